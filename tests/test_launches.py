"""How many kernels a call launches on CUDA, counted by the emulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch
from conftest import BACKENDS

from sink_attention_ext import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    reshape_and_cache,
)

needs_emulator = pytest.mark.skipif("emulated-sm80" not in BACKENDS, reason="make emulator")
ARCHS = pytest.mark.parametrize("arch", [80, 90])
CU_SEQLENS = torch.tensor([0, 3, 7], dtype=torch.int32)  # and two more rows of q


def launches(arch: int, call: Callable[[], Any]) -> int:
    with emulated.emulated(arch=arch):
        before = emulated.launches()
        call()
        return emulated.launches() - before


def qkv(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2)]


@needs_emulator
@ARCHS
def test_forward(arch: int) -> None:
    """One; with packed sequences another, which looks for rows that none of them has."""
    q, k, v = qkv(2, 9)
    assert launches(arch, lambda: flash_attn_func(q, k, v, causal=True)) == 1
    q, k, v = qkv(9)
    assert launches(
        arch,
        lambda: flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=CU_SEQLENS, cu_seqlens_k=CU_SEQLENS, max_seqlen_q=4,
            max_seqlen_k=4, causal=True,
        ),
    ) == 2  # fmt: skip


@needs_emulator
@ARCHS
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("is_packed", [False, True])
def test_paged_decode(arch: int, is_packed: bool, num_splits: int) -> None:
    """One without splits, two with them; with packed queries another, as above."""
    cache = torch.randn(64, 16, 2, 64, dtype=torch.bfloat16)
    q = torch.randn(2, 4, 64, dtype=torch.bfloat16)

    def decode() -> None:
        flash_attn_with_kvcache(
            q if is_packed else q[:, None], cache, cache,
            cache_seqlens=torch.tensor([500, 512], dtype=torch.int32),
            block_table=torch.arange(64, dtype=torch.int32).view(2, 32),
            cu_seqlens_q=torch.arange(3, dtype=torch.int32) if is_packed else None,
            max_seqlen_q=1, causal=True, num_splits=num_splits,
        )  # fmt: skip

    assert launches(arch, decode) == 1 + (num_splits > 1) + is_packed


@needs_emulator
@ARCHS
def test_cache_write(arch: int) -> None:
    k = torch.randn(700, 2, 64, dtype=torch.bfloat16)
    cache = torch.zeros(50, 16, 2, 64, dtype=torch.bfloat16)
    slots = torch.randperm(800)[:700]
    assert launches(arch, lambda: reshape_and_cache(k, k, cache, cache.clone(), slots)) == 1
    assert torch.equal(cache.flatten(0, 1)[slots], k)
