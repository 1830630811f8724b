"""flash_attn_with_kvcache and reshape_and_cache: serving from paged and dense key-value caches."""

from __future__ import annotations

import torch
from torch import Tensor

from sink_attention_ext.cache import checks as cache_checks
from sink_attention_ext.cache.attention import attend, write_tokens
from sink_attention_ext.cache.plan import KVCachePlan, check_plan
from sink_attention_ext.reference import WindowSize


def reshape_and_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes the keys and values of tokens into a paged cache, in place.

    Token t goes to slot ``slot_mapping[t] % page_size`` of page ``slot_mapping[t] // page_size``.
    What is written has memory of its own: no element in common with another argument, none that is
    two of a cache's. Caches interleaved in one buffer are fine. Where two tokens share a slot, the
    last one stays on the CPU and under torch.use_deterministic_algorithms(True); otherwise on CUDA
    the slot then holds any mixture of their elements and scales.

    Args:
        k: (num_tokens, num_heads_kv, head_dim).
        v: (num_tokens, num_heads_kv, head_dim_v).
        k_cache: (num_pages, page_size, num_heads_kv, head_dim), the dtype of k, float8_e4m3fn or
            int8. Any strides but for the last, which is 1: a (num_pages, num_heads_kv, page_size,
            head_dim) cache is passed as ``cache.transpose(1, 2)``.
        v_cache: (num_pages, page_size, num_heads_kv, head_dim_v), the dtype of k_cache.
        slot_mapping: (num_tokens,) int64 from 0 to num_pages * page_size - 1; -1 leaves the token
            out.
        k_scale: for float8 and int8 caches, and only for them: float32; what is stored is
            k / k_scale, rounded to nearest even and saturated to +-448 (float8) or +-127 (int8).
            NaN stays NaN in float8 and becomes 0 in int8.
            Of shape (), (1,) or (num_heads_kv,) it is read, of magnitudes from 2**-126 to 2**126
            (on CUDA looked at under set_debug_checks only). Of shape (num_pages, page_size,
            num_heads_kv), any strides, it is **written**, with a scale for each token and head
            beside the token: the largest finite magnitude of the head's row, divided by 448 or 127
            (1.0 for a row of zeros; infinities are saturated).
        v_scale: the same for v, of the same kind as k_scale.

    Raises:
        TypeError, ValueError: an argument does not fit, a slot out of range among them (on CUDA
            looked at under set_debug_checks only, otherwise such a token is left out). The message
            names it.
        RuntimeError: a cache was made in inference mode and is written outside of it, or autograd
            would have to differentiate this.
        In all these cases nothing has been written.

    Under torch.autocast k and v are cast to the caches' dtype.

    Example::

        cache = torch.zeros(2, 16, 4, 8, 64)  # k and v: 16 pages of 4 tokens, 8 heads
        slots = torch.tensor([5, 6, -1])
        reshape_and_cache(torch.randn(3, 8, 64), torch.randn(3, 8, 64), cache[0], cache[1], slots)
    """
    kinds = (k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    is_compiling = torch.compiler.is_compiling()
    if is_compiling:
        cache_checks.check_write_kinds(*kinds)
    try:
        write_tokens("reshape_and_cache", is_compiling, *kinds)
    except Exception:
        if not is_compiling:
            cache_checks.check_write_kinds(*kinds)
        raise


def flash_attn_with_kvcache(
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
    out: Tensor | None = None,
    max_seqlen_k: int | torch.SymInt | Tensor | None = None,
    plan: KVCachePlan | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a paged or dense cache, after appending new keys and values to it in place.

    One function for decode (seqlen_q = 1), several tokens at once (speculative decoding of a chain
    or, with tree_mask, of a tree of tokens) and prefill in chunks. Rows are aligned bottom-right
    with the keys that the cache holds after the append, so ``causal=True`` lets the last query see
    all of them. Not differentiable.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), or (total_q, num_heads_q, head_dim) with
            cu_seqlens_q. The caches' dtype; with float8 and int8 caches any float dtype.
        k_cache: with block_table (num_pages, page_size, num_heads_kv, head_dim), without it
            (batch, seqlen_cache, num_heads_kv, head_dim): one row per sequence; where keys are
            appended, memory of its own (see reshape_and_cache). Any strides but for
            the last, which is 1: a (num_pages, num_heads_kv, page_size, head_dim) cache is passed
            as ``cache.transpose(1, 2)``.
        v_cache: like k_cache with head_dim_v.
        k: new keys (batch, seqlen_new, num_heads_kv, head_dim), or (total_q, num_heads_kv,
            head_dim) with cu_seqlens_q, which then gives the lengths of the queries and of the new
            keys. They are written behind the cache_seqlens[b] keys of sequence b, then attended to.
            None: nothing is appended.
        v: new values, like k with head_dim_v; given exactly when k is.
        cache_seqlens: int or (batch,) int32, the keys that the cache held **before** the append.
            None: the cache is full.
        block_table: (batch, max_pages_per_seq) int32: key j of sequence b lies in page
            ``block_table[b, j // page_size]``. Entries beyond a sequence's length are not read.
        cu_seqlens_q: (batch + 1,) int32: q is packed.
        max_seqlen_q: at least the longest query length, at most 64 with tree_mask. None is
            seqlen_q. With cu_seqlens_q of more than one sequence it must be given, as in
            FlashAttention: 1 in decode. The host cannot read it without waiting for the device, and
            with too large a bound CUDA's decode kernels would not run.
        softmax_scale, causal, window_size, softcap, s_aux, return_lse, num_sink_tokens: as in
            flash_attn_func. Pages between the sink tokens and the window need not exist.
        num_splits: parts into which the keys are cut at most, computed apart, merged; 0: chosen;
            1: never, which is also the batch-invariant mode: a token's out and lse then have the
            same bits alone and in any batch, prefilled whole, in chunks of any size or decoded,
            wherever its pages lie, as long as its row of the block table begins at its first token
            (a windowed layer's row in PagedKVCache does not: see CacheStep.attend). On CUDA that
            costs decode some speed: its tiles for few rows, whose warps share the keys, are then
            not used.
        k_scale: for float8 and int8 caches, and only for them: float32, keys are stored * k_scale.
            Of shape (), (1,) or (num_heads_kv,); or k_cache.shape[:3], one for each token and head:
            then the append writes those of the new tokens (see reshape_and_cache), and those of
            slots that are not read may hold anything. On CUDA stored * scale is then rounded to the
            dtype of q, but by Hopper's decode, which multiplies scores and P with scales; the
            CPU computes in float32 (float64 for float64).
        v_scale: the same for v, of the same kind as k_scale.
        tree_mask: the queries are the tokens of a draft tree (SpecInfer, arXiv 2305.09781; Medusa,
            arXiv 2401.10774), ancestors before descendants, and their keys the last ones that the
            cache holds. int64 (batch, seqlen_q), or (total_q,) with cu_seqlens_q: bit d of a
            token's word, counted from the lowest, says that draft token d of its sequence is the
            token itself or an ancestor. At most 64 draft tokens a sequence (bit 63 is the sign);
            causal=True. A token with n ancestors stands at position seqlen_k - seqlen_q + n, from
            which window_size counts: it sees what it would see if its path alone followed the
            other keys. On CUDA the bits are checked under set_debug_checks only.
        out: where the result goes: its shape, the dtype of q, own memory. None: a new tensor.
        max_seqlen_k: at least the longest sequence, appended keys included; None is what
            block_table, or a dense cache, has room for. It bounds the splits and the workspace:
            give it where the table is wide (as servers' are) and sequences are short. A longer
            sequence is refused on the CPU, and on CUDA under set_debug_checks; otherwise CUDA cuts
            it there, as if it had no further keys.
        plan: what plan_kvcache returned, in the place of cache_seqlens, block_table, cu_seqlens_q,
            max_seqlen_q, max_seqlen_k, num_splits and tree_mask: many layers share one.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v), or (total_q, num_heads_q, head_dim_v); with
        return_lse ``(out, lse)``, lse (batch, num_heads_q, seqlen_q), or (num_heads_q, total_q),
        the sink included.

    Raises:
        TypeError, ValueError: an argument does not fit, values in cache_seqlens, block_table,
            cu_seqlens_q, tree_mask and scales among them (on the CPU; on CUDA under
            set_debug_checks, otherwise such keys are left out). The message names it, and nothing
            has been written, also under torch.compile.
        RuntimeError: a cache, or `out`, was made in inference mode and is written outside of it, or
            autograd would have to differentiate this. Nothing has been written.

    Under torch.autocast q, k and v are cast to the caches' dtype: a cache is never cast.

    Example::

        cache = torch.zeros(2, 4, 512, 2, 64)  # k and v of 4 sequences
        lengths = torch.zeros(4, dtype=torch.int32)
        q, k, v = (torch.randn(4, 1, heads, 64) for heads in (8, 2, 2))
        sinks = torch.zeros(8)
        out = flash_attn_with_kvcache(
            q, cache[0], cache[1], k, v, lengths, causal=True, s_aux=sinks
        )
        lengths += 1
    """
    if plan is not None:
        given = (
            cache_seqlens, block_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k, tree_mask,
            num_splits or None,
        )  # fmt: skip
        check_plan(plan, k_cache, k is not None, given)
        cache_seqlens, block_table = plan.cache_seqlens, plan.block_table
        cu_seqlens_q, tree_mask = plan.cu_seqlens_q, plan.tree_mask
        max_seqlen_q, max_seqlen_k = plan.max_seqlen_q, plan.max_seqlen_k
        num_splits = plan.num_splits
    return attend(
        "flash_attn_with_kvcache", q, k_cache, v_cache, k, v, cache_seqlens, block_table,
        cu_seqlens_q, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap,
        s_aux, return_lse, num_splits, k_scale, v_scale, num_sink_tokens, tree_mask, out,
    )  # fmt: skip
