"""Helpers refuse arguments of another type or range, by name, where they would misread them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_model import make_cache

from sink_attention_ext import PagedKVCache, set_debug_checks, supports
from sink_attention_ext.parallel import shard_heads, shard_s_aux, shard_sequence, unshard_sequence

WRONG_INTS = (8.0, "8", None, True, torch.tensor(8), [8])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("head_dim", (64.5, 64.0, "64", True, None)),
        ("head_dim_v", (64.5, "64", True)),
        ("num_heads_q", (*WRONG_INTS, 0, -1)),
        ("num_heads_kv", (1.0, "1", True, 0)),
        ("device", (0, 1.5, "gpu", "cpu:x", None)),
        *((n, ("no", 0, 1, None)) for n in (
            "causal", "varlen", "paged", "backward", "deterministic", "tree_mask",
        )),
        ("dtype", ("float32", None, torch.int64)),
        ("kv_dtype", ("float32", torch.int64)),
        ("s_aux_dtype", ("float32", torch.int64)),
        ("window_size", (5, "ab", (1,), (0.5, 0))),
        ("softcap", ("1", -1.0, float("nan"))),
        ("num_sink_tokens", (1.5, -1, "1", True)),
    ],
)  # fmt: skip
def test_supports(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        answer = supports(**{"dtype": torch.float32, "head_dim": 64, "paged": True, name: value})
        assert not answer and answer.kernel is None and name in answer.reason, value


def refused(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        call()


def test_shard_heads() -> None:
    good = {"num_heads_q": 8, "num_heads_kv": 2, "rank": 0, "world_size": 2}
    for name in good:
        for value in (*WRONG_INTS, -1, *([] if name == "num_heads_q" else [2**70])):
            refused(name, lambda: shard_heads(**good | {name: value}))  # noqa: B023
    assert shard_heads(**good) == (slice(0, 4), slice(0, 1))


def test_shard_s_aux() -> None:
    sinks = torch.arange(8.0)
    for wrong in (torch.zeros(8, dtype=torch.int8), torch.zeros(2, 4), None, [0.0] * 8, 8):
        refused("s_aux", lambda: shard_s_aux(wrong, 0, 2))  # noqa: B023
    for value in WRONG_INTS:
        refused("rank", lambda: shard_s_aux(sinks, value, 2))  # noqa: B023
        refused("world_size", lambda: shard_s_aux(sinks, 0, value))  # noqa: B023
    assert shard_s_aux(sinks, 1, 2).tolist() == [4, 5, 6, 7]


def test_shard_sequence() -> None:
    rows = torch.arange(16.0).view(2, 8)
    for wrong in (None, [1, 2], 3.0):
        refused("tensor", lambda: shard_sequence(wrong, 0, 2))  # noqa: B023
    for dim in (64, 2, -3, 1.0, "1", None, True):
        refused("dim", lambda: shard_sequence(rows, 0, 2, dim=dim))  # noqa: B023
        refused("dim", lambda: unshard_sequence([rows, rows], dim=dim))  # noqa: B023
    for layout in ("ring", None, 1, ["zigzag"], {}):
        refused("layout", lambda: shard_sequence(rows, 0, 2, layout))  # noqa: B023
        refused("layout", lambda: unshard_sequence([rows], layout))  # noqa: B023
    for value in WRONG_INTS:
        refused("rank", lambda: shard_sequence(rows, value, 2))  # noqa: B023
        refused("world_size", lambda: shard_sequence(rows, 0, value))  # noqa: B023
    unlike = [None, rows.tolist(), rows.double(), rows.to("meta"), rows[:, :4]]
    for shards in (rows, "ab", None, {rows: 1}, [], *([rows, other] for other in unlike)):
        refused("shards", lambda: unshard_sequence(shards))  # noqa: B023
    scalar = torch.tensor(1.0)
    refused("dim", lambda: shard_sequence(scalar, 0, 1, dim=0))
    shards = tuple(shard_sequence(rows, rank, 2, "zigzag", -1) for rank in range(2))
    assert torch.equal(unshard_sequence(shards, "zigzag", dim=-1), rows)


def test_the_device_of_a_cache() -> None:
    wrong: list[Any] = [True, 1.5, "gpu", "cpu:x", "xpu"]
    if not torch.cuda.is_available():
        wrong += [0, "cuda", torch.device("cuda", 1)]
    for device in wrong:
        refused("device", lambda: make_cache(device=device))  # noqa: B023
    for device in (torch.device("cpu"), "cpu", None):
        assert make_cache(device=device).k_cache(0).device.type == "cpu"


def test_questions_to_a_cache() -> None:
    cache: PagedKVCache = make_cache()
    seq = cache.allocate()
    step = cache.append([seq], 3)
    for wrong in (1.0, "0", None, True, -1, 99, 10**30):
        for question in (
            cache.k_cache, cache.v_cache, cache.scales, step.block_table, step.seqused_k,
            step.slot_mapping, step.window_size, step.attn_kwargs,
        ):  # fmt: skip
            refused("layer", lambda: question(wrong))  # noqa: B023
        refused("seq_id", lambda: cache.seqlen(wrong))  # noqa: B023
        refused("seq_id", lambda: cache.can_append([wrong]))  # noqa: B023
    for wrong in (1.0, "a", None, -1, [1, 1], [1.0], True):
        refused("num_new_tokens", lambda: cache.can_append([seq], wrong))  # noqa: B023
    for wrong in (seq, "ab", None, {seq}):
        refused("seq_ids", lambda: cache.can_append(wrong))  # noqa: B023
    short = make_cache(max_seqlen=4)
    refused("max_seqlen", lambda: short.can_append([short.allocate()], 5))
    refused("max_num_batched_tokens", lambda: cache.can_append([seq], 10**6))


@pytest.mark.parametrize("value", [0, 1, None, "on", torch.tensor(True)])
def test_set_debug_checks(value: Any) -> None:
    with pytest.raises(TypeError, match="on must be True or False"):
        set_debug_checks(value)


def test_a_cache_of_another_dtype_or_without_end() -> None:
    for dtype in (torch.qint8, torch.int32, torch.bool, torch.complex64):
        refused("dtype", lambda: make_cache(dtype=dtype))  # noqa: B023
    for name in ("num_pages", "max_num_seqs", "max_seqlen", "max_num_batched_tokens"):
        refused(name, lambda: make_cache(**{name: 10**400}))  # noqa: B023
