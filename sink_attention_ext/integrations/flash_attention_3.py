"""Our operators under FlashAttention-3's signatures, as hub kernel for transformers.

transformers looks up what a model's attention is by name. For "kernels-community/vllm-flash-attn3"
(and for "flash_attention_3" where the model says so, as GPT-OSS does) it lets the `kernels` package
fetch that repository, unless the environment says where a local copy lies:

    LOCAL_KERNELS="kernels-community/vllm-flash-attn3=<KERNEL_FOLDER>"

With that, code that nobody has changed runs on our operators: training, generate, continuous
batching, and `transformers serve`, which takes no other names than those of such repositories.

Parameters have the names and the order of that kernel's own flash_attn_interface.py
(FlashAttention-3 with sinks), and results its form. What our operators cannot do is refused by
name. Hints to FlashAttention-3's scheduler, which change no result but for rounding, are accepted
and unused: num_splits of flash_attn_func and flash_attn_varlen_func, pack_gqa, sm_margin and
scheduler_metadata. Beyond FlashAttention-3, float32 and float64 work, and any head_dim up to 256.

What transformers does not use differs: with return_softmax_lse the hub kernel's
flash_attn_with_kvcache returns further entries behind out and lse, this one does not; and its
flash_attn_combine, flash_attn_qkvpacked_func and get_scheduler_metadata are absent here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sink_attention_ext import checks, interface
from sink_attention_ext.cache import checks as cache_checks
from sink_attention_ext.cache import functions as kvcache
from sink_attention_ext.reference import WindowSize

KERNEL_REPO = "kernels-community/vllm-flash-attn3"
KERNEL_FOLDER = Path(__file__).resolve().parent.parent / "hub_kernel"


def local_kernels() -> str:
    """The value of LOCAL_KERNELS, in the environment of a process that is to use our operators.

    The variable has to be set before the model is told its attn_implementation.

    Raises:
        ValueError: this package lies in a path with a colon, which the variable cannot express.
    """
    if ":" in str(KERNEL_FOLDER):
        raise ValueError(
            f"LOCAL_KERNELS separates its entries by colons, so it cannot hold {KERNEL_FOLDER}"
        )
    return f"{KERNEL_REPO}={KERNEL_FOLDER}"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sink_attention_ext.flash_attn_func with FlashAttention-3's parameters. Differentiable.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim).
        k, v: (batch, seqlen_k, num_heads_kv, head_dim[_v]).
        softmax_scale, causal, window_size, softcap, deterministic, s_aux: as there. With causal the
            right side of window_size is 0, whatever was passed.
        qv, q_descale, k_descale, v_descale, cp_tot_seqused_k: None.
        cp_world_size, cp_rank: 1 and 0.
        num_splits, pack_gqa, sm_margin: unused.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v), lse (batch, num_heads_q, seqlen_q); always
        both, as FlashAttention-3 with sinks does.

    Raises:
        ValueError: an argument that has to be neutral is not; else as flash_attn_func.
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    _refuse_context_parallel(cp_world_size, cp_rank, cp_tot_seqused_k)
    return interface.flash_attn_func(
        _dense(q),
        _dense(k),
        _dense(v),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        s_aux=s_aux,
        deterministic=deterministic,
        return_lse=True,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sink_attention_ext.flash_attn_varlen_func with FlashAttention-3's parameters. Differentiable.

    Args:
        q: (total_q, num_heads_q, head_dim).
        k, v: (total_k, num_heads_kv, head_dim[_v]).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: int or 0-d integer tensor.
        seqused_k: (batch,) int32 or None, as in flash_attn_varlen_func.
        seqused_q: None.
        The others are those of flash_attn_func.

    Returns:
        out (total_q, num_heads_q, head_dim_v), lse (num_heads_q, total_q).

    Raises:
        ValueError: an argument that has to be neutral is not; else as flash_attn_varlen_func.
    """
    _refuse(seqused_q=seqused_q)
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    _refuse_context_parallel(cp_world_size, cp_rank, cp_tot_seqused_k)
    return interface.flash_attn_varlen_func(
        _dense(q),
        _dense(k),
        _dense(v),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        s_aux=s_aux,
        deterministic=deterministic,
        return_lse=True,
        seqused_k=seqused_k,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """sink_attention_ext.flash_attn_with_kvcache with FlashAttention-3's parameters.

    Writes k and v into the caches in place, behind the cache_seqlens tokens that are there, then
    attends to all of them. Not differentiable.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), or (total_q, num_heads_q, head_dim) with
            cu_seqlens_q.
        k_cache, v_cache: (num_pages, page_size, num_heads_kv, head_dim[_v]) with page_table, else
            (batch_cache, seqlen_cache, num_heads_kv, head_dim[_v]). Not float8 or int8:
            FlashAttention-3 has scales in k_descale and v_descale, which are not implemented.
        k, v: new keys and values, (batch, seqlen_new, num_heads_kv, head_dim[_v]), or packed like
            q; then cu_seqlens_k_new has to be given, and to equal cu_seqlens_q. Pass the same
            tensor for both: to compare it with another one waits for the device.
        cache_seqlens: int or (batch,) int32, tokens in the cache before.
        cache_batch_idx: (batch,) int32, the row of the cache of each sequence; without page_table.
        page_table, block_table: (batch, max_pages_per_seq) int32; two names of one argument, of
            which one may be given. Any page_size.
        num_splits: as in flash_attn_with_kvcache of this package.
        return_softmax_lse: return (out, lse).
        qv, rotary_cos, rotary_sin, rotary_seqlens, cache_leftpad, q_descale, k_descale, v_descale,
            cp_tot_seqused_k: None.
        cp_world_size, cp_rank: 1 and 0.
        scheduler_metadata, pack_gqa, sm_margin, rotary_interleaved: unused (the last one says how
            rotary_cos is applied).

    Returns:
        out in the shape of q with head_dim_v; with return_softmax_lse ``(out, lse)``.

    Raises:
        ValueError: an argument that has to be neutral is not; else as flash_attn_with_kvcache. In
            every such case nothing has been written.
    """
    _refuse(qv=qv, rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_seqlens=rotary_seqlens)
    _refuse(cache_leftpad=cache_leftpad)
    _refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    _refuse_context_parallel(cp_world_size, cp_rank, cp_tot_seqused_k)
    checks.check_bool("return_softmax_lse", return_softmax_lse)
    is_paged = page_table is not None or block_table is not None
    cache_checks.check_caches(k_cache, v_cache, is_paged)
    if k_cache.dtype in checks.QUANTISED_DTYPES:
        raise TypeError(
            "k_cache must not be float8 or int8 here, since k_descale and v_descale are not "
            f"implemented; got {k_cache.dtype}: sink_attention_ext.flash_attn_with_kvcache takes "
            "such caches, with k_scale and v_scale"
        )
    _check_new_lengths(k, cu_seqlens_q, cu_seqlens_k_new)
    return kvcache.flash_attn_with_kvcache(
        _dense(q),
        k_cache,
        v_cache,
        _dense(k),
        _dense(v),
        cache_seqlens,
        _choose_table(k_cache, page_table, block_table, cache_batch_idx),
        cu_seqlens_q,
        max_seqlen_q,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        s_aux=s_aux,
        return_lse=return_softmax_lse,
        num_splits=num_splits,
    )


def _refuse(**arguments: Any) -> None:
    """Of these arguments all but None are refused: our operators compute nothing from them."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None: sink_attention_ext does not implement it; got "
                f"{_described(value)}"
            )


def _refuse_context_parallel(
    cp_world_size: int, cp_rank: int, cp_tot_seqused_k: Tensor | None
) -> None:
    _refuse(cp_tot_seqused_k=cp_tot_seqused_k)
    for name, value, neutral in (("cp_world_size", cp_world_size, 1), ("cp_rank", cp_rank, 0)):
        if isinstance(value, Tensor) or value != neutral:
            raise ValueError(
                f"{name} must be {neutral}: sink_attention_ext does not implement context "
                f"parallelism inside of the kernel; got {value}"
            )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def _dense(tensor: Any) -> Any:
    """The tensor with a last stride of 1, which FlashAttention-3 makes by itself too."""
    has_strides = isinstance(tensor, Tensor) and tensor.layout == torch.strided
    if has_strides and not tensor.is_nested and tensor.dim() > 0 and tensor.stride(-1) != 1:
        return tensor.contiguous()
    return tensor  # what else it may be is refused behind


def _check_new_lengths(
    k: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k_new: Tensor | None
) -> None:
    """New keys come in the lengths of the queries where they are packed."""
    if k is None:
        _refuse(cu_seqlens_k_new=cu_seqlens_k_new)
        return
    if cu_seqlens_k_new is cu_seqlens_q:
        return
    for name, starts in (("cu_seqlens_k_new", cu_seqlens_k_new), ("cu_seqlens_q", cu_seqlens_q)):
        if isinstance(k, Tensor) and starts is not None:
            checks.check_int32(name, starts, ("batch + 1",), k.device)
    if (
        cu_seqlens_k_new is None
        or cu_seqlens_q is None
        or not torch.equal(cu_seqlens_k_new, cu_seqlens_q)
    ):
        raise ValueError(
            "cu_seqlens_k_new must equal cu_seqlens_q: new keys come with as many queries, packed "
            f"as they are; got cu_seqlens_q {cu_seqlens_q} and cu_seqlens_k_new {cu_seqlens_k_new}"
        )


def _choose_table(
    k_cache: Tensor,
    page_table: Tensor | None,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
) -> Tensor | None:
    """The one that was given, as block_table: a dense cache is one of pages as long as its rows."""
    given = {
        name: table
        for name, table in (
            ("page_table", page_table),
            ("block_table", block_table),
            ("cache_batch_idx", cache_batch_idx),
        )
        if table is not None
    }
    if len(given) > 1:
        raise ValueError(f"only one of {' and '.join(given)} may be given")
    for name, table in given.items():
        is_index = name == "cache_batch_idx"
        layout = ("batch",) if is_index else ("batch", "max_pages_per_seq")
        checks.check_int32(name, table, layout, k_cache.device)
        return table[:, None] if is_index else table
    return None
