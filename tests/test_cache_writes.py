"""Writing keys and values into a cache: reshape_and_cache, and appending before attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from backends import Backend
from cases import FLOAT8, FLOAT_DTYPES, PagedCase, heads
from test_paged import attend
from torch import Tensor


def raw(tensor: Tensor) -> Tensor:
    """The bytes, so that NaN equals NaN."""
    return tensor.contiguous().reshape(tensor.shape or (1,)).view(torch.uint8)


def assert_same_bytes(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(raw(actual), raw(expected))


def quantise(tokens: Tensor, scale: Tensor) -> Tensor:
    """(..., heads, dim) as a float8 cache stores it."""
    return (tokens.float() / scale.reshape(-1, 1)).clamp(-448, 448).to(FLOAT8)


# ---- appending ----


def check_append(backend: Backend, case: PagedCase, new: int) -> None:
    """The last `new` tokens (all that are queried, if packed) are given as k and v: the cache must
    end up as if they had been there, byte for byte, and so must the results."""
    full = cases.make_paged(case, backend.device)
    inputs = cases.make_paged(case, backend.device)
    new_lengths = case.seqlens_q if case.packed_q else (new,) * len(case.seqlens_k)
    before = [k - n for k, n in zip(case.seqlens_k, new_lengths, strict=True)]
    for b, (start, end) in enumerate(zip(before, case.seqlens_k, strict=True)):
        for position in range(start, end):
            page = inputs.block_table[b, position // case.page_size]
            inputs.k_cache[page, position % case.page_size] = cases.NAN
            inputs.v_cache[page, position % case.page_size] = cases.NAN
    new_k, new_v = (
        torch.cat([x[start:] for x, start in zip(y, before, strict=True)])
        for y in (inputs.k, inputs.v)
    )
    if not case.packed_q:
        new_k, new_v = (x.unflatten(0, (len(before), new)) for x in (new_k, new_v))
    if case.float8:  # numbers that quantise to those of the cache
        new_k = (new_k.float() * inputs.k_scale.reshape(-1, 1)).to(case.dtype)
        new_v = (new_v.float() * inputs.v_scale.reshape(-1, 1)).to(case.dtype)
    lengths = cases.int32(before, backend.device)
    actual = attend(backend, case, inputs, k=new_k, v=new_v, cache_seqlens=lengths)
    tolerance.check(actual, oracle.expected_paged(case), case.softcap)
    assert_same_bytes(inputs.k_cache, full.k_cache)
    assert_same_bytes(inputs.v_cache, full.v_cache)
    assert lengths.tolist() == before


def append_cases(count: int, seed: int) -> list[tuple[PagedCase, int]]:
    drawn = cases.draw(
        count,
        seed,
        new=(1, 1, 2, 16, 17, 40),
        mask=({"causal": True}, {"causal": True, "window_size": (20, 0)}, {}),
        page_size=(1, 4, 16, 128),
        packed_q=(False, True),
        heads=(heads(6, 6), heads(6, 3), heads(6, 1)),
        head_dim=(16, 33, 64),
        head_dim_v=(None, 24),
        num_splits=(0, 1, 3),
        heads_first=(False, True),
        dtype=FLOAT_DTYPES,
    )
    result = []
    for i, fields in enumerate(drawn):
        new = fields.pop("new")
        before = (300, 0, 17, 128, 95)
        seqlens_q = (new,) * 5 if not fields["packed_q"] else (new, 0, 3, 1, new)
        appended = (new,) * 5 if not fields["packed_q"] else seqlens_q
        seqlens_k = tuple(b + n for b, n in zip(before, appended, strict=True))
        case = PagedCase(
            seqlens_q=seqlens_q, seqlens_k=seqlens_k, seed=seed + i, **cases.merged(fields)
        )
        result.append((case, new))
    return result


@pytest.mark.sanitize
@pytest.mark.parametrize(("case", "new"), append_cases(48, 10), ids=str)
def test_append(backend: Backend, case: PagedCase, new: int) -> None:
    check_append(backend, case, new)


@pytest.mark.slow_when_emulated
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(128, 128), (256, 512), (2048, 3577)])
@pytest.mark.parametrize("page_size", [16, 256])
def test_append_of_the_peer_matrix(
    backend: Backend, page_size: int, seqlen_q: int, seqlen_k: int
) -> None:
    case = PagedCase(
        seqlens_q=(seqlen_q,),
        seqlens_k=(seqlen_k,),
        num_heads_q=3,
        page_size=page_size,
        dtype=torch.bfloat16,
        causal=True,
        window_size=(-1, -1) if page_size == 16 else (500, 0),
    )
    check_append(backend, case, seqlen_q)


@pytest.mark.parametrize("seqlen_q", [1, 7])
def test_append_of_fewer_and_of_more_keys_than_queries(backend: Backend, seqlen_q: int) -> None:
    """The last rows are aligned with the last keys, whatever was new."""
    case = PagedCase(seqlens_q=(seqlen_q,) * 2, seqlens_k=(50, 9), causal=True)
    check_append(backend, case, 3)


@pytest.mark.parametrize("float8", ["scalar", "per head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_append_to_a_float8_cache(backend: Backend, dtype: torch.dtype, float8: str) -> None:
    case = PagedCase(
        seqlens_q=(5, 5),
        seqlens_k=(70, 9),
        num_heads_q=6,
        num_heads_kv=3,
        dtype=dtype,
        causal=True,
        float8=float8,
    )
    check_append(backend, case, 5)


@pytest.mark.parametrize("seqlens_k", [(20, 12), (32, 32)], ids=str)
def test_append_to_a_cache_without_a_block_table(
    backend: Backend, seqlens_k: tuple[int, int]
) -> None:
    case = PagedCase(seqlens_q=(4, 4), seqlens_k=seqlens_k, causal=True)
    inputs = cases.make_paged(case, backend.device)
    caches = [torch.full((2, 32, 1, 64), cases.NAN, device=backend.device) for _ in range(2)]
    for cache, tokens in zip(caches, (inputs.k, inputs.v), strict=True):
        for b, x in enumerate(tokens):
            cache[b, : len(x) - 4] = x[:-4]
    new_k, new_v = (torch.stack([x[-4:] for x in y]) for y in (inputs.k, inputs.v))
    dense = replace(inputs, k_cache=caches[0], v_cache=caches[1])
    lengths = inputs.seqlens_k - 4
    actual = attend(backend, case, dense, k=new_k, v=new_v, cache_seqlens=lengths, block_table=None)
    tolerance.check(actual, oracle.expected_paged(case))
    for cache, tokens in zip(caches, (inputs.k, inputs.v), strict=True):
        for b, x in enumerate(tokens):
            assert torch.equal(cache[b, : len(x)], x)
            assert cache[b, len(x) :].isnan().all()


def test_generation_token_by_token_equals_the_training_forward(backend: Backend) -> None:
    """60 tokens: a prompt of 23 in two chunks, then one by one, two sequences of other lengths."""
    case = PagedCase(
        seqlens_q=(60, 60),
        seqlens_k=(60, 60),
        num_heads_q=4,
        num_heads_kv=2,
        head_dim=32,
        causal=True,
        window_size=(30, 0),
        page_size=4,
    )
    inputs = cases.make_paged(case, backend.device)
    k, v = torch.stack(inputs.k), torch.stack(inputs.v)
    trained, _ = backend.flash_attn(inputs.q, k, v, s_aux=inputs.s_aux, **case.options())
    inputs.k_cache.fill_(cases.NAN)
    inputs.v_cache.fill_(cases.NAN)
    steps = [(0, 20), (20, 23), *((i, i + 1) for i in range(23, 60))]
    for start, end in steps:
        step = replace(inputs, q=inputs.q[:, start:end])
        lengths = cases.int32([start, start], backend.device)
        new: dict[str, Any] = {"k": k[:, start:end], "v": v[:, start:end]}
        out = attend(backend, case, step, cache_seqlens=lengths, **new).out
        torch.testing.assert_close(out, trained[:, start:end], rtol=1e-5, atol=1e-6)


# ---- reshape_and_cache ----


@pytest.mark.sanitize
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("head_dims", [(64, 64), (1, 256), (33, 7), (80, 128)], ids=str)
def test_write(
    backend: Backend,
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    page_size: int,
    heads_first: bool,
) -> None:
    """Random slots, some tokens skipped; every other byte of the cache stays."""
    num_pages, num_heads, num_tokens = 9, 3, 7
    slots = torch.randperm(num_pages * page_size)[:num_tokens]
    slots[2] = -1
    slots[5] = -1
    caches, written, tokens = [], [], []
    for dim in head_dims:
        shape = (num_pages, page_size, num_heads, dim)
        if heads_first:
            cache = torch.randn(num_pages, num_heads, page_size, dim).to(dtype).transpose(1, 2)
        else:
            cache = torch.randn(shape).to(dtype)
        new = torch.randn(num_tokens, num_heads + 1, dim + 2).to(dtype)[:, 1:, :dim]  # strided
        after = cache.clone()
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                after[slot // page_size, slot % page_size] = new[token]
        caches.append(cache.to(backend.device))
        written.append(after)
        tokens.append(new.to(backend.device))
    backend.reshape_and_cache(*tokens, *caches, slots.to(backend.device))
    for cache, after in zip(caches, written, strict=True):
        assert_same_bytes(cache.cpu(), after)


def test_write_into_a_cache_with_gaps(backend: Backend) -> None:
    """k and v as halves of one tensor, between NaN that must stay."""
    both = torch.full((5, 2, 4, 3, 10), cases.NAN, device=backend.device)
    k_cache, v_cache = both[:, 0, :, :2, :8], both[:, 1, :, :2, :8]
    k, v = (torch.randn(20, 2, 8, device=backend.device) for _ in range(2))
    slots = torch.arange(20, device=backend.device).flip(0)
    backend.reshape_and_cache(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.reshape(20, 2, 8), k.flip(0))
    assert torch.equal(v_cache.reshape(20, 2, 8), v.flip(0))
    assert both[:, :, :, 2].isnan().all() and both[..., 8:].isnan().all()


@pytest.mark.parametrize("slots", [[], [-1, -1, -1]], ids=str)
def test_write_of_nothing(backend: Backend, slots: list[int]) -> None:
    k, v = (torch.randn(len(slots), 2, 8, device=backend.device) for _ in range(2))
    k_cache, v_cache = (torch.ones(3, 4, 2, 8, device=backend.device) for _ in range(2))
    slot_mapping = torch.tensor(slots, dtype=torch.int64, device=backend.device)
    backend.reshape_and_cache(k, v, k_cache, v_cache, slot_mapping)
    assert (k_cache == 1).all() and (v_cache == 1).all()


def test_last_of_two_tokens_for_one_slot_stays(backend: Backend) -> None:
    k, v = (torch.randn(3, 2, 8, device=backend.device) for _ in range(2))
    k_cache, v_cache = (torch.zeros(2, 4, 2, 8, device=backend.device) for _ in range(2))
    slots = torch.tensor([6, 1, 6], device=backend.device)
    backend.reshape_and_cache(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache[1, 2], k[2]) and torch.equal(v_cache[1, 2], v[2])
    assert torch.equal(k_cache[0, 1], k[1]) and torch.equal(v_cache[0, 1], v[1])


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_float8_write(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """k / scale, saturated to +-448 and rounded to nearest even, NaN kept: torch's own bytes."""
    k, v = (torch.randn(6, 3, dim).to(dtype) * 3 for dim in (40, 9))
    k[0, 0, :9] = torch.tensor([0.0, -0.0, 1e-4, 2e4, -3e4, 448.0, cases.NAN, 464.0, -480.0])
    k[0, 1, :2] = torch.tensor([cases.INF, -cases.INF])
    scales = [torch.rand(shape) + 0.4 for _ in range(2)]
    caches = [torch.zeros(3, 4, 3, dim).to(FLOAT8) for dim in (40, 9)]
    after = [cache.clone() for cache in caches]
    slots = torch.tensor([11, 3, -1, 0, 8, 5])
    for new, scale, cache in zip((k, v), scales, after, strict=True):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                cache[slot // 4, slot % 4] = quantise(new[token], scale)
    device = backend.device
    on_device = [x.to(device) for x in (k, v, *caches, slots, *scales)]
    backend.reshape_and_cache(*on_device)
    assert_same_bytes(on_device[2].cpu(), after[0])
    assert_same_bytes(on_device[3].cpu(), after[1])


def test_float8_ties(backend: Backend) -> None:
    """Quotients half way between float8 elements, for many scales: the quotient is rounded, not a
    product with the reciprocal, which falls to the other side now and then."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()  # 0 to 448
    middles = (numbers[1:] + numbers[:-1]) / 2
    scales = torch.rand(64) * 2 + 0.01  # one for each head
    k = (middles * scales[:, None])[None].contiguous()
    caches = [torch.zeros(1, 1, 64, 126).to(FLOAT8).to(backend.device) for _ in range(2)]
    scale = scales.to(backend.device)
    slot = torch.zeros(1, dtype=torch.int64, device=backend.device)
    backend.reshape_and_cache(*(2 * [k.to(backend.device)]), *caches, slot, scale, scale)
    for cache in caches:
        assert_same_bytes(cache[0].cpu(), quantise(k, scales))
    assert not torch.equal(raw(quantise(k, scales)), raw((k * (1 / scales)[:, None]).to(FLOAT8)))


def test_every_float8_number_survives(backend: Backend) -> None:
    """All 256 bit patterns through a write and a read: 1 key, so out is the stored value."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    v = numbers.to(backend.device).reshape(1, 1, 256)
    k = torch.zeros(1, 1, 8, device=backend.device)
    k_cache = torch.zeros(1, 1, 1, 8, device=backend.device).to(FLOAT8)
    v_cache = torch.zeros(1, 1, 1, 256, device=backend.device).to(FLOAT8)
    scale = torch.ones((), device=backend.device)
    slot = torch.zeros(1, dtype=torch.int64, device=backend.device)
    backend.reshape_and_cache(k, v, k_cache, v_cache, slot, scale, scale)
    q = torch.zeros(1, 1, 1, 8, device=backend.device)
    lengths = cases.int32([1], backend.device)
    out, _ = backend.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, k_scale=scale, v_scale=scale
    )
    torch.testing.assert_close(out.flatten().cpu(), numbers, rtol=1e-6, atol=0, equal_nan=True)
