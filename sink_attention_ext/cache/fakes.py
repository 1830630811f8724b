"""Fake kernels of the operators over key-value caches, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from sink_attention_ext.fake_checks import (
    MAX_DRAFT_TOKENS,
    QUANTISED_DTYPES,
    check_at_least_0,
    check_device,
    check_dtype,
    check_float,
    check_head_dim,
    check_last_stride,
    check_mask,
    check_qkv,
    check_rank,
    check_results,
    check_shape,
    check_sinks,
    check_size,
    check_vector,
    is_known,
    refuse_if,
)
from sink_attention_ext.fakes import new_results


def check_scales(k_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    named = (("k_scale", k_scale), ("v_scale", v_scale))
    if k_cache.dtype not in QUANTISED_DTYPES:
        for name, scale in named:
            if scale is not None:
                raise ValueError(
                    f"{name} must be None: it is only for float8_e4m3fn and int8 caches"
                )
        return
    num_heads_kv = k_cache.shape[2]
    for name, scale in named:
        if scale is None:
            raise ValueError(f"{name} must be given for a {k_cache.dtype} cache")
        check_device(name, scale, k_cache)
        check_dtype(name, scale, torch.float32)
    if (k_scale.dim() == 3) != (v_scale.dim() == 3):
        raise ValueError(
            "k_scale and v_scale must be of one kind, both for each token or neither; got shapes "
            f"{tuple(k_scale.shape)} and {tuple(v_scale.shape)}"
        )
    for name, scale in named:
        if scale.dim() == 3:
            check_shape(name, scale, k_cache.shape[:3])
            continue
        message = (
            f"{name} must have shape (), (1,), (num_heads_kv,) = ({num_heads_kv},) or, one for "
            "each token and head, (num_pages, page_size, num_heads_kv); got "
            f"{tuple(scale.shape)}"
        )
        if scale.dim() > 1:
            raise ValueError(message)
        if scale.dim() == 1 and not is_known(scale.shape[0] == 1):
            refuse_if(scale.shape[0] != num_heads_kv, message)
            check_last_stride(name, scale)
    if k_scale.dim() < 3:
        refuse_if(
            k_scale.numel() != v_scale.numel(),
            f"k_scale and v_scale must have one shape; got {tuple(k_scale.shape)} and "
            f"{tuple(v_scale.shape)}",
        )


def check_caches(like_name: str, like: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """`like` are the numbers that go in, or the queries."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_rank(name, cache, 4, "(num_pages, page_size, num_heads_kv, head_dim)")
    check_float(like_name, like)
    if k_cache.dtype not in QUANTISED_DTYPES:
        check_dtype("k_cache", k_cache, like.dtype)
    check_dtype("v_cache", v_cache, k_cache.dtype)


def check_tree_mask(
    tree_mask: Tensor | None, q: Tensor, max_seqlen_q: Any, causal: bool, window_right: Any
) -> None:
    if tree_mask is None:
        return
    check_dtype("tree_mask", tree_mask, torch.int64)
    check_device("tree_mask", tree_mask, q)
    check_shape("tree_mask", tree_mask, q.shape[:-2])
    check_last_stride("tree_mask", tree_mask)
    if not causal:
        refuse_if(
            window_right != 0,
            f"tree_mask needs causal (or window_right = 0); got window_right {window_right}",
        )
    rows = q.shape[-3]
    longest = min(max_seqlen_q, rows) if q.dim() == 3 and isinstance(rows, int) else rows
    if q.dim() == 4 or isinstance(rows, int):
        refuse_if(
            longest > MAX_DRAFT_TOKENS,
            f"seqlen_q of q and max_seqlen_q must be at most {MAX_DRAFT_TOKENS} with tree_mask (a "
            f"bit for each draft token); got {longest}",
        )


def check_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    check_rank("k", k, 3, "(num_tokens, num_heads_kv, head_dim)")
    check_rank("v", v, 3, "(num_tokens, num_heads_kv, head_dim_v)")
    check_caches("k", k, k_cache, v_cache)
    check_dtype("v", v, k.dtype)
    check_head_dim("k", k, "head_dim")
    check_head_dim("v", v, "head_dim_v")
    num_tokens, num_heads_kv, head_dim = k.shape
    pages = k_cache.shape[:2]
    check_shape("v", v, (num_tokens, num_heads_kv, v.shape[2]))
    check_shape("k_cache", k_cache, (*pages, num_heads_kv, head_dim))
    check_shape("v_cache", v_cache, (*pages, num_heads_kv, v.shape[2]))
    check_vector("slot_mapping", slot_mapping, num_tokens, k, torch.int64)
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_last_stride(name, tensor)
        check_device(name, tensor, k)
    check_scales(k_cache, k_scale, v_scale)


# ---- the operators ----


def _check_attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, cu_seqlens_q: Tensor | None, s_aux: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, max_seqlen_q: Any, max_seqlen_k: Any,
    scale: Any, causal: bool, left: Any, right: Any, softcap: Any, num_splits: Any,
    num_sink_tokens: Any, tree_mask: Tensor | None,
) -> None:  # fmt: skip
    if cu_seqlens_q is not None:
        check_rank("q", q, 3, "(total_q, num_heads, head_dim) with cu_seqlens_q")
    else:
        check_rank("q", q, 4, "(batch, seqlen_q, num_heads, head_dim) without cu_seqlens_q")
    check_caches("q", q, k_cache, v_cache)
    check_qkv(q, k_cache, v_cache, "k_cache", "v_cache")
    check_scales(k_cache, k_scale, v_scale)
    check_sinks(s_aux, q.shape[-2], q)
    if cu_seqlens_q is not None:
        check_rank("cu_seqlens_q", cu_seqlens_q, 1, "(batch + 1,)")
        entries = cu_seqlens_q.shape[0]
        refuse_if(entries < 1, "cu_seqlens_q must have shape (batch + 1,); got (0,)")
        batch = entries - 1
        check_vector("cu_seqlens_q", cu_seqlens_q, entries, q)
        check_at_least_0(max_seqlen_q=max_seqlen_q)
    else:
        batch = q.shape[0]
        refuse_if(
            max_seqlen_q < q.shape[1],
            f"max_seqlen_q must be at least seqlen_q = {q.shape[1]}; got {max_seqlen_q}",
        )
    if block_table is None:
        check_size("k_cache", k_cache, 0, batch, "without block_table a row for each sequence")
    else:
        check_rank("block_table", block_table, 2, "(batch, max_pages_per_seq)")
        check_dtype("block_table", block_table, torch.int32)
        check_last_stride("block_table", block_table)
        check_device("block_table", block_table, q)
        check_size("block_table", block_table, 0, batch, "a row for each sequence")
        refuse_if(
            k_cache.shape[1] < 1,
            f"k_cache must have page_size of at least 1; got shape {tuple(k_cache.shape)}",
        )
    check_vector("cache_seqlens", cache_seqlens, batch, q)
    check_at_least_0(num_splits=num_splits, max_seqlen_k=max_seqlen_k)
    check_mask(q, scale, causal, left, right, softcap, num_sink_tokens)
    check_tree_mask(tree_mask, q, max_seqlen_q, causal, right)


def _check_append(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor,
    cu_seqlens_q: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    if cu_seqlens_q is not None:
        check_rank("k", k, 3, "(total_q, num_heads_kv, head_dim) with cu_seqlens_q")
        rows: tuple[Any, ...] = (q.shape[0],)
    else:
        check_rank("k", k, 4, "(batch, seqlen_new, num_heads_kv, head_dim) without cu_seqlens_q")
        rows = (q.shape[0], k.shape[1])
    check_shape("k", k, (*rows, *k_cache.shape[2:]))
    check_shape("v", v, (*rows, *v_cache.shape[2:]))
    check_caches("k", k, k_cache, v_cache)
    check_dtype("v", v, k.dtype)
    for name, tensor in (("k", k), ("v", v)):
        check_last_stride(name, tensor)
        check_device(name, tensor, k_cache)
    check_apart("k_cache", k_cache, "v_cache", v_cache)
    if k_scale is not None and v_scale is not None and k_scale.dim() == 3:
        check_apart("k_scale", k_scale, "v_scale", v_scale)
        _fix_layout(k_scale, v_scale)
    _fix_layout(k_cache, v_cache)


def check_apart(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """What can be said without addresses of two tensors that are written: they are not one."""
    is_one = tensor is other
    if not is_one and tensor.device.type == "meta" and not is_fake(tensor):
        is_one = (
            tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
            and tensor.storage_offset() == other.storage_offset()
            and min(tensor.numel(), other.numel()) > 0
        )
    if is_one:
        raise ValueError(f"{other_name} must not share memory with {name}: both are written")


def _fix_layout(*written: Tensor) -> None:
    """Makes the layout of written views constants of a compiled graph.

    Inductor takes a symbolic storage offset of a view that an operator writes to for 0
    (pytorch/pytorch#198068): k_cache of one buffer for all layers, or for keys and values, would be
    written at the buffer's start. Sizes and strides too, of which the offset is a function.
    """
    for tensor in written:
        if isinstance(tensor.storage_offset(), torch.SymInt):
            for number in (*tensor.shape, *tensor.stride(), tensor.storage_offset()):
                int(number)


def _paged_attn(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None,
    cache_seqlens: Tensor, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_attend(q, k_cache, v_cache, cache_seqlens, block_table, *options)
    return new_results(q, v_cache.shape[-1])


def _check_given_results(q: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor) -> None:
    check_results(q, v_cache.shape[-1], out, lse)
    check_last_stride("out", out)
    check_last_stride("lse", lse)
    _fix_layout(out, lse)


def _paged_attn_out(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any, out: Tensor, lse: Tensor
) -> None:
    _paged_attn(q, k_cache, v_cache, *args)
    _check_given_results(q, v_cache, out, lse)


def _append_and_attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, cu_seqlens_q: Tensor | None, s_aux: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_attend(
        q, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens_q, s_aux, k_scale, v_scale,
        *options,
    )  # fmt: skip
    _check_append(q, k_cache, v_cache, k, v, cu_seqlens_q, k_scale, v_scale)
    return new_results(q, v_cache.shape[-1])


def _append_and_attend_out(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any, out: Tensor, lse: Tensor
) -> None:
    _append_and_attend(q, k_cache, v_cache, *args)
    _check_given_results(q, v_cache, out, lse)


def _reshape_and_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None, deterministic: bool = False,
) -> None:  # fmt: skip
    check_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    if k_scale is not None and k_scale.dim() == 3:
        raise ValueError(
            "k_scale and v_scale of each token and head are results: "
            "reshape_and_cache.token_scales writes them, reshape_and_cache takes shapes (), (1,) "
            f"and (num_heads_kv,); got {tuple(k_scale.shape)}"
        )
    check_apart("k_cache", k_cache, "v_cache", v_cache)
    _fix_layout(k_cache, v_cache)


def _reshape_and_cache_token_scales(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k_scale: Tensor,
    v_scale: Tensor, deterministic: bool = False,
) -> None:  # fmt: skip
    check_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    check_rank("k_scale", k_scale, 3, "(num_pages, page_size, num_heads_kv)")
    check_apart("k_cache", k_cache, "v_cache", v_cache)
    check_apart("k_scale", k_scale, "v_scale", v_scale)
    _fix_layout(k_cache, v_cache, k_scale, v_scale)


FAKE_KERNELS: dict[str, Callable[..., Any]] = {
    "paged_attn": _paged_attn,
    "paged_attn.out": _paged_attn_out,
    "append_and_attend": _append_and_attend,
    "append_and_attend.out": _append_and_attend_out,
    "reshape_and_cache": _reshape_and_cache,
    "reshape_and_cache.token_scales": _reshape_and_cache_token_scales,
}
