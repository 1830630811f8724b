"""flash_attn_with_kvcache appends, then attends: generation in every layout, lengths, packed rows.

In float64 against reference.attention over the tokens themselves. Kernels' tiles are in
test_decode.py, a cache's bytes in test_cache_writes.py, calls that agree in test_paged_calls.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sink_attention_ext import (
    flash_attn_with_kvcache,
    reference,
    reshape_and_cache,
)

HEADS_Q, HEADS_KV, HEAD_DIM, HEAD_DIM_V = 4, 2, 8, 6
NUM_PAGES, PAGE_SIZE = 14, 4
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


TABLE = int32([3, 1, 7, 9], [0, 2, 5, 11], [4, 6, 8, 10])  # pages 12 and 13 belong to nobody


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def paged_cache() -> tuple[Tensor, Tensor]:
    """NaN in every slot: what has not been written must not be read."""
    shape = (NUM_PAGES, PAGE_SIZE, HEADS_KV)
    return (
        torch.full((*shape, HEAD_DIM), torch.nan, dtype=torch.float64),
        torch.full((*shape, HEAD_DIM_V), torch.nan, dtype=torch.float64),
    )


def new_tokens(*rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        randn(*rows, HEADS_Q, HEAD_DIM),
        randn(*rows, HEADS_KV, HEAD_DIM),
        randn(*rows, HEADS_KV, HEAD_DIM_V),
    )


def assert_close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


OPTIONS = [{"causal": True}, {"causal": True, "window_size": (5, 0)}, {"softcap": 2.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=["causal", "window", "softcap"])
@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("layout", ["paged", "paged_heads_first", "dense", "dense_strided"])
def test_generation_equals_the_whole_sequence(
    layout: str, num_splits: int, options: dict[str, Any]
) -> None:
    """Chunks, then token by token: each call equals attention over all keys so far."""
    steps = (5, 4, 1, 1, 2)
    q, k, v = new_tokens(3, sum(steps))
    table = TABLE if layout.startswith("paged") else None
    if layout == "dense":
        k_cache, v_cache = (cache[:12].view(3, 16, *cache.shape[2:]) for cache in paged_cache())
    elif layout == "dense_strided":  # every other row of a larger batch
        caches = paged_cache()
        k_cache, v_cache = (cache[:12].view(6, 8, *cache.shape[2:])[::2] for cache in caches)
        q, k, v, steps = q[:, :8], k[:, :8], v[:, :8], (5, 3)
    elif layout == "paged_heads_first":
        k_cache, v_cache = (
            cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in paged_cache()
        )
        assert not k_cache.is_contiguous()
    else:
        k_cache, v_cache = paged_cache()
    done = 0
    for n in steps:
        rows = slice(done, done + n)
        out, lse = flash_attn_with_kvcache(
            q[:, rows], k_cache, v_cache, k[:, rows], v[:, rows],
            cache_seqlens=torch.full((3,), done, dtype=torch.int32), block_table=table,
            s_aux=SINKS, return_lse=True, num_splits=num_splits, **options,
        )  # fmt: skip
        done += n
        expected = reference.attention(q[:, rows], k[:, :done], v[:, :done], s_aux=SINKS, **options)
        assert_close((out, lse), expected)
    if table is not None:
        for b in range(3):
            assert torch.equal(reference.gather_pages(k_cache, TABLE[b], done), k[b, :done])
            assert torch.equal(reference.gather_pages(v_cache, TABLE[b], done), v[b, :done])
        assert k_cache[12:].isnan().all() and v_cache[12:].isnan().all()
        assert int((~k_cache[..., 0, 0].isnan()).sum()) == 3 * done


def filled_cache(lengths: list[int]) -> tuple[tuple[Tensor, Tensor], list[Tensor], list[Tensor]]:
    """Caches that hold sequences of these lengths, and their keys and values."""
    caches = paged_cache()
    keys = [randn(n, HEADS_KV, HEAD_DIM) for n in lengths]
    values = [randn(n, HEADS_KV, HEAD_DIM_V) for n in lengths]
    for b, n in enumerate(lengths):
        position = torch.arange(n)
        slots = TABLE[b, position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        reshape_and_cache(keys[b], values[b], *caches, slots.long())
    return caches, keys, values


@pytest.mark.parametrize("causal", [True, False])
def test_sequences_of_different_lengths(causal: bool) -> None:
    lengths = [0, 9, 14]
    caches, keys, values = filled_cache(lengths)
    q, k, v = new_tokens(3, 2)
    out, lse = flash_attn_with_kvcache(
        q, *caches, k, v, int32(*lengths), TABLE, causal=causal, s_aux=SINKS, return_lse=True
    )
    for b in range(3):
        every_k, every_v = torch.cat([keys[b], k[b]])[None], torch.cat([values[b], v[b]])[None]
        expected = reference.attention(q[b : b + 1], every_k, every_v, causal=causal, s_aux=SINKS)
        assert_close((out[b : b + 1], lse[b : b + 1]), expected)


@pytest.mark.parametrize("max_seqlen_q", [5, 7])
def test_packed_queries_and_keys(max_seqlen_q: int) -> None:
    """Prefill and decode in one call, an empty sequence, a padding token that is not stored."""
    lengths, new_lengths = [3, 7, 14], [5, 0, 1]
    caches, keys, values = filled_cache(lengths)
    q, k, v = new_tokens(7)
    ends = int32(0, 5, 5, 6)
    before = int((~caches[0].isnan()).sum())
    out, lse = flash_attn_with_kvcache(
        q, *caches, k, v, int32(*lengths), TABLE, ends, max_seqlen_q,
        causal=True, s_aux=SINKS, return_lse=True,
    )  # fmt: skip
    every_k = [torch.cat([keys[b], k[ends[b] : ends[b + 1]]]) for b in range(3)]
    every_v = [torch.cat([values[b], v[ends[b] : ends[b + 1]]]) for b in range(3)]
    totals = [a + b for a, b in zip(lengths, new_lengths, strict=True)]
    k_ends = int32(0, *torch.tensor(totals).cumsum(0).tolist())
    expected = reference.varlen_attention(
        q, torch.cat(every_k), torch.cat(every_v), ends, k_ends, causal=True, s_aux=SINKS
    )
    assert_close((out, lse), expected)
    for b in range(3):
        assert torch.equal(reference.gather_pages(caches[0], TABLE[b], totals[b]), every_k[b])
        assert torch.equal(reference.gather_pages(caches[1], TABLE[b], totals[b]), every_v[b])
    assert int((~caches[0].isnan()).sum()) == before + 6 * HEADS_KV * HEAD_DIM


def test_append_at_one_length_of_all() -> None:
    """cache_seqlens as an int: the new key goes behind that many tokens of every sequence."""
    _, k, v = new_tokens(2, 16)
    copies = k.clone(), v.clone()
    q, new_k, new_v = new_tokens(2, 1)
    flash_attn_with_kvcache(q, *copies, new_k, new_v, cache_seqlens=7)
    for copy, before, new in zip(copies, (k, v), (new_k, new_v), strict=True):
        assert torch.equal(copy[:, 7:8], new)
        assert torch.equal(copy[:, :7], before[:, :7]) and torch.equal(copy[:, 8:], before[:, 8:])


def test_empty_calls() -> None:
    """No sequence, no query, no new key."""
    caches, _, _ = filled_cache([3, 7, 14])
    before = tuple(cache.clone() for cache in caches)
    q, k, v = new_tokens(0, 2)
    out = flash_attn_with_kvcache(q, *caches, k, v, int32(), TABLE[:0])
    assert out.shape == (0, 2, HEADS_Q, HEAD_DIM_V)
    q, k, v = new_tokens(3, 0)
    out = flash_attn_with_kvcache(q, *caches, k, v, int32(3, 7, 14), TABLE)
    assert out.shape == (3, 0, HEADS_Q, HEAD_DIM_V)
    q, k, v = new_tokens(2)  # two tokens, in no sequence
    out, lse = flash_attn_with_kvcache(
        q, *caches, k, v, int32(), TABLE[:0], int32(0), return_lse=True
    )
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    assert_close(caches, before, 0.0)


def test_the_callers_tensors_are_not_changed() -> None:
    """Only the caches are: not cache_seqlens (the caller adds to it), the table, k or v."""
    caches, _, _ = filled_cache([3, 7, 13])
    arguments = (*new_tokens(3, 2)[1:], int32(3, 7, 13), TABLE.clone())
    copies = [tensor.clone() for tensor in arguments]
    flash_attn_with_kvcache(randn(3, 2, HEADS_Q, HEAD_DIM), *caches, *arguments)
    assert all(map(torch.equal, arguments, copies))
