"""The tolerance rule and the oracle. test_fault_injection.py, too, shows what they reject."""

from __future__ import annotations

import math

import cases
import pytest
import tolerance
import torch
from cases import DenseCase, Inputs
from oracle import Expected, Results
from torch import Tensor

from sink_attention_ext import reference

# ---- the oracle itself ----


def literal_attention(case: DenseCase, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """DESIGN section 1 in Python numbers, one row and one key at a time."""
    visible = cases.is_visible_literally(case)
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    out = torch.zeros(case.batch, case.seqlen_q, case.num_heads_q, case.dim_v, dtype=torch.float64)
    lse = torch.zeros(case.batch, case.num_heads_q, case.seqlen_q, dtype=torch.float64)
    group = case.num_heads_q // case.num_heads_kv
    for b in range(case.batch):
        for h in range(case.num_heads_q):
            sink = -math.inf if inputs.s_aux is None else float(inputs.s_aux[h])
            for i in range(case.seqlen_q):
                total = math.exp(sink)
                for j in range(case.seqlen_k):
                    if not visible[i, j]:
                        continue
                    s = scale * float(inputs.q[b, i, h] @ inputs.k[b, j, h // group])
                    if case.softcap > 0:
                        s = case.softcap * math.tanh(s / case.softcap)
                    total += math.exp(s)
                    out[b, i, h] += math.exp(s) * inputs.v[b, j, h // group]
                out[b, i, h] /= total if total > 0 else 1
                lse[b, h, i] = math.log(total) if total > 0 else -math.inf
    return out, lse


@pytest.mark.parametrize("sink", ["none", "normal"])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("mask", cases.MASKS[:3] + cases.MASKS[7:], ids=str)
@pytest.mark.parametrize("seqlens", [(4, 7), (7, 4), (3, 0), (1, 1)], ids=str)
def test_reference_is_the_formula(
    seqlens: tuple[int, int], mask: dict, softcap: float, sink: str
) -> None:
    case = DenseCase(
        seqlen_q=seqlens[0],
        seqlen_k=seqlens[1],
        batch=2,
        num_heads_q=4,
        num_heads_kv=2,
        head_dim=5,
        head_dim_v=3,
        dtype=torch.float64,
        softcap=softcap,
        sink=sink,
        **mask,
    )
    inputs = cases.make_dense(case)
    out, lse = reference.attention(
        inputs.q, inputs.k, inputs.v, s_aux=inputs.s_aux, **case.options()
    )
    literal_out, literal_lse = literal_attention(case, inputs)
    torch.testing.assert_close(out, literal_out, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lse, literal_lse, rtol=1e-12, atol=1e-14)


# ---- the rule ----


def numbers() -> tuple[Tensor, Tensor, Tensor]:
    ref = torch.randn(6, 5, dtype=torch.float64)
    pt = ref.to(torch.bfloat16)
    return pt.clone(), ref, pt


def test_rule_accepts_rounding_and_rejects_three_times_it() -> None:
    actual, ref, pt = numbers()
    tolerance.assert_close("x", actual, ref, pt)
    actual[2, 3] = ref[2, 3] + 3 * (pt.double() - ref).abs().max() + tolerance._ulps(ref, pt.dtype)
    with pytest.raises(AssertionError, match=r"x: max error .* worst at \[2, 3\] of \(6, 5\)"):
        tolerance.assert_close("x", actual, ref, pt)


def test_rule_rejects_many_small_errors_behind_one_large() -> None:
    ref = torch.full((1000,), 0.01, dtype=torch.float64)
    ref[0] = 100
    pt = ref.to(torch.bfloat16)
    actual = (ref * 1.05).to(torch.bfloat16)
    actual[0] = pt[0]
    with pytest.raises(AssertionError, match="x: mean error"):
        tolerance.assert_close("x", actual, ref, pt)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rule_rejects_misplaced_infinities_and_nan(value: float) -> None:
    actual, ref, pt = numbers()
    actual[4, 1] = value
    with pytest.raises(AssertionError, match=r"1 of 30 places differ in .*worst at \[4, 1\]"):
        tolerance.assert_close("x", actual, ref, pt)
    ref[4, 1] = value
    tolerance.assert_close("x", actual, ref, pt)


def test_rule_rejects_another_shape_dtype_or_set_of_results() -> None:
    actual, ref, pt = numbers()
    with pytest.raises(AssertionError, match="shape"):
        tolerance.assert_close("x", actual[:5], ref, pt)
    lse = ref.float()
    expected = Expected(Results(ref, ref), Results(pt, lse), {})
    tolerance.check(Results(pt, lse), expected)
    with pytest.raises(AssertionError, match="out: torch.float32"):
        tolerance.check(Results(pt.float(), lse), expected)
    with pytest.raises(AssertionError):
        tolerance.check(Results(pt, lse, dq=pt), expected)


def test_lse_is_compared_as_float32() -> None:
    """The error of a bfloat16 score would be a thousand times too much."""
    ref = torch.linspace(-3, 12, 50, dtype=torch.float64)
    tolerance.assert_lse_close(ref.float(), ref)
    actual = ref.float()
    actual[7] += 1e-3
    with pytest.raises(AssertionError, match=r"lse: 1 of 50 errors .* worst at \[7\]"):
        tolerance.assert_lse_close(actual, ref)
