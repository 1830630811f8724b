"""Shapes, dtypes and strides of the operators' results, for FakeTensor and meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sink_attention_ext.fake_checks import (
    FLOAT8,
    check_at_least_0,
    check_caches,
    check_dense,
    check_descales,
    check_device,
    check_dtype,
    check_float,
    check_gradients,
    check_last_stride,
    check_mask,
    check_qkv,
    check_rank,
    check_results,
    check_scales,
    check_shape,
    check_sinks,
    check_size,
    check_tree_mask,
    check_varlen,
    check_vector,
    check_write,
    lse_dtype,
)


def _attention(q: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    """Rows of q are (..., seqlen or total, num_heads_q, head_dim): lse has heads before rows."""
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return (
        q.new_empty((*q.shape[:-1], head_dim_v)),
        q.new_empty(lse_shape, dtype=lse_dtype(q.dtype)),
    )


# ---- attention ----


def _flash_attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, scale: Any, causal: bool, left: Any,
    right: Any, softcap: Any, deterministic: bool, num_sink_tokens: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_float("q", q)
    check_dense(q, k, v, s_aux, scale, causal, left, right, softcap, num_sink_tokens)
    return _attention(q, v.shape[-1])


def _flash_attn_varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    seqused_k: Tensor | None, s_aux: Tensor | None, max_seqlen_q: Any, max_seqlen_k: Any,
    scale: Any, causal: bool, left: Any, right: Any, softcap: Any, deterministic: bool,
    num_sink_tokens: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_float("q", q)
    check_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, s_aux, max_seqlen_q, max_seqlen_k,
        scale, causal, left, right, softcap, num_sink_tokens,
    )  # fmt: skip
    return _attention(q, v.shape[-1])


def _float8_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _attention(q, v.shape[-1])
    return out.new_empty(out.shape, dtype=torch.bfloat16), lse


def _flash_attn_fp8_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
    v_descale: Tensor | None, s_aux: Tensor | None, *mask: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_dtype("q", q, FLOAT8)
    check_dense(q, k, v, s_aux, *mask)
    check_descales(q, q.shape[0], k.shape[2], q_descale, k_descale, v_descale)
    return _float8_results(q, v)


def _flash_attn_fp8_varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
    v_descale: Tensor | None, cu_seqlens_q: Tensor, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_dtype("q", q, FLOAT8)
    check_varlen(q, k, v, cu_seqlens_q, *options)
    batch = cu_seqlens_q.shape[0] - 1
    check_descales(q, batch, k.shape[1], q_descale, k_descale, v_descale)
    return _float8_results(q, v)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if s_aux is None:
        ds_aux = q.new_empty((0,), dtype=torch.float32)
    else:
        ds_aux = s_aux.new_empty(s_aux.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), ds_aux


def _flash_attn_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    s_aux: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _flash_attn_fwd(q, k, v, s_aux, *options)
    check_gradients(dout, dlse, q, v, out, lse)
    return _gradients(q, k, v, s_aux)


def _flash_attn_varlen_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, s_aux: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _flash_attn_varlen_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, s_aux, *options)
    check_gradients(dout, dlse, q, v, out, lse)
    return _gradients(q, k, v, s_aux)


# ---- caches ----


def _paged_attn(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seqused_k: Tensor,
    cu_seqlens_q: Tensor | None, s_aux: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, max_seqlen_q: Any, scale: Any, causal: bool, left: Any, right: Any,
    softcap: Any, num_splits: Any, num_sink_tokens: Any, tree_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if cu_seqlens_q is not None:
        check_rank("q", q, 3, "(total_q, num_heads, head_dim) with cu_seqlens_q")
    else:
        check_rank("q", q, 4, "(batch, seqlen_q, num_heads, head_dim) without cu_seqlens_q")
    check_caches("q", q, k_cache, v_cache)
    check_qkv(q, k_cache, v_cache, "k_cache", "v_cache")
    check_scales(k_cache, k_scale, v_scale)
    check_sinks(s_aux, q.shape[-2], q)
    check_rank("block_table", block_table, 2, "(batch, max_pages_per_seq)")
    check_dtype("block_table", block_table, torch.int32)
    check_last_stride("block_table", block_table)
    check_device("block_table", block_table, q)
    batch = block_table.shape[0]
    check_vector("seqused_k", seqused_k, batch, q)
    if cu_seqlens_q is not None:
        check_vector("cu_seqlens_q", cu_seqlens_q, batch + 1, q)
        check_at_least_0(max_seqlen_q=max_seqlen_q)
    else:
        check_size("q", q, 0, batch, "block_table's batch size")
    check_at_least_0(num_splits=num_splits)
    check_mask(q, scale, causal, left, right, softcap, num_sink_tokens)
    check_tree_mask(tree_mask, q, max_seqlen_q, causal, right)
    return _attention(q, v_cache.shape[-1])


def _check_paged_attn(*args: Any) -> None:
    *arguments, cache_seqlens = args
    _paged_attn(*arguments)
    if cache_seqlens is not None:
        check_device("cache_seqlens", cache_seqlens, args[0])


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


def _paged_attn_out(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any, out: Tensor, lse: Tensor
) -> None:
    _paged_attn(q, k_cache, v_cache, *args)
    check_results(q, v_cache.shape[-1], out, lse)
    check_last_stride("out", out)
    check_last_stride("lse", lse)
    _fix_layout(out, lse)


def _reshape_and_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    check_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    if k_scale is not None and k_scale.dim() == 3:
        raise RuntimeError(
            "k_scale and v_scale of each token and head are results: "
            "reshape_and_cache.token_scales writes them, reshape_and_cache takes shapes (), (1,) "
            f"and (num_heads_kv,), got {tuple(k_scale.shape)}"
        )
    _fix_layout(k_cache, v_cache)


def _reshape_and_cache_token_scales(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k_scale: Tensor,
    v_scale: Tensor,
) -> None:  # fmt: skip
    check_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    check_rank("k_scale", k_scale, 3, "(num_pages, page_size, num_heads_kv)")
    _fix_layout(k_cache, v_cache, k_scale, v_scale)


# ---- merge_attn_states ----


def _merge_attn_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], s_aux: Tensor | None
) -> tuple[Tensor, Tensor]:
    if len(outs) == 0 or len(outs) != len(lses):
        raise RuntimeError(
            "outs and lses must be equally many, at least one partial result, got "
            f"{len(outs)} and {len(lses)}"
        )
    first = outs[0]
    if first.dim() not in (3, 4):
        raise RuntimeError(
            "outs[0] must be (batch, seqlen, num_heads, head_dim) or (total, num_heads, head_dim), "
            f"got shape {tuple(first.shape)}"
        )
    check_float("outs[0]", first)
    lse_shape = (*first.shape[:-3], first.shape[-2], first.shape[-3])
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_dtype(f"outs[{i}]", out, first.dtype)
        check_dtype(f"lses[{i}]", lse, lse_dtype(first.dtype))
        check_device(f"outs[{i}]", out, first)
        check_device(f"lses[{i}]", lse, first)
        check_shape(f"outs[{i}]", out, first.shape)
        check_shape(f"lses[{i}]", lse, lse_shape)
    check_sinks(s_aux, first.shape[-2], first)
    return first.new_empty(first.shape), lses[0].new_empty(lses[0].shape)


FAKE_KERNELS: dict[str, Callable[..., Any]] = {
    "flash_attn_fwd": _flash_attn_fwd,
    "flash_attn_bwd": _flash_attn_bwd,
    "flash_attn_varlen_fwd": _flash_attn_varlen_fwd,
    "flash_attn_varlen_bwd": _flash_attn_varlen_bwd,
    "flash_attn_fp8_fwd": _flash_attn_fp8_fwd,
    "flash_attn_fp8_varlen_fwd": _flash_attn_fp8_varlen_fwd,
    "paged_attn": _paged_attn,
    "paged_attn.out": _paged_attn_out,
    "check_paged_attn": _check_paged_attn,
    "reshape_and_cache": _reshape_and_cache,
    "reshape_and_cache.token_scales": _reshape_and_cache_token_scales,
    "merge_attn_states": _merge_attn_states,
}
