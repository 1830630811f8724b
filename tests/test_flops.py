"""FlopCounterMode counts attention: torch's convention, windows by the pairs that are visible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sink_attention_ext import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    flops,
    ops,
)

HEADS, DIM, DIM_V = 4, 8, 6
FORWARD = 2 * HEADS * (DIM + DIM_V)  # of one pair
BACKWARD = 2 * HEADS * (3 * DIM + 2 * DIM_V)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def count(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def visible_pairs(
    seqlen_q: int, seqlen_k: int, left: int, right: int, num_sink_tokens: int = 0
) -> int:
    position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k)
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        seen = (key >= position - left) | (key < num_sink_tokens)
    if right >= 0:
        seen &= key <= position + right
    return int(seen.sum())


def qkv(seqlen_q: int, seqlen_k: int, *batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(*batch, seqlen_q, HEADS, DIM, requires_grad=True),
        torch.randn(*batch, seqlen_k, 2, DIM, requires_grad=True),
        torch.randn(*batch, seqlen_k, 2, DIM_V, requires_grad=True),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_dense_with_its_backward(causal: bool) -> None:
    q, k, v = qkv(5, 7, 3)
    forward = count(lambda: flash_attn_func(q, k, v, causal=causal))
    assert forward == FORWARD * 3 * 5 * 7  # masks are not deducted
    both = count(lambda: flash_attn_func(q, k, v, causal=causal).sum().backward())
    assert both == (FORWARD + BACKWARD) * 3 * 5 * 7


WINDOWS = [(2, 0), (2, 3), (0, 0), (5, 1), (-1, 2), (1, -1), (6, 0), (100, 0), (-1, 0), (-1, -1)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("num_sink_tokens", [0, 1, 4, 100])
@pytest.mark.parametrize("lengths", [(5, 7), (7, 7), (9, 4), (1, 12), (0, 5), (3, 0)])
def test_pairs_of_windows(
    lengths: tuple[int, int], num_sink_tokens: int, window: tuple[int, int]
) -> None:
    seqlen_q, seqlen_k = lengths
    left, right = window
    if (left < 0 or left >= seqlen_k - 1) and right <= 0:  # hides nothing but the future
        expected = seqlen_q * seqlen_k
    else:
        expected = visible_pairs(seqlen_q, seqlen_k, left, right, num_sink_tokens)
    assert flops.num_pairs(*lengths, flops.Window(left, right, num_sink_tokens)) == expected


def test_a_causal_window_with_its_backward() -> None:
    q, k, v = qkv(50, 60, 2)
    pairs = 2 * visible_pairs(50, 60, 7, 0, 3)
    options = {"causal": True, "window_size": (7, 7), "num_sink_tokens": 3}
    both = count(lambda: flash_attn_func(q, k, v, **options).sum().backward())
    assert both == (FORWARD + BACKWARD) * pairs
    assert pairs < 50 * 60


def test_packed_sequences_by_their_lengths() -> None:
    q, k, v = qkv(9, 12)
    ends = int32(0, 2, 8), int32(0, 5, 12)  # the last row is in no sequence
    for seqused_k, keys in ((None, (5, 7)), (int32(4, 0), (4, 0))):
        both = count(
            lambda used=seqused_k: (
                flash_attn_varlen_func(q, k, v, *ends, 6, 7, seqused_k=used).sum().backward()
            )
        )
        assert both == (FORWARD + BACKWARD) * (2 * keys[0] + 6 * keys[1])


def test_lengths_that_cannot_be_read_count_as_the_longest() -> None:
    with FakeTensorMode():
        q, k, v = qkv(9, 12)
        ends = torch.empty(3, dtype=torch.int32)
        forward = count(lambda: flash_attn_varlen_func(q, k, v, ends, ends, 6, 7))
    assert forward == FORWARD * 2 * 6 * 7


def test_paged_caches_by_the_keys_they_hold() -> None:
    q = torch.randn(2, 3, HEADS, DIM)
    caches = torch.randn(6, 4, 2, DIM), torch.randn(6, 4, 2, DIM_V)
    table, lengths = int32([0, 1, 2], [3, 4, 5]), int32(5, 9)

    def attend(**options: Any) -> Tensor:
        return flash_attn_with_kvcache(
            q, *caches, cache_seqlens=lengths, block_table=table, causal=True, **options
        )

    assert count(attend) == FORWARD * 3 * (5 + 9)
    pairs = visible_pairs(3, 5, 2, 0) + visible_pairs(3, 9, 2, 0)
    assert count(lambda: attend(window_size=(2, 0))) == FORWARD * pairs

    packed = q.flatten(0, 1)
    forward = count(
        lambda: flash_attn_with_kvcache(
            packed,
            *caches,
            cache_seqlens=lengths,
            block_table=table,
            cu_seqlens_q=int32(0, 1, 6),
            max_seqlen_q=5,
        )
    )
    assert forward == FORWARD * (5 + 5 * 9)


def test_the_out_variant_counts_too() -> None:
    q, caches = torch.randn(1, 3, HEADS, DIM), torch.randn(2, 2, 4, 2, DIM)
    results = {"out": torch.empty(1, 3, HEADS, DIM), "lse": torch.empty(1, HEADS, 3)}
    args = (q, *caches, int32([0, 1]), int32(6), None, None, None, None, 3, 8, 0.5, False, -1, -1,
            0.0, 0, 0, None)  # fmt: skip
    assert count(lambda: ops.paged_attn_out(*args, **results)) == 2 * HEADS * 2 * DIM * 3 * 6


@pytest.mark.parametrize("packed", [False, True])
def test_float8_counts_once(packed: bool) -> None:
    q, k, v = (x.detach().to(torch.float8_e4m3fn) for x in qkv(5, 7, *(() if packed else (1,))))
    if packed:
        ends = int32(0, 5), int32(0, 7)
        forward = count(lambda: flash_attn_varlen_func(q, k, v, *ends, 5, 7))
    else:
        forward = count(lambda: flash_attn_func(q, k, v))
    assert forward == FORWARD * 5 * 7


def test_compiled_attention_counts_alike() -> None:
    torch._dynamo.reset()
    q, k, v = qkv(5, 7, 3)
    call = torch.compile(lambda: flash_attn_func(q, k, v).sum(), backend="aot_eager")
    call().backward()  # compiled now: tracing would count, too
    assert count(lambda: call().backward()) == (FORWARD + BACKWARD) * 3 * 5 * 7
