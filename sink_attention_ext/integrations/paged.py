"""Continuous batching in transformers 5.17 (``model.generate_batch``): name "paged|sink_attention".

transformers keeps keys and values of all requests in tensors (slots, num_heads_kv, head_dim), one
slot a token, and hands each layer the slots of the tokens that its rows may see (read_index, one
request after the other, lengths in cu_seq_lens_k) and the slots of the new tokens (write_index).
Our paged operator reads that as pages of one token:

* full attention: the new tokens are written, then the cache is read in place;
* sliding window, one new token per request (decode): the same. The ring of `window` slots lets
  the new token overwrite one that has just left the window;
* sliding window, several new tokens: the ring would lose tokens that the first of them still see,
  so the at most window - 1 old ones are gathered before the write;
* nothing cached yet: the new tokens attend to each other, packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sink_attention_ext import checks
from sink_attention_ext.cache.functions import flash_attn_with_kvcache, reshape_and_cache
from sink_attention_ext.integrations.keywords import (
    PAGED_HARMLESS,
    check_keywords,
    choose_sinks,
    refuse_bidirectional,
)
from sink_attention_ext.integrations.transformers import kernel_options, to_compute_dtype
from sink_attention_ext.interface import flash_attn_varlen_func


def paged_sink_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    is_causal: bool | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | dict[str, Tensor] | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int | dict[str, int] = 0,
    read_index: list[Tensor] | None = None,
    write_index: list[Tensor] | None = None,
    block_table: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What an attention layer calls during continuous batching.

    Args:
        query: (1, num_heads_q, tokens, head_dim), the new tokens of all requests.
        key, value: (1, num_heads_kv, tokens, head_dim), of the same tokens.
        cache: transformers' PagedAttentionCache.
        cu_seq_lens_q: (requests + 1,) int32; cu_seq_lens_k: the same for the keys that are read, by
            kind of layer where there are two.

    Returns:
        (tokens, num_heads_q, head_dim), None.
    """
    if cache is None or read_index is None or write_index is None:
        raise ValueError(
            '"paged|sink_attention" is for generate_batch, which brings a paged cache; use '
            '"sink_attention" for forward and generate'
        )
    if attention_mask is not None or block_table is not None:
        given = "attention_mask" if attention_mask is not None else "block_table"
        raise ValueError(
            f'"paged|sink_attention" reads read_index and write_index; got {given} too'
        )
    check_keywords(module, kwargs, PAGED_HARMLESS)
    refuse_bidirectional('"paged|sink_attention"', module, is_causal)
    s_aux = choose_sinks(module, s_aux, sinks)
    options = kernel_options(module, query, dropout, scaling, softcap, s_aux)
    q, k, v = (t[0].transpose(0, 1) for t in to_compute_dtype(module, query, key, value))

    ring = cache.sliding_windows[module.layer_idx]  # 1: full attention, every token is kept
    is_ring = ring > 1
    if isinstance(cu_seq_lens_k, dict):
        layer_type = "sliding_attention" if is_ring else "full_attention"
        cu_seq_lens_k, max_seqlen_k = cu_seq_lens_k[layer_type], max_seqlen_k[layer_type]
    window = ring if is_ring else sliding_window
    options |= {"causal": True, "window_size": (window - 1 if window else -1, 0)}
    checks.check_int32("cu_seq_lens_q", cu_seq_lens_q, ("requests + 1",), q.device)
    checks.check_int32("cu_seq_lens_k", cu_seq_lens_k, ("requests + 1",), q.device)
    checks.check_size(
        "cu_seq_lens_k",
        cu_seq_lens_k,
        0,
        "requests + 1",
        cu_seq_lens_q.shape[0],
        "as cu_seq_lens_q has",
    )

    group, index = cache.layer_index_to_group_indices[module.layer_idx]
    old_slots, new_slots = read_index[group], write_index[group]
    k_cache, v_cache = cache.key_cache[index], cache.value_cache[index]

    max_seqlen_k = checks.check_max_seqlen("max_seqlen_k", max_seqlen_k)
    if old_slots.numel() > 0 and (not is_ring or max_seqlen_q == 1):
        if is_ring:  # one row per request: its own slot stands where read_index has the sentinel
            old_slots = _with_new_slots(old_slots, new_slots, cache.sentinel_index)
        # The last slots of a request are those of its new tokens: one operator writes and attends.
        out = flash_attn_with_kvcache(
            q,
            k_cache[:, None],
            v_cache[:, None],
            k,
            v,
            cache_seqlens=cu_seq_lens_k.diff() - cu_seq_lens_q.diff(),
            block_table=_block_table(
                old_slots, cu_seq_lens_k, min(max_seqlen_k, old_slots.numel())
            ),
            cu_seqlens_q=cu_seq_lens_q,
            max_seqlen_q=max_seqlen_q,
            **options,
        )
        return out, None

    if old_slots.numel() > 0:
        is_new = old_slots == cache.sentinel_index
        keys, values = (_gather(c, old_slots, is_new, t) for c, t in ((k_cache, k), (v_cache, v)))
    else:
        keys, values = k, v
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_seqlen_q, max_seqlen_k)
    out = flash_attn_varlen_func(q, keys, values, *lengths, **options)
    _write(k, v, k_cache, v_cache, new_slots)
    return out, None


def _write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """k and v (tokens, num_heads_kv, head_dim) into their slots. Many may share the trash slot."""
    reshape_and_cache(k, v, k_cache[:, None], v_cache[:, None], slots)


def _block_table(slots: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """(requests, max_seqlen) int32: slots of the packed read_index, one row per request."""
    column = torch.arange(max_seqlen, device=slots.device)
    position = (cu_seqlens[:-1, None] + column).clamp(max=slots.numel() - 1)
    return slots[position].to(torch.int32)


def _with_new_slots(old_slots: Tensor, new_slots: Tensor, sentinel: int) -> Tensor:
    return old_slots.masked_scatter(old_slots == sentinel, new_slots)


def _gather(cache: Tensor, slots: Tensor, is_new: Tensor, new: Tensor) -> Tensor:
    """The tokens of `slots` out of the cache, and the new ones where is_new."""
    tokens = cache.index_select(0, slots)
    return tokens.masked_scatter_(is_new[:, None, None], new)
