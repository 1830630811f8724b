"""Caches of 8-bit numbers: int8 and float8, with scales per tensor, per kv head, and per token.

The oracle is reference.quantise, what a cache should hold byte for byte, and reference.attention on
the numbers that it then stands for. Slots that are not in use hold garbage, and so do their scales.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from cases import FLOAT8, FLOAT_DTYPES, HALF_DTYPES, MASKS, PagedCase, PagedInputs, heads
from conftest import EMULATED, Backend
from test_cache_writes import assert_same_bytes
from test_paged import attend
from torch import Tensor

from sink_attention_ext import ops, reference, support

INT8 = torch.int8
STORED = (FLOAT8, INT8)
LARGEST = {FLOAT8: 448.0, INT8: 127.0}
KINDS = ("tensor", "head", "token")  # what has a scale of its own


def static_scale(kind: str, num_heads: int, rng: torch.Generator, stored: torch.dtype) -> Tensor:
    """For standard normal numbers."""
    shape = {"tensor": (), "head": (num_heads,)}[kind]
    return (torch.rand(shape, generator=rng) * 0.5 + 3.5) / LARGEST[stored]


def garbage_like(cache: Tensor) -> Tensor:
    """NaN where the dtype has it, else -128, which no write leaves."""
    return torch.full_like(cache, -128 if cache.dtype == INT8 else cases.NAN)


def quantise_inputs(
    case: PagedCase, inputs: PagedInputs, kind: str, stored: torch.dtype
) -> PagedInputs:
    """The same tokens in a quantised cache; inputs.k and .v become what it stands for, float64."""
    rng = cases.generator(case.seed + 1)
    changes: dict[str, Any] = {}
    for name in ("k", "v"):
        cache = getattr(inputs, f"{name}_cache").cpu()
        # Slots beyond a sequence are NaN there: their scales are to be garbage too.
        scale = None if kind == "token" else static_scale(kind, case.num_heads_kv, rng, stored)
        numbers, scales = reference.quantise(cache, stored, scale)
        is_unused = cache.isnan().all(-1)
        numbers = torch.where(is_unused[..., None], garbage_like(numbers), numbers)
        if kind == "token":
            scales = torch.where(is_unused, cases.NAN, scales)
        tokens = []
        for x in getattr(inputs, name):
            row, row_scale = reference.quantise(x.cpu(), stored, scale)
            factor = row_scale[..., None] if kind == "token" else row_scale.reshape(-1, 1)
            tokens.append(row.double() * factor.double())
        if case.heads_first:
            numbers = numbers.transpose(1, 2).contiguous().transpose(1, 2)
            scales = (
                scales.transpose(1, 2).contiguous().transpose(1, 2) if kind == "token" else scales
            )
        device = inputs.q.device
        changes[name] = tokens
        changes[f"{name}_cache"] = numbers.to(device)
        changes[f"{name}_scale"] = scales.to(device)
    return replace(inputs, **changes)


def kernel_family(backend: Backend, case: PagedCase, stored: torch.dtype) -> str:
    """Whose CUDA kernels read such a cache: its rows are aligned, max_seqlen_q is not given."""
    longest = sum(case.seqlens_q) if case.packed_q else max(case.seqlens_q)
    arch = EMULATED.get(backend.name) or support.cuda_arch()
    dtype, kv_dtype = (str(d).removeprefix("torch.") for d in (case.dtype, stored))
    return ops.cuda_kernel_family(
        dtype, kv_dtype, longest, case.num_heads_q, case.num_heads_kv, case.head_dim,
        case.dim_v, True, case.num_splits, False, False, arch,
    )  # fmt: skip


def read_as(
    backend: Backend, case: PagedCase, kind: str, stored: torch.dtype, tokens: list[Tensor]
) -> list[Tensor]:
    """On CUDA a token's own scale is multiplied in before its numbers are rounded to q's dtype, but
    for Hopper's decode, which multiplies scores and weights with it."""
    if kind == "token" and backend.name != "cpu" and kernel_family(backend, case, stored) != "sm90":
        return [x.to(case.dtype).double() for x in tokens]
    return tokens


def expected(case: PagedCase, inputs: PagedInputs, k: list[Tensor], v: list[Tensor]) -> Any:
    starts = cases.ends(case.seqlens_q)
    rows = (inputs.q if case.packed_q else inputs.q.flatten(0, 1)).cpu()
    s_aux = None if inputs.s_aux is None else inputs.s_aux.cpu()

    def compute(dtype: torch.dtype) -> oracle.Results:
        outs, lses = [], []
        for b, (keys, values) in enumerate(zip(k, v, strict=True)):
            out, lse = reference.attention(
                rows[None, starts[b] : starts[b + 1]].to(dtype),
                keys[None].to(dtype),
                values[None].to(dtype),
                s_aux=s_aux if s_aux is None or dtype != torch.float64 else s_aux.double(),
                **case.options(),
            )
            outs.append(out[0])
            lses.append(lse[0])
        if case.packed_q:
            return oracle.Results(torch.cat(outs), torch.cat(lses, dim=-1))
        return oracle.Results(torch.stack(outs), torch.stack(lses))

    return oracle.Expected(compute(torch.float64), compute(case.dtype), {})


def check_read(backend: Backend, case: PagedCase, kind: str, stored: torch.dtype) -> None:
    inputs = quantise_inputs(case, cases.make_paged(case, backend.device), kind, stored)
    k, v = (read_as(backend, case, kind, stored, x) for x in (inputs.k, inputs.v))
    tolerance.check(attend(backend, case, inputs), expected(case, inputs, k, v), case.softcap)


# ---- reading ----


def read_cases(count: int, seed: int) -> list[tuple[PagedCase, str, torch.dtype]]:
    drawn = cases.draw(
        count,
        seed,
        seqlen_q=(1, 1, 3, 20, 130),
        seqlen_k=(1, 17, 64, 130, 300, 700),
        heads=(heads(2, 2), heads(4, 2), heads(8, 1), heads(16, 2)),
        head_dim=(8, 16, 33, 64, 128),
        head_dim_v=(None, None, 5, 72),
        dtype=FLOAT_DTYPES,
        mask=MASKS,
        softcap=(0.0, 0.0, 0.0, 15.0),
        sink=("normal", "none", "mixed"),
        page_size=(1, 3, 16, 128),
        packed_q=(False, True),
        heads_first=(False, True),
        num_splits=(0, 1, 3, 7),
        kind=KINDS,
        stored=STORED,
    )
    result = []
    for i, fields in enumerate(drawn):
        q, k = fields.pop("seqlen_q"), fields.pop("seqlen_k")
        kind, stored = fields.pop("kind"), fields.pop("stored")
        options = cases.merged(fields)
        seqlens_q = (q, 1, 0) if options["packed_q"] else (q,) * 3
        case = PagedCase(seqlens_q=seqlens_q, seqlens_k=(k, k // 3, 0), seed=seed + i, **options)
        result.append((case, kind, stored))
    return result


@pytest.mark.sanitize
@pytest.mark.parametrize(("case", "kind", "stored"), read_cases(60, 100), ids=str)
def test_read(backend: Backend, case: PagedCase, kind: str, stored: torch.dtype) -> None:
    check_read(backend, case, kind, stored)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind", "stored"), read_cases(600, 1000), ids=str)
def test_read_many(backend: Backend, case: PagedCase, kind: str, stored: torch.dtype) -> None:
    check_read(backend, case, kind, stored)


@pytest.mark.parametrize("seqlen_q", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_read_of_gpt_oss_heads(
    backend: Backend,
    dtype: torch.dtype,
    stored: torch.dtype,
    kind: str,
    page_size: int,
    seqlen_q: int,
) -> None:
    """Eight query heads share a kv head; rows of 64 are loaded eight numbers at a time."""
    case = PagedCase(
        seqlens_q=(seqlen_q,) * 2,
        seqlens_k=(150, 77),
        num_heads_q=8,
        page_size=page_size,
        dtype=dtype,
        causal=True,
        window_size=(99, 0),
        num_splits=2,
    )
    check_read(backend, case, kind, stored)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_alignment_changes_nothing(backend: Backend, stored: torch.dtype, offset: int) -> None:
    """Rows that start 1 or 8 bytes after an aligned address: the same bits, by the same kernels
    (Hopper's decode takes aligned rows only)."""
    case = PagedCase(seqlens_q=(2,), seqlens_k=(90,), dtype=torch.bfloat16)
    inputs = quantise_inputs(case, cases.make_paged(case, backend.device), "token", stored)
    aligned = attend(backend, case, inputs)
    shape = inputs.k_cache.shape
    moved = {}
    for name in ("k_cache", "v_cache"):
        cache = getattr(inputs, name)
        memory = torch.zeros(cache.numel() + offset, dtype=torch.int8, device=backend.device)
        moved[name] = memory[offset:].view(cache.dtype).view(shape)
        moved[name].copy_(cache)
    actual = attend(backend, case, replace(inputs, **moved))
    if offset > 0 and backend.name != "cpu" and kernel_family(backend, case, stored) == "sm90":
        k, v = ([x.to(case.dtype).double() for x in tokens] for tokens in (inputs.k, inputs.v))
        return tolerance.check(actual, expected(case, inputs, k, v))
    assert torch.equal(actual.out, aligned.out) and torch.equal(actual.lse, aligned.lse)


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_reference_reads_token_scales(backend: Backend, stored: torch.dtype) -> None:
    """reference.paged_attention, in float64, on the cache itself."""
    case = PagedCase(
        seqlens_q=(3, 3), seqlens_k=(50, 21), num_heads_q=6, num_heads_kv=3, dtype=torch.float64
    )
    inputs = quantise_inputs(case, cases.make_paged(case, backend.device), "token", stored)
    out, lse = reference.paged_attention(
        inputs.q, inputs.k_cache, inputs.v_cache, inputs.block_table, inputs.seqlens_k,
        s_aux=inputs.s_aux, k_scale=inputs.k_scale, v_scale=inputs.v_scale,
    )  # fmt: skip
    actual = attend(backend, case, inputs)
    torch.testing.assert_close(actual.out, out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual.lse, lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_every_bit_pattern_is_read(
    backend: Backend, stored: torch.dtype, dtype: torch.dtype
) -> None:
    """One key a sequence, so out is the stored value, which q's dtype holds exactly; NaN too."""
    patterns = torch.arange(256, dtype=torch.uint8).view(stored)
    if stored == INT8:
        patterns = patterns[patterns.ne(-128)]  # which no write leaves
    device, count = backend.device, len(patterns)
    v_cache = patterns.reshape(1, 1, 1, count).to(device)
    k_cache = torch.zeros(1, 1, 1, 8).to(stored).to(device)
    q = torch.zeros(1, 1, 1, 8, dtype=dtype, device=device)
    for scales in (torch.ones(()), torch.ones(1, 1, 1)):
        scales = scales.to(device)
        out, _ = backend.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=1, k_scale=scales, v_scale=scales
        )
        assert out.dtype == dtype
        wanted = patterns.to(torch.float32)
        torch.testing.assert_close(
            out.flatten().cpu().float(), wanted, rtol=1e-6, atol=0, equal_nan=True
        )


# ---- writing ----


def empty_caches(
    stored: torch.dtype,
    dims: tuple[int, int],
    num_heads: int,
    page_size: int,
    num_pages: int,
    heads_first: bool,
    device: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Garbage everywhere, in the scales of each token too."""
    caches, scales = [], []
    for dim in dims:
        shape = (num_pages, page_size, num_heads, dim)
        if heads_first:
            shape = (num_pages, num_heads, page_size, dim)
        cache = torch.zeros(shape, device=device).to(stored)
        cache = garbage_like(cache.float()).to(stored) if stored == FLOAT8 else garbage_like(cache)
        scale = torch.full(shape[:3], cases.NAN, device=device)
        caches.append(cache.transpose(1, 2) if heads_first else cache)
        scales.append(scale.transpose(1, 2) if heads_first else scale)
    return caches, scales


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
    backend.reshape_and_cache(k.to(device), k.to(device), *caches, slots.to(device), *scales)
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


# ---- appending ----


@pytest.mark.parametrize("packed_q", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_append(
    backend: Backend, dtype: torch.dtype, stored: torch.dtype, kind: str, packed_q: bool
) -> None:
    """The cache ends up as if the tokens had been there, byte for byte, and so do the results."""
    case = PagedCase(
        seqlens_q=(4, 4),
        seqlens_k=(70, 9),
        num_heads_q=6,
        num_heads_kv=3,
        head_dim=32,
        head_dim_v=24,
        dtype=dtype,
        causal=True,
        packed_q=packed_q,
    )
    plain = cases.make_paged(case, backend.device)
    full = quantise_inputs(case, plain, kind, stored)
    inputs = quantise_inputs(case, plain, kind, stored)
    for b, end in enumerate(case.seqlens_k):
        for position in range(end - 4, end):
            place = (inputs.block_table[b, position // 16], position % 16)
            for cache in (inputs.k_cache, inputs.v_cache):
                cache[place] = garbage_like(cache[place])
            if kind == "token":
                inputs.k_scale[place] = inputs.v_scale[place] = cases.NAN
    new_k, new_v = (torch.cat([x[-4:] for x in y]) for y in (plain.k, plain.v))
    if not packed_q:
        new_k, new_v = new_k.unflatten(0, (2, 4)), new_v.unflatten(0, (2, 4))
    actual = attend(backend, case, inputs, k=new_k, v=new_v, cache_seqlens=inputs.seqlens_k - 4)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        assert_same_bytes(getattr(inputs, name), getattr(full, name))
    k, v = (read_as(backend, case, kind, stored, x) for x in (full.k, full.v))
    tolerance.check(actual, expected(case, full, k, v))


def test_append_to_a_cache_without_a_block_table(backend: Backend) -> None:
    """Token scales are indexed like the cache there too: (batch, seqlen_cache, num_heads_kv)."""
    device = backend.device
    k, v = (torch.randn(2, 30, 2, 16, device=device) for _ in range(2))
    q = torch.randn(2, 30, 4, 16, device=device)
    caches, scales = empty_caches(INT8, (16, 16), 2, 32, 2, True, device)
    options = {"k_scale": scales[0], "v_scale": scales[1], "causal": True}
    for start, end in ((0, 20), (20, 29), (29, 30)):
        new = (x[:, start:end] for x in (q, k, v))
        out, _ = backend.flash_attn_with_kvcache(
            next(new), *caches, *new, cache_seqlens=start, **options
        )
    stored = []
    for x, scale in ((k, scales[0]), (v, scales[1])):
        numbers, row_scales = reference.quantise(x, INT8)
        assert torch.equal(scale[:, :30], row_scales) and scale[:, 30:].isnan().all()
        stored.append((numbers * row_scales[..., None]).double())
    expected_out, _ = reference.attention(q[:, 29:].double(), *stored, causal=True)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-5)


def test_half_dtypes_share_a_cache(backend: Backend) -> None:
    """A cache written from float32 is read by bfloat16 and float16 queries."""
    for dtype in HALF_DTYPES:
        case = PagedCase(seqlens_q=(1,), seqlens_k=(40,), dtype=dtype)
        check_read(backend, case, "token", INT8)
