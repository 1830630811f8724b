"""Validation of arguments: every message names the argument, what came, and what was expected.

Wrong values raise ValueError, wrong types and dtypes TypeError. Shapes, dtypes, devices and strides
are checked everywhere; numbers that torch.compile traces as symbols, and the contents of tensors,
only in eager mode. The compiled operators check them again when they run.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sink_attention_ext import ops
from sink_attention_ext.autocast import autocast_dtype
from sink_attention_ext.batching import is_mapped
from sink_attention_ext.dispatch_rules import refuse_gradient
from sink_attention_ext.fake_checks import (
    FLOAT8,
    FLOAT_DTYPES,
    MAX_HEAD_DIM,
    QUANTISED_DTYPES,
    wrong_softcap,
    wrong_softmax_scale,
)
from sink_attention_ext.tensor_kinds import STRIDED, check_kind

CACHE_DTYPES = (*FLOAT_DTYPES, *QUANTISED_DTYPES)
INT32_MAX = 2**31 - 1  # lengths are int32

Q_DENSE = ("batch", "seqlen_q", "num_heads_q", "head_dim")
K_DENSE = ("batch", "seqlen_k", "num_heads_kv", "head_dim")
V_DENSE = ("batch", "seqlen_k", "num_heads_kv", "head_dim_v")
Q_PACKED = ("total_q", "num_heads_q", "head_dim")


def dim_names(layout: Sequence[str]) -> str:
    return f"({', '.join(layout)}{',' if len(layout) == 1 else ''})"


def shape_text(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


# ---- one tensor ----


def is_dtensor(tensor: Tensor) -> bool:
    """By its method: to import torch.distributed.tensor for an isinstance takes long."""
    return hasattr(tensor, "to_local")


def check_kind_of(name: str, tensor: Any, layout: Sequence[str]) -> None:
    """A tensor of a kind that operators take, whatever its shape."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor {dim_names(layout)}; got {type(tensor).__name__}"
        )
    check_kind(name, tensor)
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} must be a plain tensor, what this rank holds of it; got a DTensor of global "
            f"shape {shape_text(tensor)}: pass {name}.to_local()"
        )


def check_tensor(name: str, tensor: Any, layout: Sequence[str]) -> None:
    """A tensor with the dimensions of `layout`."""
    check_kind_of(name, tensor, layout)
    if tensor.dim() != len(layout):
        raise ValueError(
            f"{name} must have {len(layout)} dimensions {dim_names(layout)}; got shape "
            f"{shape_text(tensor)}"
        )


def check_last_stride(name: str, tensor: Tensor) -> None:
    is_read = tensor.shape[-1] > 1 and tensor.numel() > 0
    if tensor.stride(-1) != 1 and is_read and not is_mapped(tensor):
        raise ValueError(
            f"{name} must have stride 1 in its last dimension; got strides "
            f"{tuple(tensor.stride())}: pass {name}.contiguous()"
        )


def check_size(name: str, tensor: Tensor, dim: int, dim_name: str, expected: int, why: str) -> None:
    if tensor.shape[dim] != expected:
        raise ValueError(
            f"{name} must have {dim_name} = {expected} ({why}); got shape {shape_text(tensor)}"
        )


def check_int32(name: str, tensor: Any, layout: Sequence[str], device: torch.device) -> None:
    """A table of indices or lengths: int32, on the device of q, unit last stride."""
    check_tensor(name, tensor, layout)
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must have dtype torch.int32; got {tensor.dtype}")
    check_device(name, tensor, device)
    check_last_stride(name, tensor)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors; got {tensor.device}")


def check_device_name(device: Any) -> torch.device:
    """A torch.device, or what names one; a number is one of the accelerator's."""
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"device must be a torch.device, its name or number; got {device!r}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one that torch knows; got {device!r}: {error}") from None


def check_backend(name: str, tensor: Tensor) -> None:
    """This build has kernels for the tensor's device (meta tensors only ask for shapes)."""
    device = tensor.device.type
    if device not in ops.BACKENDS and device != "meta" and ops.LIBRARY_PATH is not None:
        raise ValueError(
            f"{name} must be on a device that this build has kernels for "
            f"({', '.join(ops.BACKENDS)}); got {tensor.device}"
        )


def check_float_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must have dtype float64, float32, float16 or bfloat16; got {tensor.dtype}"
        )


def check_same_dtype(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Equal dtypes, or dtypes that autocast is about to make equal."""
    if tensor.dtype == like.dtype:
        return
    if autocast_dtype(tensor) is not None and autocast_dtype(like) is not None:
        return
    raise TypeError(
        f"{name} must have the dtype of {like_name}, {like.dtype}; got {tensor.dtype}: cast it"
    )


def check_head_dim(name: str, tensor: Tensor, dim_name: str) -> None:
    head_dim = tensor.shape[-1]
    if head_dim < 1 or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{name} must have {dim_name} from 1 to {MAX_HEAD_DIM}; got {head_dim} (shape "
            f"{shape_text(tensor)})"
        )


# ---- q, k and v together ----


def check_heads(q: Tensor, k_name: str, k: Tensor, v_name: str, v: Tensor) -> None:
    """Heads and head dims of q (..., num_heads_q, head_dim) and of keys and values fit."""
    num_heads_q, num_heads_kv = q.shape[-2], k.shape[-2]
    if num_heads_q < 1:
        raise ValueError(f"q must have num_heads_q of at least 1; got shape {shape_text(q)}")
    if num_heads_kv < 1 or num_heads_q % num_heads_kv != 0:
        raise ValueError(
            f"{k_name} must have num_heads_kv that divides num_heads_q = {num_heads_q}; "
            f"got {num_heads_kv} (shape {shape_text(k)})"
        )
    check_size(v_name, v, -2, "num_heads_kv", num_heads_kv, f"as {k_name} has")
    check_head_dim("q", q, "head_dim")
    check_head_dim(v_name, v, "head_dim_v")
    check_size(k_name, k, -1, "head_dim", q.shape[-1], "as q has")


def check_qkv(q: Any, k: Any, v: Any, layouts: Sequence[Sequence[str]]) -> None:
    """q, k and v of one call, dense or packed; all three of float8 or none."""
    named = (("q", q), ("k", k), ("v", v))
    for (name, tensor), layout in zip(named, layouts, strict=True):
        check_tensor(name, tensor, layout)
    if FLOAT8 in (q.dtype, k.dtype, v.dtype):
        for name, tensor in named:
            if tensor.dtype != FLOAT8:
                raise TypeError(
                    f"{name} must have dtype float8_e4m3fn where one of q, k and v has; got "
                    f"{tensor.dtype}"
                )
    else:
        for name, tensor in named:
            check_float_dtype(name, tensor)
    check_backend("q", q)
    for name, tensor in named[1:]:
        if q.dtype != FLOAT8:
            check_same_dtype(name, tensor, "q", q)
        check_device(name, tensor, q.device)
    check_heads(q, "k", k, "v", v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_stride(name, tensor)
    if len(layouts[0]) == 4:
        check_size("k", k, 0, "batch", q.shape[0], "as q has")
        check_size("v", v, 0, "batch", q.shape[0], "as q has")
        check_size("v", v, 1, "seqlen_k", k.shape[1], "as k has")
    else:
        check_size("v", v, 0, "total_k", k.shape[0], "as k has")


def refuse_descales(q: Tensor, descales: Sequence[Any]) -> None:
    """They are for float8 q, k and v, which these are not."""
    for name, descale in zip(("q_descale", "k_descale", "v_descale"), descales, strict=True):
        if descale is not None:
            raise TypeError(
                f"{name} must be None unless q, k and v have dtype float8_e4m3fn; q has {q.dtype}"
            )


def refuse_float8_gradient(*tensors: Tensor | None) -> None:
    refuse_gradient(
        "attention on float8_e4m3fn q, k and v", *tensors, instead="bfloat16 q, k and v"
    )


def local_s_aux(s_aux: Tensor) -> Tensor:
    """This rank's sinks of a DTensor; any other tensor as it is.

    A module's parameter is a DTensor where a tensor parallel plan has sharded it, while q, k and v
    come out of the projections as plain tensors of this rank's heads. The gradient goes back as a
    DTensor with the placements of s_aux.
    """
    if not is_dtensor(s_aux):
        return s_aux
    if any(placement.is_partial() for placement in s_aux.placements):
        raise ValueError(
            "s_aux must be a DTensor with Shard or Replicate placements, whose local tensor holds "
            f"logits; got {tuple(s_aux.placements)}, of which it holds a summand: redistribute it"
        )
    return s_aux.to_local()


def check_s_aux(s_aux: Any, num_heads_q: int, device: torch.device) -> Tensor | None:
    """The sinks, contiguous: one logit per query head, any float dtype; of a DTensor the local."""
    if s_aux is None:
        return None
    if not isinstance(s_aux, Tensor):
        raise TypeError(
            f"s_aux must be None or a torch.Tensor (num_heads_q,); got {type(s_aux).__name__}"
        )
    s_aux = local_s_aux(s_aux)
    check_kind("s_aux", s_aux)
    if s_aux.dim() != 1 or s_aux.shape[0] != num_heads_q:
        raise ValueError(
            f"s_aux must have shape (num_heads_q,) = ({num_heads_q},), one sink per query head; "
            f"got shape {shape_text(s_aux)}{_unsharded_sinks(s_aux, num_heads_q)}"
        )
    check_float_dtype("s_aux", s_aux)
    check_device("s_aux", s_aux, device)
    return s_aux if s_aux.is_contiguous() else s_aux.contiguous()


def _unsharded_sinks(s_aux: Tensor, num_heads_q: int) -> str:
    """What to do about sinks of all heads beside one tensor parallel rank's share of the heads."""
    if num_heads_q == 0 or s_aux.dim() != 1 or s_aux.shape[0] <= num_heads_q:
        return ""
    if s_aux.shape[0] % num_heads_q != 0:
        return ""
    return (
        f". s_aux has {s_aux.shape[0]} logits, q has {num_heads_q} heads: under tensor parallelism "
        "shard the sinks with the heads (GPT_OSS_TP_PLAN or shard_s_aux of "
        "sink_attention_ext.parallel)"
    )


PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def local_sinks(s_aux: Any) -> Tensor | None:
    """s_aux as operators take it: contiguous, and of a DTensor what this rank holds."""
    if s_aux is None:
        return None
    if type(s_aux) in PLAIN_TENSORS and s_aux.layout is STRIDED and s_aux.is_contiguous():
        return s_aux
    if not isinstance(s_aux, Tensor):
        raise TypeError(
            f"s_aux must be None or a torch.Tensor (num_heads_q,); got {type(s_aux).__name__}"
        )
    s_aux = local_s_aux(s_aux)
    check_kind("s_aux", s_aux)
    return s_aux.contiguous()


# ---- numbers ----


def check_bools(causal: Any, deterministic: Any, return_lse: Any) -> None:
    if type(causal) is bool and type(deterministic) is bool and type(return_lse) is bool:
        return
    check_bool("causal", causal)
    check_bool("deterministic", deterministic)
    check_bool("return_lse", return_lse)


def check_number_types(softmax_scale: Any, softcap: Any, num_sink_tokens: Any) -> tuple[Any, ...]:
    """Types alone: a bool, a string or a tensor might pass for a number. Values are the operator's
    to refuse."""
    if softmax_scale is not None and type(softmax_scale) is not float:
        if not _is_number(softmax_scale):
            raise TypeError(f"softmax_scale must be None or a number; got {softmax_scale!r}")
    if type(softcap) is not float and not _is_number(softcap):
        raise TypeError(f"softcap must be a number; got {softcap!r}")
    if type(num_sink_tokens) is not int:
        num_sink_tokens = check_num_sink_tokens(num_sink_tokens)
    return softmax_scale, softcap, num_sink_tokens


def window_bounds(window_size: Any) -> tuple[int, int]:
    """(left, right), None as -1. Their values are the operator's to refuse."""
    if type(window_size) is tuple and len(window_size) == 2:
        left, right = window_size
        if type(left) is int and type(right) is int:
            return left, right
    return check_window(window_size, causal=False)


def _is_number(value: Any) -> bool:
    kinds = (int, float, torch.SymInt, torch.SymFloat)
    return isinstance(value, kinds) and not isinstance(value, bool)


def check_softmax_scale(
    softmax_scale: Any, head_dim: int, dtype: torch.dtype = torch.float32
) -> float:
    """The scale of the scores of q of `dtype`; None is head_dim ** -0.5."""
    if softmax_scale is None:
        return head_dim**-0.5
    if not _is_number(softmax_scale):
        raise TypeError(f"softmax_scale must be None or a number; got {softmax_scale!r}")
    if not torch.compiler.is_compiling():
        wrong = wrong_softmax_scale(softmax_scale, dtype)
        if wrong is not None:
            raise ValueError(
                f"{wrong} (the argument after v is softmax_scale, not FlashAttention 2's dropout_p)"
            )
    return softmax_scale


def check_softcap(
    softcap: Any, dtype: torch.dtype = torch.float32, softmax_scale: float | None = None
) -> float:
    """The softcap of scores of q of `dtype`, beside a softmax_scale that has been checked."""
    if not _is_number(softcap):
        raise TypeError(f"softcap must be a number; got {softcap!r}")
    if not torch.compiler.is_compiling():
        wrong = wrong_softcap(softcap, softmax_scale, dtype)
        if wrong is not None:
            raise ValueError(wrong)
    return softcap


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return value


def check_int(name: str, value: Any) -> int:
    """An int, or one of NumPy's, but no bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int; got {value!r}")
    return int(value)


def check_window(window_size: Any, causal: bool) -> tuple[int, int]:
    """(window_left, window_right) with -1 for unbounded; causal makes window_right 0."""
    if (
        not isinstance(window_size, Sequence)
        or isinstance(window_size, str)
        or len(window_size) != 2
    ):
        raise TypeError(
            f"window_size must be a pair (left, right) of integers or None; got {window_size!r}"
        )
    left = _window_bound("left", window_size[0])
    right = _window_bound("right", window_size[1])
    return left, 0 if causal else right


def _window_bound(side: str, bound: Any) -> int:
    if bound is None:
        return -1
    if not isinstance(bound, (int, torch.SymInt)) or isinstance(bound, bool):
        raise TypeError(f"window_size must hold integers or None; got {side} = {bound!r}")
    if bound < -1:
        raise ValueError(
            "window_size must hold numbers of tokens from 0, or -1 for unbounded; "
            f"got {side} = {bound}"
        )
    # Wider than any sequence is unbounded; lengths are int32, and so is what is computed of them.
    return min(bound, 2**30) if isinstance(bound, int) else bound


def check_num_sink_tokens(num_sink_tokens: Any) -> int:
    if not isinstance(num_sink_tokens, (int, torch.SymInt)) or isinstance(num_sink_tokens, bool):
        raise TypeError(f"num_sink_tokens must be an int; got {num_sink_tokens!r}")
    if num_sink_tokens < 0:
        raise ValueError(
            "num_sink_tokens must be at least 0, the first tokens that stay visible beside a "
            f"sliding window; got {num_sink_tokens}"
        )
    return within_int32(num_sink_tokens)


def check_max_seqlen(name: str, max_seqlen: Any) -> int:
    """A longest length: int, SymInt, or a 0-d integer tensor, which the host reads."""
    if isinstance(max_seqlen, Tensor):
        if max_seqlen.dim() != 0 or max_seqlen.is_floating_point():
            raise TypeError(
                f"{name} must be an int or a 0-d integer tensor; got a {max_seqlen.dtype} "
                f"tensor of shape {shape_text(max_seqlen)}"
            )
        if max_seqlen.device.type == "meta":
            raise ValueError(f"{name} must have a value; got a meta tensor: pass an int")
        max_seqlen = max_seqlen.item()
    if not isinstance(max_seqlen, (int, torch.SymInt)) or isinstance(max_seqlen, bool):
        raise TypeError(f"{name} must be an int; got {max_seqlen!r}")
    if not torch.compiler.is_compiling() and max_seqlen < 0:
        raise ValueError(f"{name} must be at least 0; got {max_seqlen}")
    return within_int32(max_seqlen)


def check_num_splits(num_splits: Any) -> int:
    if not isinstance(num_splits, (int, torch.SymInt)) or isinstance(num_splits, bool):
        raise TypeError(f"num_splits must be an int; got {num_splits!r}")
    if num_splits < 0:
        raise ValueError(
            f"num_splits must be 0 (chosen for you), 1 (never split) or more; got {num_splits}"
        )
    return within_int32(num_splits)


def within_int32(count: int | torch.SymInt) -> int | torch.SymInt:
    """More than any sequence has tokens is as good as the most; operators take no more than int64.

    A number that torch.compile traces as a symbol is within int64 already.
    """
    return min(count, INT32_MAX) if isinstance(count, int) else count
