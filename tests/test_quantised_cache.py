"""Attention over caches of 8-bit elements: int8 and float8, with scales per tensor, per kv head,
and per token. What lies in them is in test_quantised_cache_writes.py."""

from __future__ import annotations

from dataclasses import replace

import cases
import pytest
import tolerance
import torch
from backends import Backend
from cases import FLOAT_DTYPES, HALF_DTYPES, MASKS, PagedCase, heads
from quantised import (
    INT8,
    KINDS,
    STORED,
    check_read,
    empty_caches,
    expected,
    garbage_like,
    quantise_inputs,
    read_as,
)
from test_cache_writes import assert_same_bytes
from test_paged import attend

from sink_attention_ext import reference

pytestmark = pytest.mark.sm90

not_on_sm90 = pytest.mark.not_on_sm90

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


@pytest.mark.parametrize(
    "seqlen_q",
    [
        pytest.param(1, id="decode"),
        pytest.param(40, id="prefill", marks=not_on_sm90("its prefill takes no such caches")),
    ],
)
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
    if offset > 0 and backend.name != "cpu" and backend.hopper_takes(case, stored):
        k, v = ([x.to(case.dtype).double() for x in tokens] for tokens in (inputs.k, inputs.v))
        return tolerance.check(actual, expected(case, inputs, k, v))
    assert torch.equal(actual.out, aligned.out) and torch.equal(actual.lse, aligned.lse)


@not_on_sm90("in float64")
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
        patterns[128] = 0  # for -128, which no write leaves
    device, count = backend.device, len(patterns)
    v_cache = patterns.reshape(1, 1, 1, count).to(device)
    k_cache = torch.zeros(1, 1, 1, 16).to(stored).to(device)
    q = torch.zeros(1, 1, 1, 16, dtype=dtype, device=device)
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
    case = backend.fitting(case, stored)
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
    device, dtype = backend.device, backend.dtype
    k, v = (torch.randn(2, 30, 2, 16, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(2, 30, 4, 16, device=device, dtype=dtype)
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
    torch.testing.assert_close(out.double(), expected_out, **tolerance.short_rows(dtype))


def test_half_dtypes_share_a_cache(backend: Backend) -> None:
    """A cache written from float32 is read by bfloat16 and float16 queries."""
    for dtype in HALF_DTYPES:
        case = PagedCase(seqlens_q=(1,), seqlens_k=(40,), dtype=dtype)
        check_read(backend, case, "token", INT8)
