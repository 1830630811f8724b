"""Ctrl-C, or no memory, at any line of a change of PagedKVCache: it has happened or it has not."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from cache_model import CacheModel

from sink_attention_ext import PagedKVCache
from sink_attention_ext.cache import step as cache_step
from sink_attention_ext.cache.page_storage import PageStorage
from sink_attention_ext.cache.step import CacheStep

PACKAGE = cache_step.__file__.removesuffix("cache/step.py")


class Stop(BaseException):
    """As KeyboardInterrupt is one, but nobody else's."""


def interrupted(change: Callable[[], Any], at: int) -> bool:
    """Whether it came to the at'th line of this package, where an exception was raised."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise Stop
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        change()
    except Stop:
        return True
    finally:
        sys.settrace(before)
    return False


def made() -> tuple[CacheModel, list[int], CacheStep]:
    """A full and a windowed group; a fork, whose last page has room; pages that will leave."""
    model = CacheModel(num_pages=12, max_num_seqs=4)
    a, b = model.allocate(), model.allocate()
    model.append([a, b], [14, 6])
    fork = model.fork(a)
    step = model.append([b], [1])
    return model, [a, fork, b], step


CHANGES: dict[str, Callable[[PagedKVCache, list[int]], Any]] = {
    "append": lambda cache, ids: cache.append(ids, [5, 1, 2]),
    "truncate": lambda cache, ids: cache.truncate(ids[0], 11),
    "free": lambda cache, ids: cache.free(ids[0]),
    "fork": lambda cache, ids: cache.fork(ids[2]),
    "allocate": lambda cache, ids: cache.allocate(),
}


def bookkeeping(cache: PagedKVCache) -> Any:
    """All but the ids, which are drawn again."""
    assert cache.num_seqs == len(cache._sequences)  # a call, which makes a change whole
    live = (
        [(s.row, s.length) for s in cache._sequences.values()],
        cache._free_rows,
        [(t._pages, t._num_dropped, t.pool._references, t.pool._free) for t in cache._tables],
        [t.table.tolist() for t in cache._tables],
    )
    return copy.deepcopy(live)


@pytest.mark.parametrize("again", [0, 5], ids="and {} lines into the next call".format)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_has_happened_or_not(name: str, again: int) -> None:
    model, ids, _ = made()
    before = bookkeeping(model.cache)
    CHANGES[name](model.cache, ids)
    after = bookkeeping(model.cache)
    assert before != after
    at, seen = 0, {"before": 0, "after": 0}
    while True:
        at += 1
        model, ids, step = made()
        buffers = model.cache._buffers
        filled = [t.clone() for t in (buffers.tokens, buffers.lengths, *buffers.block_tables)]
        if not interrupted(lambda: CHANGES[name](model.cache, ids), at):  # noqa: B023
            break
        if again:
            interrupted(lambda: model.cache.stats(), again)  # noqa: B023
        found = bookkeeping(model.cache)
        assert found in (before, after), at
        has_happened = found == after
        seen["after" if has_happened else "before"] += 1
        if step._token is model.cache._current_step:
            assert not has_happened or name == "allocate"
            now = (buffers.tokens, buffers.lengths, *buffers.block_tables)
            assert all(map(torch.equal, filled, now))
        else:
            with pytest.raises(RuntimeError, match="this step has ended"):
                step.write(0, *model.new_kv(0, ids[2:], [1]))
        if has_happened and name == "append":  # every token from before is still there
            for seq, length in zip(ids, (14, 14, 7), strict=True):
                model.cache.truncate(seq, length)
        if not has_happened or name == "append":
            model.check()
    assert seen["before"] > 5 and seen["after"] > 1


@pytest.mark.parametrize("nth", range(4))
def test_no_memory_for_a_buffer(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been appended, the step before is over, and the next append is as ever."""
    model, ids, step = made()
    before, upload, calls = bookkeeping(model.cache), cache_step.upload, []

    def fails(target: torch.Tensor, values: torch.Tensor) -> None:
        calls.append(target)
        if len(calls) == nth + 1:
            raise MemoryError
        upload(target, values)

    monkeypatch.setattr(cache_step, "upload", fails)
    with pytest.raises(MemoryError):
        model.cache.append(ids, [5, 1, 2])
    assert bookkeeping(model.cache) == before
    with pytest.raises(RuntimeError, match="this step has ended"):
        step.write(0, *model.new_kv(0, ids[2:], [1]))
    model.append(ids, [5, 1, 2])
    model.check()


def test_a_copy_that_fails_is_made_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, _ = made()
    copy_pages, failures = PageStorage.copy_pages, [MemoryError()]

    def fails(self: PageStorage, copies: list[tuple[int, int]]) -> None:
        if failures:
            raise failures.pop()
        copy_pages(self, copies)

    monkeypatch.setattr(PageStorage, "copy_pages", fails)
    with pytest.raises(MemoryError):
        model.cache.append(ids, [5, 1, 2])
    assert [model.cache.seqlen(seq) for seq in ids] == [19, 15, 9]
    for seq, length in zip(ids, (14, 14, 7), strict=True):
        model.cache.truncate(seq, length)
    model.check()
