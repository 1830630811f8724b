"""The CUDA backend's own refusals come before the caches are written. Its splits have limits.

On emulated cards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch
from backends import BACKENDS, NOT_TAKEN
from torch import Tensor

from sink_attention_ext import flash_attn_with_kvcache, ops

pytestmark = pytest.mark.skipif("emulated-sm80" not in BACKENDS, reason="make emulator")
MIB = 2**20


@pytest.fixture(autouse=True)
def any_kernels() -> Iterator[None]:
    with emulated.emulated():
        before = ops.cuda_kernels()
        ops.set_cuda_kernels("")
    yield
    with emulated.emulated():
        ops.set_cuda_kernels(before)


def appending(
    seqlen_q: int, dtype: torch.dtype = torch.bfloat16, heads_q: int = 2, dim: int = 64
) -> dict[str, Any]:
    """Arguments of an append to a sequence of 5 tokens."""
    cache = torch.randn(2, 1, seqlen_q + 8, 1, dim).to(dtype)
    new = torch.randn(2, 1, seqlen_q, 1, dim).to(dtype)
    return {
        "q": torch.randn(1, 1, 1, dim).to(dtype).expand(1, seqlen_q, heads_q, dim),
        "k_cache": cache[0], "v_cache": cache[1], "k": new[0], "v": new[1],
        "cache_seqlens": torch.tensor([5], dtype=torch.int32), "causal": True,
    }  # fmt: skip


def check_refused(args: dict[str, Any], reason: str) -> None:
    caches = args["k_cache"], args["v_cache"]
    before = [cache.clone() for cache in caches]
    with pytest.raises(RuntimeError, match=reason):
        flash_attn_with_kvcache(**args)
    assert all(map(torch.equal, caches, before))


@pytest.mark.parametrize(
    ("arch", "args"),
    [
        (80, appending(1)),
        (90, appending(1, torch.float32)),
        (90, appending(1, dim=60)),
        (90, appending(70) | {"num_splits": 2}),
        (90, appending(1) | {"num_splits": 1, "tree_mask": torch.tensor([[1]])}),
    ],
    ids=["another card", "float32", "rows without alignment", "splits of many rows", "tree"],
)
def test_kernels_that_are_forced_refuse_before_the_write(arch: int, args: dict[str, Any]) -> None:
    with emulated.emulated(arch=arch):
        ops.set_cuda_kernels("sm90")
        check_refused(args, NOT_TAKEN)
        ops.set_cuda_kernels("")
        flash_attn_with_kvcache(**args)
    assert torch.equal(args["k_cache"][0, 5], args["k"][0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_rows_that_are_too_many_are_refused_before_the_write(arch: int, dtype: torch.dtype) -> None:
    with emulated.emulated(arch=arch):
        check_refused(appending(2**17, dtype, heads_q=2**14, dim=8), "more rows or keys than one")


@pytest.mark.parametrize(
    ("dtype", "heads", "num_splits"),
    [
        (torch.bfloat16, 64, 1),
        (torch.float32, 64, 1),
        (torch.bfloat16, 1, 3),  # attention itself fits into one launch, the merge does not
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", [80, 90])
def test_grids_that_are_too_large_are_refused_before_the_write(
    arch: int, dtype: torch.dtype, heads: int, num_splits: int
) -> None:
    """Any of these sequences may have all tokens, as far as the host knows."""
    batch, dim = 100_000, 40
    lengths = torch.ones(batch + 1, dtype=torch.int32)
    args = {
        "q": torch.zeros(1, 1, dim, dtype=dtype).expand(batch, heads, dim),
        "k_cache": torch.zeros(1, 200, heads, dim, dtype=dtype),
        "v_cache": torch.zeros(1, 200, heads, dim, dtype=dtype),
        "k": torch.ones(1, 1, dim, dtype=dtype).expand(batch, heads, dim),
        "v": torch.ones(1, 1, dim, dtype=dtype).expand(batch, heads, dim),
        "cache_seqlens": lengths[1:], "cu_seqlens_q": lengths.cumsum(0, dtype=torch.int32) - 1,
        "block_table": torch.zeros(batch, 1, dtype=torch.int32), "max_seqlen_q": batch,
        "num_splits": num_splits,
    }  # fmt: skip
    with emulated.emulated(arch=arch):
        check_refused(args, "more rows( or keys)? than one launch")


def workspace_bytes(arch: int, num_splits: int, keys: int, rows: int = 1, window: int = -1) -> int:
    """For `rows` tokens of one sequence with 64 heads, over a cache of pages of 16."""
    cache = torch.empty(2, 1, 16, 8, 128, dtype=torch.bfloat16)
    q = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16).expand(1, rows, 64, 128)
    table = torch.zeros(1, keys // 16, dtype=torch.int32)
    with emulated.emulated(arch=arch, multiprocessors=132):
        return emulated.operator("paged_workspace_bytes")(
            q, cache[0], cache[1], table, torch.tensor([keys], dtype=torch.int32), rows, keys,
            window, num_splits,
        )  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90])
def test_splits_take_memory_for_blocks_of_keys_only(arch: int) -> None:
    part = 64 * (128 + 2) * 4  # bytes for a token: an output and a state for each head
    assert workspace_bytes(arch, 64, 16) == 0  # a single block
    assert workspace_bytes(arch, 64, 640) == 10 * part
    assert workspace_bytes(arch, 7, 640) == 7 * part
    assert workspace_bytes(arch, 64, 65_536) == 64 * part
    assert workspace_bytes(arch, 2**60, 65_536) == 64 * part
    assert workspace_bytes(arch, 64, 65_536, window=127) == 2 * part
    assert workspace_bytes(arch, 1, 65_536) == 0
    assert workspace_bytes(arch, 0, 65_536) > 8 * part
    for rows in (1000, 4000):  # as many as fit into 256 MiB
        assert workspace_bytes(arch, 64, 65_536, rows) == 256 * MIB // (rows * part) * rows * part
    assert workspace_bytes(arch, 64, 65_536, 10_000) == 0


@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("arch", [80, 90])
def test_results_of_more_splits_than_blocks(arch: int, seqlen_q: int) -> None:
    def attend(num_splits: int) -> tuple[Tensor, Tensor]:
        return flash_attn_with_kvcache(**args, num_splits=num_splits, return_lse=True)

    args = appending(seqlen_q)
    with emulated.emulated(arch=arch):
        once = attend(1)
        for num_splits in (2, 64):
            out, lse = attend(num_splits)
            torch.testing.assert_close(out, once[0], rtol=2.0**-7, atol=2.0**-8)
            torch.testing.assert_close(lse, once[1], rtol=1e-5, atol=1e-5)
