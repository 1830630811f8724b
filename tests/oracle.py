"""What a case's results should be: reference.attention in float64, and in the case's own dtype.

Both are computed once a case and shared by the tests that use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import cases
import torch
from cases import DenseCase, Inputs, PagedCase, VarlenCase
from torch import Tensor

from sink_attention_ext import reference


@dataclass(frozen=True)
class Results:
    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    ds_aux: Tensor | None = None

    def items(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class Expected:
    ref: Results  # float64
    pt: Results  # the same formula in the case's dtype: how far rounding may take one
    noise: dict[str, Tensor]  # standard deviations of sums of few terms, beside pt; see noise()


AttentionFn = Callable[..., tuple[Tensor, Tensor]]

FEW = 4096  # elements of dq but zeros: in more than that, `pt` shows how far rounding goes


def run(
    attention: AttentionFn,
    inputs: Inputs,
    options: dict[str, Any],
    dtype: torch.dtype | None = None,
    gradients: bool = True,
    sink_dtype: torch.dtype | None = None,
) -> Results:
    """Calls a dense or varlen `attention` and takes gradients; in other dtypes where given."""

    def leaf(x: Tensor) -> Tensor:
        x = x if dtype is None else x.to(dtype)
        return x.detach().requires_grad_(gradients)

    q, k, v = leaf(inputs.q), leaf(inputs.k), leaf(inputs.v)
    s_aux = inputs.s_aux
    if s_aux is not None:
        s_aux = s_aux.to(sink_dtype or s_aux.dtype).detach().requires_grad_(gradients)
    kwargs = options | ({} if inputs.seqused_k is None else {"seqused_k": inputs.seqused_k})
    out, lse = attention(q, k, v, *inputs.lengths, s_aux=s_aux, **kwargs)
    if not gradients:
        return Results(out, lse)
    leaves = [q, k, v] + ([] if s_aux is None else [s_aux])
    dout, dlse = inputs.dout.to(out.dtype), inputs.dlse.to(lse.dtype)
    if dtype is None:
        grads = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    else:  # where a packed batch is empty, the reference's results depend on nothing
        pairs = [(x, dx) for x, dx in ((out, dout), (lse, dlse)) if x.requires_grad]
        outputs, grad_outputs = zip(*pairs, strict=True) if pairs else ((q.sum() * 0,), None)
        grads = torch.autograd.grad(outputs, leaves, grad_outputs, materialize_grads=True)
    return Results(out.detach(), lse.detach(), *grads)


def _reference_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **kw: Any
) -> tuple[Tensor, Tensor]:
    return reference.varlen_attention(q, k, v, cu_q, cu_k, **kw)


@lru_cache(maxsize=4)
def expected(case: DenseCase | VarlenCase, gradients: bool = True) -> Expected:
    if isinstance(case, DenseCase):
        inputs, attention = cases.make_dense(case), reference.attention
    else:
        inputs, attention = cases.make_varlen(case), _reference_varlen
    ref = run(attention, inputs, case.options(), torch.float64, gradients, torch.float64)
    pt = run(attention, inputs, case.options(), case.dtype, gradients)
    found = noise(case.dtype, case.options(), inputs, ref, attention) if gradients else {}
    return Expected(ref, pt, found)


def noise(
    dtype: torch.dtype,
    options: dict[str, Any],
    inputs: Inputs,
    ref: Results,
    attention: AttentionFn,
) -> dict[str, Tensor]:
    """Standard deviations of gradients when out is rounded to the dtype before they are taken.

    A flash backward subtracts <dout, out>, row by row, as rounding left it, which acts like an
    error in dlse. In sums over few rows or heads the error of `pt` can be small by chance; this
    cannot.
    """
    products = (inputs.dout.double().nan_to_num() * ref.out).norm(dim=-1).transpose(-1, -2)
    d_row = products * torch.finfo(dtype).eps / 2  # shaped like lse
    found = {}
    if ref.ds_aux is not None:  # sums weight * (dlse - <dout, out>) over all rows
        sink = inputs.s_aux.double()[:, None]
        weight = torch.exp(torch.where(sink == ref.lse, 0.0, sink - ref.lse))
        weight = weight.masked_fill(ref.lse == -torch.inf, 0.0)  # in no sequence, or nothing there
        found["ds_aux"] = (weight * d_row).transpose(0, -2).flatten(1).norm(dim=1)
    if dtype in cases.HALF_DTYPES and int((ref.dq != 0).sum()) <= FEW:
        signs = torch.randint(0, 2, d_row.shape, generator=cases.generator(0)) * 2 - 1
        perturbed = replace(inputs, dout=torch.zeros_like(inputs.dout), dlse=d_row * signs)
        change = run(attention, perturbed, options, torch.float64)
        found |= {"dq": change.dq.abs(), "dk": change.dk.abs()}
    return found


def joined(case: PagedCase, outs: list[Tensor], lses: list[Tensor]) -> Results:
    """Results of single sequences, as a call on all of them has them."""
    if case.packed_q:
        return Results(torch.cat(outs), torch.cat(lses, dim=-1))
    return Results(torch.stack(outs), torch.stack(lses))


@lru_cache(maxsize=4)
def expected_paged(case: PagedCase) -> Expected:
    """Sequence by sequence from the tokens themselves, without any cache."""
    inputs = cases.make_paged(case)
    starts = cases.ends(case.seqlens_q)
    rows = inputs.q if case.packed_q else inputs.q.flatten(0, 1)

    def compute(dtype: torch.dtype) -> Results:
        outs, lses = [], []
        for b, (k, v) in enumerate(zip(inputs.k, inputs.v, strict=True)):
            k, v = k.to(dtype), v.to(dtype)
            if case.float8:
                k = k * inputs.k_scale.to(dtype).reshape(-1, 1)
                v = v * inputs.v_scale.to(dtype).reshape(-1, 1)
            q = rows[starts[b] : starts[b + 1]].to(dtype)
            s_aux = inputs.s_aux
            if dtype == torch.float64 and s_aux is not None:
                s_aux = s_aux.double()
            out, lse = reference.attention(q[None], k[None], v[None], s_aux=s_aux, **case.options())
            outs.append(out[0])
            lses.append(lse[0])
        return joined(case, outs, lses)

    return Expected(compute(torch.float64), compute(case.dtype), {})
