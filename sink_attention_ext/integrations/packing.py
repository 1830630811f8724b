"""Several sequences in one row of the batch: found in position_ids, or given by cu_seq_lens.

transformers' mask function sees position_ids of few models, and of none together with a padding
mask or a cache, so it is the attention function that splits the rows. The layers of a forward share
a mask object, on which the result is kept: there is one look at the values per forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sink_attention_ext import checks
from sink_attention_ext.integrations.mask_object import AttentionMask
from sink_attention_ext.integrations.masks import (
    GatheredMask,
    PackedMask,
    PaddedMask,
    UnpaddedMask,
    is_tracing,
)
from sink_attention_ext.tensor_kinds import check_kind

# ---- position_ids ----


def split_by_positions(
    mask: AttentionMask, position_ids: Tensor | None, batch: int
) -> AttentionMask:
    """The mask of sequences packed into a row, where position_ids restart within it.

    A token whose position is not above that of the token before it begins a sequence. Only where a
    token sees none behind it: encoders (BERT) number segments of one text so. Padding does
    not count: generate() gives it positions of any kind, and leaves those of the tokens rising.

    Args:
        position_ids: (batch or 1, q_length). Of another shape, they are nothing to go by.

    Raises:
        ValueError: there are packed sequences, but behind tokens of a cache, or with padding inside
            of one.
    """
    if mask.q_length == 1 or not isinstance(mask, (UnpaddedMask, PaddedMask, GatheredMask)):
        return mask
    if not isinstance(mask, UnpaddedMask) and mask.key_mask is None:
        return mask
    if is_tracing():
        _assert_one_sequence(mask, position_ids, batch)
        return mask
    if not _belong_to_rows(position_ids, batch, mask.q_length):
        return mask
    split = vars(mask).get("_split")
    if split is None or split[0] is not position_ids or split[1] != batch:
        split = mask._split = (position_ids, batch, _split(mask, position_ids, batch))
    packed = split[2]
    return mask if packed is None else packed


def _belong_to_rows(position_ids: Any, batch: int, q_length: int) -> bool:
    if not isinstance(position_ids, Tensor):
        return False
    check_kind("position_ids", position_ids)
    return (
        position_ids.dim() == 2
        and position_ids.shape[0] in (1, batch)
        and position_ids.shape[1] == q_length
    )


def _row_begin(mask: AttentionMask) -> int | Tensor:
    """The key at which the first row stands."""
    if isinstance(mask, UnpaddedMask):
        return mask.key_end - mask.q_length
    return mask.row_begin


def _split(mask: AttentionMask, position_ids: Tensor, batch: int) -> PackedMask | None:
    """The packed sequences; None if each row of the batch holds one."""
    begin, q_length = int(_row_begin(mask)), mask.q_length
    positions = position_ids.expand(batch, -1)
    is_real = None
    if not isinstance(mask, UnpaddedMask):
        is_real = mask.key_mask[:, begin : begin + q_length]
    if isinstance(mask, GatheredMask):
        is_start = _starts_between_holes(positions, is_real)
    else:
        is_start = F.pad(positions.diff(dim=-1) <= 0, (1, 0), value=True)
        if is_real is not None:
            is_start = is_real & F.pad(is_start[:, 1:] | ~is_real[:, :-1], (1, 0), value=True)
    if not bool((is_start.sum(-1) > 1).any()):
        return None
    if begin != 0:
        raise ValueError(
            f"position_ids restart within {q_length} tokens behind {begin} cached ones: "
            "sink_attention cannot tell which of several packed sequences the cache belongs to; "
            "pass packed rows with use_cache=False, or one sequence per row of the batch"
        )
    return pack(mask, is_start, is_real)


def _starts_between_holes(positions: Tensor, is_real: Tensor) -> Tensor:
    """(batch, q_length) bool: tokens whose position is not above that of the real one before."""
    column = torch.arange(positions.shape[1], device=positions.device)
    last_real = column.where(is_real, -1).cummax(-1).values
    previous = F.pad(last_real[:, :-1], (1, 0), value=-1)
    rises = positions > positions.gather(1, previous.clamp(min=0))
    return is_real & ((previous < 0) | ~rises)


def pack(mask: AttentionMask, is_start: Tensor, is_real: Tensor | None) -> PackedMask:
    """A mask of the shape and rule of `mask`, for sequences that begin where is_start.

    Args:
        is_start: (batch, q_length) bool; True for each row's first real token.
        is_real: (batch, q_length) bool, what is no padding; None: all.

    Raises:
        ValueError: there is padding between two tokens of a sequence.
    """
    batch, q_length = is_start.shape
    kv_length = mask.kv_length
    is_bound = is_start
    if is_real is not None:
        changes = F.pad(is_real[:, 1:] != is_real[:, :-1], (1, 0), value=True)
        if bool((changes & is_real & ~is_start).any()):
            raise ValueError(
                "attention_mask has zeros between the ones of a sequence that shares its row with "
                "others (position_ids restart); sink_attention takes padding beside packed "
                "sequences, not inside of them: use attn_implementation='eager'"
            )
        is_bound = is_start | changes
    # Padding is a sequence too, without keys. So all rows of q belong to one, and none is copied.
    first = is_bound.flatten().nonzero()[:, 0]
    cu_seqlens_q = F.pad(first, (0, 1), value=is_bound.numel())
    lengths = cu_seqlens_q.diff()
    cu_seqlens_k, seqused_k = cu_seqlens_q, None
    if kv_length != q_length:  # a static cache: behind the new tokens' keys there are unused ones
        cu_seqlens_k = F.pad(
            first // q_length * kv_length + first % q_length, (0, 1), value=batch * kv_length
        )
        seqused_k = lengths
    if is_real is not None:
        seqused_k = lengths.where(is_real.flatten()[first], 0)
    return PackedMask(
        *(q_length, kv_length, mask.causal, mask.window_size),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=int(lengths.max()),
        max_seqlen_k=int(cu_seqlens_k.diff().max()),
        seqused_k=None if seqused_k is None else seqused_k.to(torch.int32),
    )


def _assert_one_sequence(mask: AttentionMask, position_ids: Tensor | None, batch: int) -> None:
    """Under torch.compile no size may depend on values: packed rows end the compiled code."""
    is_packed = mask.is_packed if isinstance(mask, UnpaddedMask) else None
    if is_packed is None:
        if not _belong_to_rows(position_ids, batch, mask.q_length):
            return
        restarts = position_ids.diff(dim=-1) <= 0
        if not isinstance(mask, UnpaddedMask):  # padding is on one side, or has been refused
            column = torch.arange(mask.q_length, device=position_ids.device) + mask.row_begin
            is_real = mask.key_mask[:, column]
            restarts = restarts & is_real[:, 1:] & is_real[:, :-1]
        is_packed = restarts.any()
    torch._assert_async(
        ~is_packed,
        "sink_attention: packed sequences (position_ids that restart) under "
        "torch.compile need cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k",
    )


# ---- cu_seq_lens ----


def split_by_lengths(
    mask: AttentionMask,
    batch: int,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | Tensor | None,
    max_length_k: int | Tensor | None,
) -> AttentionMask:
    """The mask of packed sequences whose bounds are given. A missing maximum is replaced by a safe
    one.

    Args:
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,) int32 or int64, bounds in the rows of the
            batch one after the other.
        max_length_q, max_length_k: int, 0-d integer tensor or None.

    Raises:
        TypeError, ValueError: only one of cu_seq_lens_q and cu_seq_lens_k is given, or a maximum
            without them; they are of another kind; there is padding; they disagree with
            position_ids, or cross the bounds of the batch's rows. (On CUDA the last two are
            asserted on the device, without waiting for it.)
    """
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        values = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        given = [name for name, value in zip(names, values, strict=True) if value is not None]
        raise ValueError(
            "packed sequences need both cu_seq_lens_q and cu_seq_lens_k (max_length_q and "
            f"max_length_k may be missing); got {' and '.join(given)} only"
        )
    if not isinstance(mask, (UnpaddedMask, PackedMask)):
        raise ValueError("cu_seq_lens_q and an attention_mask with padding exclude each other")
    key = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, position_ids, batch)
    kept = None if is_tracing() else vars(mask).get("_by_lengths")
    if kept is not None and all(a is b for a, b in zip(kept[0], key, strict=True)):
        return kept[1]
    for name, bounds in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        _check_bounds(name, bounds)
    if len(cu_seq_lens_q) != len(cu_seq_lens_k):
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must have as many entries; got "
            f"{len(cu_seq_lens_q)} and {len(cu_seq_lens_k)}"
        )
    total_q, total_k = batch * mask.q_length, batch * mask.kv_length
    packed = PackedMask(
        *(mask.q_length, mask.kv_length, mask.causal, mask.window_size),
        cu_seqlens_q=_as_int32(cu_seq_lens_q),
        cu_seqlens_k=_as_int32(cu_seq_lens_k),
        max_seqlen_q=_maximum("max_length_q", max_length_q, total_q),
        max_seqlen_k=_maximum("max_length_k", max_length_k, total_k),
    )
    if batch > 1:
        _require_rows("cu_seq_lens_q", packed.cu_seqlens_q, batch, mask.q_length)
        _require_rows("cu_seq_lens_k", packed.cu_seqlens_k, batch, mask.kv_length)
    if mask.causal and _belong_to_rows(position_ids, batch, mask.q_length):
        _require_starts(position_ids.expand(batch, -1), packed.cu_seqlens_q)
    if not is_tracing():
        mask._by_lengths = (key, packed)
    return packed


def _check_bounds(name: str, bounds: Any) -> None:
    if not isinstance(bounds, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(bounds).__name__}")
    if bounds.dtype not in (torch.int32, torch.int64) or bounds.dim() != 1:
        raise TypeError(
            f"{name} must be (sequences + 1,) int32 or int64; got {tuple(bounds.shape)} of "
            f"{bounds.dtype}"
        )


def _as_int32(bounds: Tensor) -> Tensor:
    """What does not fit into 32 bits stays too large, for the operator to refuse."""
    if bounds.dtype == torch.int32:
        return bounds
    return bounds.clamp(-1, checks.INT32_MAX).to(torch.int32)


def _maximum(name: str, given: int | Tensor | None, total: int) -> int:
    if given is None or (is_tracing() and isinstance(given, Tensor)):
        return total
    return checks.check_max_seqlen(name, given)


def _require_rows(name: str, bounds: Tensor, batch: int, length: int) -> None:
    """No sequence reaches from one row of the batch into the next, and each row is in some."""
    ends = torch.arange(1, batch + 1, dtype=torch.int32, device=bounds.device) * length
    _require(
        torch.isin(ends, bounds).all(),
        f"{name} must have a bound at the end of each of the batch's rows, at every multiple of "
        f"{length} up to {batch * length}: it counts through the {batch} rows one after the other",
    )


def _require_starts(positions: Tensor, bounds: Tensor) -> None:
    """Where position_ids fall a sequence begins.

    Bounds at which they rise are fine: models count through the row where no position_ids were
    given. So are repeated positions, with which collators fill rows up.
    """
    total = positions.numel()
    is_bound = torch.zeros(total + 1, dtype=torch.bool, device=positions.device)
    is_bound = is_bound.index_fill(0, bounds.clamp(0, total).long(), True)
    falls = F.pad(positions.diff(dim=-1) < 0, (1, 0)).flatten()
    is_covered = torch.arange(total, device=positions.device) < bounds[-1]
    _require(
        ~(falls & is_covered & ~is_bound[:-1]).any(),
        "cu_seq_lens_q and position_ids disagree: position_ids restart inside of a sequence of "
        "cu_seq_lens_q",
    )


def _require(condition: Tensor, message: str) -> None:
    if is_tracing() or condition.is_cuda:
        torch._assert_async(condition, f"sink_attention: {message}")
    elif not bool(condition):
        raise ValueError(message)
