"""Validation of arguments: every message names the argument, what came, and what was expected.

Wrong values raise ValueError, wrong types and dtypes TypeError. Shapes, dtypes, devices and strides
are checked everywhere; numbers that torch.compile traces as symbols, and the contents of tensors,
only in eager mode. The compiled operators check them again when they run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sink_attention_ext import ops
from sink_attention_ext.autograd import autocast_dtype

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = torch.float8_e4m3fn
MAX_HEAD_DIM = 256

Q_DENSE = ("batch", "seqlen_q", "num_heads_q", "head_dim")
K_DENSE = ("batch", "seqlen_k", "num_heads_kv", "head_dim")
V_DENSE = ("batch", "seqlen_k", "num_heads_kv", "head_dim_v")
Q_PACKED = ("total_q", "num_heads_q", "head_dim")
K_PACKED = ("total_k", "num_heads_kv", "head_dim")
V_PACKED = ("total_k", "num_heads_kv", "head_dim_v")
K_NEW = ("batch", "seqlen_new", "num_heads_kv", "head_dim")
V_NEW = ("batch", "seqlen_new", "num_heads_kv", "head_dim_v")
K_PACKED_NEW = ("total_q", "num_heads_kv", "head_dim")
V_PACKED_NEW = ("total_q", "num_heads_kv", "head_dim_v")
K_TOKENS = ("num_tokens", "num_heads_kv", "head_dim")
V_TOKENS = ("num_tokens", "num_heads_kv", "head_dim_v")
K_CACHE = ("num_pages", "page_size", "num_heads_kv", "head_dim")
V_CACHE = ("num_pages", "page_size", "num_heads_kv", "head_dim_v")


def _names(layout: Sequence[str]) -> str:
    return f"({', '.join(layout)}{',' if len(layout) == 1 else ''})"


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


# ---- one tensor ----


def check_tensor(name: str, tensor: Any, layout: Sequence[str]) -> None:
    """A tensor with the dimensions of `layout`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor {_names(layout)}; got {type(tensor).__name__}"
        )
    if tensor.dim() != len(layout):
        raise ValueError(
            f"{name} must have {len(layout)} dimensions {_names(layout)}; got shape "
            f"{_shape(tensor)}"
        )


def check_last_stride(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} must have stride 1 in its last dimension; got strides "
            f"{tuple(tensor.stride())}: "
            f"pass {name}.contiguous()"
        )


def check_size(name: str, tensor: Tensor, dim: int, dim_name: str, expected: int, why: str) -> None:
    if tensor.shape[dim] != expected:
        raise ValueError(
            f"{name} must have {dim_name} = {expected} ({why}); got shape {_shape(tensor)}"
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
        f"{name} must have the dtype of {like_name}, {like.dtype}; got {tensor.dtype}: cast one "
        "of them"
    )


def check_head_dim(name: str, tensor: Tensor, dim_name: str) -> None:
    head_dim = tensor.shape[-1]
    if head_dim < 1 or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{name} must have {dim_name} from 1 to {MAX_HEAD_DIM}; got {head_dim} (shape "
            f"{_shape(tensor)})"
        )


# ---- q, k and v together ----


def check_heads(q: Tensor, k_name: str, k: Tensor, v_name: str, v: Tensor) -> None:
    """Heads and head dims of q (..., num_heads_q, head_dim) and of keys and values fit."""
    num_heads_q, num_heads_kv = q.shape[-2], k.shape[-2]
    if num_heads_q < 1:
        raise ValueError(f"q must have num_heads_q of at least 1; got shape {_shape(q)}")
    if num_heads_kv < 1 or num_heads_q % num_heads_kv != 0:
        raise ValueError(
            f"{k_name} must have num_heads_kv that divides num_heads_q = {num_heads_q}; got "
            f"{num_heads_kv} "
            f"(shape {_shape(k)})"
        )
    check_size(v_name, v, -2, "num_heads_kv", num_heads_kv, f"as {k_name} has")
    check_head_dim("q", q, "head_dim")
    check_head_dim(v_name, v, "head_dim_v")
    check_size(k_name, k, -1, "head_dim", q.shape[-1], "as q has")


def check_qkv(q: Any, k: Any, v: Any, layouts: Sequence[Sequence[str]]) -> None:
    """q, k and v of one call, dense or packed."""
    for name, tensor, layout in (("q", q, layouts[0]), ("k", k, layouts[1]), ("v", v, layouts[2])):
        check_tensor(name, tensor, layout)
        check_float_dtype(name, tensor)
    check_backend("q", q)
    for name, tensor in (("k", k), ("v", v)):
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


def check_s_aux(s_aux: Any, num_heads_q: int, device: torch.device) -> Tensor | None:
    """The sinks, contiguous: one logit per query head, any float dtype."""
    if s_aux is None:
        return None
    if not isinstance(s_aux, Tensor):
        raise TypeError(
            f"s_aux must be None or a torch.Tensor (num_heads_q,); got {type(s_aux).__name__}"
        )
    if s_aux.dim() != 1 or s_aux.shape[0] != num_heads_q:
        raise ValueError(
            f"s_aux must have shape (num_heads_q,) = ({num_heads_q},), one sink per query head; "
            f"got shape {_shape(s_aux)}"
        )
    check_float_dtype("s_aux", s_aux)
    check_device("s_aux", s_aux, device)
    return s_aux if s_aux.is_contiguous() else s_aux.contiguous()


# ---- numbers ----


def _is_number(value: Any) -> bool:
    kinds = (int, float, torch.SymInt, torch.SymFloat)
    return isinstance(value, kinds) and not isinstance(value, bool)


def check_softmax_scale(softmax_scale: Any, head_dim: int) -> float:
    """The scale of the scores; None is head_dim ** -0.5."""
    if softmax_scale is None:
        return head_dim**-0.5
    if not _is_number(softmax_scale):
        raise TypeError(f"softmax_scale must be None or a number; got {softmax_scale!r}")
    if not torch.compiler.is_compiling():
        if not math.isfinite(softmax_scale) or softmax_scale == 0:
            raise ValueError(
                f"softmax_scale must be finite and not 0; got {softmax_scale} "
                "(the argument after v is softmax_scale, not FlashAttention 2's dropout_p)"
            )
    return softmax_scale


def check_softcap(softcap: Any) -> float:
    if not _is_number(softcap):
        raise TypeError(f"softcap must be a number; got {softcap!r}")
    if not torch.compiler.is_compiling() and not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be finite and at least 0 (0.0 is none); got {softcap}")
    return softcap


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return value


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
            f"window_size must hold numbers of tokens from 0, or -1 for unbounded; got {side} = "
            f"{bound}"
        )
    return bound


def check_max_seqlen(name: str, max_seqlen: Any) -> int:
    """A longest length: int, SymInt, or (in eager mode) a 0-d integer tensor on the CPU."""
    if isinstance(max_seqlen, Tensor):
        if max_seqlen.dim() != 0 or max_seqlen.is_floating_point():
            raise TypeError(
                f"{name} must be an int or a 0-d integer tensor; got a {max_seqlen.dtype} tensor "
                "of "
                f"shape {_shape(max_seqlen)}"
            )
        max_seqlen = max_seqlen.item()
    if not isinstance(max_seqlen, (int, torch.SymInt)) or isinstance(max_seqlen, bool):
        raise TypeError(f"{name} must be an int; got {max_seqlen!r}")
    if not torch.compiler.is_compiling() and max_seqlen < 0:
        raise ValueError(f"{name} must be at least 0; got {max_seqlen}")
    return max_seqlen


def check_num_splits(num_splits: Any) -> int:
    if not isinstance(num_splits, (int, torch.SymInt)) or isinstance(num_splits, bool):
        raise TypeError(f"num_splits must be an int; got {num_splits!r}")
    if num_splits < 0:
        raise ValueError(
            f"num_splits must be 0 (chosen for you), 1 (never split) or more; got {num_splits}"
        )
    return num_splits


# ---- packed sequences ----


def check_cu_seqlens(
    cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_k: Any, device: torch.device
) -> None:
    check_int32("cu_seqlens_q", cu_seqlens_q, ("batch + 1",), device)
    check_int32("cu_seqlens_k", cu_seqlens_k, ("batch + 1",), device)
    if cu_seqlens_q.shape[0] < 1:
        raise ValueError("cu_seqlens_q must have batch + 1 entries, at least 1; got shape (0,)")
    check_size(
        "cu_seqlens_k", cu_seqlens_k, 0, "batch + 1", cu_seqlens_q.shape[0], "as cu_seqlens_q has"
    )
    if seqused_k is not None:
        check_int32("seqused_k", seqused_k, ("batch",), device)
        check_size(
            "seqused_k", seqused_k, 0, "batch", cu_seqlens_q.shape[0] - 1, "see cu_seqlens_q"
        )


# ---- caches ----


def check_caches(k_cache: Any, v_cache: Any) -> None:
    """Two caches that belong together, (num_pages, page_size, num_heads_kv, head_dim[_v])."""
    for name, cache, layout in (("k_cache", k_cache, K_CACHE), ("v_cache", v_cache, V_CACHE)):
        check_tensor(name, cache, layout)
        if cache.dtype not in FLOAT_DTYPES and cache.dtype != FLOAT8:
            raise TypeError(
                f"{name} must have dtype float64, float32, float16, bfloat16 or float8_e4m3fn; "
                f"got {cache.dtype}"
            )
        check_last_stride(name, cache)
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(
            f"v_cache must have the dtype of k_cache, {k_cache.dtype}; got {v_cache.dtype}"
        )
    check_device("v_cache", v_cache, k_cache.device)
    check_backend("k_cache", k_cache)
    check_size("v_cache", v_cache, 0, "num_pages", k_cache.shape[0], "as k_cache has")
    check_size("v_cache", v_cache, 1, "page_size", k_cache.shape[1], "as k_cache has")
    if k_cache.shape[1] < 1:
        raise ValueError(f"k_cache must have page_size of at least 1; got shape {_shape(k_cache)}")


def check_dtype_against_cache(name: str, tensor: Tensor, k_cache: Tensor) -> None:
    """q, k and v have the dtype of the cache, unless it is float8 or autocast will make them so."""
    check_float_dtype(name, tensor)
    if k_cache.dtype != FLOAT8:
        check_same_dtype(name, tensor, "k_cache", k_cache)


def check_cache_scale(name: str, scale: Any, k_cache: Tensor) -> Tensor | None:
    """A scale is there exactly for float8 caches: float32, one for all kv heads or one each."""
    num_heads_kv = k_cache.shape[2]
    if k_cache.dtype != FLOAT8:
        if scale is not None:
            raise ValueError(
                f"{name} must be None for caches of {k_cache.dtype}: only float8_e4m3fn caches "
                "are scaled; "
                f"got {scale!r}"
            )
        return None
    if not isinstance(scale, Tensor):
        raise TypeError(
            f"{name} must be a float32 tensor of shape (), (1,) or (num_heads_kv,) for "
            "float8_e4m3fn "
            f"caches; got {type(scale).__name__}"
        )
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} must have dtype torch.float32; got {scale.dtype}")
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] not in (1, num_heads_kv)):
        raise ValueError(
            f"{name} must have shape (), (1,) or (num_heads_kv,) = ({num_heads_kv},); got "
            f"{_shape(scale)}"
        )
    check_device(name, scale, k_cache.device)
    return scale.contiguous()


def check_new_kv(
    k: Any,
    v: Any,
    k_cache: Tensor,
    v_cache: Tensor,
    k_layout: Sequence[str],
    v_layout: Sequence[str],
) -> None:
    """New keys and values that go into the caches."""
    if (k is None) != (v is None):
        missing, given = ("k", "v") if k is None else ("v", "k")
        raise ValueError(
            f"{missing} must be given where {given} is: keys and values are appended together"
        )
    for name, new, layout, cache in (("k", k, k_layout, k_cache), ("v", v, v_layout, v_cache)):
        check_tensor(name, new, layout)
        check_device(name, new, k_cache.device)
        check_dtype_against_cache(name, new, k_cache)
        check_last_stride(name, new)
        check_size(name, new, -2, "num_heads_kv", k_cache.shape[2], "as k_cache has")
        check_size(name, new, -1, layout[-1], cache.shape[-1], f"as {name}_cache has")
    check_same_dtype("v", v, "k", k)
    check_size("v", v, 0, v_layout[0], k.shape[0], "as k has")
    if len(v_layout) == 4:
        check_size("v", v, 1, v_layout[1], k.shape[1], "as k has")


def can_read_values(tensor: Tensor) -> bool:
    """Whether the host may look at the values: eager mode, and no device to wait for."""
    return (
        not torch.compiler.is_compiling() and type(tensor) is Tensor and tensor.device.type == "cpu"
    )


def check_packed_lengths(cu_seqlens_q: Tensor, total_q: int, max_seqlen_q: int) -> None:
    """cu_seqlens_q starts at 0, never falls, ends within q; no sequence exceeds max_seqlen_q."""
    starts = cu_seqlens_q.tolist()
    if starts[0] != 0:
        raise ValueError(f"cu_seqlens_q[0] must be 0; got {starts[0]}")
    for i in range(1, len(starts)):
        if starts[i] < starts[i - 1]:
            raise ValueError(
                f"cu_seqlens_q must never fall; got cu_seqlens_q[{i}] = {starts[i]} after "
                f"{starts[i - 1]}"
            )
        if starts[i] - starts[i - 1] > max_seqlen_q:
            raise ValueError(
                f"max_seqlen_q must be at least the longest sequence; got {max_seqlen_q}, but "
                f"sequence {i - 1} "
                f"has {starts[i] - starts[i - 1]} queries"
            )
    if starts[-1] > total_q:
        raise ValueError(
            f"cu_seqlens_q[{len(starts) - 1}] must be at most total_q = {total_q}; got {starts[-1]}"
        )


def check_append_lengths(cache_seqlens: Tensor, seqused_k: Tensor, capacity: int) -> None:
    """The values of cache_seqlens leave room for the new tokens."""
    before, after = cache_seqlens.tolist(), seqused_k.tolist()
    for b, (old, new) in enumerate(zip(before, after, strict=True)):
        if old < 0 or new > capacity:
            raise ValueError(
                f"cache_seqlens[{b}] must be from 0 to {capacity - new + old}, so that "
                f"{new - old} new tokens fit into the {capacity} that the sequence's cache holds; "
                f"got {old}"
            )


def check_block_table_values(
    block_table: Tensor, first_key: Tensor, seqused_k: Tensor, num_pages: int, page_size: int
) -> None:
    """Every page with a key from first_key[b] to seqused_k[b] - 1 exists; others are not read."""
    if block_table.numel() == 0:
        return
    lowest, highest = block_table.aminmax()
    if lowest >= 0 and highest < num_pages:
        return  # also the entries that are not read: the common case, and quick to see
    column = torch.arange(block_table.shape[1], device=block_table.device)
    end = (seqused_k[:, None] + page_size - 1) // page_size
    is_used = (column >= first_key[:, None] // page_size) & (column < end)
    is_bad = is_used & ((block_table < 0) | (block_table >= num_pages))
    if is_bad.any():
        b, i = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"block_table[{b}, {i}] must be from 0 to {num_pages - 1}, a page of k_cache; "
            f"got {int(block_table[b, i])}"
        )
