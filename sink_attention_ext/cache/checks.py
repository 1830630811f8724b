"""Validation of key-value caches, block tables, and what is appended to them; see checks.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sink_attention_ext import checks, ops
from sink_attention_ext.fake_checks import MAX_DRAFT_TOKENS
from sink_attention_ext.tensor_kinds import check_kind, check_written_kind

K_NEW = ("batch", "seqlen_new", "num_heads_kv", "head_dim")
V_NEW = ("batch", "seqlen_new", "num_heads_kv", "head_dim_v")
K_PACKED_NEW = ("total_q", "num_heads_kv", "head_dim")
V_PACKED_NEW = ("total_q", "num_heads_kv", "head_dim_v")
K_TOKENS = ("num_tokens", "num_heads_kv", "head_dim")
V_TOKENS = ("num_tokens", "num_heads_kv", "head_dim_v")
K_CACHE = ("num_pages", "page_size", "num_heads_kv", "head_dim")
V_CACHE = ("num_pages", "page_size", "num_heads_kv", "head_dim_v")
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32


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


def check_dtype_against_cache(name: str, tensor: Tensor, k_cache: Tensor) -> None:
    """q, k and v have the cache's dtype, unless it is quantised or autocast will make them so."""
    checks.check_float_dtype(name, tensor)
    if k_cache.dtype not in checks.QUANTISED_DTYPES:
        checks.check_same_dtype(name, tensor, "k_cache", k_cache)


def are_token_scales(k_scale: Tensor | None) -> bool:
    """Whether checked scales are one for each token and head, which a write computes."""
    return k_scale is not None and k_scale.dim() == 3


def check_cache_scales(
    k_scale: Any, v_scale: Any, k_cache: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Scales are there exactly for quantised caches, both of one kind.

    Returned for the operators: scales of tokens as they are, since they are written to; others with
    one shape.
    """
    if k_cache.dtype not in checks.QUANTISED_DTYPES:
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is not None:
                raise ValueError(
                    f"{name} must be None for caches of {k_cache.dtype}: only float8_e4m3fn and "
                    f"int8 caches are scaled; got {scale!r}"
                )
        return None, None
    k_scale = _check_scale("k_scale", k_scale, k_cache)
    v_scale = _check_scale("v_scale", v_scale, k_cache)
    if are_token_scales(k_scale) != are_token_scales(v_scale):
        raise ValueError(
            "k_scale and v_scale must be of one kind, both for each token and head or neither; "
            f"got shapes {checks.shape_text(k_scale)} and {checks.shape_text(v_scale)}"
        )
    if are_token_scales(k_scale):
        return k_scale, v_scale
    if k_scale.shape != v_scale.shape:
        num_heads_kv = k_cache.shape[2]
        k_scale, v_scale = k_scale.expand(num_heads_kv), v_scale.expand(num_heads_kv)
    return k_scale.contiguous(), v_scale.contiguous()


def _check_scale(name: str, scale: Any, k_cache: Tensor) -> Tensor:
    """float32, one for all kv heads, one for each, or one for each token and head."""
    num_heads_kv = k_cache.shape[2]
    token_shape = tuple(k_cache.shape[:3])
    shapes = "(), (1,), (num_heads_kv,) or (num_pages, page_size, num_heads_kv)"
    if not isinstance(scale, Tensor):
        raise TypeError(
            f"{name} must be a float32 tensor of shape {shapes} for {k_cache.dtype} caches; got "
            f"{type(scale).__name__}"
        )
    check_kind(name, scale)
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} must have dtype torch.float32; got {scale.dtype}")
    is_static = scale.dim() == 0 or (scale.dim() == 1 and scale.shape[0] in (1, num_heads_kv))
    if not is_static and tuple(scale.shape) != token_shape:
        raise ValueError(
            f"{name} must have shape {shapes}, here (), (1,), ({num_heads_kv},) or {token_shape}; "
            f"got {checks.shape_text(scale)}"
        )
    checks.check_device(name, scale, k_cache.device)
    if is_static and can_read_values(scale):
        values = scale.tolist()
        for head, value in enumerate(values if scale.dim() > 0 else [values]):
            if not SMALLEST_SCALE <= abs(value) <= 1 / SMALLEST_SCALE:  # NaN is neither
                raise ValueError(
                    f"{name} must be finite, of a magnitude from 2**-126 to 2**126, so that "
                    f"numbers can be divided by it in float32; got {value}"
                    + (f" for head {head}" if scale.dim() > 0 else "")
                )
    return scale


MEMORY_FAULTS = ("must not share memory with", "must have memory of its own")  # check_memory.cpp


def call(op: Callable[..., Any], *args: Any) -> Any:
    """An operator whose refusal of tensors that overlap is a ValueError."""
    try:
        return op(*args)
    except RuntimeError as error:
        message = str(error)
        if any(fault in message for fault in MEMORY_FAULTS):
            raise ValueError(message) from None
        raise


def check_caches_can_be_written(k_cache: Tensor, v_cache: Tensor) -> None:
    """What can be said without addresses, as of meta tensors; operators see to the rest."""
    check_written_kind("k_cache", k_cache)
    check_written_kind("v_cache", v_cache)
    if k_cache is v_cache or (k_cache.device.type == "meta" and _begin_alike(k_cache, v_cache)):
        raise ValueError(
            "v_cache must not share memory with k_cache: keys and values are written to both"
        )


def _begin_alike(a: Tensor, b: Tensor) -> bool:
    """Two tensors of one storage whose first elements are one. Views are two objects of one."""
    is_one = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return is_one and a.storage_offset() == b.storage_offset() and min(a.numel(), b.numel()) > 0


def check_scales_can_be_written(k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """The same for scales of tokens, which are written where those are."""
    if are_token_scales(k_scale) and k_scale is v_scale:
        raise ValueError("v_scale must not share memory with k_scale: both are written")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not are_token_scales(scale):
            continue
        check_written_kind(name, scale)
        strides = zip(scale.shape, scale.stride(), strict=True)
        if any(size > 1 and stride == 0 for size, stride in strides):
            raise ValueError(
                f"{name} must have memory of its own for each token and head, since their scales "
                f"are written to it; got strides {tuple(scale.stride())}, as of expand()"
            )


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
        checks.check_tensor(name, new, layout)
        checks.check_device(name, new, k_cache.device)
        check_dtype_against_cache(name, new, k_cache)
        checks.check_last_stride(name, new)
        checks.check_size(name, new, -2, "num_heads_kv", k_cache.shape[2], "as k_cache has")
        checks.check_size(name, new, -1, layout[-1], cache.shape[-1], f"as {name}_cache has")
    checks.check_same_dtype("v", v, "k", k)
    checks.check_size("v", v, 0, v_layout[0], k.shape[0], "as k has")
    if len(v_layout) == 4:
        checks.check_size("v", v, 1, v_layout[1], k.shape[1], "as k has")


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
                f"sequence {i - 1} has {starts[i] - starts[i - 1]} queries"
            )
    if starts[-1] > total_q:
        raise ValueError(
            f"cu_seqlens_q[{len(starts) - 1}] must be at most total_q = {total_q}; got {starts[-1]}"
        )


def check_append_lengths(cache_seqlens: Tensor, new: Sequence[int], capacity: int) -> None:
    """The values of cache_seqlens leave room for new[b] tokens; int32 would not hold every sum."""
    for b, (old, count) in enumerate(zip(cache_seqlens.tolist(), new, strict=True)):
        if old < 0 or old + count > capacity:
            room = "" if count > capacity else f"from 0 to {capacity - count}, "
            raise ValueError(
                f"cache_seqlens[{b}] must be {room}so that {count} new tokens fit into the "
                f"{capacity} that the sequence's cache holds; got {old}"
            )


def check_block_table_values(
    block_table: Tensor,
    first_key: Tensor,
    seqused_k: Tensor,
    num_sink_tokens: int,
    num_pages: int,
    page_size: int,
) -> None:
    """Every page with a key from first_key[b] to seqused_k[b] - 1, or below num_sink_tokens,
    exists; others are not read."""
    if block_table.numel() == 0:
        return
    lowest, highest = block_table.aminmax()
    if lowest >= 0 and highest < num_pages:
        return  # also the entries that are not read: the common case, and quick to see
    column = torch.arange(block_table.shape[1], device=block_table.device)
    end = (seqused_k[:, None] + page_size - 1) // page_size
    is_used = (column >= first_key[:, None] // page_size) | (column * page_size < num_sink_tokens)
    is_used &= column < end
    is_bad = is_used & ((block_table < 0) | (block_table >= num_pages))
    if is_bad.any():
        b, i = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"block_table[{b}, {i}] must be from 0 to {num_pages - 1}, a page of k_cache; "
            f"got {int(block_table[b, i])}"
        )


def check_tree_mask(tree_mask: Any, q: Tensor, window_right: int, max_seqlen_q: int) -> None:
    """A word for each query, in a call that is causal and of few enough draft tokens."""
    if tree_mask is None:
        return
    layout = ("total_q",) if q.dim() == 3 else ("batch", "seqlen_q")
    checks.check_tensor("tree_mask", tree_mask, layout)
    if tree_mask.dtype != torch.int64:
        raise TypeError(f"tree_mask must have dtype torch.int64; got {tree_mask.dtype}")
    checks.check_device("tree_mask", tree_mask, q.device)
    checks.check_last_stride("tree_mask", tree_mask)
    for dim, dim_name in enumerate(layout):
        checks.check_size("tree_mask", tree_mask, dim, dim_name, q.shape[dim], "as q has")
    if window_right != 0:
        raise ValueError(
            f"tree_mask needs causal=True (or window_size[1] = 0); got window_right {window_right}"
        )
    if max_seqlen_q > MAX_DRAFT_TOKENS:
        raise ValueError(
            f"max_seqlen_q must be at most {MAX_DRAFT_TOKENS} with tree_mask, which has a bit for "
            f"each draft token of a sequence; got {max_seqlen_q}"
        )


def check_tree_mask_values(tree_mask: Tensor, cu_seqlens_q: Tensor | None) -> None:
    """Each draft token's word has the token's own bit, and none of a token after it."""
    if cu_seqlens_q is None:
        index = torch.arange(tree_mask.shape[1], device=tree_mask.device).expand(tree_mask.shape)
    else:
        tree_mask = tree_mask[: int(cu_seqlens_q[-1])]
        starts = cu_seqlens_q[:-1].repeat_interleave(cu_seqlens_q.diff())
        index = torch.arange(len(tree_mask), device=tree_mask.device) - starts
    own = torch.where(index == MAX_DRAFT_TOKENS - 1, -1, 1)  # the shift keeps the sign
    is_bad = (tree_mask >> index) != own
    if is_bad.any():
        place = is_bad.nonzero()[0].tolist()
        i = int(index[tuple(place)])
        raise ValueError(
            f"tree_mask must have bit {i} set and none above it in the word of draft token {i}; "
            f"got tree_mask{place} = {int(tree_mask[tuple(place)])}"
        )
