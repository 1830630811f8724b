"""Attention on float8_e4m3fn q, k and v: where no kernel takes it, on dequantised elements.

``flash_attn_fp8_is_native`` asks the plan: kernels take it on cards of compute capability 9.0, with
16-byte aligned rows. Everything else is computed by the operators for wider elements, on
stored * descale: in float32 on the CPU, and elsewhere in bfloat16, to which the products with the
descales are rounded.

Importing this registers it with torch, as what the operators do on tensors of each device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sink_attention_ext import ops

OPERATORS = ("flash_attn_fp8_fwd", "flash_attn_fp8_varlen_fwd")  # computed here


def computed_in(device: torch.device) -> torch.dtype:
    """The dtype of dequantised values."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def sequence_of_rows(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) int64: which sequence a packed row is of; the last one for those after it."""
    rows = torch.arange(num_rows, device=cu_seqlens.device, dtype=torch.int32)
    sequence = torch.bucketize(rows, cu_seqlens[1:].contiguous(), right=True)
    return sequence.clamp(max=max(cu_seqlens.shape[0] - 2, 0))


def dequantise(stored: Tensor, descale: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """stored * descale.

    Args:
        stored: (batch, seqlen, num_heads, head_dim), or (total, num_heads, head_dim) with
            cu_seqlens.
        descale: (batch, num_heads_kv), of which num_heads is a multiple; None: 1.
        cu_seqlens: (batch + 1,).
    """
    dtype = computed_in(stored.device)
    if descale is None or descale.shape[0] == 0:
        return stored.to(dtype)
    factor = descale.repeat_interleave(stored.shape[-2] // descale.shape[1], dim=1)
    if cu_seqlens is None:
        factor = factor[:, None]
    else:
        factor = factor[sequence_of_rows(cu_seqlens, stored.shape[0])]
    return (stored.float() * factor[..., None]).to(dtype)


def _flash_attn_fp8_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
    v_descale: Tensor | None, s_aux: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    no_lengths = (None, None, None)
    call = (q, k, v, q_descale, k_descale, v_descale, *no_lengths, s_aux, 0, 0, *options)
    if ops.flash_attn_fp8_is_native(*call):
        return ops.flash_attn_fp8_native(*call)
    *options, num_sink_tokens = options
    with torch.autocast(q.device.type, enabled=False):
        out, lse = ops.flash_attn_fwd(
            dequantise(q, q_descale), dequantise(k, k_descale), dequantise(v, v_descale), s_aux,
            *options, False, num_sink_tokens,
        )  # fmt: skip
    return out.bfloat16(), lse


def _flash_attn_fp8_varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
    v_descale: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = (q, k, v, q_descale, k_descale, v_descale, cu_seqlens_q, cu_seqlens_k, *options)
    if ops.flash_attn_fp8_is_native(*call):
        return ops.flash_attn_fp8_native(*call)
    *options, num_sink_tokens = options
    with torch.autocast(q.device.type, enabled=False):
        out, lse = ops.flash_attn_varlen_fwd(
            dequantise(q, q_descale, cu_seqlens_q), dequantise(k, k_descale, cu_seqlens_k),
            dequantise(v, v_descale, cu_seqlens_k), cu_seqlens_q, cu_seqlens_k,
            *options, False, num_sink_tokens,
        )  # fmt: skip
    return out.bfloat16(), lse


def _register() -> torch.library.Library:
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    for key in ("CPU", "CUDA"):
        library.impl("flash_attn_fp8_fwd", _flash_attn_fp8_fwd, key)
        library.impl("flash_attn_fp8_varlen_fwd", _flash_attn_fp8_varlen_fwd, key)
    return library


_LIBRARY = _register() if ops.LIBRARY_PATH is not None else None
