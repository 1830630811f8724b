"""num_sink_tokens: the first tokens of a sequence stay visible beside a sliding window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from backends import Backend
from cases import FLOAT_DTYPES, NAN, DenseCase, PagedCase, PagedInputs, VarlenCase, heads, int32
from torch import Tensor

from sink_attention_ext import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    reference,
    supports,
)

pytestmark = pytest.mark.sm90

SINK_TOKENS = (1, 4, 7, 70, 10**12)
WINDOWS = (
    {"causal": True, "window_size": (0, 0)},
    {"causal": True, "window_size": (6, 0)},
    {"causal": True, "window_size": (63, 0)},
    {"window_size": (5, 9)},
    {"window_size": (20, -1)},
)
FIELDS: dict[str, Any] = {
    "num_sink_tokens": SINK_TOKENS,
    "mask": WINDOWS,
    "heads": (heads(2, 2), heads(4, 2), heads(8, 1)),
    "head_dim": (16, 64, 24),
    "dtype": FLOAT_DTYPES,
    "softcap": (0.0, 0.0, 0.0, 15.0),
    "sink": ("normal", "none", "mixed"),
}


def drawn(count: int, seed: int, **fields: Any) -> list[dict[str, Any]]:
    return [
        cases.merged(picked) | {"seed": seed + i}
        for i, picked in enumerate(cases.draw(count, seed, **FIELDS, **fields))
    ]


# ---- forward and gradients ----

SEQLENS = ((1, 300), (9, 200), (65, 65), (40, 300), (130, 130), (30, 20))
DENSE = [
    DenseCase(seqlen_q=q, seqlen_k=k, **fields)
    for (q, k), fields in zip(SEQLENS * 4, drawn(4 * len(SEQLENS), 1), strict=True)
]


@pytest.mark.sanitize
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense(backend: Backend, case: DenseCase) -> None:
    case = backend.fitting(case)
    inputs = cases.make_dense(case, backend.device)
    actual = oracle.run(backend.flash_attn, inputs, case.options() | {"deterministic": True})
    tolerance.check(actual, oracle.expected(case), case.softcap)


PACKED_SEQLENS = (
    {"seqlens_q": (40, 0, 1, 70), "seqlens_k": (140, 30, 200, 60), "unused_k": (3, 0, 40, 1)},
    {"seqlens_q": (5, 128), "seqlens_k": (3, 128)},
)
PACKED_FIELDS: dict[str, Any] = {"lengths": PACKED_SEQLENS, "extra_rows": (0, 3)}
VARLEN = [VarlenCase(**fields) for fields in drawn(12, 2, **PACKED_FIELDS)]


@pytest.mark.sanitize
@pytest.mark.parametrize("case", VARLEN, ids=str)
def test_varlen(backend: Backend, case: VarlenCase) -> None:
    case = backend.fitting(case)
    inputs = cases.make_varlen(case, backend.device)
    actual = oracle.run(backend.flash_attn_varlen, inputs, case.options())
    tolerance.check(actual, oracle.expected(case), case.softcap)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_gap_of_many_blocks(backend: Backend, dtype: torch.dtype) -> None:
    """Blocks of keys on both sides of blocks that are never visited, in both passes."""
    case = DenseCase(
        seqlen_q=20, seqlen_k=1100, num_heads_q=4, num_heads_kv=2, head_dim=16, dtype=dtype,
        causal=True, window_size=(40, 0), num_sink_tokens=5,
    )  # fmt: skip
    case = backend.fitting(case)
    inputs = cases.make_dense(case, backend.device)
    for deterministic in (False, True):
        options = case.options() | {"deterministic": deterministic}
        actual = oracle.run(backend.flash_attn, inputs, options)
        tolerance.check(actual, oracle.expected(case))
        assert not actual.dk[:, 5:1040].any() and not actual.dv[:, 5:1040].any()
        assert (actual.dk[:, :5] != 0).all()  # each sink token is visible to all queries


def test_sink_tokens_beyond_the_window_change_nothing(backend: Backend) -> None:
    """Bit for bit, without a left bound, and where they are in the window anyway."""
    options = {"dtype": backend.dtype, "device": backend.device}
    q, k, v = (torch.randn(1, 70, 2, backend.fitting_dim(16), **options) for _ in range(3))
    for options, more in (
        ({"causal": True}, {"num_sink_tokens": 9}),
        ({"window_size": (-1, 3)}, {"num_sink_tokens": 9}),
        ({"causal": True, "window_size": (69, 0)}, {"num_sink_tokens": 30}),
        ({"causal": True, "window_size": (3, 0)}, {"num_sink_tokens": 0}),
    ):
        expected = backend.flash_attn(q, k, v, **options)
        for a, b in zip(backend.flash_attn(q, k, v, **options, **more), expected, strict=True):
            assert torch.equal(a, b)


def test_each_key_is_seen_or_not(backend: Backend) -> None:
    """With v the identity, out shows which keys count; the mask, literally."""
    case = DenseCase(seqlen_q=30, seqlen_k=60, causal=True, window_size=(8, 0), num_sink_tokens=5)
    q = torch.zeros(1, 30, 1, 16, dtype=backend.dtype, device=backend.device)
    k, v = torch.zeros(1, 60, 1, 16), torch.eye(60, 64)[None, :, None]
    out, _ = backend.flash_attn(q, k.to(q), v.to(q), **case.options())
    assert torch.equal(out[0, :, 0, :60].cpu() > 0, cases.is_visible_literally(case))
    assert not out[..., 60:].any()


# ---- paged ----


def attend(backend: Backend, case: PagedCase, inputs: PagedInputs) -> oracle.Results:
    return oracle.Results(
        *backend.flash_attn_with_kvcache(
            inputs.q, inputs.k_cache, inputs.v_cache, cache_seqlens=inputs.seqlens_k,
            block_table=inputs.block_table, cu_seqlens_q=inputs.cu_seqlens_q,
            max_seqlen_q=inputs.max_seqlen_q, s_aux=inputs.s_aux,
            k_scale=inputs.k_scale, v_scale=inputs.v_scale, num_splits=case.num_splits,
            **case.options(),
        )
    )  # fmt: skip


def without_gap(case: PagedCase, inputs: PagedInputs, entry: int) -> PagedInputs:
    """NaN in every slot whose key no query sees, `entry` for every page of such slots."""
    k_cache, v_cache = inputs.k_cache.clone(), inputs.v_cache.clone()
    table = inputs.block_table.clone()
    for b, (seqlen_q, seqlen_k) in enumerate(zip(case.seqlens_q, case.seqlens_k, strict=True)):
        seen = reference.is_visible(
            seqlen_q, seqlen_k, case.causal, case.window_size, None, case.num_sink_tokens
        ).any(0)
        for page in range(-(-seqlen_k // case.page_size)):
            keys = seen[page * case.page_size : (page + 1) * case.page_size]
            for slot in (~keys).nonzero().flatten().tolist():
                for cache in (k_cache, v_cache):  # float8 has no fill
                    cache[int(table[b, page]), slot].copy_(torch.tensor(NAN).to(cache))
            if not keys.any():
                table[b, page] = entry
    return replace(inputs, k_cache=k_cache, v_cache=v_cache, block_table=table)


PAGED_SEQLENS = (
    {"seqlens_q": (1, 1), "seqlens_k": (300, 3)},
    {"seqlens_q": (1, 1), "seqlens_k": (700, 40)},
    {"seqlens_q": (5, 5), "seqlens_k": (280, 5)},
    {"seqlens_q": (60, 60), "seqlens_k": (200, 70)},
    {"seqlens_q": (3, 0, 40), "seqlens_k": (90, 20, 290), "packed_q": True},
)
PAGED_FIELDS: dict[str, Any] = {
    "lengths": PAGED_SEQLENS,
    "page_size": (1, 4, 16),
    "num_splits": (0, 1, 3),
    "heads_first": (False, True),
}
PAGED = [PagedCase(**fields) for fields in drawn(40, 3, **PAGED_FIELDS)]


@pytest.mark.sanitize
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_paged(backend: Backend, case: PagedCase) -> None:
    """What lies between the sink tokens and the window is NaN, or pages that do not exist."""
    case = backend.fitting(case)
    inputs = cases.make_paged(case, backend.device)
    expected = oracle.expected_paged(case)
    tolerance.check(attend(backend, case, inputs), expected, case.softcap)
    for entry in (-1, 2**31 - 1):
        gone = without_gap(case, inputs, entry)
        tolerance.check(attend(backend, case, gone), expected, case.softcap)


@pytest.mark.sanitize
@pytest.mark.parametrize("num_heads", [(8, 1), (16, 8)], ids=str)
@pytest.mark.parametrize("float8", [None, "per head"])
def test_decode_in_place(backend: Backend, num_heads: tuple[int, int], float8: str | None) -> None:
    """Decode over heads side by side, the CPU's reading in place, with holes inside a chunk."""
    for num_sink_tokens, window in ((3, 9), (30, 20), (70, 0), (1, 400)):
        case = PagedCase(
            seqlens_q=(1, 1), seqlens_k=(610, 100), **heads(*num_heads), head_dim=64,
            dtype=torch.bfloat16 if float8 else backend.dtype, float8=float8, causal=True,
            window_size=(window, 0), num_sink_tokens=num_sink_tokens,
        )  # fmt: skip
        gone = without_gap(case, cases.make_paged(case, backend.device), -1)
        tolerance.check(attend(backend, case, gone), oracle.expected_paged(case))


def test_appending_needs_no_pages_in_the_gap(backend: Backend) -> None:
    """New keys are written and seen; a table entry that is read must be a page, nothing written."""
    length, new, page_size = 57, 3, 4
    k = torch.randn(1, length + new, 2, 16).to(backend.dtype)
    v = torch.randn(1, length + new, 2, 16).to(backend.dtype)
    q = torch.randn(1, new, 4, 16).to(backend.dtype)
    table = torch.randperm(20)[None, :16].int()
    k_cache, v_cache = torch.full((2, 20, page_size, 2, 16), NAN, dtype=q.dtype).unbind()
    for j in range(length):
        place = int(table[0, j // page_size]), j % page_size
        k_cache[place], v_cache[place] = k[0, j], v[0, j]
    table[0, 2:12] = -5  # keys 8 to 47; the window begins at 57 - 8
    options = {"causal": True, "window_size": (8, 0), "num_sink_tokens": 5}
    tensors = [x.to(backend.device) for x in (q, k_cache, v_cache, k[:, length:], v[:, length:])]
    before = [x.clone() for x in tensors]
    if backend.name == "cpu":
        for column in (0, 1, 12):
            wrong = table.clone()
            wrong[0, column] = 20
            with pytest.raises(ValueError, match=rf"block_table\[0, {column}\] must be in \[0, "):
                backend.flash_attn_with_kvcache(*tensors, int32([length]), wrong, **options)
            with pytest.raises(ValueError, match=rf"block_table\[0, {column}\] must be in"):
                backend.flash_attn_with_kvcache(
                    *tensors[:3], None, None, int32([length + new]), wrong, **options
                )
        for tensor, old in zip(tensors, before, strict=True):
            torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)
    out, lse = backend.flash_attn_with_kvcache(
        *tensors, int32([length], backend.device), table.to(backend.device), **options
    )
    ref_out, ref_lse = reference.attention(q.double(), k.double(), v.double(), **options)
    torch.testing.assert_close(out.cpu(), ref_out.to(q), **tolerance.short_rows(q.dtype))
    torch.testing.assert_close(lse.cpu(), ref_lse.float(), rtol=1e-4, atol=1e-5)


# ---- autograd, the compiler, refusals ----


@pytest.mark.parametrize("num_sink_tokens", [1, 3])
def test_gradcheck(num_sink_tokens: int) -> None:
    q, k, v = (torch.randn(1, 6, n, 5, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1))
    s_aux = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attn_func(
            q, k, v, causal=True, window_size=(1, 0), s_aux=s_aux, return_lse=True,
            num_sink_tokens=num_sink_tokens,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (q, k, v, s_aux))


def test_compiled() -> None:
    """fullgraph, forward and backward, dense and paged."""
    options = {"causal": True, "window_size": (4, 0), "num_sink_tokens": 2}

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, **options).square().sum()

    q, k, v = (torch.randn(1, 20, 2, 8, requires_grad=True) for _ in range(3))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(q, k, v), (q, k, v)),
        torch.autograd.grad(loss(q, k, v), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)

    def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_with_kvcache(q, k, v, **options)

    q, k, v = q.detach(), k.detach(), v.detach()
    call = torch.compile(decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(q, k, v), decode(q, k, v))


CALLS: dict[str, Callable[..., Any]] = {
    "dense": lambda x, **kw: flash_attn_func(x, x, x, **kw),
    "varlen": lambda x, **kw: flash_attn_varlen_func(
        x[0], x[0], x[0], int32([0, 5]), int32([0, 5]), 5, 5, **kw
    ),
    "kvcache": lambda x, **kw: flash_attn_with_kvcache(x, x, x, **kw),
}


@pytest.mark.parametrize("name", CALLS)
def test_refusals(name: str) -> None:
    x = torch.randn(1, 5, 2, 8)
    with pytest.raises(ValueError, match="num_sink_tokens must be at least 0.*got -1"):
        CALLS[name](x, num_sink_tokens=-1)
    for wrong in (1.0, True, None, torch.tensor(1)):
        with pytest.raises(TypeError, match="num_sink_tokens must be an int"):
            CALLS[name](x, num_sink_tokens=wrong)


def test_the_operator_refuses_too() -> None:
    x = torch.randn(1, 5, 2, 8)
    with pytest.raises(ValueError, match="num_sink_tokens must be at least 0.*got -3"):
        torch.ops.sink_attention_ext.flash_attn_fwd(x, x, x, None, 1.0, True, 2, 0, 0.0, False, -3)
    assert not supports(dtype=torch.float32, head_dim=8, num_sink_tokens=-1)
