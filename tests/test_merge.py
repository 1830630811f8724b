"""Merging partial results: vLLM's test matrix, empty parts, gradients, and attention in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from backends import Backend
from cases import FLOAT_DTYPES, INF, NAN, DenseCase, PagedCase
from torch import Tensor

from sink_attention_ext import apply_sink

Parts = tuple[list[Tensor], list[Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class MergeCase:
    rows: tuple[int, ...]  # (tokens,) or (batch, seqlen)
    num_heads: int
    head_dim: int
    num_parts: int = 2
    dtype: torch.dtype = torch.float32
    sink: str = "normal"
    sink_dtype: torch.dtype = torch.float32
    empty: bool = True  # a tenth of the lse values is infinite, the outputs there are NaN
    seed: int = 0


def make(case: MergeCase, device: str = "cpu") -> Parts:
    rng = cases.generator(case.seed)
    lse_dtype = torch.promote_types(case.dtype, torch.float32)
    outs, lses = [], []
    for _ in range(case.num_parts):
        out = cases.normal((*case.rows, case.num_heads, case.head_dim), rng, case.dtype)
        lse = cases.normal((*case.rows[:-1], case.num_heads, case.rows[-1]), rng, lse_dtype) * 3
        if case.empty:
            chance = torch.rand(lse.shape, generator=rng)
            lse[chance < 0.1] = -INF
            lse[chance < 0.05] = INF
            out[lse.isinf().transpose(-1, -2)] = NAN
        outs.append(out)
        lses.append(lse)
    sinks = cases.AttentionCase(
        num_heads_q=case.num_heads, sink=case.sink, sink_dtype=case.sink_dtype
    )
    s_aux = cases.make_sinks(sinks, rng)
    moved = [[part.to(device) for part in parts] for parts in (outs, lses)]
    return *moved, None if s_aux is None else s_aux.to(device)


def formula(outs: list[Tensor], lses: list[Tensor], s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    """out = sum of exp(lse_p - lse) out_p with lse = log(sum of exp(lse_p) + exp(s_aux))."""
    logits = torch.stack(lses)
    is_empty = logits.isinf()
    logits = logits.masked_fill(is_empty, -INF)
    takes_all = torch.zeros_like(is_empty[0])
    if s_aux is not None:
        sink = s_aux.to(logits.dtype)[:, None].expand_as(logits[0])
        takes_all = sink == INF
        logits = torch.cat([logits, sink.masked_fill(takes_all, 0.0)[None]])
    is_nothing = (logits == -INF).all(0)
    lse = torch.logsumexp(logits.masked_fill(is_nothing, 0.0), dim=0)
    weights = torch.exp(logits - lse)[: len(outs)].masked_fill(takes_all | is_nothing, 0.0)
    lse = lse.masked_fill(is_nothing, -INF)
    if s_aux is not None:
        lse = torch.where(takes_all, sink, lse)
    values = torch.stack(outs).masked_fill(is_empty.transpose(-1, -2).unsqueeze(-1), 0.0)
    weights = weights.transpose(-1, -2).unsqueeze(-1).to(values.dtype)
    return (weights * values).sum(0), lse


def check_merge(backend: Backend, case: MergeCase) -> None:
    outs, lses, s_aux = make(case)

    def double(tensors: list[Tensor]) -> list[Tensor]:
        return [x.double() for x in tensors]

    ref = formula(double(outs), double(lses), None if s_aux is None else s_aux.double())
    pt = formula(outs, lses, s_aux)
    out, lse = backend.merge_attn_states(*make(case, backend.device))
    assert out.dtype == case.dtype
    tolerance.assert_close("out", out, ref[0], pt[0])
    tolerance.assert_lse_close(lse, ref[1])


def vllm_cases() -> list[MergeCase]:
    drawn = cases.draw(
        48,
        7,
        rows=((256,), (512,), (613,), (1024,), (1536,), (4096,), (3, 128), (2, 97)),
        num_heads=(4, 8, 16, 32, 48, 64),
        head_dim=(32, 48, 64, 96, 128, 256),
        dtype=(torch.float32, torch.float16, torch.bfloat16),
        sink=("none", "normal", "mixed", "normal"),
        sink_dtype=(torch.float32, torch.bfloat16),
        num_parts=(2, 2, 3),
    )
    for i, fields in enumerate(drawn):  # the largest few would take seconds each
        if fields["rows"] == (4096,):
            fields["num_heads"] = min(fields["num_heads"], 8)
        fields["seed"] = i
    return [MergeCase(**fields) for fields in drawn]


@pytest.mark.parametrize("case", vllm_cases(), ids=str)
def test_vllm_matrix(backend: Backend, case: MergeCase) -> None:
    check_merge(backend, case)


@pytest.mark.sanitize
@pytest.mark.parametrize("sink", cases.SINKS)
@pytest.mark.parametrize("num_parts", [1, 2, 5])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_sinks_and_parts(backend: Backend, dtype: torch.dtype, num_parts: int, sink: str) -> None:
    for i, (rows, head_dim) in enumerate((((5,), 1), ((2, 9), 33), ((0,), 8), ((1, 300), 17))):
        case = MergeCase(
            rows=rows,
            num_heads=5,
            head_dim=head_dim,
            num_parts=num_parts,
            dtype=dtype,
            sink=sink,
            seed=i,
        )
        check_merge(backend, case)


def test_head_dim_is_not_limited(backend: Backend) -> None:
    check_merge(backend, MergeCase(rows=(7,), num_heads=2, head_dim=700))


@pytest.mark.parametrize("far", [1e4, -1e4, 88.0, -88.0])
def test_lse_far_from_zero(backend: Backend, far: float) -> None:
    """exp(lse) overflows or vanishes; only differences may be taken."""
    outs, lses, s_aux = make(MergeCase(rows=(40,), num_heads=4, head_dim=8, empty=False))
    near = backend.merge_attn_states(outs, lses, s_aux)
    moved = backend.merge_attn_states(outs, [lse + far for lse in lses], s_aux + far)
    torch.testing.assert_close(moved[0], near[0], rtol=0, atol=1e-6 * abs(far))
    torch.testing.assert_close(moved[1], near[1] + far, rtol=1e-6, atol=1e-6)


def test_order_of_parts_does_not_matter(backend: Backend) -> None:
    outs, lses, s_aux = make(MergeCase(rows=(60,), num_heads=4, head_dim=8, num_parts=4))
    out, lse = backend.merge_attn_states(outs, lses, s_aux)
    again = backend.merge_attn_states(outs[::-1], lses[::-1], s_aux)
    torch.testing.assert_close(again[0], out)
    torch.testing.assert_close(again[1], lse)


def test_nan_in_nan_out(backend: Backend) -> None:
    outs, lses, s_aux = make(MergeCase(rows=(6,), num_heads=2, head_dim=8, empty=False))
    lses[1][0, 3] = NAN
    out, lse = backend.merge_attn_states(outs, lses, s_aux)
    assert out[3, 0].isnan().all() and lse[0, 3].isnan()
    assert int(out.isnan().any(-1).sum()) == 1 and int(lse.isnan().sum()) == 1


@pytest.mark.parametrize("sink", ["none", "normal", "mixed"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_gradients(backend: Backend, dtype: torch.dtype, sink: str) -> None:
    case = MergeCase(rows=(2, 30), num_heads=5, head_dim=12, num_parts=3, dtype=dtype, sink=sink)
    outs, lses, s_aux = make(case, backend.device)
    dout = torch.randn_like(outs[0])
    dlse = torch.randn_like(lses[0])

    def gradients(merge: Any, exact: bool) -> list[Tensor]:
        kind = {"dtype": torch.float64} if exact else {}
        leaves = [x.detach().clone().to(**kind).requires_grad_() for x in (*outs, *lses)]
        sinks = [] if s_aux is None else [s_aux.clone().to(**kind).requires_grad_()]
        out, lse = merge(leaves[:3], leaves[3:], sinks[0] if sinks else None)
        grads = (dout.to(out.dtype), dlse.to(lse.dtype))
        return list(torch.autograd.grad([out, lse], leaves + sinks, grads))

    actual = gradients(backend.merge_attn_states, exact=False)
    ref, pt = gradients(formula, exact=True), gradients(formula, exact=False)
    names = [*(f"douts[{i}]" for i in range(3)), *(f"dlses[{i}]" for i in range(3)), "ds_aux"]
    # The backward starts from out as it was rounded, the formula from out as it was summed.
    out, _ = formula(outs, lses, s_aux)
    rounding = (dout * out).double().norm(dim=-1).transpose(-1, -2) * torch.finfo(dtype).eps / 2
    noise = [None] * 3 + [rounding.cpu()] * 3 + [rounding.norm(dim=(0, 2)).cpu()]
    for name, a, r, p, n in zip(names, actual, ref, pt, noise, strict=False):
        tolerance.assert_close(name, a, r, p, noise=n)


# ---- attention in pieces ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [(100,), (64, 65), (1, 128, 256)], ids=str)
def test_pieces_merged_with_the_sink_are_the_whole(
    backend: Backend, cuts: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Forward and backward: attention over pieces of the keys without the sink, then one merge."""
    case = DenseCase(
        seqlen_q=50, seqlen_k=300, batch=2, num_heads_q=4, num_heads_kv=2, head_dim=32, dtype=dtype
    )
    inputs = cases.make_dense(case, backend.device)

    def in_pieces(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor, **kw: Any) -> Any:
        bounds = (0, *cuts, case.seqlen_k)
        parts = [
            backend.flash_attn(q, k[:, start:end], v[:, start:end], **kw)
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]
        outs, lses = zip(*parts, strict=True)
        return backend.merge_attn_states(outs, lses, s_aux)

    actual = oracle.run(in_pieces, inputs, case.options())
    expected = oracle.expected(case)
    # A piece's output is rounded before it is merged, and so is its gradient.
    tolerance.check(actual, expected, softcap=1.0)


def test_pieces_of_a_causal_prefill(backend: Backend) -> None:
    """Keys of the past seen whole and keys of the present causally, as a chunked prefill does."""
    case = DenseCase(seqlen_q=40, seqlen_k=200, num_heads_q=4, causal=True)
    inputs = cases.make_dense(case, backend.device)
    past = backend.flash_attn(inputs.q, inputs.k[:, :160], inputs.v[:, :160])
    present = backend.flash_attn(inputs.q, inputs.k[:, 160:], inputs.v[:, 160:], causal=True)
    merged = backend.merge_attn_states([past[0], present[0]], [past[1], present[1]], inputs.s_aux)
    expected = oracle.expected(case, gradients=False)
    tolerance.assert_close("out", merged[0], expected.ref.out, expected.pt.out, softcap=1.0)
    tolerance.assert_lse_close(merged[1], expected.ref.lse)


@pytest.mark.parametrize("sink", cases.SINKS)
def test_pieces_of_a_cache_without_visible_keys(backend: Backend, sink: str) -> None:
    """A part in which a sequence has no key has lse -inf: it takes no share."""
    case = PagedCase(seqlens_q=(1, 1), seqlens_k=(90, 0), num_heads_q=5, sink=sink)
    inputs = cases.make_paged(case, backend.device)
    q, k_cache, v_cache = inputs.q, inputs.k_cache, inputs.v_cache
    parts = []
    for table, seqlens in (
        (inputs.block_table, [32, 0]),
        (inputs.block_table[:, 2:], [58, 0]),
    ):
        lengths = cases.int32(seqlens, backend.device)
        parts.append(
            backend.flash_attn_with_kvcache(
                q, k_cache, v_cache, cache_seqlens=lengths, block_table=table
            )
        )
    out, lse = backend.merge_attn_states([p[0] for p in parts], [p[1] for p in parts], inputs.s_aux)
    tolerance.check(oracle.Results(out, lse), oracle.expected_paged(case), softcap=1.0)


@pytest.mark.parametrize("sink", ["normal", "4randn", "above", "below", "inf", "-inf", "mixed"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_apply_sink_equals_the_sink_in_the_kernel(
    backend: Backend, dtype: torch.dtype, sink: str
) -> None:
    """Output, lse and every gradient, through the gradient of lse; rows without a key too."""
    case = DenseCase(
        seqlen_q=60,
        seqlen_k=50,
        num_heads_q=10,
        num_heads_kv=2,
        head_dim=32,
        dtype=dtype,
        causal=True,
        sink=sink,
    )
    inputs = cases.make_dense(case, backend.device)

    def rescaled(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor, **kw: Any) -> Any:
        return apply_sink(*backend.flash_attn(q, k, v, **kw), s_aux)

    actual = oracle.run(rescaled, inputs, case.options())
    tolerance.check(actual, oracle.expected(case), softcap=1.0)
