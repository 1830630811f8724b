"""torch.vmap over the operators: the mapped dimension becomes part of one that they have.

The batch dimension where that is right, since it needs no copy; else the heads, each of which has a
sink, and a gradient of it, of its own. Importing this registers nothing: dispatch_rules.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sink_attention_ext import ops

Dim = int | None  # of an argument: which dimension is mapped, None where none is
Results = tuple[tuple[Tensor, ...], tuple[Dim, ...]]
HEADS = -2  # of q, k, v and what is shaped like them
HEADS_OF_LSE = -2


def _mapped_first(tensor: Tensor, dim: Dim, size: int) -> Tensor:
    """(size, ...), whether `tensor` is mapped or the same for all."""
    if dim is None:
        return tensor.expand(size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _into_batch(tensor: Tensor | None, dim: Dim, size: int) -> Tensor | None:
    """(size * batch, ...)."""
    return None if tensor is None else _mapped_first(tensor, dim, size).flatten(0, 1)


def _out_of_batch(tensor: Tensor, size: int) -> Tensor:
    return tensor.unflatten(0, (size, tensor.shape[0] // size))


def _into_heads(tensor: Tensor | None, dim: Dim, size: int, heads: int = HEADS) -> Tensor | None:
    """size * num_heads in the place of the heads: those of the first mapped call come first."""
    if tensor is None:
        return None
    return _mapped_first(tensor, dim, size).movedim(0, heads - 1).flatten(heads - 1, heads)


def _out_of_heads(tensor: Tensor, size: int, heads: int = HEADS) -> Tensor:
    """(size, ...)."""
    return tensor.unflatten(heads, (size, tensor.shape[heads] // size)).movedim(heads - 1, 0)


def _rows(tensor: Tensor) -> Tensor:
    """With rows of unit stride, which the operators read."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _fold_qkv(
    tensors: Sequence[Tensor], dims: Sequence[Dim], size: int, fold: Callable[..., Any]
) -> list[Tensor]:
    return [_rows(fold(*mapped, size)) for mapped in zip(tensors, dims, strict=True)]


def _fold_sinks(s_aux: Tensor | None, dim: Dim, size: int) -> Tensor | None:
    return _into_heads(s_aux, dim, size, heads=-1)


# ---- attention ----


def _flash_attn_fwd(info: Any, dims: Sequence[Dim], *args: Any) -> Results:
    q, k, v, s_aux, *options = args
    size = info.batch_size
    if dims[3] is None:  # the sinks of all mapped calls are the same
        q, k, v = _fold_qkv((q, k, v), dims[:3], size, _into_batch)
        results = ops.flash_attn_fwd(q, k, v, s_aux, *options)
        return tuple(_out_of_batch(x, size) for x in results), (0, 0)
    q, k, v = _fold_qkv((q, k, v), dims[:3], size, _into_heads)
    out, lse = ops.flash_attn_fwd(q, k, v, _fold_sinks(s_aux, dims[3], size), *options)
    return (_out_of_heads(out, size), _out_of_heads(lse, size, HEADS_OF_LSE)), (0, 0)


def _flash_attn_bwd(info: Any, dims: Sequence[Dim], *args: Any) -> Results:
    dout, dlse, q, k, v, out, lse, s_aux, *options = args
    size = info.batch_size
    if s_aux is None:
        fold: Callable[..., Any] = _into_batch
        folded_lse, folded_dlse = (fold(*x, size) for x in ((lse, dims[6]), (dlse, dims[1])))
    else:  # its gradient is a sum over the batch, and one of each mapped call is wanted
        fold = _into_heads
        folded_lse = fold(lse, dims[6], size, HEADS_OF_LSE)
        folded_dlse = fold(dlse, dims[1], size, HEADS_OF_LSE)
    wide = (dout, q, k, v, out)
    dout, q, k, v, out = _fold_qkv(wide, (dims[0], *dims[2:6]), size, fold)
    sinks = _fold_sinks(s_aux, dims[7], size)
    grads = ops.flash_attn_bwd(dout, folded_dlse, q, k, v, out, folded_lse, sinks, *options)
    return _unfolded_gradients(grads, s_aux, size)


def _unfolded_gradients(grads: Sequence[Tensor], s_aux: Tensor | None, size: int) -> Results:
    *wide, ds_aux = grads
    if s_aux is None:
        return (*(_out_of_batch(x, size) for x in wide), ds_aux), (0, 0, 0, None)
    unfolded = (_out_of_heads(x, size) for x in wide)
    return (*unfolded, _out_of_heads(ds_aux, size, heads=-1)), (0, 0, 0, 0)


def _refuse_mapped_lengths(name: str, named: dict[str, Dim]) -> None:
    for argument, dim in named.items():
        if dim is not None:
            raise NotImplementedError(
                f"sink_attention_ext::{name} has no batching rule for torch.vmap over {argument}: "
                "the mapped calls must have the same lengths; pack all sequences into one call"
            )


def _flash_attn_varlen_fwd(info: Any, dims: Sequence[Dim], *args: Any) -> Results:
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, s_aux, *options = args
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    _refuse_mapped_lengths("flash_attn_varlen_fwd", dict(zip(names, dims[3:6], strict=True)))
    size = info.batch_size
    q, k, v = _fold_qkv((q, k, v), dims[:3], size, _into_heads)
    out, lse = ops.flash_attn_varlen_fwd(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, _fold_sinks(s_aux, dims[6], size), *options
    )
    return (_out_of_heads(out, size), _out_of_heads(lse, size, HEADS_OF_LSE)), (0, 0)


def _flash_attn_varlen_bwd(info: Any, dims: Sequence[Dim], *args: Any) -> Results:
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, s_aux, *options = args
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    _refuse_mapped_lengths("flash_attn_varlen_bwd", dict(zip(names, dims[7:10], strict=True)))
    size = info.batch_size
    lse = _into_heads(lse, dims[6], size, HEADS_OF_LSE)
    dlse = _into_heads(dlse, dims[1], size, HEADS_OF_LSE)
    wide = (dout, q, k, v, out)
    dout, q, k, v, out = _fold_qkv(wide, (dims[0], *dims[2:6]), size, _into_heads)
    *grads, ds_aux = ops.flash_attn_varlen_bwd(
        dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k,
        _fold_sinks(s_aux, dims[10], size), *options,
    )  # fmt: skip
    unfolded = (_out_of_heads(x, size) for x in grads)
    if s_aux is None:
        return (*unfolded, ds_aux), (0, 0, 0, None)
    return (*unfolded, _out_of_heads(ds_aux, size, heads=-1)), (0, 0, 0, 0)


# ---- merge_attn_states ----


def _merge_attn_states(info: Any, dims: Sequence[Any], *args: Any) -> Results:
    (outs, lses, s_aux), size = args, info.batch_size
    parts = [list(zip(x, d, strict=True)) for x, d in ((outs, dims[0]), (lses, dims[1]))]
    if dims[2] is not None:
        out, lse = ops.merge_attn_states(
            [_into_heads(*part, size) for part in parts[0]],
            [_into_heads(*part, size, HEADS_OF_LSE) for part in parts[1]],
            _fold_sinks(s_aux, dims[2], size),
        )
        return (_out_of_heads(out, size), _out_of_heads(lse, size, HEADS_OF_LSE)), (0, 0)
    outs, lses = ([_mapped_first(*part, size) for part in kind] for kind in parts)
    is_dense = outs[0].dim() == 5  # else (size, total, num_heads, head_dim), which is dense enough
    if is_dense:
        outs, lses = ([x.flatten(0, 1) for x in kind] for kind in (outs, lses))
    results = ops.merge_attn_states(outs, lses, s_aux)
    return tuple(_out_of_batch(x, size) if is_dense else x for x in results), (0, 0)


# ---- what has no rule ----


def refuse(name: str) -> Callable[..., NoReturn]:
    def rule(info: Any, dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(
            f"sink_attention_ext::{name} has no batching rule for torch.vmap: fold the mapped "
            "dimension into the batch dimension instead"
        )

    return rule


def _with_no_calls(name: str, rule: Callable[..., Results]) -> Callable[..., Results]:
    """The rule; over a dimension of size 0, which would leave no heads, empty results."""

    def zeros(arg: Any, dim: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [zeros(*pair) for pair in zip(arg, dim, strict=True)]
        return arg if dim is None else torch.zeros_like(arg.sum(dim))

    def either(info: Any, dims: Sequence[Any], *args: Any) -> Results:
        if info.batch_size > 0:
            return rule(info, dims, *args)
        one = ops.lookup(name)(*map(zeros, args, dims))
        return tuple(x.new_empty((0, *x.shape)) for x in one), (0,) * len(one)

    return either


_RULES: dict[str, Callable[..., Results]] = {
    "flash_attn_fwd": _flash_attn_fwd,
    "flash_attn_bwd": _flash_attn_bwd,
    "flash_attn_varlen_fwd": _flash_attn_varlen_fwd,
    "flash_attn_varlen_bwd": _flash_attn_varlen_bwd,
    "merge_attn_states": _merge_attn_states,
}
RULES = {name: _with_no_calls(name, rule) for name, rule in _RULES.items()}


def is_mapped(tensor: Any) -> bool:
    """Whether a torch.vmap that runs now maps a dimension of the tensor."""
    functorch = torch._C._functorch
    while isinstance(tensor, Tensor) and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
