"""float8_e4m3fn q, k and v with descales, against the formula in float64 on the values that they
stand for.

Dequantised, in float32 or on other cards than Hopper's in bfloat16, results are as exact as others,
and rounded to bfloat16. Hopper's kernel also rounds P to e4m3, and its tensor
cores cut sums of 8-bit products (tests/emulator/wgmma_float8.cpp), which bounds its errors as
follows.

Before the division by the row's sum, the largest P of a row is 2^8. It is less where a later block
held a larger score, which the division corrects. e4m3 has 4 significant bits from 2^-6 on, so
rounding is off by a factor of up to 1 +- 2^-4. Below, its values are 2^-9 apart, so rounding is off
by up to 2^-10, that is 2^-18 of the row's largest P. The sum is taken of P before it is rounded.
With p the softmax, out = sum_j p_j v_j is off by sum_j d_j v_j where

    |d_j|  <=  e_j  =  max(2^-4 p_j, 2^-18 max p)

The signs of the d_j are as good as random, so by Hoeffding's inequality the sum exceeds
t * sqrt(sum_j (e_j v_j)^2) with a probability of at most 2 exp(-t^2 / 2): 2e-8 for t = 6. (On
average it is at most 1 / 1.7 of the square root, the deviation of what is spread evenly.) bfloat16
adds 2^-8 of the result at most, float32 what `assert_lse_close` allows the lse.

A step of the tensor cores, 32 products deep, cuts each term toward zero by up to 2^-13 of the
largest one, and the sum so far by 2^-13 of itself. Cuts of terms have their terms' signs, of both
kinds in these inputs.

* Scores, one sum of head_dim products: to 2^-13 of sum_d |q_d k_d| for each step. (lse, off by the
  mean of that over p, was off by up to 0.91 of it in 2 * 10^5 rows of normal values.)
  out is off by the same mean of what v is off from out.
* O, a sum for each block of 128 keys or fewer, four steps: with m = sum_j |p_j v_j| the sums take
  4 * 2^-13 m at most, and the terms are 128 more of up to 2^-13 m whose signs are random.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import cases
import emulated
import pytest
import torch
from backends import EMULATED, Backend
from cases import DenseCase, VarlenCase
from tolerance import assert_close, assert_lse_close
from torch import Tensor

from sink_attention_ext import (
    flash_attn_func,
    flash_attn_varlen_func,
    fp8,
    ops,
    reference,
    support,
    supports,
)

pytestmark = pytest.mark.sm90

FLOAT8 = torch.float8_e4m3fn
T = 6


def descale(shape: tuple[int, int], kind: str | None, rng: torch.Generator) -> Tensor | None:
    if kind is None:
        return None
    factor = torch.rand(shape, generator=rng) + 0.5
    if kind == "signs":
        factor[:, ::2] *= -1
    if kind == "zero":
        factor[0, 0] = 0.0
    return factor


def times(stored: Tensor, factor: Tensor | None) -> Tensor:
    """In float64; stored (seqlen, heads, dim), factor (num_heads_kv,)."""
    stored = stored.double()
    if factor is None:
        return stored
    return stored * factor.double().repeat_interleave(stored.shape[1] // len(factor))[:, None]


def check_sequence(
    out: Tensor, lse: Tensor, qkv: tuple[Tensor, ...], s_aux: Tensor | None, on_hopper: bool,
    dtype: torch.dtype, options: dict[str, Any],
) -> None:  # fmt: skip
    """One sequence (seqlen, heads, dim) of dequantised float64 values, computed in `dtype`."""
    q, k, v = (x[None] for x in qkv)
    s_aux = None if s_aux is None else s_aux.double()

    def attend(values: Tensor) -> tuple[Tensor, Tensor]:
        return reference.attention(q, k, values, s_aux=s_aux, **options)

    ref, ref_lse = attend(v)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    if not on_hopper or k.shape[1] == 0:
        assert_lse_close(lse, ref_lse[0])
        pt, _ = reference.attention(*(x.to(dtype) for x in (q, k, v)), s_aux=s_aux, **options)
        assert_close("out", out, ref[0], pt[0].bfloat16())
        return
    seqlen, head_dim = k.shape[1], q.shape[3]
    one_of = torch.eye(seqlen, dtype=torch.float64)[None, :, None].expand(-1, -1, k.shape[2], -1)
    p = attend(one_of)[0][0]  # (seqlen_q, heads, seqlen_k)
    k_size, v_size = (x[0].abs().repeat_interleave(q.shape[2] // k.shape[2], 1) for x in (k, v))
    scale, steps = options["softmax_scale"], math.ceil(head_dim / 32)
    scale = head_dim**-0.5 if scale is None else abs(scale)
    cut = scale * steps * 2.0**-13 * torch.einsum("ihd,jhd->ihj", q[0].abs(), k_size)
    lse_cut = (p * cut).sum(-1)
    nearest = ref_lse[0].clamp(lse - lse_cut.T, lse + lse_cut.T)  # that the cuts allow
    assert_lse_close(nearest.to(lse.dtype), ref_lse[0])
    e = torch.where(p > 0, (2.0**-18 * p.amax(-1, keepdim=True)).maximum(2.0**-4 * p), 0.0)
    m = torch.einsum("ihj,jhd->ihd", p, v_size)
    cut_terms = min(seqlen, 128) * (2.0**-13 * m).square()
    spread = (torch.einsum("ihj,jhd->ihd", e.square(), v_size.square()) + cut_terms).sqrt()
    error = (out.double() - ref[0]).abs()
    cut_sums = 2.0**-11 * m + torch.einsum("ihj,jhd->ihd", p * cut, v_size)
    other = 2.0**-8 * ref[0].abs() + 1e-5 + cut_sums + lse_cut[..., None] * ref[0].abs()
    assert (error <= T * spread + other).all(), float((error / (T * spread + other)).max())
    assert error.sum() <= (spread / 1.7 + other).sum()


def check(
    backend: Backend,
    case: DenseCase | VarlenCase,
    kinds: tuple[str | None, ...] = ("plain",) * 3,
    taken: bool = True,
) -> None:
    """kinds: of q_descale, k_descale and v_descale. taken: Hopper has a kernel for it."""
    packed = isinstance(case, VarlenCase)
    make = cases.make_varlen if packed else cases.make_dense
    inputs = make(replace(case, layout="contiguous"))
    rng = cases.generator(case.seed + 1)
    batch = len(case.seqlens_q) if packed else case.batch
    q, k, v = (x.to(FLOAT8) for x in (inputs.q, inputs.k, inputs.v))
    factors = [descale((batch, case.num_heads_kv), kind, rng) for kind in kinds]
    on_device = [None if x is None else x.to(backend.device) for x in (*factors, inputs.s_aux)]
    names = ("q_descale", "k_descale", "v_descale", "s_aux")
    options = case.options() | dict(zip(names, on_device, strict=True))
    qkv = [cases.with_layout(x.to(backend.device), case.layout) for x in (q, k, v)]
    lengths = [x.to(backend.device) if isinstance(x, Tensor) else x for x in inputs.lengths]
    before = emulated.blocks_run() if backend.name in EMULATED else None
    if packed:
        used = inputs.seqused_k
        used = None if used is None else used.to(backend.device)
        out, lse = backend.flash_attn_varlen(*qkv, *lengths, seqused_k=used, **options)
    else:
        out, lse = backend.flash_attn(*qkv, **options)
    hopper = backend.is_hopper and taken
    dtype = fp8.computed_in(torch.device(backend.device))
    if before is not None:
        blocks = emulated.blocks_run() - before
        family = "sm90" if hopper else "simt" if dtype == torch.float32 else "sm80"
        assert [name for name in emulated.FAMILIES if blocks[name] > 0] == [family]
    out, lse = out.cpu(), lse.cpu()
    if not packed:
        sequences = [(out[b], lse[b], (q[b], k[b], v[b])) for b in range(batch)]
    else:
        ends_q, ends_k = (x.tolist() for x in inputs.lengths[:2])
        assert (out[ends_q[-1] :] == 0).all() and (lse[:, ends_q[-1] :] == -torch.inf).all()
        sequences = []
        for b, keys in enumerate(case.seqlens_k):
            rows = slice(ends_q[b], ends_q[b + 1])
            seen = slice(ends_k[b], ends_k[b] + keys)
            sequences.append((out[rows], lse[:, rows], (q[rows], k[seen], v[seen])))
    for b, (out_b, lse_b, stored) in enumerate(sequences):
        values = [
            times(x, None if f is None else f[b]) for x, f in zip(stored, factors, strict=True)
        ]
        if not hopper:  # which are rounded where they are dequantised
            values = [x.to(dtype).double() for x in values]
        check_sequence(out_b, lse_b, tuple(values), inputs.s_aux, hopper, dtype, case.options())


def dense(**fields: Any) -> DenseCase:
    return DenseCase(dtype=torch.bfloat16, **fields)  # of the values that become float8


CASES = [
    # Several blocks of keys, so that ring buffers wrap, and more work tiles than thread blocks.
    dense(seqlen_q=70, seqlen_k=650, batch=2, num_heads_q=3, num_heads_kv=3, causal=True, seed=1),
    dense(seqlen_q=33, seqlen_k=450, num_heads_q=5, head_dim=128, causal=True, seed=2),
    dense(seqlen_q=40, seqlen_k=300, num_heads_q=4, num_heads_kv=2, head_dim=256, seed=3),
    dense(seqlen_q=300, seqlen_k=300, head_dim=128, window_size=(40, 0), num_sink_tokens=5, seed=4),
    dense(seqlen_q=20, seqlen_k=200, head_dim=80, head_dim_v=48, softcap=3.0, sink="none", seed=5),
    dense(  # few large P
        seqlen_q=50, seqlen_k=130, head_dim=64, softmax_scale=2.0, causal=True, seed=6
    ),
    dense(seqlen_q=50, seqlen_k=20, head_dim=48, causal=True, sink="none", seed=7),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense(backend: Backend, case: DenseCase) -> None:
    check(backend, case)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed(backend: Backend, head_dim: int) -> None:
    """Empty sequences, and NaN in all that no sequence has."""
    case = VarlenCase(
        dtype=torch.bfloat16,
        seqlens_q=(5, 0, 70, 3), seqlens_k=(200, 9, 140, 0), unused_k=(3, 0, 20, 1), extra_rows=4,
        num_heads_q=6, num_heads_kv=2, head_dim=head_dim, causal=True, window_size=(150, 0),
    )  # fmt: skip
    check(backend, case)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_lengths_far_apart(backend: Backend, head_dim: int) -> None:
    """Many tiles without rows, a few whose rows see no key, and short ones between long ones."""
    case = VarlenCase(
        dtype=torch.bfloat16,
        seqlens_q=(1, *(0,) * 40, 300, 2, 0, 5, 150), seqlens_k=(9, *(3,) * 40, 300, 7, 0, 0, 160),
        num_heads_q=4, num_heads_kv=2, head_dim=head_dim, window_size=(40, 0),
    )  # fmt: skip
    check(backend, case, ("plain", "signs", "plain"))


@pytest.mark.parametrize(
    "kinds",
    [(None, None, None), (None, "plain", None), ("signs", "plain", "signs"), ("zero",) * 3],
    ids=str,
)
def test_descales(backend: Backend, kinds: tuple[str | None, ...]) -> None:
    case = dense(seqlen_q=9, seqlen_k=40, batch=2, num_heads_q=4, num_heads_kv=2, causal=True)
    check(backend, case, kinds)
    check(backend, replace(case, softcap=2.0), kinds)


@pytest.mark.no_sm90_blocks("as its name says")
@pytest.mark.parametrize("change", [{"head_dim": 40}, {"layout": "unaligned"}], ids=str)
def test_what_hopper_has_no_kernel_for(backend: Backend, change: dict[str, Any]) -> None:
    check(backend, dense(seqlen_q=9, seqlen_k=40, **change), taken=False)


@pytest.mark.not_on_sm90("it has a kernel")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_bfloat16(backend: Backend, case: DenseCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on cards without kernels for it."""
    monkeypatch.setattr(fp8, "computed_in", lambda device: torch.bfloat16)
    check(backend, case)


def as_descales(factors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("q_descale", "k_descale", "v_descale"), factors, strict=True))


def test_compiled() -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, n, h, 16).to(FLOAT8) for n, h in ((5, 4), (7, 2), (7, 2)))
    factors = as_descales([torch.rand(2, 2) + 0.5 for _ in range(3)])
    cu_seqlens_q, cu_seqlens_k = cases.int32([0, 5, 10]), cases.int32([0, 7, 14])

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        dense = flash_attn_func(q, k, v, causal=True, **factors)
        packed = flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q, cu_seqlens_k, 5, 7, causal=True,
            **factors,
        )  # fmt: skip
        return dense, packed.view_as(dense)

    dense, packed = torch.compile(both, backend="aot_eager", fullgraph=True)(q, k, v)
    assert torch.equal(dense, packed) and torch.equal(dense, both(q, k, v)[0])
    torch._dynamo.reset()


def test_autocast_leaves_float8_alone() -> None:
    q, k, v = (torch.randn(1, 6, 2, 16).to(FLOAT8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn_func(q, k, v, v_descale=torch.full((1, 2), 2.0))
    assert torch.equal(out, flash_attn_func(q, k, v, v_descale=torch.full((1, 2), 2.0)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(2, 7, 2, 16)}, TypeError, "k must have the dtype of q"),
        ({"q": torch.zeros(2, 5, 4, 16)}, TypeError, "k must have the dtype of q"),
        ({"q_descale": torch.ones(2, 4)}, ValueError, r"q_descale .*\(2, 2\); got \(2, 4\)"),
        ({"k_descale": torch.ones(2)}, ValueError, "k_descale must have shape"),
        ({"v_descale": torch.ones(2, 2).double()}, TypeError, "v_descale .*float32; got .*float64"),
        ({"v_descale": 1.0}, TypeError, "v_descale must be None or a torch.Tensor"),
        ({"s_aux": torch.zeros(4, requires_grad=True)}, RuntimeError, "use bfloat16 q, k and v"),
        ({"k_descale": torch.ones(2, 2, requires_grad=True)}, RuntimeError, "not differentiable"),
    ],
    ids=str,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = (torch.zeros(2, n, h, 16).to(FLOAT8) for n, h in ((5, 4), (7, 2), (7, 2)))
    with pytest.raises(error, match=message):
        flash_attn_func(**{"q": q, "k": k, "v": v} | change)


def test_descales_are_for_float8() -> None:
    q, ones = torch.zeros(4, 2, 16), torch.ones(1, 2)
    cu_seqlens = cases.int32([0, 4])
    with pytest.raises(TypeError, match="q_descale must be None unless .* q has torch.float32"):
        flash_attn_func(q[None], q[None], q[None], q_descale=ones)
    with pytest.raises(TypeError, match="v_descale must be None unless .* q has torch.float32"):
        flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 4, 4, v_descale=ones)


def test_the_operator_checks_descales_too() -> None:
    q = torch.zeros(2, 5, 4, 16).to(FLOAT8)
    options = (None, 1.0, False, -1, -1, 0.0, 0)
    with pytest.raises(ValueError, match=r"k_descale must have shape .* = \(2, 4\); got \(2, 2\)"):
        ops.flash_attn_fp8_fwd(q, q, q, None, torch.ones(2, 2), None, *options)


@pytest.mark.no_sm90_blocks("it only asks")
def test_which_kernel(backend: Backend) -> None:
    def families(arch: int, head_dim: int = 64) -> str:
        return support.cuda_families(
            False, arch=arch, dtype=FLOAT8, kv_dtype=FLOAT8, head_dim=head_dim,
            head_dim_v=head_dim, num_heads_q=8, num_heads_kv=2, paged=False, tree_mask=False,
        )  # fmt: skip

    if backend.name in EMULATED:
        assert [families(90), families(80), families(90, 40)] == ["sm90-float8", "sm80", "sm90"]
    elif backend.device == "cpu":
        answer = supports(dtype=FLOAT8, head_dim=64)
        assert answer.kernel == f"cpu/{ops.cpu_instruction_set()}"
        assert "forward" in supports(dtype=FLOAT8, head_dim=64, backward=True).reason


@pytest.mark.not_on_sm90("Hopper has no kernels of its own that write caches")
def test_rounding_is_torchs(backend: Backend) -> None:
    """What the emulated kernels round P with (attention/numeric.h): every float16 value that
    e4m3 has room for, as a cache stores it."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    halves = halves[halves.abs() <= 448].view(-1, 1, 2)
    tokens = halves.to(backend.device)
    stored = torch.zeros(len(tokens), 1, 1, 2, dtype=FLOAT8, device=backend.device)
    one = torch.ones((), device=backend.device)
    slots = torch.arange(len(tokens), device=backend.device)
    backend.reshape_and_cache(tokens, tokens, stored, stored.clone(), slots, one, one)
    expected = halves.float().to(FLOAT8)
    assert torch.equal(
        stored.cpu().view(torch.uint8).flatten(), expected.view(torch.uint8).flatten()
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_small_p_counts(backend: Backend, head_dim: int) -> None:
    """600 keys of 2^-11 of the largest P, which e4m3 would round to 0 if that were 1."""
    q, k, v = (torch.ones(1, n, 1, head_dim).to(FLOAT8).to(backend.device) for n in (3, 601, 601))
    k[:, 1:] = 0
    v[:, 0] = 0
    scale = 11 * math.log(2) / head_dim
    out, lse = backend.flash_attn(q, k, v, softmax_scale=scale)
    largest, others = 2.0**11, 600.0
    expected = torch.full(out.shape, others / (largest + others))
    torch.testing.assert_close(out.cpu().float(), expected, rtol=2.0**-8, atol=0.0)
    assert_lse_close(lse.cpu(), torch.full(lse.shape, math.log(largest + others)).double())


def test_the_same_bits_alone_and_chunked(backend: Backend) -> None:
    q, k, v = (torch.randn(2, n, h, 64).to(FLOAT8) for n, h in ((150, 4), (300, 2), (300, 2)))
    q, k, v = (x.to(backend.device) for x in (q, k, v))
    factors = [torch.rand(2, 2, device=backend.device) + 0.5 for _ in range(3)]
    options = {"causal": True, "window_size": (130, 0)}
    out, lse = backend.flash_attn(q, k, v, **as_descales(factors), **options)
    alone = as_descales([factor[1:] for factor in factors])
    out_alone, lse_alone = backend.flash_attn(q[1:, -9:], k[1:], v[1:], **alone, **options)
    assert torch.equal(out[1:, -9:], out_alone) and torch.equal(lse[1:, :, -9:], lse_alone)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_rows_do_not_shrink(backend: Backend, head_dim: int) -> None:
    """Positive values: a single sum over 4100 keys, which the tensor cores cut at each step, would
    be 7% too small. Rounding P is off by 2^-4 of each at most, at random, so by less than
    2^-8 of the sum of so many."""
    rng = cases.generator(11)
    q, k = (torch.randn(1, n, 1, head_dim, generator=rng).to(FLOAT8) for n in (3, 4100))
    v = (torch.rand(1, 4100, 1, head_dim, generator=rng) + 1).to(FLOAT8)
    out, _ = backend.flash_attn(*(x.to(backend.device) for x in (q, k, v)))
    ref, _ = reference.attention(q.double(), k.double(), v.double())
    error = out.cpu().double() / ref - 1
    assert error.abs().max() < 2.0**-7
    assert error.mean().abs() < 2.0**-9
