"""Small valid arguments for every operator, shared by the opcheck and the fake-kernel tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sink_attention_ext import ops

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# scale, causal, window, softcap, deterministic, num_sink_tokens
FWD_OPTIONS = (0.5, True, 3, 0, 0.0, False, 2)


def randn(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(requires_grad)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense_qkv(
    dtype: torch.dtype, requires_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and sinks; q has rows with gaps, v a head_dim of its own."""
    q = randn(2, 4, 5, 8, dtype=dtype).transpose(1, 2).requires_grad_(requires_grad)
    k = randn(2, 7, 2, 8, dtype=dtype, requires_grad=requires_grad)
    v = randn(2, 7, 2, 6, dtype=dtype, requires_grad=requires_grad)
    return q, k, v, randn(4, requires_grad=requires_grad)


def packed_qkv(
    dtype: torch.dtype, requires_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = randn(4, 6, 8, dtype=dtype).transpose(0, 1).requires_grad_(requires_grad)
    k = randn(9, 2, 8, dtype=dtype, requires_grad=requires_grad)
    v = randn(9, 2, 6, dtype=dtype, requires_grad=requires_grad)
    return q, k, v, randn(4, requires_grad=requires_grad)


def fwd(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    return (*dense_qkv(dtype, requires_grad), *FWD_OPTIONS), {}


def fwd_without_sink(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    return (*dense_qkv(dtype, requires_grad)[:3], None, *FWD_OPTIONS), {}


def bwd(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    q, k, v, s_aux = dense_qkv(dtype)
    out, lse = ops.flash_attn_fwd(q, k, v, s_aux, *FWD_OPTIONS)
    dout = torch.randn_like(out).requires_grad_(requires_grad)
    return (dout, torch.randn_like(lse), q, k, v, out, lse, s_aux, *FWD_OPTIONS), {}


def bwd_without_sink(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    q, k, v, _ = dense_qkv(dtype)
    out, lse = ops.flash_attn_fwd(q, k, v, None, *FWD_OPTIONS)
    dout = torch.randn_like(out).requires_grad_(requires_grad)
    return (dout, None, q, k, v, out, lse, None, *FWD_OPTIONS), {}


def fwd_float8(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    q, k, v = (x.to(torch.float8_e4m3fn) for x in dense_qkv(dtype)[:3])
    descales = (torch.rand(2, 2) + 0.5, None, torch.rand(2, 2) + 0.5)
    return (q, k, v, *descales, randn(4), 0.5, True, 3, 0, 0.0, 2), {}


CU_SEQLENS = ([0, 2, 2, 5], [0, 4, 6, 9])  # row 5 of q is in no sequence


def varlen_fwd(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    q, k, v, s_aux = packed_qkv(dtype, requires_grad)
    cu_seqlens_q, cu_seqlens_k = (int32(*ends) for ends in CU_SEQLENS)
    lengths = (cu_seqlens_q, cu_seqlens_k, int32(4, 1, 2))
    return (q, k, v, *lengths, s_aux, 3, 4, *FWD_OPTIONS), {}


def varlen_fwd_float8(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    q, k, v, *lengths, s_aux, max_q, max_k = varlen_fwd(dtype, False)[0][:9]
    q, k, v = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
    descales = (torch.rand(3, 2) + 0.5, torch.rand(3, 2) + 0.5, None)
    return (q, k, v, *descales, *lengths, s_aux, max_q, max_k, 0.5, True, 3, 0, 0.0, 2), {}


def varlen_bwd(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (q, k, v, *lengths, s_aux, max_q, max_k), options = varlen_fwd(dtype, False)[0][:9], FWD_OPTIONS
    out, lse = ops.flash_attn_varlen_fwd(q, k, v, *lengths, s_aux, max_q, max_k, *options)
    dout = torch.randn_like(out).requires_grad_(requires_grad)
    dlse = torch.randn_like(lse)
    return (dout, dlse, q, k, v, out, lse, *lengths, s_aux, max_q, max_k, *options), {}


def caches(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Four pages of four tokens, kept heads first."""
    k_cache = randn(4, 2, 4, 8).to(dtype).transpose(1, 2)
    return k_cache, randn(4, 2, 4, 6).to(dtype).transpose(1, 2)


BLOCK_TABLE = ([1, 3, 0], [2, -7, 9])  # what lies beyond a sequence's length is not read


def paged(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    q = randn(2, 3, 4, 8, dtype=dtype)
    tables = (int32(*BLOCK_TABLE), int32(11, 2))
    # max_seqlen_q, max_seqlen_k, scale, causal, window, softcap, splits, num_sink_tokens
    options = (3, 12, 0.5, True, 5, 0, 0.0, 2, 1)
    return (q, *caches(dtype), *tables, None, randn(4), None, None, *options, None), {}


def paged_dense(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (q, *_), _ = paged(dtype, requires_grad)
    k_cache, v_cache = (cache[:2] for cache in caches(dtype))
    options = (3, 4, 0.5, True, -1, 0, 0.0, 0, 0, None)
    return (q, k_cache, v_cache, None, int32(4, 2), None, randn(4), None, None, *options), {}


def append(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (q, k_cache, v_cache, table, _, *options), _ = paged(dtype, requires_grad)
    new = randn(2, 2, 2, 8, dtype=dtype), randn(2, 2, 2, 6, dtype=dtype)
    return (q, k_cache, v_cache, *new, int32(8, 0), table, *options), {}


def append_out(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    return append(dtype, requires_grad)[0], paged_out(dtype, requires_grad)[1]


def append_dense(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (q, k_cache, v_cache, _, lengths, *options), _ = paged_dense(dtype, requires_grad)
    new = randn(2, 1, 2, 8, dtype=dtype), randn(2, 1, 2, 6, dtype=dtype)
    return (q, k_cache, v_cache, *new, lengths - 1, None, *options), {}


def append_packed_float8(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (q, k_cache, v_cache, table, _, *options), _ = paged_packed_float8(dtype, requires_grad)
    new = randn(6, 2, 8, dtype=dtype), randn(6, 2, 6, dtype=dtype)
    return (q, k_cache, v_cache, *new, int32(6, 1), table, *options), {}


def append_token_scales(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (*args, _), _ = append(dtype, requires_grad)
    args[1:3] = caches(torch.int8)
    args[9:11] = token_scales(), token_scales()
    return (*args, None), {}


def paged_tree(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (*args, _), _ = paged(dtype, requires_grad)
    return (*args, torch.tensor([[0b1, 0b11, 0b101], [0b1, 0b10, 0b111]])), {}


def paged_packed_float8(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    q = randn(6, 4, 8, dtype=dtype)
    tables = (int32(*BLOCK_TABLE), int32(11, 2), int32(0, 4, 5))
    scales = (torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.7]))
    options = (4, 11, 0.5, True, -1, 0, 0.0, 0, 0, torch.tensor([1, 3, 5, 9, 1, 1]))
    return (q, *caches(torch.float8_e4m3fn), *tables, randn(4), *scales, *options), {}


def paged_out(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    args, _ = paged(dtype, requires_grad)
    lse = torch.empty(2, 4, 3, dtype=ops.lse_dtype(dtype))
    return args, {"out": torch.empty(2, 3, 4, 6, dtype=dtype), "lse": lse}


def reshape_and_cache(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    k, v = randn(3, 2, 8, dtype=dtype), randn(3, 2, 6, dtype=dtype)
    return (k, v, *caches(dtype), torch.tensor([13, -1, 2]), None, None), {}


def reshape_and_cache_float8(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (k, v, *_), _ = reshape_and_cache(dtype, requires_grad)
    scales = (torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.7]))
    return (k, v, *caches(torch.float8_e4m3fn), torch.tensor([13, -1, 2]), *scales), {}


def paged_int8_token_scales(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (q, _, _, *rest), _ = paged(dtype, requires_grad)
    rest[4], rest[5] = token_scales(), token_scales()
    return (q, *caches(torch.int8), *rest), {}


def token_scales() -> Tensor:
    """For the pages of caches(), kept heads first too."""
    return torch.rand(4, 2, 4).transpose(1, 2) + 0.5


def reshape_and_cache_int8(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (k, v, *_), _ = reshape_and_cache(dtype, requires_grad)
    scales = (torch.tensor(0.5), torch.tensor(1.5))
    return (k, v, *caches(torch.int8), torch.tensor([13, -1, 2]), *scales), {}


def reshape_and_cache_token_scales(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (k, v, *_), _ = reshape_and_cache(dtype, requires_grad)
    slots = torch.tensor([13, -1, 2])
    return (k, v, *caches(torch.int8), slots, token_scales(), token_scales()), {}


def reshape_and_cache_token_scales_float8(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    (k, v, _, _, slots, *scales), _ = reshape_and_cache_token_scales(dtype, requires_grad)
    return (k, v, *caches(torch.float8_e4m3fn), slots, *scales), {}


def merge(dtype: torch.dtype, requires_grad: bool) -> Arguments:
    outs = [randn(2, 3, 4, 5, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]
    lses = [torch.randn(2, 4, 3, dtype=ops.lse_dtype(dtype)) for _ in range(3)]
    lses = [lse.requires_grad_(requires_grad) for lse in lses]
    return (outs, lses, randn(4, requires_grad=requires_grad)), {}


Sample = Callable[[torch.dtype, bool], Arguments]

SAMPLES: dict[str, tuple[Callable[..., Any], Sample]] = {
    "fwd": (ops.flash_attn_fwd, fwd),
    "fwd_without_sink": (ops.flash_attn_fwd, fwd_without_sink),
    "bwd": (ops.flash_attn_bwd, bwd),
    "bwd_without_sink": (ops.flash_attn_bwd, bwd_without_sink),
    "varlen_fwd": (ops.flash_attn_varlen_fwd, varlen_fwd),
    "fwd_float8": (ops.flash_attn_fp8_fwd, fwd_float8),
    "varlen_fwd_float8": (ops.flash_attn_fp8_varlen_fwd, varlen_fwd_float8),
    "varlen_bwd": (ops.flash_attn_varlen_bwd, varlen_bwd),
    "paged": (ops.paged_attn, paged),
    "paged_tree": (ops.paged_attn, paged_tree),
    "paged_packed_float8": (ops.paged_attn, paged_packed_float8),
    "paged_int8_token_scales": (ops.paged_attn, paged_int8_token_scales),
    "paged_out": (ops.paged_attn_out, paged_out),
    "paged_dense": (ops.paged_attn, paged_dense),
    "append": (ops.append_and_attend, append),
    "append_out": (ops.append_and_attend_out, append_out),
    "append_dense": (ops.append_and_attend, append_dense),
    "append_packed_float8": (ops.append_and_attend, append_packed_float8),
    "append_token_scales": (ops.append_and_attend, append_token_scales),
    "reshape_and_cache": (ops.reshape_and_cache, reshape_and_cache),
    "reshape_and_cache_float8": (ops.reshape_and_cache, reshape_and_cache_float8),
    "reshape_and_cache_int8": (ops.reshape_and_cache, reshape_and_cache_int8),
    "reshape_and_cache_token_scales": (
        ops.reshape_and_cache_token_scales,
        reshape_and_cache_token_scales,
    ),
    "reshape_and_cache_token_scales_float8": (
        ops.reshape_and_cache_token_scales,
        reshape_and_cache_token_scales_float8,
    ),
    "merge": (ops.merge_attn_states, merge),
}
DIFFERENTIABLE = ("fwd", "fwd_without_sink", "varlen_fwd", "merge")
