"""What the operators mean to autograd, autocast and vmap. Importing this registers it with torch.

* Gradients of the dense, varlen and merge operators, through `out` and through `lse`.
* Double backward of attention, and any gradient through the paged cache, is refused by name.
* Autocast casts q, k and v; s_aux and lse keep their dtype. A cache is never cast: q follows its
  dtype.
* vmap is refused: fold the mapped dimension into the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sink_attention_ext import float8, ops

# ---- attention: dense and varlen ----


def _gradient_of_out(dout: Tensor | None, out: Tensor) -> Tensor:
    """`dout` with rows of unit stride; None (only lse was used) is zero."""
    if dout is None:
        return out.new_zeros(out.shape[-1]).expand_as(out)
    return dout if dout.stride(-1) == 1 else dout.contiguous()


def _backward_options(options: Sequence[Any]) -> tuple[Any, ...]:
    """A backward's last arguments. `deterministic` is also what torch asks of its own operators
    when they run: torch.use_deterministic_algorithms."""
    *first, deterministic, num_sink_tokens = options
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    return *first, deterministic, num_sink_tokens


def _setup_flash_attn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, s_aux, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, s_aux)
    ctx.set_materialize_grads(False)


def _backward_flash_attn(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, s_aux = ctx.saved_tensors
    not_differentiable = (None,) * len(ctx.options)
    if dout is None and dlse is None:
        return (None,) * 4 + not_differentiable
    dout = _gradient_of_out(dout, out)
    options = _backward_options(ctx.options)
    dq, dk, dv, ds_aux = ops.flash_attn_bwd(dout, dlse, q, k, v, out, lse, s_aux, *options)
    return dq, dk, dv, None if s_aux is None else ds_aux, *not_differentiable


def _setup_flash_attn_varlen(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, s_aux, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, seqused_k, s_aux)
    ctx.set_materialize_grads(False)


def _backward_flash_attn_varlen(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Any, ...]:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, s_aux = ctx.saved_tensors
    not_differentiable = (None,) * len(ctx.options)
    if dout is None and dlse is None:
        return (None,) * 7 + not_differentiable
    dout = _gradient_of_out(dout, out)
    dq, dk, dv, ds_aux = ops.flash_attn_varlen_bwd(
        dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, s_aux,
        *_backward_options(ctx.options),
    )  # fmt: skip
    ds_aux = None if s_aux is None else ds_aux
    return dq, dk, dv, None, None, None, ds_aux, *not_differentiable


def _backward_of_backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError(
        "sink_attention_ext: the gradient of attention is not differentiable a second time "
        "(double backward). Take the first gradient without create_graph=True, or use "
        "sink_attention_ext.reference.attention, which is plain torch, for second derivatives"
    )


# ---- merge_attn_states ----


def _setup_merge_attn_states(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    outs, lses, s_aux = inputs
    ctx.num_parts = len(outs)
    ctx.save_for_backward(*outs, *lses, *output, s_aux)
    ctx.set_materialize_grads(False)


def _per_row(lse: Tensor) -> Tensor:
    """lse (..., num_heads, rows) as (..., rows, num_heads, 1), to multiply with out."""
    return lse.transpose(-1, -2).unsqueeze(-1)


def _backward_merge_attn_states(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Any, ...]:
    """With w_i = exp(lse_i - lse): dout_i = w_i dout, dlse_i = w_i (<dout, out_i - out> + dlse)."""
    num_parts = ctx.num_parts
    outs = ctx.saved_tensors[:num_parts]
    lses = ctx.saved_tensors[num_parts : 2 * num_parts]
    out, lse, s_aux = ctx.saved_tensors[2 * num_parts :]
    if dout is None and dlse is None:
        return [None] * num_parts, [None] * num_parts, None

    def dot(part: Tensor) -> Tensor:  # <dout, part>, shaped like lse
        return torch.linalg.vecdot(dout.to(lse.dtype), part.to(lse.dtype)).transpose(-1, -2)

    d_logit = torch.zeros_like(lse) if dlse is None else dlse  # of a logit that had value 0
    if dout is not None:
        d_logit = d_logit - dot(out)
    is_finite = ~lse.isinf()  # lse = +inf: the sink takes all; -inf: there is nothing
    lse_or_zero = torch.where(is_finite, lse, 0.0)

    douts: list[Tensor | None] = []
    dlses: list[Tensor] = []
    for out_i, lse_i in zip(outs, lses, strict=True):
        counts = is_finite & ~lse_i.isinf()
        weight = torch.where(counts, torch.exp(torch.where(counts, lse_i, 0.0) - lse_or_zero), 0.0)
        if dout is None:
            douts.append(None)
            dlses.append(weight * d_logit)
        else:
            douts.append((_per_row(weight) * dout).to(out_i.dtype))
            # An empty part may hold anything, NaN too: it has no share in any gradient.
            dlses.append(torch.where(counts, weight * (d_logit + dot(out_i)), 0.0))

    ds_aux = None
    if s_aux is not None:
        sink = s_aux.to(lse.dtype)[:, None].expand_as(lse)
        counts = is_finite & ~sink.isinf()
        weight = torch.where(counts, torch.exp(torch.where(counts, sink, 0.0) - lse_or_zero), 0.0)
        weight = torch.where(sink == torch.inf, 1.0, weight)
        ds_aux = (weight * d_logit).transpose(-1, -2).flatten(0, -2).sum(0).to(s_aux.dtype)
    return douts, dlses, ds_aux


# ---- what cannot be differentiated ----


def refuse_gradient(
    function: str, *tensors: Any, instead: str = "flash_attn_func or flash_attn_varlen_func"
) -> None:
    """Raises a RuntimeError if autograd would have to differentiate `function`."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{function} is not differentiable, but one of its tensors requires grad: call it "
            f"under torch.no_grad(), or use {instead} instead"
        )


def _without_gradient(name: str) -> Callable[..., Any]:
    """Autograd kernel of an operator without gradient; counts in-place changes of its arguments."""
    op = ops.lookup(name)
    arguments = op._schema.arguments
    is_mutated = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    mutated = [(i, a.name) for i, a in enumerate(arguments) if is_mutated[i]]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        refuse_gradient(f"sink_attention_ext::{name}", *args, *kwargs.values())
        for i, argument in mutated:
            changed = args[i] if i < len(args) else kwargs[argument]
            torch.autograd.graph.increment_version(changed)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    return kernel


# ---- autocast ----


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants for `tensor`, or None where it leaves the tensor alone."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return None
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensor: Tensor) -> Tensor:
    dtype = autocast_dtype(tensor)
    return tensor if dtype is None else tensor.to(dtype)


def _cast_qkv(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Any, ...]:
    return _cast(q), _cast(k), _cast(v), *args


def _is_quantised(cache: Tensor) -> bool:
    return cache.dtype in (torch.float8_e4m3fn, torch.int8)


def _cast_q_like_cache(q: Tensor, k_cache: Tensor, *args: Any) -> tuple[Any, ...]:
    if _is_quantised(k_cache):
        return _cast(q), k_cache, *args
    return q if autocast_dtype(q) is None else q.to(k_cache.dtype), k_cache, *args


def _cast_kv_like_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any
) -> tuple[Any, ...]:
    if _is_quantised(k_cache):
        return _cast(k), _cast(v), k_cache, v_cache, *args
    k = k if autocast_dtype(k) is None else k.to(k_cache.dtype)
    v = v if autocast_dtype(v) is None else v.to(v_cache.dtype)
    return k, v, k_cache, v_cache, *args


_AUTOCAST_RULES = {
    "flash_attn_fwd": _cast_qkv,
    "flash_attn_varlen_fwd": _cast_qkv,
    "paged_attn": _cast_q_like_cache,
    "reshape_and_cache": _cast_kv_like_cache,
    "reshape_and_cache.token_scales": _cast_kv_like_cache,
}


def _autocast_kernel(
    name: str, cast: Callable[..., tuple[Any, ...]], dispatch_key: str
) -> Callable[..., Any]:
    op = ops.lookup(name)
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        args = cast(*args)  # outside the guard, under which autocast reads as disabled
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op(*args, **kwargs)

    return kernel


# ---- vmap ----


def _refuse_vmap(name: str) -> Callable[..., NoReturn]:
    def rule(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(
            f"sink_attention_ext::{name} has no batching rule for torch.vmap: fold the mapped "
            "dimension into the batch dimension of q, k and v instead"
        )

    return rule


# ---- registration ----


def _register() -> torch.library.Library:
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    formulas = {
        "flash_attn_fwd": (_backward_flash_attn, _setup_flash_attn),
        "flash_attn_bwd": (_backward_of_backward, None),
        "flash_attn_varlen_fwd": (_backward_flash_attn_varlen, _setup_flash_attn_varlen),
        "flash_attn_varlen_bwd": (_backward_of_backward, None),
        "merge_attn_states": (_backward_merge_attn_states, _setup_merge_attn_states),
    }
    for name, (backward, setup_context) in formulas.items():
        torch.library.register_autograd(
            f"{ops.NAMESPACE}::{name}", backward, setup_context=setup_context, lib=library
        )
    writers = ("reshape_and_cache", "reshape_and_cache.token_scales")
    for name in ("paged_attn", "paged_attn.out", *float8.OPERATORS, *writers):
        library.impl(name, _without_gradient(name), "Autograd")
    for name, cast in _AUTOCAST_RULES.items():
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(name, _autocast_kernel(name, cast, key), key)
    for name in (*formulas, "paged_attn", *float8.OPERATORS, *writers):
        torch.library.register_vmap(f"{ops.NAMESPACE}::{name}", _refuse_vmap(name), lib=library)
    return library


_LIBRARY = _register() if ops.LIBRARY_PATH is not None else None
