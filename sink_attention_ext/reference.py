"""Attention with learnable sinks in plain torch: the specification, and the oracle of every test.

For query row ``i`` of head ``h``, with ``p = i + seqlen_k - seqlen_q`` (bottom-right alignment)::

    s[i,j]  = softmax_scale * <q[i], k[j]>,  then softcap * tanh(s / softcap) if softcap > 0
    visible = j <= p + window_right  and  (p - window_left <= j  or  j < num_sink_tokens)
              (-1: unbounded; causal: window_right = 0)
    Z[i]    = sum over visible j of exp(s[i,j])  +  exp(s_aux[h])
    out[i]  = sum over visible j of exp(s[i,j]) * v[j] / Z[i]
    lse[i]  = log Z[i]                                     (natural log, the sink included)

It needs O(seqlen_q * seqlen_k) memory and is differentiable by autograd. Scores and the product
with v are taken in the dtype of q, the softmax in float32 (float64 for float64): pass float64
tensors for an oracle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WindowSize = Sequence[int | None]


def is_visible(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    device: torch.device | str | None = None,
    num_sink_tokens: int = 0,
    tree_mask: Tensor | None = None,
) -> Tensor:
    """Which keys a row sees: a bool tensor (seqlen_q, seqlen_k).

    tree_mask (seqlen_q,) int64: the rows are tokens of a draft tree, the last seqlen_q keys theirs;
    bit d of row i says that token d is token i or one of its ancestors. Row i then stands at the
    position ``p = seqlen_k - seqlen_q + (bits set) - 1``, and sees what it would see if only its
    path followed the keys before the tree.
    """
    window_left, window_right = (-1 if size is None else size for size in window_size)
    if causal:
        window_right = 0
    position = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k, device=device)[None, :].expand(seqlen_q, seqlen_k)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if tree_mask is not None:
        context = seqlen_k - seqlen_q
        token = torch.arange(seqlen_q, device=device)
        on_path = (tree_mask[:, None] >> token) & 1 == 1
        depth = on_path.cumsum(1) - 1  # of token d, on the path of row i
        position = context + on_path.sum(1, keepdim=True) - 1
        is_draft = key >= context
        token_of_key = (key - context).clamp(min=0)
        visible = ~is_draft | on_path.gather(1, token_of_key)
        key = torch.where(is_draft, context + depth.gather(1, token_of_key), key)
    if window_left >= 0:
        is_sink_token = key < num_sink_tokens if num_sink_tokens > 0 else torch.zeros_like(visible)
        visible &= (key >= position - window_left) | is_sink_token
    if window_right >= 0:
        visible &= key <= position + window_right
    return visible


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    num_sink_tokens: int = 0,
    tree_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim).
        k: (batch, seqlen_k, num_heads_kv, head_dim); num_heads_kv divides num_heads_q.
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        s_aux: (num_heads_q,), the logit of each head's sink, neither scaled nor softcapped; None:
            no sink.
        num_sink_tokens: the first keys, which stay visible beside the window.
        tree_mask: (batch, seqlen_q) int64; see is_visible.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v) in the dtype of q, and lse (batch,
        num_heads_q, seqlen_q) in float32 (float64 for float64). A row without a visible key has
        out = 0 and lse = s_aux (-inf without).
    """
    batch, seqlen_q, num_heads_q, head_dim = q.shape
    seqlen_k, num_heads_kv = k.shape[1:3]
    k = k.repeat_interleave(num_heads_q // num_heads_kv, dim=2)
    v = v.repeat_interleave(num_heads_q // num_heads_kv, dim=2)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale

    scores = torch.einsum("bihd,bjhd->bhij", q * scale, k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    options = (causal, window_size, q.device, num_sink_tokens)
    if tree_mask is None:
        visible = is_visible(seqlen_q, seqlen_k, *options)
    else:
        trees = [is_visible(seqlen_q, seqlen_k, *options, words) for words in tree_mask]
        visible = torch.stack(trees)[:, None] if trees else scores.new_ones(scores.shape).bool()
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(
        ~visible, -torch.inf
    )

    if s_aux is None:
        s_aux = scores.new_full((num_heads_q,), -torch.inf)
    sink = s_aux.to(scores.dtype)[None, :, None, None].expand(batch, -1, seqlen_q, 1)
    takes_all = sink == torch.inf  # exp() of it has no gradient: such rows are set apart
    logits = torch.cat([scores, sink.masked_fill(takes_all, 0.0)], dim=-1)

    row_max = logits.amax(dim=-1, keepdim=True).detach()
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    exp_logits = torch.exp(logits - row_max)
    row_sum = exp_logits.sum(dim=-1, keepdim=True)
    is_empty = row_sum == 0
    row_sum = row_sum.masked_fill(is_empty, 1.0)

    lse = (row_max + torch.log(row_sum)).masked_fill(is_empty, -torch.inf)
    lse = torch.where(takes_all, sink, lse).squeeze(-1)
    probs = (exp_logits / row_sum).masked_fill(takes_all, 0.0)[..., :seqlen_k]
    return torch.einsum("bhij,bjhd->bihd", probs.to(v.dtype), v), lse


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    seqused_k: Tensor | None = None,
    num_sink_tokens: int = 0,
    tree_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Packed sequences: sequence b is rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) of q (total_q,
    num_heads_q, head_dim), and of tree_mask (total_q,).

    Returns:
        out (total_q, num_heads_q, head_dim_v) and lse (num_heads_q, total_q). Rows in no sequence:
        0 and -inf.
    """
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    lse = lse.to(torch.promote_types(q.dtype, torch.float32))
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_ends) - 1):
        rows = slice(q_ends[b], q_ends[b + 1])
        k_end = k_ends[b + 1] if seqused_k is None else k_ends[b] + int(seqused_k[b])
        keys = slice(k_ends[b], k_end)
        out_b, lse_b = attention(
            q[None, rows],
            k[None, keys],
            v[None, keys],
            softmax_scale,
            causal,
            window_size,
            softcap,
            s_aux,
            num_sink_tokens,
            None if tree_mask is None else tree_mask[None, rows],
        )
        out = out.index_copy(0, torch.arange(*rows.indices(len(q)), device=q.device), out_b[0])
        lse = lse.index_copy(1, torch.arange(*rows.indices(len(q)), device=q.device), lse_b[0])
    return out, lse


def gather_pages(cache: Tensor, pages: Tensor, seqlen: int) -> Tensor:
    """The first `seqlen` tokens of the sequence in `pages`: (seqlen, num_heads_kv, head_dim)."""
    page_size = cache.shape[1]
    used = pages[: -(-seqlen // page_size)].long()
    return cache[used].flatten(0, 1)[:seqlen]


def quantise(
    tokens: Tensor, dtype: torch.dtype, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keys or values as an 8-bit cache holds them: value = stored * scale.

    Args:
        tokens: (..., num_heads_kv, head_dim), read as float32.
        dtype: float8_e4m3fn or int8.
        scale: float32 of shape (), (1,) or (num_heads_kv,); None: one for each token and head, its
            largest finite magnitude over dtype's largest value, 1 where that is 0.

    Returns:
        stored, like tokens in `dtype`: tokens / scale, saturated to +-448 or +-127, ties to even;
        NaN is NaN in float8 and 0 in int8. And the scale, computed ones (..., num_heads_kv).
    """
    largest = 127.0 if dtype == torch.int8 else 448.0
    tokens = tokens.float()
    if scale is None:
        finite = torch.where(tokens.isfinite(), tokens, 0.0)
        scale = finite.abs().amax(dim=-1) / largest
        scale = torch.where(scale > 0, scale, 1.0)
        factor = scale[..., None]
    else:
        factor = scale.reshape(-1, 1)
    stored = (tokens / factor).clamp(-largest, largest)
    if dtype == torch.int8:
        stored = stored.nan_to_num(0.0).round()
    return stored.to(dtype), scale


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seqused_k: Tensor,
    cu_seqlens_q: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_sink_tokens: int = 0,
    tree_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a paged cache (num_pages, page_size, num_heads_kv, head_dim), one sequence
    after the other.

    q is (batch, seqlen_q, num_heads_q, head_dim), or (total_q, num_heads_q, head_dim) with
    cu_seqlens_q; tree_mask is (batch, seqlen_q), or (total_q,). A float8 or int8 cache is read as
    stored * scale, the scale of shape (), (1,) or (num_heads_kv,), or cache.shape[:3], one for each
    token and head.
    """

    def read(cache: Tensor, scale: Tensor | None, b: int) -> Tensor:
        tokens = gather_pages(cache, block_table[b], int(seqused_k[b])).to(q.dtype)
        if scale is not None and scale.dim() == 3:
            scale = gather_pages(scale, block_table[b], int(seqused_k[b]))[..., None]
        elif scale is not None:
            scale = scale.reshape(-1, 1)
        return tokens if scale is None else tokens * scale.to(q.dtype)

    batch = block_table.shape[0]
    keys = [read(k_cache, k_scale, b) for b in range(batch)]
    values = [read(v_cache, v_scale, b) for b in range(batch)]
    options = (softmax_scale, causal, window_size, softcap, s_aux)
    if cu_seqlens_q is None:
        parts = [
            attention(
                q[b : b + 1],
                keys[b][None],
                values[b][None],
                *options,
                num_sink_tokens,
                None if tree_mask is None else tree_mask[b : b + 1],
            )
            for b in range(batch)
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    cu_seqlens_k = torch.cat([seqused_k.new_zeros(1), seqused_k.cumsum(0)])
    return varlen_attention(
        q,
        torch.cat(keys),
        torch.cat(values),
        cu_seqlens_q,
        cu_seqlens_k,
        *options,
        num_sink_tokens=num_sink_tokens,
        tree_mask=tree_mask,
    )
