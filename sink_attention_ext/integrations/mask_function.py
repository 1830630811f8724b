"""The mask function that transformers calls, once per forward and kind of layer, under our name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sink_attention_ext import checks
from sink_attention_ext.integrations.mask_object import AttentionMask
from sink_attention_ext.integrations.mask_pattern import (
    MaskPattern,
    recognise,
    recognise_traced,
)
from sink_attention_ext.integrations.masks import (
    GatheredMask,
    PaddedMask,
    UnpaddedMask,
    is_tracing,
)
from sink_attention_ext.integrations.packing import pack
from sink_attention_ext.tensor_kinds import check_kind


def sink_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | AttentionMask | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> AttentionMask:
    """What row ``q_offset + i`` sees of the keys ``kv_offset + j``, as an object for our kernels.

    Args:
        batch_size, q_length, kv_length: the shape that a mask tensor would have. On a static cache
            kv_length is its capacity.
        q_offset: tokens before the first row; on static caches a tensor **that the cache changes in
            place** while the forward runs, so what is derived from it is computed here and now.
        kv_offset: position of the first key (a sliding cache has dropped the ones before).
        mask_function: transformers' rule ``(batch, head, q_position, kv_position) -> bool``.
        attention_mask: (batch, tokens) bool padding mask over all positions so far, or None.

    Raises:
        ValueError: the rule, or the padding under this rule, is not one that the kernels compute,
            or attention_mask is of another shape.
    """
    if isinstance(attention_mask, AttentionMask):  # generate() made it before the forward
        return attention_mask
    if attention_mask is not None:
        _check_padding_mask(attention_mask, batch_size)
    lengths = {"q_length": q_length, "kv_length": kv_length}
    for name, count in (lengths | {"q_offset": q_offset, "kv_offset": kv_offset}).items():
        _check_length(name, count)
    if isinstance(q_offset, Tensor) and q_length > 1 and not is_tracing():
        # A static cache's length is read by the host, but for decoding: that forward may be
        # compiled, and should not depend on a number that changes with each token.
        q_offset = int(q_offset)
    row_begin = q_offset - kv_offset
    rule = (recognise_traced if is_tracing() else recognise)(
        mask_function,
        attention_mask=attention_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        device=device,
        **kwargs,
    )
    if rule.key_start is not None:  # read off a mask that had been written out, padding included
        key_mask = None
        if attention_mask is not None:
            key_mask = _key_mask(attention_mask, kv_offset, kv_length)
        mask = mask_of_pattern(rule, q_length, kv_length, key_mask)
        if rule.starts is None:
            return mask
        return pack(mask, rule.starts.expand(batch_size, -1), None)

    shape = (q_length, kv_length, rule.causal, rule.window_size)
    if rule.starts is not None:
        return pack(AttentionMask(*shape), rule.starts.expand(batch_size, -1), None)
    key_end = _key_end(rule, row_begin, q_length, kv_length, device)
    if attention_mask is None:
        return UnpaddedMask(*shape, key_end=key_end, is_packed=rule.is_packed)
    return _padded(shape, attention_mask, row_begin, key_end, kv_offset)


def mask_of_pattern(
    rule: MaskPattern, q_length: int, kv_length: int, key_mask: Tensor | None = None
) -> AttentionMask:
    """The mask of a pattern that was read off a (batch, 1, q_length, kv_length) tensor."""
    shape = (q_length, kv_length, rule.causal, rule.window_size)
    bounds = {"key_start": rule.key_start, "key_stop": rule.key_stop}
    return PaddedMask(*shape, **bounds, row_begin=rule.row_begin, key_mask=key_mask)


def _check_length(name: str, count: Any) -> None:
    if isinstance(count, (Tensor, torch.SymInt)):  # which torch.compile traces
        return
    if not 0 <= checks.check_int(name, count) <= checks.INT32_MAX:
        raise ValueError(f"{name} must be from 0 to {checks.INT32_MAX}; got {count}")


def _check_padding_mask(attention_mask: Tensor, batch_size: int) -> None:
    if isinstance(attention_mask, Tensor):
        check_kind("attention_mask", attention_mask)
        if attention_mask.device.type == "meta" and not is_tracing():
            raise ValueError("attention_mask must hold values, which are read; got a meta tensor")
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        got = (
            f"shape {tuple(attention_mask.shape)}"
            if isinstance(attention_mask, Tensor)
            else type(attention_mask).__name__
        )
        raise ValueError(
            "sink_attention takes an attention_mask of (batch, tokens), or (batch, 1, q_length, "
            f"kv_length); got {got}"
        )
    if attention_mask.shape[0] != batch_size:
        raise ValueError(
            f"attention_mask must have a row for each of {batch_size} sequences; got shape "
            f"{tuple(attention_mask.shape)}"
        )


def _key_mask(attention_mask: Tensor, kv_offset: int, kv_length: int) -> Tensor:
    """(batch, kv_length) bool: the part of a padding mask that is about the keys there are."""
    key_mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return F.pad(key_mask, (0, kv_length - key_mask.shape[1]))  # columns it lacks are unused


def _key_end(
    rule: MaskPattern,
    row_begin: int | Tensor,
    q_length: int,
    kv_length: int,
    device: torch.device | str,
) -> int | Tensor:
    """One past the last key that any row sees: int, or a 0-d int32 tensor."""
    if not rule.causal:
        if rule.window_size != (-1, -1) and q_length != kv_length:
            raise ValueError(
                "sink_attention computes a bidirectional window only where queries and keys are "
                f"the same tokens; got {q_length} queries and {kv_length} keys"
            )
        return kv_length
    key_end = row_begin + q_length
    if isinstance(key_end, Tensor):
        return key_end.to(device=device, dtype=torch.int32)
    if is_tracing():
        return key_end
    if key_end > kv_length:
        raise ValueError(
            f"the last query stands at key {key_end - 1}, but there are {kv_length} keys: the "
            "cache is too short"
        )
    if (
        q_length == 1 and key_end < kv_length
    ):  # a static cache that fills: as with a tensor q_offset
        return torch.tensor(key_end, dtype=torch.int32, device=device)
    return key_end


def _padded(
    shape: tuple[int, int, bool, tuple[int, int]],
    attention_mask: Tensor,
    row_begin: int | Tensor,
    key_end: int | Tensor,
    kv_offset: int,
) -> AttentionMask:
    """A 2D padding mask (batch, tokens) bool, on top of `shape`'s causality and window."""
    q_length, kv_length, causal, window_size = shape
    key_mask = _key_mask(attention_mask, kv_offset, kv_length)
    column = torch.arange(kv_length, device=key_mask.device)
    key_mask = key_mask & (column < key_end)

    count = key_mask.sum(-1)
    key_start = torch.where(count > 0, key_mask.int().argmax(-1), 0)
    key_stop = torch.where(count > 0, kv_length - key_mask.flip(-1).int().argmax(-1), 0)
    is_full = (count == key_end).all()
    has_holes = (count != key_stop - key_start).any()
    bounds = {"key_start": key_start.to(torch.int32), "key_stop": key_stop.to(torch.int32)}
    if is_tracing():
        torch._assert_async(
            ~has_holes,
            "sink_attention: an attention_mask with zeros between ones does not work under "
            "torch.compile",
        )
        return PaddedMask(*shape, **bounds, row_begin=row_begin, key_mask=key_mask)

    is_full, has_holes = torch.stack([is_full, has_holes]).tolist()
    if is_full:
        return UnpaddedMask(*shape, key_end=key_end)
    if not has_holes:
        return PaddedMask(*shape, **bounds, row_begin=row_begin, key_mask=key_mask)

    begin = int(row_begin)
    if causal:
        row_mask = key_mask[:, begin : begin + q_length]
    else:
        row_mask = key_mask.new_ones(key_mask.shape[0], q_length)
    return GatheredMask(
        *shape, row_begin=begin, key_end=int(key_end), key_mask=key_mask, row_mask=row_mask
    )
