"""What torch.autocast casts: q, k and v, but never a cache, whose dtype q then follows.

Importing this registers nothing: dispatch_rules.py does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sink_attention_ext import ops


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants for `tensor`, or None where it leaves the tensor alone."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch has no word on meta
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


def cast_q_like_cache(q: Tensor, k_cache: Tensor, *args: Any) -> tuple[Any, ...]:
    """What autocast makes of an operator's arguments, q to begin with."""
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


def _cast_qkv_like_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Any, ...]:
    q, *_ = cast_q_like_cache(q, k_cache)
    k, v, *_ = _cast_kv_like_cache(k, v, k_cache, v_cache)
    return q, k_cache, v_cache, k, v, *args


RULES = {
    "flash_attn_fwd": _cast_qkv,
    "flash_attn_varlen_fwd": _cast_qkv,
    "paged_attn": cast_q_like_cache,
    "paged_attn.out": cast_q_like_cache,
    "append_and_attend": _cast_qkv_like_cache,
    "append_and_attend.out": _cast_qkv_like_cache,
    "reshape_and_cache": _cast_kv_like_cache,
    "reshape_and_cache.token_scales": _cast_kv_like_cache,
}


def kernel_of(
    name: str, cast: Callable[..., tuple[Any, ...]], dispatch_key: str
) -> Callable[..., Any]:
    op = ops.lookup(name)
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        args = cast(*args)  # outside the guard, under which autocast reads as disabled
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op(*args, **kwargs)

    return kernel
