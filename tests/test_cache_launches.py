"""How many kernels a layer of a decode step launches on CUDA: the append, attention, and the merge
of splits. Counted by the emulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch
from backends import BACKENDS
from torch import Tensor

from sink_attention_ext import PagedKVCache, flash_attn_with_kvcache

pytestmark = pytest.mark.skipif("emulated-sm80" not in BACKENDS, reason="make emulator")

BATCH, HEADS_Q, HEADS, DIM, SIZE, PAGES = 2, 8, 2, 64, 16, 40


def launched(arch: int, call: Callable[[], Any]) -> int:
    with emulated.emulated(arch=arch):
        call()
        before = emulated.launches()
        call()
        return emulated.launches() - before


def arguments(packed: bool, paged: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    rows = (BATCH,) if packed else (BATCH, 1)
    cache = torch.randn(2, BATCH if not paged else BATCH * PAGES, SIZE, HEADS, DIM).bfloat16()

    def new(heads: int) -> Tensor:
        return torch.randn(*rows, heads, DIM).bfloat16()

    args: dict[str, Any] = {
        "q": new(HEADS_Q), "k_cache": cache[0], "v_cache": cache[1], "k": new(HEADS),
        "v": new(HEADS), "cache_seqlens": torch.tensor([9, 4], dtype=torch.int32),
        "causal": True,
    }  # fmt: skip
    if paged:
        args["block_table"] = torch.arange(BATCH * PAGES, dtype=torch.int32).view(BATCH, -1)
    if packed:
        args["cu_seqlens_q"] = torch.arange(BATCH + 1, dtype=torch.int32)
        args["max_seqlen_q"] = 1
    return args


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "dense"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("arch", [80, 90])
def test_append_and_attend(arch: int, packed: bool, paged: bool) -> None:
    args = arguments(packed, paged)
    for num_splits, most in ((1, 2), (3, 3)):
        if not paged and num_splits > 1:
            continue  # a block of keys has no parts
        call = lambda n=num_splits: flash_attn_with_kvcache(**args, num_splits=n)  # noqa: E731
        assert launched(arch, call) == most


@pytest.mark.parametrize("arch", [80, 90])
def test_max_seqlen_k_bounds_what_is_chosen(arch: int) -> None:
    """The table's width says nothing: a server's is as wide as the longest sequence may be."""
    args = arguments(packed=False, paged=True)
    args["block_table"] = args["block_table"].repeat(1, 40)
    assert launched(arch, lambda: flash_attn_with_kvcache(**args)) == 3
    assert launched(arch, lambda: flash_attn_with_kvcache(**args, max_seqlen_k=16)) == 2


def test_a_layer_of_a_paged_cache() -> None:
    cache = PagedKVCache(
        [(-1, 0), (20, 0)], num_heads_kv=HEADS, head_dim=DIM, num_pages=64, max_num_seqs=BATCH,
        max_seqlen=64, max_num_batched_tokens=8,
    )  # fmt: skip
    step = cache.append([cache.allocate(), cache.allocate()], [1, 1])
    q = torch.randn(BATCH, HEADS_Q, DIM).bfloat16()
    k = torch.randn(BATCH, HEADS, DIM).bfloat16()
    for layer in range(2):
        assert launched(80, lambda at=layer: step.attend(at, q, k, k)) == 2
