"""Cascade attention: many sequences over one shared prefix, which is attended to once for all."""

from __future__ import annotations

import torch
from torch import Tensor

from sink_attention_ext import checks
from sink_attention_ext.cache import checks as cache_checks
from sink_attention_ext.cache.functions import flash_attn_with_kvcache
from sink_attention_ext.dispatch_rules import refuse_gradient
from sink_attention_ext.merge import merge_attn_states
from sink_attention_ext.reference import WindowSize

Part = tuple[Tensor, Tensor]  # out and lse


def cascade_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
    common_prefix_len: int,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | torch.SymInt | None = None,
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
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn_with_kvcache for sequences that begin with the same keys, lying in the same pages.

    The queries of all sequences attend to the shared pages in one call, as one long sequence (the
    pages are read once and not once per sequence), and to their own keys in another; the two are
    joined by merge_attn_states, where the sink enters once. It pays for long prefixes and many
    sequences: a system prompt, beams, several samples of one prompt. The method is that of Hydragen
    (arXiv 2402.05099) and FlashInfer's cascade. The result equals flash_attn_with_kvcache's but
    for rounding: the two parts are rounded to the dtype of q before they are joined, so there is no
    batch-invariant mode here.

    With a sliding window (``window_size[0] >= 0``) each row sees another piece of the prefix, if
    any: such a call is passed on to flash_attn_with_kvcache. Nothing is appended: write new keys
    first, by reshape_and_cache.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), or (total_q, num_heads_q, head_dim) with
            cu_seqlens_q.
        k_cache, v_cache: (num_pages, page_size, num_heads_kv, head_dim[_v]).
        cache_seqlens: (batch,) int32, the keys of each sequence, those of the prefix and of its
            queries included: at least common_prefix_len + its number of queries.
        block_table: (batch, max_pages_per_seq) int32. The first common_prefix_len // page_size
            entries are the same in every row; those of row 0 are used.
        common_prefix_len: keys that all sequences share, a multiple of page_size; 0: none.
        cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size, softcap, s_aux, return_lse,
            num_splits, k_scale, v_scale, num_sink_tokens, tree_mask: as in
            flash_attn_with_kvcache.

    Returns:
        As flash_attn_with_kvcache.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. In eager mode on the
            CPU this includes values in cache_seqlens and block_table; elsewhere a sequence that is
            too short gets a meaningless, finite result, and rows of the block table that differ in
            the prefix count as row 0.

    Example::

        # four sequences that share 2 pages of 16 keys, and have 3 of their own each
        cache = torch.randn(2, 6, 16, 2, 64)
        table = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5]], dtype=torch.int32)
        lengths = torch.full((4,), 35, dtype=torch.int32)
        q, sinks = torch.randn(4, 1, 8, 64), torch.zeros(8)
        out = cascade_attn_with_kvcache(
            q, cache[0], cache[1], lengths, table, 32, causal=True, s_aux=sinks
        )
    """
    layout = checks.Q_DENSE if cu_seqlens_q is None else checks.Q_PACKED
    checks.check_tensor("q", q, layout)
    cache_checks.check_caches(k_cache, v_cache)
    checks.check_int32("block_table", block_table, ("batch", "max_pages_per_seq"), q.device)
    checks.check_int32("cache_seqlens", cache_seqlens, ("batch",), q.device)
    checks.check_size(
        "cache_seqlens", cache_seqlens, 0, "batch", block_table.shape[0], "as block_table has"
    )
    s_aux = checks.check_s_aux(s_aux, q.shape[-2], q.device)
    checks.check_bool("return_lse", return_lse)
    window_left, _ = checks.check_window(window_size, causal)
    page_size = k_cache.shape[1]
    prefix_pages = _check_common_prefix_len(common_prefix_len, block_table, page_size)
    options = {
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "num_splits": num_splits,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    own = {
        "causal": causal,
        "window_size": window_size,
        "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": max_seqlen_q,
        "num_sink_tokens": num_sink_tokens,  # without a left bound it means nothing
        "tree_mask": tree_mask,  # every draft token sees the whole prefix
    }
    refuse_gradient("cascade_attn_with_kvcache", q, k_cache, v_cache, s_aux)
    is_empty = block_table.shape[0] == 0 or q.shape[0] == 0 or q.shape[-3] == 0
    if prefix_pages == 0 or window_left >= 0 or is_empty:
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, None, None, cache_seqlens, block_table,
            s_aux=s_aux, return_lse=return_lse, **own, **options,
        )  # fmt: skip

    if cache_checks.can_read_values(cache_seqlens):
        _check_lengths(q, cache_seqlens, cu_seqlens_q, common_prefix_len, block_table, page_size)
        _check_shared_pages(block_table, prefix_pages)
    own_out, own_lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, None, None, (cache_seqlens - common_prefix_len).clamp(min=0),
        block_table[:, prefix_pages:], return_lse=True, **own, **options,
    )  # fmt: skip
    prefix = {
        "cache_seqlens": torch.full_like(cache_seqlens[:1], common_prefix_len),
        "block_table": block_table[:1, :prefix_pages],
    }
    if cu_seqlens_q is None:
        shared = _attend_as_one(q, k_cache, v_cache, prefix | options)
    else:
        shared = _attend_as_one_packed(q, k_cache, v_cache, cu_seqlens_q, prefix | options)
    out, lse = merge_attn_states([shared[0], own_out], [shared[1], own_lse], s_aux)
    if cu_seqlens_q is not None and s_aux is not None:  # rows in no sequence have no sink either
        is_in_a_sequence = torch.arange(q.shape[0], device=q.device) < cu_seqlens_q[-1]
        lse = lse.masked_fill(~is_in_a_sequence, -torch.inf)
    return (out, lse) if return_lse else out


def _attend_as_one(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: dict) -> Part:
    """The queries of all sequences as one sequence's; every row sees the whole prefix."""
    batch, seqlen_q = q.shape[:2]
    out, lse = flash_attn_with_kvcache(
        q.flatten(0, 1)[None], k_cache, v_cache, return_lse=True, **options
    )
    lse = lse.view(-1, batch, seqlen_q).transpose(0, 1)
    return out.view(batch, seqlen_q, *out.shape[2:]), lse


def _attend_as_one_packed(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens_q: Tensor, options: dict
) -> Part:
    """The same for packed queries, up to where the last sequence ends."""
    ends = torch.stack([torch.zeros_like(cu_seqlens_q[0]), cu_seqlens_q[-1]])
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, cu_seqlens_q=ends, return_lse=True, **options
    )


def _check_common_prefix_len(length: int, block_table: Tensor, page_size: int) -> int:
    """The number of pages that the prefix fills."""
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"common_prefix_len must be an int; got {length!r}")
    capacity = block_table.shape[1] * page_size
    if length < 0 or length > capacity or length % page_size != 0:
        raise ValueError(
            f"common_prefix_len must be a multiple of page_size = {page_size} from 0 to "
            f"{capacity}, what block_table has room for; got {length}"
        )
    return length // page_size


def _check_lengths(
    q: Tensor, cache_seqlens: Tensor, cu_seqlens_q: Tensor | None, prefix_len: int,
    block_table: Tensor, page_size: int,
) -> None:  # fmt: skip
    """Every query comes after the prefix."""
    capacity = block_table.shape[1] * page_size
    if cu_seqlens_q is None:
        seqlens_q = [q.shape[1]] * cache_seqlens.shape[0]
    else:
        seqlens_q = cu_seqlens_q.diff().tolist()
    for b, (length, seqlen_q) in enumerate(zip(cache_seqlens.tolist(), seqlens_q, strict=False)):
        lowest = prefix_len + seqlen_q
        if seqlen_q > 0 and not lowest <= length <= capacity:
            raise ValueError(
                f"cache_seqlens[{b}] must be from {lowest} (common_prefix_len and its {seqlen_q} "
                f"queries) to {capacity}; got {length}"
            )


def _check_shared_pages(block_table: Tensor, prefix_pages: int) -> None:
    differs = block_table[:, :prefix_pages] != block_table[:1, :prefix_pages]
    if differs.any():
        b, i = differs.nonzero()[0].tolist()
        raise ValueError(
            f"block_table must begin with the same {prefix_pages} pages in every row; got "
            f"block_table[{b}, {i}] = {int(block_table[b, i])}, but block_table[0, {i}] = "
            f"{int(block_table[0, i])}"
        )
