"""Validation that the operators over caches cannot do: kinds of arguments, whose refusal torch
words in its own way, and lengths that a plan is made of. The operators check all else."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sink_attention_ext import checks, ops
from sink_attention_ext.tensor_kinds import check_kind

K_CACHE = ("num_pages", "page_size", "num_heads_kv", "head_dim")
V_CACHE = ("num_pages", "page_size", "num_heads_kv", "head_dim_v")
Q = {False: checks.Q_DENSE, True: checks.Q_PACKED}  # by whether there is a cu_seqlens_q
K_NEW = {
    False: ("batch", "seqlen_new", "num_heads_kv", "head_dim"),
    True: ("total_q", "num_heads_kv", "head_dim"),
}
V_NEW = {packed: (*layout[:-1], "head_dim_v") for packed, layout in K_NEW.items()}
K_TOKENS = ("num_tokens", "num_heads_kv", "head_dim")
V_TOKENS = ("num_tokens", "num_heads_kv", "head_dim_v")
SCALE_SHAPES = "(), (1,), (num_heads_kv,) or (num_pages, page_size, num_heads_kv)"


def check_caches(k_cache: Any, v_cache: Any, is_paged: bool = True) -> None:
    """Two caches that belong together, (num_pages, page_size, num_heads_kv, head_dim[_v]).

    is_paged: else dense, a row for each sequence, which may have room for no token.
    """
    for name, cache, layout in (("k_cache", k_cache, K_CACHE), ("v_cache", v_cache, V_CACHE)):
        checks.check_tensor(name, cache, layout)
        if cache.dtype not in checks.CACHE_DTYPES:
            raise TypeError(
                f"{name} must have dtype float64, float32, float16, bfloat16, float8_e4m3fn or "
                f"int8; got {cache.dtype}"
            )
        checks.check_last_stride(name, cache)
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(
            f"v_cache must have the dtype of k_cache, {k_cache.dtype}; got {v_cache.dtype}"
        )
    checks.check_device("v_cache", v_cache, k_cache.device)
    checks.check_backend("k_cache", k_cache)
    checks.check_size("v_cache", v_cache, 0, "num_pages", k_cache.shape[0], "as k_cache has")
    checks.check_size("v_cache", v_cache, 1, "page_size", k_cache.shape[1], "as k_cache has")
    if is_paged and k_cache.shape[1] < 1:
        raise ValueError(
            f"k_cache must have page_size of at least 1; got shape {checks.shape_text(k_cache)}"
        )


def are_token_scales(k_scale: Tensor | None) -> bool:
    """Whether checked scales are one for each token and head, which a write computes."""
    return k_scale is not None and k_scale.dim() == 3


def of_one_shape(k_scale: Any, v_scale: Any, k_cache: Tensor) -> tuple[Any, Any]:
    """Scales for the operators: of a whole cache or of its heads, both of one shape, contiguous."""
    tensors = isinstance(k_scale, Tensor) and isinstance(v_scale, Tensor)
    if not tensors or k_scale.dim() > 1 or v_scale.dim() > 1 or k_cache.dim() != 4:
        return k_scale, v_scale
    num_heads_kv = k_cache.shape[2]
    if k_scale.numel() != v_scale.numel():
        ones = [scale for scale in (k_scale, v_scale) if scale.numel() == 1]
        if len(ones) == 1 and max(k_scale.numel(), v_scale.numel()) == num_heads_kv:
            k_scale, v_scale = k_scale.expand(num_heads_kv), v_scale.expand(num_heads_kv)
    return k_scale.contiguous(), v_scale.contiguous()


def check_cache_scales(k_scale: Any, v_scale: Any, k_cache: Tensor) -> None:
    """Scales are there exactly for quantised caches, both of one kind."""
    if k_cache.dtype not in checks.QUANTISED_DTYPES:
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is not None:
                raise ValueError(
                    f"{name} must be None for caches of {k_cache.dtype}: only float8_e4m3fn and "
                    f"int8 caches are scaled; got {scale!r}"
                )
        return
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        check_scale(name, scale, k_cache)
    if are_token_scales(k_scale) != are_token_scales(v_scale):
        raise ValueError(
            "k_scale and v_scale must be of one kind, both for each token and head or neither; "
            f"got shapes {checks.shape_text(k_scale)} and {checks.shape_text(v_scale)}"
        )


def check_scale(name: str, scale: Any, k_cache: Tensor) -> None:
    """float32, one for all kv heads, one for each, or one for each token and head."""
    if not isinstance(scale, Tensor):
        raise TypeError(
            f"{name} must be a float32 tensor of shape {SCALE_SHAPES} for {k_cache.dtype} caches; "
            f"got {type(scale).__name__}"
        )
    check_kind(name, scale)
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} must have dtype torch.float32; got {scale.dtype}")
    num_heads_kv, token_shape = k_cache.shape[2], tuple(k_cache.shape[:3])
    is_static = scale.dim() == 0 or (scale.dim() == 1 and scale.shape[0] in (1, num_heads_kv))
    if not is_static and tuple(scale.shape) != token_shape:
        raise ValueError(
            f"{name} must have shape {SCALE_SHAPES}, here (), (1,), ({num_heads_kv},) or "
            f"{token_shape}; got {checks.shape_text(scale)}"
        )
    checks.check_device(name, scale, k_cache.device)
    if is_static and can_read_values(scale):
        values = scale.tolist()
        for head, value in enumerate(values if scale.dim() > 0 else [values]):
            if not 2.0**-126 <= abs(value) <= 2.0**126:  # NaN is neither
                raise ValueError(
                    f"{name}[{head}] must be finite, of a magnitude from 2**-126 to 2**126, so "
                    f"that numbers can be divided by it in float32; got {value}"
                )


def can_read_values(tensor: Tensor) -> bool:
    """Whether the host may look at the values: eager mode, no tensor that only wraps others, and no
    device that it would wait for unasked (set_debug_checks)."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if type(tensor) is not Tensor and (is_fake(tensor) or is_traceable_wrapper_subclass(tensor)):
        return False
    if tensor.device.type == "cuda":
        return ops.debug_checks() and not torch.cuda.is_current_stream_capturing()
    return tensor.device.type == "cpu"


# ---- kinds of arguments ----


def check_kinds(**arguments: tuple[Any, Sequence[str] | None]) -> None:
    """Each argument is a plain tensor, with the dimensions of its layout where one is given, or
    None where that is allowed: names of such arguments end in "_"."""
    for name, (value, layout) in arguments.items():
        if name.endswith("_") and value is None:
            continue
        name = name.removesuffix("_")
        if layout is not None:
            checks.check_tensor(name, value, layout)
        elif not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
        else:
            check_kind(name, value)
        if value.is_quantized:
            raise TypeError(f"{name} must not have a dtype of torch's quantised; got {value.dtype}")


def check_attend_kinds(
    q: Any, k_cache: Any, v_cache: Any, k: Any, v: Any, cache_seqlens: Any, block_table: Any,
    cu_seqlens_q: Any, s_aux: Any, k_scale: Any, v_scale: Any, tree_mask: Any, out: Any,
) -> None:  # fmt: skip
    is_packed = cu_seqlens_q is not None
    if not isinstance(cache_seqlens, (int, torch.SymInt, Tensor, NoneType)) or (
        isinstance(cache_seqlens, bool)
    ):
        raise TypeError(
            f"cache_seqlens must be an int or an int32 tensor (batch,); got {cache_seqlens!r}"
        )
    lengths = cache_seqlens if isinstance(cache_seqlens, Tensor) else None
    check_kinds(
        q=(q, Q[is_packed]),
        k_cache=(k_cache, K_CACHE),
        v_cache=(v_cache, V_CACHE),
        k_=(k, K_NEW[is_packed]),
        v_=(v, V_NEW[is_packed]),
        cache_seqlens_=(lengths, ("batch",)),
        block_table_=(block_table, ("batch", "max_pages_per_seq")),
        cu_seqlens_q_=(cu_seqlens_q, ("batch + 1",)),
        s_aux_=(s_aux, ("num_heads_q",)),
        tree_mask_=(tree_mask, ("total_q",) if is_packed else ("batch", "seqlen_q")),
        k_scale_=(k_scale, None),
        v_scale_=(v_scale, None),
        out_=(out, (*Q[is_packed][:-1], "head_dim_v")),
    )
    check_caches(k_cache, v_cache, is_paged=block_table is not None)


def check_write_kinds(
    k: Any, v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, k_scale: Any, v_scale: Any
) -> None:
    check_kinds(
        k=(k, K_TOKENS),
        v=(v, V_TOKENS),
        k_cache=(k_cache, K_CACHE),
        v_cache=(v_cache, V_CACHE),
        slot_mapping=(slot_mapping, ("num_tokens",)),
        k_scale_=(k_scale, None),
        v_scale_=(v_scale, None),
    )
    check_caches(k_cache, v_cache)
