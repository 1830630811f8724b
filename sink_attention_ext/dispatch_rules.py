"""What the operators mean to autograd, autocast and vmap. Importing this registers it with torch.

* Gradients of the dense, varlen and merge operators, through `out` and through `lse`, also under
  torch.func's grad, vjp and jacrev.
* Double backward of attention, forward-mode AD of everything, and any gradient through the paged
  cache are refused by name.
* Autocast casts q, k and v; s_aux and lse keep their dtype. A cache is never cast: q follows its
  dtype.
* vmap: batching.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from sink_attention_ext import autocast, batching, fp8, ops
from sink_attention_ext.tensor_kinds import check_kind, check_written_kind

# ---- attention: dense and varlen ----


def _check_kinds(dout: Tensor | None, dlse: Tensor | None) -> None:
    """Of gradients, which a function of the user's may have made in any layout."""
    for name, gradient in (("dout", dout), ("dlse", dlse)):
        if gradient is not None:
            check_kind(name, gradient)


def _gradient_of_out(dout: Tensor | None, out: Tensor) -> Tensor:
    """`dout` with rows of unit stride; None (only lse was used) is zero."""
    if dout is None:
        return out.new_zeros(out.shape[-1]).expand_as(out)
    return dout if dout.stride(-1) == 1 else dout.contiguous()


def _backward_options(options: Sequence[Any]) -> tuple[Any, ...]:
    """A backward's last arguments. `deterministic` is also what torch asks of its own operators
    when they run: torch.use_deterministic_algorithms."""
    *first, deterministic, num_sink_tokens = options
    return *first, is_deterministic(deterministic), num_sink_tokens


def is_deterministic(asked: bool) -> bool:
    """Whether gradients must be bitwise repeatable: asked of the function, or of torch."""
    return asked or torch.are_deterministic_algorithms_enabled()


def _setup_flash_attn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, s_aux, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, s_aux)
    ctx.set_materialize_grads(False)


def _backward_flash_attn(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, s_aux = ctx.saved_tensors
    not_differentiable = (None,) * len(ctx.options)
    if dout is None and dlse is None:
        return (None,) * 4 + not_differentiable
    _check_kinds(dout, dlse)
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
    _check_kinds(dout, dlse)
    dout = _gradient_of_out(dout, out)
    dq, dk, dv, ds_aux = ops.flash_attn_varlen_bwd(
        dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, s_aux,
        *_backward_options(ctx.options),
    )  # fmt: skip
    ds_aux = None if s_aux is None else ds_aux
    return dq, dk, dv, None, None, None, ds_aux, *not_differentiable


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


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
    _check_kinds(dout, dlse)

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
        ds_aux = weight * d_logit  # (batch, num_heads, seqlen) or (num_heads, total)
        ds_aux = ds_aux.sum((0, 2) if ds_aux.dim() == 3 else 1).to(s_aux.dtype)
    return douts, dlses, ds_aux


# ---- what cannot be differentiated ----


def refuse_tangents(function: str, *tensors: Any) -> None:
    """Raises a NotImplementedError if one of the tensors carries a forward-mode derivative. Where
    forward_ad._current_level is below 0, no torch.func.jvp or dual_level runs: none can."""
    for tensor in tensors:
        if isinstance(tensor, (list, tuple)):
            refuse_tangents(function, *tensor)
        elif isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{function} has no forward-mode derivative (torch.func.jvp, jacfwd, linearize, "
                "dual tensors), but one of its tensors carries a tangent: use reverse mode, or "
                "sink_attention_ext.reference.attention, which is plain torch"
            )


def refuse_gradient(
    function: str, *tensors: Any, instead: str = "flash_attn_func or flash_attn_varlen_func"
) -> None:
    """Raises a RuntimeError if autograd would have to differentiate `function`, and a
    NotImplementedError if forward-mode AD or torch.vmap would have to transform it."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{function} is not differentiable, but one of its tensors requires grad: call it "
            f"under torch.no_grad(), or use {instead} instead"
        )
    if forward_ad._current_level >= 0:
        refuse_tangents(function, *tensors)
    if torch._C._are_functorch_transforms_active() and any(map(batching.is_mapped, tensors)):
        raise NotImplementedError(
            f"{function} has no batching rule for torch.vmap: fold the mapped dimension into the "
            "batch dimension instead"
        )


def check_written(name: str, tensor: Tensor | None) -> None:
    """Refuses a tensor that must not be written in place here."""
    if tensor is None:  # the dispatcher lets it pass for a tensor
        raise TypeError(f"{name} must be a torch.Tensor; got None")
    if not (tensor.is_neg() or tensor.is_conj() or tensor.is_inference()):
        return
    check_written_kind(name, tensor)
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(  # as torch's own in-place operators do
            f"{name} must not be a tensor that was made in inference mode, which is "
            "written outside of it here: write under torch.inference_mode(), or clone it"
        )


def written_scales(k_scale: Tensor | None, v_scale: Tensor | None) -> list[Tensor]:
    """Those of each token and head, which are written where keys and values are."""
    scales = (k_scale, v_scale)
    return [scale for scale in scales if isinstance(scale, Tensor) and scale.dim() == 3]


def _counting_changes(name: str) -> Callable[..., Any]:
    """ADInplaceOrView kernel of an operator, where torch counts in-place changes of its arguments.

    Under inference mode too, which leaves autograd's kernels out: the tensors may have been saved
    for a backward before.
    """
    op = ops.lookup(name)
    arguments = op._schema.arguments
    is_mutated = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    mutated = [(i, a.name) for i, a in enumerate(arguments) if is_mutated[i]]
    only_of_tokens = ("k_scale", "v_scale") if name.startswith("append_and_attend") else ()

    def kernel(*args: Any, **kwargs: Any) -> Any:
        changed = []
        for i, argument in mutated:
            tensor = args[i] if i < len(args) else kwargs.get(argument)
            if argument in only_of_tokens and not written_scales(tensor, None):
                continue
            check_written(argument, tensor)
            changed.append(tensor)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op(*args, **kwargs)
        torch.autograd.graph.increment_version(changed)  # not where the operator has refused
        return result

    return kernel


def _without_gradient(name: str) -> Callable[..., Any]:
    """Autograd kernel of an operator without gradient; counts, too, which saves a dispatch."""
    count_and_call = _counting_changes(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        refuse_gradient(f"sink_attention_ext::{name}", *args, *kwargs.values())
        return count_and_call(*args, **kwargs)

    return kernel


# ---- calls that need no gradient ----

below_autograd = torch._C._AutoDispatchBelowAutograd
# Names of this module: a look-up each less.
_are_transforms_active = torch._C._are_functorch_transforms_active
_any_requires_grad = torch._C._any_requires_grad
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled


def needs_autograd(*tensors: Any) -> bool:
    """Whether an operator that has gradients must come through its kernel for autograd: one of the
    tensors requires grad, a transform of torch.func or forward-mode AD runs, or a graph is traced.

    Otherwise it may be called under below_autograd(), which costs less than half: autocast, modes,
    fake tensors and profilers are seen as always.
    """
    if _is_dynamo_compiling() or _are_transforms_active() or forward_ad._current_level >= 0:
        return True
    return _is_grad_enabled() and _any_requires_grad(*tensors)


# ---- registration ----


class _OperatorGradient(torch.autograd.Function):
    """The gradient of an operator, applied within its kernel for autograd.

    There, below torch.func's dispatch, each grad or vjp that runs is a level of its own, as for
    torch's own operators. ``Function.apply`` would start from the outermost one again.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        apply = super(torch.autograd.Function, cls).apply
        if not torch._C._are_functorch_transforms_active():
            return apply(*args)
        with enable_single_level_autograd_function():
            return apply(*args)


def _below_autograd(op: Any, keyset: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _outer_levels_recorded() -> contextlib.AbstractContextManager:
    """Within a Function's forward, which turns both modes of AD off: what torch.func's outer levels
    record of the operator below, they must record here too, or a gradient of a gradient is 0."""
    if not torch._C._are_functorch_transforms_active():
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(torch.enable_grad())
    stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
    return stack


def _differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Autograd kernel of an operator whose arguments are tensors and numbers."""
    op = ops.lookup(name)

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        with _outer_levels_recorded():
            output = _below_autograd(op, keyset, *args)
        setup_context(ctx, args, output)
        return output

    gradient = type(
        f"GradientOf_{name}",
        (_OperatorGradient,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(lambda ctx, *grads: (None, *backward(ctx, *grads))),
        },
    )

    below_autograd = torch._C._after_autograd_keyset

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(f"sink_attention_ext::{name}", *args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return gradient.apply(keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below_autograd, *args)

    return kernel


def _differentiable_merge() -> Callable[..., Any]:
    """The same for merge_attn_states, whose lists are spread out for autograd to see."""
    op = ops.lookup("merge_attn_states")

    class GradientOfMerge(_OperatorGradient):
        @staticmethod
        def forward(ctx: Any, keyset: Any, num_parts: int, s_aux: Any, *parts: Tensor) -> Any:
            outs, lses = list(parts[:num_parts]), list(parts[num_parts:])
            with _outer_levels_recorded():
                output = _below_autograd(op, keyset, outs, lses, s_aux)
            _setup_merge_attn_states(ctx, (outs, lses, s_aux), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            douts, dlses, ds_aux = _backward_merge_attn_states(ctx, *grads)
            return None, None, ds_aux, *douts, *dlses

    def kernel(keyset: Any, outs: Any, lses: Any, s_aux: Tensor | None) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents("sink_attention_ext::merge_attn_states", outs, lses, s_aux)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*outs, *lses, s_aux):
            return GradientOfMerge.apply(keyset, len(outs), s_aux, *outs, *lses)
        return _below_autograd(op, keyset, outs, lses, s_aux)

    return kernel


def _register() -> torch.library.Library:
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    formulas = {
        "flash_attn_fwd": (_setup_flash_attn, _backward_flash_attn),
        "flash_attn_bwd": (_setup_nothing, _backward_of_backward),
        "flash_attn_varlen_fwd": (_setup_flash_attn_varlen, _backward_flash_attn_varlen),
        "flash_attn_varlen_bwd": (_setup_nothing, _backward_of_backward),
    }
    for name, formula in formulas.items():
        library.impl(name, _differentiable(name, *formula), "Autograd", with_keyset=True)
    library.impl("merge_attn_states", _differentiable_merge(), "Autograd", with_keyset=True)
    writers = ("reshape_and_cache", "reshape_and_cache.token_scales")
    results_given = ("paged_attn.out", "append_and_attend.out")
    without = ("paged_attn", "append_and_attend", *fp8.OPERATORS, *writers)
    for name in (*without, *results_given):
        library.impl(name, _without_gradient(name), "Autograd")
    for name in ("append_and_attend", *results_given, *writers):
        library.impl(name, _counting_changes(name), "ADInplaceOrView")
    for name, cast in autocast.RULES.items():
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(name, autocast.kernel_of(name, cast, key), key)
    rules = batching.RULES | {name: batching.refuse(name) for name in without}
    for name, rule in rules.items():
        torch.library.register_vmap(f"{ops.NAMESPACE}::{name}", rule, lib=library)
    return library


_LIBRARY = _register() if ops.LIBRARY_PATH is not None else None
