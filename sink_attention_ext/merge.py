"""Joining partial results: merge_attn_states for ours, apply_sink for any other backend's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sink_attention_ext import checks, explain, ops
from sink_attention_ext.dispatch_rules import below_autograd, needs_autograd
from sink_attention_ext.tensor_kinds import check_kind

_LAYOUTS = "(batch, seqlen, num_heads, head_dim) or (total, num_heads, head_dim)"


def _check_part(out_name: str, out: Any, lse_name: str, lse: Any) -> None:
    """out (..., rows, num_heads, head_dim) with lse (..., num_heads, rows)."""
    for name, tensor in ((out_name, out), (lse_name, lse)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
        check_kind(name, tensor)
    if out.dim() not in (3, 4):
        raise ValueError(f"{out_name} must be {_LAYOUTS}; got shape {tuple(out.shape)}")
    checks.check_float_dtype(out_name, out)
    expected = (*out.shape[:-3], out.shape[-2], out.shape[-3])
    if tuple(lse.shape) != expected:
        layout = "(batch, num_heads, seqlen)" if out.dim() == 4 else "(num_heads, total)"
        raise ValueError(
            f"{lse_name} must have shape {layout} = {expected}, heads before rows, for "
            f"{out_name} of shape {tuple(out.shape)}; got {tuple(lse.shape)}"
        )
    if lse.dtype != ops.lse_dtype(out.dtype):
        raise TypeError(
            f"{lse_name} must have dtype {ops.lse_dtype(out.dtype)} for {out_name} of "
            f"{out.dtype}; got {lse.dtype}"
        )
    checks.check_device(lse_name, lse, out.device)


def merge_attn_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], s_aux: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Joins the results of attention over disjoint sets of keys into attention over all of them.

    The parts must have been computed **without** the sink: it enters exactly once, here.
    Differentiable in every out, lse and s_aux::

        lse = log(sum_p exp(lses[p]) + exp(s_aux)),  out = sum_p exp(lses[p] - lse) * outs[p]

    Args:
        outs: partial outputs, one or more, each (batch, seqlen, num_heads, head_dim), or each
            (total, num_heads, head_dim); one dtype.
        lses: their log-sum-exps, natural logarithm, (batch, num_heads, seqlen) or (num_heads,
            total), float32 (float64 with float64 outs). -inf marks an empty part, +inf too
            (FlashAttention 2's convention); the out of an empty part is not read.
        s_aux: (num_heads,) sinks, any float dtype; None: no sink.

    Returns:
        (out, lse), shaped like a part; lse includes the sink.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example::

        near = flash_attn_func(q, k[:, 512:], v[:, 512:], causal=True, return_lse=True)
        far = flash_attn_func(q, k[:, :512], v[:, :512], return_lse=True)
        out, lse = merge_attn_states([near[0], far[0]], [near[1], far[1]], s_aux)
    """
    outs, lses = _parts("outs", outs), _parts("lses", lses)
    try:
        s_aux = checks.local_sinks(s_aux)
        if needs_autograd(*outs, *lses, s_aux):
            return ops.merge_attn_states(outs, lses, s_aux)
        with below_autograd():
            return ops.merge_attn_states(outs, lses, s_aux)
    except Exception:
        _explain_parts(outs, lses, s_aux)
        raise


def _parts(name: str, parts: Any) -> Sequence[Tensor]:
    """As operators take them: a list or tuple. A tensor would pass for the list of its rows."""
    if type(parts) is list or type(parts) is tuple:
        return parts
    if isinstance(parts, Tensor) or not isinstance(parts, Sequence):
        raise TypeError(f"{name} must be a list or tuple of tensors; got {type(parts).__name__}")
    return list(parts)


def _explain_parts(outs: Sequence[Any], lses: Sequence[Any], s_aux: Any) -> None:
    """Raises a TypeError about one of the arguments, if it is of a wrong kind."""
    for i, out in enumerate(outs):
        explain.tensor(f"outs[{i}]", out, ("...", "num_heads", "head_dim"))
    for i, lse in enumerate(lses):
        explain.tensor(f"lses[{i}]", lse, ("...", "num_heads", "rows"))
    explain.optional_tensor("s_aux", s_aux, ("num_heads",))
    if outs:
        checks.check_backend("outs[0]", outs[0])


def apply_sink(out: Tensor, lse: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    """Adds a sink to the result of any attention that returns its log-sum-exp. Plain torch, any
    device.

    ``out * sigmoid(lse - s_aux)`` and ``logaddexp(lse, s_aux)``. Differentiable in out, lse and
    s_aux: the gradients of q and k are right only if the backend's backward uses the gradient of
        its lse.

    Args:
        out: (batch, seqlen, num_heads, head_dim) or (total, num_heads, head_dim), computed without
            a sink.
        lse: (batch, num_heads, seqlen) or (num_heads, total), natural logarithm, without the sink,
            float32 (float64 with float64 out). -inf and +inf mark a row that saw no key; its out is
            not read.
        s_aux: (num_heads,) sinks, any float dtype.

    Returns:
        (out, lse) with the sink, in the dtypes of the inputs.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example::

        out, lse = flash_attn_func(q, k, v, return_lse=True)  # or any other backend
        out, lse = apply_sink(out, lse, s_aux)
    """
    _check_part("out", out, "lse", lse)
    if s_aux is None:
        raise TypeError("s_aux must be a torch.Tensor (num_heads,); got None")
    s_aux = checks.check_s_aux(s_aux, out.shape[-2], out.device)

    sink = s_aux.to(lse.dtype)[:, None].expand_as(lse)
    is_empty = lse.isinf()
    lse = lse.masked_fill(is_empty, -torch.inf)
    is_nothing = is_empty & (
        sink == -torch.inf
    )  # neither a key nor a sink: -inf - -inf is kept away
    sink = sink.masked_fill(is_nothing, 0.0)

    share = torch.sigmoid(lse - sink).transpose(-1, -2).unsqueeze(-1)
    out = out.masked_fill(is_empty.transpose(-1, -2).unsqueeze(-1), 0.0)
    lse = torch.logaddexp(lse, sink).masked_fill(is_nothing, -torch.inf)
    return (out * share).to(out.dtype), lse
