"""Where new tokens go in a paged cache: their positions, and the slots of those; on the device."""

from __future__ import annotations

import torch
from torch import Tensor

SKIP_SLOT = -1  # reshape_and_cache leaves the token out
INVALID_SLOT = -2  # reshape_and_cache refuses the call before it writes


def first_key(
    lengths: Tensor, seqused_k: Tensor, seqlens_q: Tensor | int, window_left: int
) -> Tensor:
    """(batch,): the first key that is written or in a window; pages before it need not exist, but
    for those of sink tokens."""
    if window_left < 0:
        return torch.zeros_like(lengths)
    return torch.minimum(lengths, seqused_k - seqlens_q - window_left).clamp(min=0)


def new_positions(
    lengths: Tensor, cu_seqlens_q: Tensor | None, k: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each new token: its sequence, its position there, and whether it is in one (None: all)."""
    if cu_seqlens_q is None:
        batch, seqlen_new = k.shape[:2]
        sequence = torch.arange(batch, device=k.device)[:, None].expand(batch, seqlen_new)
        position = lengths[:, None] + torch.arange(seqlen_new, device=k.device)
        return sequence.flatten(), position.flatten(), None
    token = torch.arange(k.shape[0], device=k.device)
    is_in_a_sequence = (token >= cu_seqlens_q[0]) & (token < cu_seqlens_q[-1])
    sequence = torch.searchsorted(cu_seqlens_q, token, right=True) - 1
    sequence = torch.where(is_in_a_sequence, sequence, 0)
    return sequence, lengths[sequence] + token - cu_seqlens_q[sequence], is_in_a_sequence


def slots_of(
    sequence: Tensor,
    position: Tensor,
    is_in_a_sequence: Tensor | None,
    block_table: Tensor,
    num_pages: int,
    page_size: int,
) -> Tensor:
    """Where each new token lies in the cache, (num_tokens,) int64; the host reads no value."""
    if block_table.shape[1] == 0:  # no token has a place
        slot = torch.full_like(position, INVALID_SLOT)
        return slot if is_in_a_sequence is None else slot.masked_fill(~is_in_a_sequence, SKIP_SLOT)
    column = position // page_size
    column_inside = column.clamp(0, block_table.shape[1] - 1)
    page = block_table[sequence, column_inside]
    exists = (column == column_inside) & (page == page.clamp(0, num_pages - 1))
    slot = torch.where(exists, position + (page - column) * page_size, INVALID_SLOT)
    return slot if is_in_a_sequence is None else torch.where(is_in_a_sequence, slot, SKIP_SLOT)
