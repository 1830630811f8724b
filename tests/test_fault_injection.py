"""Fault injection: wrong kernels that the test matrix must notice.

A suite that can't fail shows nothing. Each injected fault here is one that people have made. The
comparison that every test of the matrix uses must reject it, in float32 and in bfloat16.
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
from backends import Backend
from cases import DenseCase, Inputs
from oracle import Results
from torch import Tensor

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
def test_an_injected_fault_is_noticed(backend: Backend, name: str, dtype: torch.dtype) -> None:
    case, inject = FAULTS[name]
    case = replace(case, dtype=dtype)
    inputs = cases.make_dense(case, backend.device)
    expected = oracle.expected(case)
    tolerance.check(attend(backend, case, inputs), expected, case.softcap)
    with pytest.raises(AssertionError, match="worst at|mean error|max error|differ in"):
        tolerance.check(inject(backend, case, inputs), expected, case.softcap)
