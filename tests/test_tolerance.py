"""The tolerance rule, the oracle, and faults that the grid must notice.

A suite that can't fail shows nothing: each planted fault here is one that people have made, and the
comparison that every test of the grid uses must reject it, in float32 and in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import cases
import oracle
import pytest
import tolerance
import torch
from cases import DenseCase, Inputs
from conftest import Backend
from oracle import Expected, Results
from torch import Tensor

from sink_attention_ext import reference

CASE = DenseCase(
    seqlen_q=150,
    seqlen_k=130,
    batch=2,
    num_heads_q=6,
    num_heads_kv=3,
    head_dim=32,
    head_dim_v=24,
    window_size=(40, 7),
    softmax_scale=0.3,
)
Fault = Callable[[Backend, DenseCase, Inputs], Results]
FAULTS: dict[str, tuple[DenseCase, Fault]] = {}


def fault(case: DenseCase = CASE) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        FAULTS[function.__name__] = (case, function)
        return function

    return register


def attend(backend: Backend, case: DenseCase, inputs: Inputs, **options: object) -> Results:
    return oracle.run(backend.flash_attn, inputs, case.options() | options)


def with_sink(backend: Backend, case: DenseCase, inputs: Inputs, s_aux: Tensor | None) -> Results:
    """Results for other sinks, with the gradient that would come of them."""
    results = attend(backend, case, replace(inputs, s_aux=s_aux))
    return results if s_aux is not None else replace(results, ds_aux=torch.zeros_like(inputs.s_aux))


# ---- masks ----


@fault()
def window_left_is_one_too_wide(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return attend(backend, case, inputs, window_size=(41, 7))


@fault()
def window_left_is_one_too_narrow(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return attend(backend, case, inputs, window_size=(39, 7))


@fault()
def window_right_is_one_too_wide(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return attend(backend, case, inputs, window_size=(40, 8))


@fault(replace(CASE, seqlen_q=32, seqlen_k=2048, window_size=(1023, 0)))
def long_window_is_one_too_wide(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return attend(backend, case, inputs, window_size=(1024, 0))


@fault(replace(CASE, causal=True, window_size=(-1, -1)))
def causal_is_aligned_top_left(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return attend(backend, case, inputs, causal=False, window_size=(-1, 20))


@fault(replace(CASE, causal=True, window_size=(-1, -1)))
def causal_is_ignored(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return attend(backend, case, inputs, causal=False)


@fault(replace(CASE, window_size=(-1, -1), seqlen_q=20, seqlen_k=2000))
def last_key_is_left_out(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    cut = replace(inputs, k=inputs.k[:, :-1], v=inputs.v[:, :-1])
    results = attend(backend, case, cut)

    def pad(x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)

    return replace(results, dk=pad(results.dk), dv=pad(results.dv))


# ---- sinks ----


@fault()
def sink_is_dropped(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return with_sink(backend, case, inputs, None)


@fault()
def sink_is_scaled(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return with_sink(backend, case, inputs, inputs.s_aux * case.softmax_scale)


@fault()
def sink_enters_twice(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return with_sink(backend, case, inputs, inputs.s_aux + math.log(2))


@fault()
def sink_is_read_in_base_two(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return with_sink(backend, case, inputs, inputs.s_aux * math.log(2))


@fault()
def sinks_of_two_heads_are_swapped(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return with_sink(backend, case, inputs, inputs.s_aux[[1, 0, 2, 3, 4, 5]])


@fault(replace(CASE, softcap=3.0))
def sink_is_softcapped(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return with_sink(backend, case, inputs, 3 * torch.tanh(inputs.s_aux / 3))


@fault(replace(CASE, seqlen_q=20, seqlen_k=2000, window_size=(-1, -1)))
def sink_is_dropped_in_a_long_row(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return with_sink(backend, case, inputs, None)


# ---- lse, heads, scores ----


@fault()
def lse_leaves_the_sink_out(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    without = attend(backend, case, replace(inputs, s_aux=None))
    return replace(attend(backend, case, inputs), lse=without.lse)


@fault()
def lse_is_in_base_two(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    results = attend(backend, case, inputs)
    return replace(results, lse=results.lse / math.log(2))


@fault()
def heads_of_a_group_are_interleaved(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    """Query head h reads kv head h % num_heads_kv instead of h // group."""
    order = [0, 2, 4, 1, 3, 5]
    back = [order.index(h) for h in range(6)]
    swapped = replace(
        inputs,
        q=inputs.q[:, :, back],
        dout=inputs.dout[:, :, back],
        dlse=inputs.dlse[:, back],
        s_aux=inputs.s_aux[back],
    )
    results = attend(backend, case, swapped)
    return replace(
        results,
        out=results.out[:, :, order],
        lse=results.lse[:, order],
        dq=results.dq[:, :, order],
        ds_aux=results.ds_aux[order],
    )


@fault()
def scale_is_forgotten(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return attend(backend, case, inputs, softmax_scale=1.0)


@fault(replace(CASE, softcap=2.0))
def softcap_is_ignored(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return attend(backend, case, inputs, softcap=0.0)


@fault(replace(CASE, seqlen_k=100))
def a_row_without_keys_is_nan(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    results = attend(backend, case, inputs)
    results.out[0, 0] = math.nan
    return results


@fault()
def one_row_is_its_neighbour(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    results = attend(backend, case, inputs)
    results.out[1, 64, 3] = results.out[1, 65, 3]
    return results


@fault()
def one_column_is_stale(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    results = attend(backend, case, inputs)
    results.out[1, 128:, 5, -1] = 0
    return results


# ---- gradients ----


@fault()
def gradient_of_lse_is_ignored(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    return attend(backend, case, replace(inputs, dlse=torch.zeros_like(inputs.dlse)))


@fault()
def gradient_of_lse_has_the_wrong_sign(
    backend: Backend, case: DenseCase, inputs: Inputs
) -> Results:
    return attend(backend, case, replace(inputs, dlse=-inputs.dlse))


@fault()
def gradient_of_the_sink_has_the_wrong_sign(
    backend: Backend, case: DenseCase, inputs: Inputs
) -> Results:
    results = attend(backend, case, inputs)
    return replace(results, ds_aux=-results.ds_aux)


@fault()
def gradient_of_the_sink_misses_a_sequence(
    backend: Backend, case: DenseCase, inputs: Inputs
) -> Results:
    results = attend(backend, case, inputs)
    halves = [
        replace(inputs, q=q, k=k, v=v, dout=dout, dlse=dlse)
        for q, k, v, dout, dlse in zip(
            *(x.split(1) for x in (inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse)),
            strict=True,
        )
    ]
    return replace(results, ds_aux=attend(backend, case, halves[0]).ds_aux)


@fault()
def gradient_of_q_lacks_the_scale(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    results = attend(backend, case, inputs)
    return replace(results, dq=results.dq / case.softmax_scale)


@fault()
def gradient_of_k_takes_one_head_of_a_group(
    backend: Backend, case: DenseCase, inputs: Inputs
) -> Results:
    half = inputs.dout.clone()
    half[:, :, 1::2] = 0
    dlse = inputs.dlse.clone()
    dlse[:, 1::2] = 0
    results = attend(backend, case, inputs)
    return replace(results, dk=attend(backend, case, replace(inputs, dout=half, dlse=dlse)).dk)


@fault()
def gradient_of_the_last_key_is_lost(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    results = attend(backend, case, inputs)
    results.dv[:, -1] = 0
    return results


@fault(replace(CASE, softcap=2.0))
def gradient_forgets_the_softcap(backend: Backend, case: DenseCase, inputs: Inputs) -> Results:
    results = attend(backend, case, inputs)
    return replace(results, dq=attend(backend, case, inputs, softcap=0.0).dq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(backend: Backend, name: str, dtype: torch.dtype) -> None:
    case, plant = FAULTS[name]
    case = replace(case, dtype=dtype)
    inputs = cases.make_dense(case, backend.device)
    expected = oracle.expected(case)
    tolerance.check(attend(backend, case, inputs), expected, case.softcap)
    with pytest.raises(AssertionError, match="worst at|mean error|max error|differ in"):
        tolerance.check(plant(backend, case, inputs), expected, case.softcap)


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
