"""What every function that attends over a cache runs: its checks, then a write, then attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sink_attention_ext import checks, ops, torch_context_parallel
from sink_attention_ext.autocast import cast_q_like_cache
from sink_attention_ext.cache import checks as cache_checks
from sink_attention_ext.cache import slots as cache_slots
from sink_attention_ext.dispatch_rules import refuse_gradient
from sink_attention_ext.reference import WindowSize


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | torch.SymInt | Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    return_lse: bool = False,
    num_splits: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_sink_tokens: int = 0,
    tree_mask: Tensor | None = None,
    write: Callable[[], None] | None = None,
    function: str = "flash_attn_with_kvcache",
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn_with_kvcache, with a `write` of the caller's own in the place of that of k and v.

    It is called when all else has been checked, and checks what it writes. function: the caller's
    name in messages.
    """
    torch_context_parallel.refuse(function)
    is_packed = cu_seqlens_q is not None
    cache_checks.check_caches(k_cache, v_cache, is_paged=block_table is not None)
    checks.check_tensor("q", q, checks.Q_PACKED if is_packed else checks.Q_DENSE)
    checks.check_device("q", q, k_cache.device)
    cache_checks.check_dtype_against_cache("q", q, k_cache)
    checks.check_heads(q, "k_cache", k_cache, "v_cache", v_cache)
    checks.check_last_stride("q", q)
    batch = _check_batch(q, k_cache, block_table, cu_seqlens_q)
    k_scale, v_scale = cache_checks.check_cache_scales(k_scale, v_scale, k_cache)
    s_aux = checks.check_s_aux(s_aux, q.shape[-2], q.device)
    checks.check_bool("causal", causal)
    window_left, window_right = checks.check_window(window_size, causal)
    scale = checks.check_softmax_scale(softmax_scale, q.shape[-1], q.dtype)
    softcap = checks.check_softcap(softcap, q.dtype, scale)
    num_splits = checks.check_num_splits(num_splits)
    checks.check_bool("return_lse", return_lse)
    num_sink_tokens = checks.check_num_sink_tokens(num_sink_tokens)
    max_seqlen_q = _max_seqlen_q(max_seqlen_q, q)
    cache_checks.check_tree_mask(tree_mask, q, window_right, max_seqlen_q)
    refuse_gradient(function, q, k, v, k_cache, v_cache, s_aux, k_scale, v_scale)

    pages = block_table
    if pages is None and k_cache.shape[1] == 0:  # a dense cache without tokens: no page
        pages = torch.empty(batch, 0, dtype=torch.int32, device=q.device)
        k_cache, v_cache, k_scale, v_scale = _without_pages(k_cache, v_cache, k_scale, v_scale)
    elif pages is None:  # a dense cache: every sequence has one page
        pages = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    page_size = k_cache.shape[1]
    capacity = checks.within_int32(pages.shape[1] * page_size)
    lengths = _cache_lengths(cache_seqlens, k, batch, capacity, q.device)

    seqused_k = lengths
    if k is not None or v is not None:
        _check_new_kv(q, k, v, k_cache, v_cache, is_packed)
        cache_checks.check_scales_can_be_written(k_scale, v_scale)
        cache_checks.check_caches_can_be_written(k_cache, v_cache)
        seqused_k = lengths + (cu_seqlens_q.diff() if is_packed else k.shape[1])
        if cache_checks.can_read_values(lengths):
            if is_packed:
                cache_checks.check_packed_lengths(cu_seqlens_q, q.shape[0], max_seqlen_q)
            new = cu_seqlens_q.diff().tolist() if is_packed else [k.shape[1]] * batch
            cache_checks.check_append_lengths(lengths, new, capacity)
            if block_table is not None:
                seqlens_q = cu_seqlens_q.diff() if is_packed else q.shape[1]
                first_key = cache_slots.first_key(lengths, seqused_k, seqlens_q, window_left)
                cache_checks.check_block_table_values(
                    block_table, first_key, seqused_k, num_sink_tokens, k_cache.shape[0], page_size
                )
            if tree_mask is not None:
                cache_checks.check_tree_mask_values(tree_mask, cu_seqlens_q)
        if batch > 0:
            tokens = cache_slots.new_positions(lengths, cu_seqlens_q, k)
            slots = cache_slots.slots_of(*tokens, pages, k_cache.shape[0], page_size)
            if not is_packed:
                k, v = k.flatten(0, 1), v.flatten(0, 1)
            write = partial(write_tokens, k, v, k_cache, v_cache, slots, k_scale, v_scale)

    if write is not None:
        q, _ = cast_q_like_cache(q, k_cache)  # once for two operators
    arguments = (
        q,
        k_cache,
        v_cache,
        pages,
        seqused_k,
        cu_seqlens_q,
        s_aux,
        k_scale,
        v_scale,
        max_seqlen_q,
        scale,
        causal,
        window_left,
        window_right,
        softcap,
        num_splits,
        num_sink_tokens,
        tree_mask,
    )
    if write is not None:
        if not torch.compiler.is_compiling():  # what attention refuses is refused before the write
            cache_checks.call(ops.check_paged_attn, *arguments, lengths)
        write()
    out, lse = ops.paged_attn(*arguments)
    return (out, lse) if return_lse else out


def write_tokens(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """By the operator that reads the scales, or by the one that writes them."""
    op = ops.reshape_and_cache
    if cache_checks.are_token_scales(k_scale):
        op = ops.reshape_and_cache_token_scales
    cache_checks.call(op, k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def _without_pages(
    k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Caches of no pages in the place of dense ones that hold no token: pages have a size."""
    k_cache, v_cache = (c.new_empty(0, 1, *c.shape[2:]) for c in (k_cache, v_cache))
    if cache_checks.are_token_scales(k_scale):
        k_scale, v_scale = (s.new_empty(0, 1, s.shape[2]) for s in (k_scale, v_scale))
    return k_cache, v_cache, k_scale, v_scale


def _check_batch(q: Tensor, k_cache: Tensor, block_table: Any, cu_seqlens_q: Any) -> int:
    """The number of sequences, the same in q, cu_seqlens_q, block_table and a dense cache."""
    if cu_seqlens_q is not None:
        checks.check_int32("cu_seqlens_q", cu_seqlens_q, ("batch + 1",), q.device)
        if cu_seqlens_q.shape[0] < 1:
            raise ValueError("cu_seqlens_q must have batch + 1 entries, at least 1; got shape (0,)")
        batch, source = cu_seqlens_q.shape[0] - 1, "cu_seqlens_q"
    else:
        batch, source = q.shape[0], "q"
    if block_table is None:
        checks.check_size(
            "k_cache", k_cache, 0, "batch", batch, f"as {source} has, without block_table"
        )
    else:
        checks.check_int32("block_table", block_table, ("batch", "max_pages_per_seq"), q.device)
        checks.check_size("block_table", block_table, 0, "batch", batch, f"as {source} has")
    return batch


def _max_seqlen_q(max_seqlen_q: Any, q: Tensor) -> int:
    if max_seqlen_q is None:
        return q.shape[-3]  # seqlen_q; of packed queries total_q, which no sequence exceeds
    max_seqlen_q = checks.check_max_seqlen("max_seqlen_q", max_seqlen_q)
    if q.dim() == 4 and max_seqlen_q < q.shape[1]:
        raise ValueError(
            f"max_seqlen_q must be at least seqlen_q = {q.shape[1]}; got {max_seqlen_q}"
        )
    return max_seqlen_q


def _check_new_kv(
    q: Tensor, k: Any, v: Any, k_cache: Tensor, v_cache: Tensor, is_packed: bool
) -> None:
    if is_packed:
        cache_checks.check_new_kv(
            k, v, k_cache, v_cache, cache_checks.K_PACKED_NEW, cache_checks.V_PACKED_NEW
        )
        checks.check_size("k", k, 0, "total_q", q.shape[0], "as q has: cu_seqlens_q is for both")
    else:
        cache_checks.check_new_kv(k, v, k_cache, v_cache, cache_checks.K_NEW, cache_checks.V_NEW)
        checks.check_size("k", k, 0, "batch", q.shape[0], "as q has")


def _cache_lengths(
    cache_seqlens: Any, k: Any, batch: int, capacity: int, device: torch.device
) -> Tensor:
    """cache_seqlens as a (batch,) int32 tensor."""
    if isinstance(cache_seqlens, Tensor):
        checks.check_int32("cache_seqlens", cache_seqlens, ("batch",), device)
        checks.check_size(
            "cache_seqlens", cache_seqlens, 0, "batch", batch, "one length per sequence"
        )
        return cache_seqlens
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(
                "cache_seqlens must be given where k and v are to be appended; got None"
            )
        cache_seqlens = capacity
    elif not isinstance(cache_seqlens, (int, torch.SymInt)) or isinstance(cache_seqlens, bool):
        raise TypeError(
            f"cache_seqlens must be an int or an int32 tensor (batch,); got {cache_seqlens!r}"
        )
    if cache_seqlens < 0 or cache_seqlens > capacity:
        raise ValueError(
            f"cache_seqlens must be from 0 to {capacity}, the tokens that a sequence's cache can "
            f"hold; got {cache_seqlens}"
        )
    return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=device)
