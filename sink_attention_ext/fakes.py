"""Shapes, dtypes and strides of the operators' results, for FakeTensor and meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sink_attention_ext.fake_checks import (
    FLOAT8,
    check_dense,
    check_descales,
    check_device,
    check_dtype,
    check_float,
    check_gradients,
    check_same_dtype,
    check_shape,
    check_sinks,
    check_varlen,
    lse_dtype,
)


def new_results(q: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
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
    return new_results(q, v.shape[-1])


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
    return new_results(q, v.shape[-1])


def _float8_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = new_results(q, v.shape[-1])
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


# ---- merge_attn_states ----


def _merge_attn_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], s_aux: Tensor | None
) -> tuple[Tensor, Tensor]:
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"outs and lses must have the same length of at least 1; got {len(outs)} outs and "
            f"{len(lses)} lses"
        )
    first = outs[0]
    check_float("outs[0]", first)
    if first.dim() not in (3, 4):
        raise ValueError(
            "outs[0] must have 4 dimensions (batch, seqlen, num_heads, head_dim) or 3 (total, "
            f"num_heads, head_dim); got shape {tuple(first.shape)}"
        )
    lse_shape = (*first.shape[:-3], first.shape[-2], first.shape[-3])
    lse_dims = "(batch, num_heads, seqlen)" if first.dim() == 4 else "(num_heads, total)"
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_same_dtype(f"outs[{i}]", out, "outs[0]", first)
        check_dtype(f"lses[{i}]", lse, lse_dtype(first.dtype))
        check_device(f"outs[{i}]", out, first)
        check_device(f"lses[{i}]", lse, first)
        check_shape(f"outs[{i}]", out, first.shape, "of outs[0]")
        check_shape(f"lses[{i}]", lse, lse_shape, f"{lse_dims}, heads before rows")
    check_sinks(s_aux, first.shape[-2], first)
    return first.new_empty(first.shape), lses[0].new_empty(lses[0].shape)


FAKE_KERNELS: dict[str, Callable[..., Any]] = {
    "flash_attn_fwd": _flash_attn_fwd,
    "flash_attn_bwd": _flash_attn_bwd,
    "flash_attn_varlen_fwd": _flash_attn_varlen_fwd,
    "flash_attn_varlen_bwd": _flash_attn_varlen_bwd,
    "flash_attn_fp8_fwd": _flash_attn_fp8_fwd,
    "flash_attn_fp8_varlen_fwd": _flash_attn_fp8_varlen_fwd,
    "merge_attn_states": _merge_attn_states,
}
