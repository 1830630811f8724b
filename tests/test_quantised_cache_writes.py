"""Writing to caches of 8-bit elements: the reference's bytes and scales, rounding, saturation."""

from __future__ import annotations

import cases
import pytest
import torch
from backends import Backend
from cases import FLOAT_DTYPES
from quantised import INT8, KINDS, LARGEST, STORED, empty_caches, static_scale
from test_cache_writes import assert_same_bytes
from torch import Tensor

from sink_attention_ext import reference


def awkward_tokens(num_tokens: int, num_heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows of many sizes; of zeros, with infinities and NaN, and of numbers next to nothing."""
    tokens = torch.randn(num_tokens, num_heads, dim, dtype=torch.float64)
    tokens *= 2.0 ** torch.randint(-8, 8, (num_tokens, num_heads, 1))
    tokens[0, 0] = 0
    tokens[1, 0, dim // 2] = cases.INF
    tokens[1, -1, 0] = -cases.INF
    tokens[2, 0, dim - 1] = cases.NAN
    tokens[3, -1] = cases.NAN
    tokens[4, 0] = 1e-44  # whose scale float32 does not have
    return tokens.to(dtype)


@pytest.mark.sanitize
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_write(
    backend: Backend,
    dtype: torch.dtype,
    stored: torch.dtype,
    kind: str,
    page_size: int,
    heads_first: bool,
) -> None:
    """Byte for byte and scale for scale the reference's; skipped slots and their scales stay."""
    num_tokens, num_heads, num_pages = 9, 3, 40 if page_size == 1 else 3
    for dims in ((64, 40), (33, 256), (1, 7)):
        caches, scales = empty_caches(
            stored, dims, num_heads, page_size, num_pages, heads_first, backend.device
        )
        rng = cases.generator(0)
        slots = torch.randperm(num_pages * page_size, generator=rng)[:num_tokens]
        slots[5] = -1
        tokens, after, scales_after = [], [], []
        for i, dim in enumerate(dims):
            new = awkward_tokens(num_tokens, num_heads + 1, dim + 2, dtype)[:, 1:, :dim]  # strided
            if kind != "token":
                scales[i] = static_scale(kind, num_heads, rng, stored).to(backend.device)
            given = None if kind == "token" else scales[i].cpu()
            numbers, row_scales = reference.quantise(new, stored, given)
            expected_cache, expected_scale = caches[i].cpu().clone(), scales[i].cpu().clone()
            for token, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    expected_cache[slot // page_size, slot % page_size] = numbers[token]
                    if kind == "token":
                        expected_scale[slot // page_size, slot % page_size] = row_scales[token]
            tokens.append(new.to(backend.device))
            after.append(expected_cache)
            scales_after.append(expected_scale)
        backend.reshape_and_cache(*tokens, *caches, slots.to(backend.device), *scales)
        for actual, wanted in zip((*caches, *scales), (*after, *scales_after), strict=True):
            assert_same_bytes(actual.cpu(), wanted)


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_row_comes_back_within_half_a_step(backend: Backend, stored: torch.dtype) -> None:
    """One key, so out is the stored value: int8 within half a unit of the scale, float8 within
    2^-4 of each number (3 bits of mantissa) or half of its smallest step."""
    v = awkward_tokens(5, 4, 64, torch.float32).nan_to_num(0.0, 1.0, 1.0)[:, :, None]
    v = v.reshape(20, 1, 64)
    caches, scales = empty_caches(stored, (8, 64), 1, 1, 20, False, "cpu")
    k = torch.zeros(20, 1, 8)
    tensors = [x.to(backend.device) for x in (k, v, *caches, torch.arange(20), *scales)]
    backend.reshape_and_cache(*tensors)
    out, _ = backend.flash_attn_with_kvcache(
        torch.zeros(20, 1, 1, 8, device=backend.device),
        *tensors[2:4],
        cache_seqlens=1,
        block_table=torch.arange(20, dtype=torch.int32, device=backend.device)[:, None],
        k_scale=tensors[5],
        v_scale=tensors[6],
    )
    scale = v.abs().amax(-1, keepdim=True) / LARGEST[stored]
    step = scale / 2 if stored == INT8 else torch.maximum(v.abs() * 2**-4, scale * 2**-10)
    error = (out.cpu().reshape(v.shape) - v).abs()
    assert (error <= step * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("kind", ["tensor", "token"])
def test_every_int8_number_survives(backend: Backend, kind: str) -> None:
    numbers = torch.arange(-127, 128).float()
    v = numbers.reshape(1, 1, 255).to(backend.device)
    caches, scales = empty_caches(INT8, (255, 255), 1, 1, 1, False, backend.device)
    if kind == "tensor":
        scales = [torch.ones((), device=backend.device)] * 2
    slot = torch.zeros(1, dtype=torch.int64, device=backend.device)
    backend.reshape_and_cache(v, v, *caches, slot, *scales)
    assert torch.equal(caches[0].cpu().flatten(), numbers.to(INT8))
    assert all(float(scale) == 1 for scale in scales)
    q = torch.zeros(1, 1, 1, 255, device=backend.device)
    out, _ = backend.flash_attn_with_kvcache(
        q, *caches, cache_seqlens=1, k_scale=scales[0], v_scale=scales[1]
    )
    torch.testing.assert_close(out.flatten().cpu(), numbers, rtol=1e-6, atol=0)


def test_int8_rounds_ties_to_even_and_saturates(backend: Backend) -> None:
    numbers = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9, -1e9])
    special = torch.tensor([cases.INF, -cases.INF, cases.NAN, -0.0])
    k = torch.cat([numbers, special]).reshape(1, 1, 13).to(backend.device)
    cache = torch.ones(1, 1, 1, 13, dtype=INT8, device=backend.device)
    slot = torch.zeros(1, dtype=torch.int64, device=backend.device)
    scale = torch.ones((), device=backend.device)
    backend.reshape_and_cache(k, k, cache, cache.clone(), slot, scale, scale)
    wanted = [0, 2, 2, 0, -2, 126, 127, 127, -127, 127, -127, 0, 0]
    assert cache.flatten().tolist() == wanted


def test_last_of_two_tokens_for_one_slot_stays(backend: Backend) -> None:
    """Its scale too; many tokens, so that some are other blocks' and some the same warp's."""
    num_tokens, num_slots = 700, 32
    k = torch.randn(num_tokens, 2, 16) * 2.0 ** torch.randint(-9, 9, (num_tokens, 2, 1))
    slots = torch.randint(0, num_slots, (num_tokens,))
    caches, scales = empty_caches(INT8, (16, 16), 2, 16, 2, False, backend.device)
    device = backend.device
    torch.use_deterministic_algorithms(True)  # CUDA leaves the order open otherwise
    try:
        backend.reshape_and_cache(k.to(device), k.to(device), *caches, slots.to(device), *scales)
    finally:
        torch.use_deterministic_algorithms(False)
    last = torch.tensor([int((slots == slot).nonzero()[-1]) for slot in range(num_slots)])
    numbers, row_scales = reference.quantise(k[last], INT8)
    for cache, scale in zip(caches, scales, strict=True):
        assert torch.equal(cache.cpu().flatten(0, 1), numbers)
        assert torch.equal(scale.cpu().flatten(0, 1), row_scales)


@pytest.mark.parametrize("slots", [[], [-1, -1]], ids=str)
def test_write_of_nothing(backend: Backend, slots: list[int]) -> None:
    k = torch.randn(len(slots), 2, 8, device=backend.device)
    caches, scales = empty_caches(INT8, (8, 8), 2, 4, 3, False, backend.device)
    slot_mapping = torch.tensor(slots, dtype=torch.int64, device=backend.device)
    backend.reshape_and_cache(k, k, *caches, slot_mapping, *scales)
    for cache, scale in zip(caches, scales, strict=True):
        assert (cache == -128).all() and scale.isnan().all()
