"""Every way to misuse PagedKVCache: refused by name, and nothing has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_model import HEAD_DIM, NUM_HEADS_KV, NUM_HEADS_Q, make_cache
from cases import FLOAT8

from sink_attention_ext import OutOfPages, PagedKVCache
from sink_attention_ext.cache.page_pool import PagePool, PoolDraft


def snapshot(cache: PagedKVCache) -> Any:
    rows = [[t.pages(row) for row in range(cache.max_num_seqs)] for t in cache._tables]
    lengths = {seq: s.length for seq, s in cache._sequences.items()}
    return rows, lengths, cache.num_free_pages, [t.table.clone().tolist() for t in cache._tables]


def test_exhaustion_changes_nothing_in_any_group() -> None:
    """The windowed group is short, the full one is not; and the other way round."""
    for num_pages, short in (({-1: 20, 5: 4}, 5), ({-1: 4, 5: 20}, -1)):
        cache = make_cache(num_pages=num_pages)
        a, b = cache.allocate(), cache.allocate()
        cache.append([a], 6)
        fork = cache.fork(a)
        cache.append([b], 5)  # four pages are taken
        before = snapshot(cache)
        # 2 new pages of b, 1 of the fork and a copy of the page that it shares with a.
        assert not cache.can_append([fork, b], [3, 8])
        with pytest.raises(OutOfPages, match="needs 4 more pages, 0 are free; nothing") as caught:
            cache.append([fork, b], [3, 8])
        error = caught.value
        assert (error.window_left, error.needed, error.available) == (short, 4, 0)
        assert snapshot(cache) == before
        cache.free(b)
        assert cache.can_append([fork], [3])
        cache.append([fork], [3])


def test_the_last_holder_of_a_shared_page_does_not_copy_it() -> None:
    """Three write into a page that they share: two copies, and the third has the page."""
    cache = make_cache([(-1, 0)], num_pages=3)
    seq = cache.allocate()
    cache.append([seq], 3)
    forks = [cache.fork(seq), cache.fork(seq)]
    cache.append([seq, *forks])
    assert cache.num_free_pages == {-1: 0}
    assert cache.stats()[-1].num_shared_pages == 0


def test_pages_that_leave_the_window_can_be_taken_in_the_same_append() -> None:
    cache = make_cache([(3, 0)], num_pages=6)
    seq = cache.allocate()
    cache.append([seq], 20)
    assert cache.num_free_pages == {3: 1}
    cache.append([seq], 19)  # needs 5: four of its five pages left the window
    with pytest.raises(OutOfPages, match="layers with window_left = 3 do not suffice"):
        cache.append([cache.allocate()], 5)


def test_no_sequence_is_left() -> None:
    cache = make_cache()
    seqs = [cache.allocate() for _ in range(3)]
    for full in (cache.allocate, lambda: cache.fork(seqs[0])):
        with pytest.raises(RuntimeError, match="max_num_seqs = 3 sequences are in the cache"):
            full()
    cache.free(seqs[1])
    assert cache.fork(seqs[0]) not in seqs


def test_ids_are_of_one_cache() -> None:
    cache, other = make_cache(), make_cache()
    foreign, own = other.allocate(), cache.allocate()
    cache.free(own)
    for bad in (foreign, own, -1, 10**9):
        for use in (cache.free, cache.fork, cache.seqlen, lambda s: cache.append([s])):
            with pytest.raises(
                ValueError, match=f"seq_id must be a sequence of this .* got {bad},"
            ):
                use(bad)
    for bad in (True, 1.0, None, "a"):
        with pytest.raises(TypeError, match="seq_id must be an int"):
            cache.free(bad)


@pytest.mark.parametrize(
    ("seqs", "counts", "error", "message"),
    [
        ([0, 0], 1, ValueError, "seq_ids must name each sequence once"),
        ([0, 1], [1, -1], ValueError, r"num_new_tokens\[1\] must be at least 0; got -1"),
        ([0], -1, ValueError, "num_new_tokens must be at least 0; got -1"),
        ([0, 1], [1], ValueError, "one entry for each of the 2 seq_ids; got 1"),
        ([0], iter([1]), TypeError, "num_new_tokens must be an int; got <list_iterator"),
        ([0], 1.0, TypeError, "num_new_tokens must be an int; got 1.0"),
        ([0], [True], TypeError, r"num_new_tokens\[0\] must be an int; got True"),
        ([0, 1], [20, 1], ValueError, "max_num_batched_tokens = 20 together; got 21"),
        ([2], 9, ValueError, "max_seqlen = 12 tokens .* got 9 new ones for sequence .* of 4"),
    ],
)
def test_bad_appends(seqs: Any, counts: Any, error: type, message: str) -> None:
    cache = make_cache(max_seqlen=12)
    ids = [cache.allocate() for _ in range(3)]
    cache.append([ids[2]], 4)
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        cache.append([ids[s] for s in seqs], counts)
    assert snapshot(cache) == before


def test_seq_ids_are_a_list() -> None:
    cache = make_cache()
    seq = cache.allocate()
    before = snapshot(cache)
    for bad in (seq, (s for s in [seq]), None, str(seq), {seq: 1}):
        for use in (cache.append, cache.can_append):
            with pytest.raises(TypeError, match="^seq_ids must be a list of sequence ids; got "):
                use(bad)
    assert snapshot(cache) == before
    cache.append((seq,))


def test_bad_padding() -> None:
    cache = make_cache()
    seq = cache.allocate()
    before = snapshot(cache)
    for name, padded, message in (
        ("pad_seqs_to", 0, "pad_seqs_to must be from 1, what there is, to 3; got 0"),
        ("pad_seqs_to", 4, "to 3; got 4"),
        ("pad_tokens_to", 4, "pad_tokens_to must be from 5, what there is, to 20; got 4"),
        ("pad_tokens_to", 21, "to 20; got 21"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.append([seq], 5, **{name: padded})
    assert snapshot(cache) == before


def test_how_far_truncate_goes() -> None:
    """Back to before the last append always; further only while no page is missing."""
    cache = make_cache([(-1, 0), (5, 0)], num_pages=30)
    seq = cache.allocate()
    cache.append([seq], 14)
    cache.append([seq], 4)  # the first new token sees 9 and later: pages 0 and 1 left
    before = snapshot(cache)
    with pytest.raises(ValueError, match="length must be at least 13: .* window_left = 5 have"):
        cache.truncate(seq, 12)
    with pytest.raises(ValueError, match="length must be at most 18, .* got 19"):
        cache.truncate(seq, 19)
    with pytest.raises(ValueError, match="length must be at least 0; got -1"):
        cache.truncate(seq, -1)
    with pytest.raises(TypeError, match="length must be an int"):
        cache.truncate(seq, 13.0)
    assert snapshot(cache) == before
    cache.truncate(seq, 13)
    assert cache.seqlen(seq) == 13
    # An append of nothing drops no page, though at 32 one more than at 30 has left the window.
    cache = make_cache([(-1, 0), (4, 0)], num_pages=30, max_num_batched_tokens=40)
    seq = cache.allocate()
    for count in (30, 2, 0):
        cache.append([seq], count)
    cache.truncate(seq, 30)
    assert cache.seqlen(seq) == 30
    full_only = make_cache([(-1, 0)])
    seq = full_only.allocate()
    full_only.append([seq], 14)
    full_only.truncate(seq, 0)
    assert full_only.num_free_pages == {-1: 8}


def test_a_step_ends() -> None:
    cache = make_cache()
    a, b = cache.allocate(), cache.allocate()
    k = torch.zeros(1, NUM_HEADS_KV, HEAD_DIM)
    q = torch.zeros(1, NUM_HEADS_Q, HEAD_DIM)
    for end in (
        lambda: cache.append([b]),
        lambda: cache.truncate(a, 0),
        lambda: cache.free(cache.fork(a)),
        lambda: cache.free(b),
    ):
        step = cache.append([a])
        step.attend(0, q, k, k)
        end()
        for use in (lambda s: s.write(0, k, k), lambda s: s.attend(0, q, k, k)):
            with pytest.raises(RuntimeError, match="this step has ended"):
                use(step)


def test_what_a_step_refuses() -> None:
    cache = make_cache()
    step = cache.append([cache.allocate()], 2)
    q = torch.zeros(2, NUM_HEADS_Q, HEAD_DIM)
    k = torch.zeros(2, NUM_HEADS_KV, HEAD_DIM)
    before = cache.k_cache(0).fill_(7).clone()
    with pytest.raises(RuntimeError, match="layer 0 has not been written in this step"):
        step.attend(0, q)
    for bad, message in (
        (k[:1], "k must have num_tokens = 2 .as the step has.; got shape"),
        (k[:, :1], "k must have shape"),
        (k[..., :5], "k must have shape"),
        (k[0], "k must have 3 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            step.write(0, bad, k)
    for bad, message in (
        (q[:1], "q must have num_tokens = 2 .as the step has.; got shape"),
        (torch.cat([q, q]), "q must have num_tokens = 2 .as the step has.; got shape"),
        (q[None], "q must have 3 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            step.attend(0, bad, k + 1, k)
    with pytest.raises(ValueError, match="v must be given where k is"):
        step.attend(0, q, k)
    with pytest.raises(TypeError, match="k must have the dtype of k_cache"):
        step.write(0, k.double(), k.double())
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"layer must be from 0 to 1; got {layer}"):
            step.attend(layer, q, k, k)
    assert torch.equal(cache.k_cache(0), before)
    step.write(0, k, k)
    step.attend(0, q)  # what was written need not be given again


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window_sizes": []}, ValueError, "window_sizes must have one entry for each layer"),
        ({"window_sizes": [(5, 1)]}, ValueError, r"window_sizes\[0\] must be \(left, 0\)"),
        ({"window_sizes": [5]}, TypeError, r"^window_sizes\[0\] must be a pair"),
        ({"window_sizes": (127, 0)}, TypeError, r"^window_sizes\[0\] must be a pair .* got 127"),
        ({"window_sizes": [(31, 0), "x"]}, TypeError, r"^window_sizes\[1\] must be .* got 'x'"),
        ({"window_sizes": [(31, 0), (-2, 0)]}, ValueError, r"^window_sizes\[1\] must hold .* -2"),
        ({"window_sizes": 5}, TypeError, "^window_sizes must be a list of a pair .* got 5"),
        ({"num_pages": None}, ValueError, "exactly one of num_pages and memory_budget"),
        ({"memory_budget": 10**6}, ValueError, "exactly one of num_pages and memory_budget"),
        ({"num_pages": {-1: 4}}, ValueError, r"each window_left of the layers, \[-1, 5\]"),
        ({"num_pages": 0}, ValueError, "num_pages must be at least 1; got 0"),
        ({"num_pages": {-1: 4, 5: 0}}, ValueError, r"num_pages\[5\] must be at least 1; got 0"),
        ({"page_size": 0}, ValueError, "page_size must be at least 1; got 0"),
        ({"head_dim_v": 257}, ValueError, "head_dim_v must be at most 256; got 257"),
        ({"dtype": "bf16"}, TypeError, "dtype must be a torch.dtype; got 'bf16'"),
        ({"head_dim": 8.0}, TypeError, "head_dim must be an int; got 8.0"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1"),
        ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens must be at least 0; got -1"),
        ({"dtype": torch.int64}, TypeError, "dtype must be float64"),
        ({"k_scale": torch.ones(())}, ValueError, "k_scale must be None for caches of"),
        ({"dtype": FLOAT8}, TypeError, "k_scale must be a float32 tensor"),
        ({"dtype": FLOAT8, "k_scale": 0.5}, TypeError, "^k_scale must be a tensor.* got 0.5"),
        ({"k_scale": [torch.ones(())]}, ValueError, "one for each of the 2 layers; got 1"),
        (
            {"per_token_head_scales": True, "v_scale": torch.ones(())},
            ValueError,
            "k_scale and v_scale must be None with per_token_head_scales",
        ),
        (
            {"per_token_head_scales": True, "dtype": torch.bfloat16},
            ValueError,
            "^per_token_head_scales must be False .* got dtype torch.bfloat16",
        ),
    ],
    ids=str,
)
def test_bad_constructors(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make_cache(**options)


def test_pool_refuses_foreign_and_free_pages() -> None:
    page_pool = PagePool(3)
    pool = PoolDraft(page_pool)
    held = pool.take(2)
    pool.share(held[:1])
    for misuse, message in (
        (lambda: pool.drop([3]), "page must be from 0 to 2; got 3"),
        (lambda: pool.drop([-1]), "page must be from 0 to 2; got -1"),
        (lambda: pool.drop([held[1], held[1]]), "page 1 must be held at least 2 times"),
        (lambda: pool.drop([held[0], 2]), "page 2 must be held at least 1 times"),
        (lambda: pool.share([held[0], 2]), "page 2 must be held at least 1 times"),
        (lambda: pool.take(2), "count must be from 0 to 1 free pages; got 2"),
        (lambda: pool.take(-1), "count must be from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            misuse()
    assert [pool.references(page) for page in held] == [2, 1]
    assert (page_pool.num_free, page_pool.num_shared) == (3, 0)
    for _ in range(2):  # a commit may be made again
        pool.commit()
        assert [page_pool.references(page) for page in held] == [2, 1]
        assert (page_pool.num_free, page_pool.num_shared) == (1, 1)
