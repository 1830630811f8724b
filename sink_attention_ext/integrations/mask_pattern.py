"""Reading a rule of visibility off what transformers gives: a mask function, or a mask tensor.

Masks that the kernels compute are causal or not, with a window or not, with padding on one side, or
several sequences in one row. Whatever else arrives is refused by name: nothing is guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MASKING_UTILS = "transformers.masking_utils"


@dataclass(frozen=True)
class MaskPattern:
    """A rule of visibility; window_size as in flash_attn_func."""

    causal: bool
    window_size: tuple[int, int]
    starts: Tensor | None = None  # (batch, seqlen) bool: where packed sequences begin
    is_packed: Tensor | None = None  # traced: 0-d bool, known when the compiled code runs
    # Only of a mask that was written out: sequence b sees keys [key_start[b], key_stop[b]), both
    # (batch,) int32, and its first row stands at key row_begin.
    key_start: Tensor | None = None
    key_stop: Tensor | None = None
    row_begin: int = 0


# ---- mask functions, in eager mode: exact ----


def recognise(
    mask_function: Callable[..., Tensor],
    *,
    attention_mask: Tensor | None,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
    use_vmap: bool = False,
    **kwargs: Any,
) -> MaskPattern:
    """The pattern of a mask function: by its parts, or else by writing the whole mask out.

    Raises:
        ValueError: it is none that the kernels compute.
    """
    rules, starts = _without_packing(mask_function, q_length)
    is_alone = q_offset == 0 and q_length == kv_length and attention_mask is None
    if starts is None or not is_alone:
        rules, starts = [mask_function], None
    pattern = _combine(rules, kv_offset + kv_length)
    if pattern is not None:
        return replace(pattern, starts=starts)
    from transformers.masking_utils import and_masks, sdpa_mask

    written_out = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=and_masks(*rules),
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    source = f"the mask function {getattr(mask_function, '__qualname__', mask_function)}"
    return replace(pattern_of_mask(written_out, batch_size, source), starts=starts)


def _without_packing(
    mask_function: Callable[..., Tensor], q_length: int
) -> tuple[list[Callable[..., Tensor]], Tensor | None]:
    """The other rules of a conjunction, and where the sequences of its packing rules begin.

    Starts are (batch or 1, q_length) bool; None if there is no such rule, or one whose sequences
    are not told apart by where they begin (their numbers do not rise).
    """
    others, starts = [], None
    for part in _parts(mask_function):
        if _name(part) != "packed_sequence_mask_function.<locals>.inner_mask":
            others.append(part)
            continue
        ids = _closure(part)["packed_sequence_mask"]
        if ids.dim() != 2 or ids.shape[1] != q_length or bool((ids.diff(dim=-1) < 0).any()):
            return others, None
        begins = ids.diff(dim=-1, prepend=ids[:, :1] - 1) != 0
        starts = begins if starts is None else starts | begins
    return others, starts


def _combine(rules: list[Callable[..., Tensor]], length: int) -> MaskPattern | None:
    """The pattern of a conjunction of transformers' own rules; None if a part is unknown."""
    pattern = MaskPattern(causal=False, window_size=(-1, -1))
    for part in (part for rule in rules for part in _parts(rule)):
        left, right = pattern.window_size
        name = _name(part)
        if name == "causal_mask_function":
            pattern = replace(pattern, causal=True)
        elif name == "bidirectional_mask_function":
            pass
        elif name == "sliding_window_overlay.<locals>.inner_mask":
            window = _closure(part)["sliding_window"]
            pattern = replace(pattern, window_size=(_narrower(left, window - 1), right))
        elif name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
            window = _closure(part)["sliding_window"]
            both = (_narrower(left, window), _narrower(right, window))
            pattern = replace(pattern, window_size=both)
        elif name == "chunked_overlay.<locals>.inner_mask":
            if length > _closure(part)["chunk_size"]:
                return None
        else:
            return None
    if pattern.causal:
        return replace(pattern, window_size=(pattern.window_size[0], 0))
    return pattern


def _narrower(a: int, b: int) -> int:
    """The narrower of two sides of windows; -1 is unbounded."""
    return max(a, b) if min(a, b) < 0 else min(a, b)


def _parts(mask_function: Callable[..., Tensor]) -> Iterator[Callable[..., Tensor]]:
    name = _name(mask_function)
    if name == "and_masks.<locals>.and_mask":
        for part in _closure(mask_function)["mask_functions"]:
            yield from _parts(part)
    elif name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        # Counts positions from the start of each packed sequence, which changes no distance in it.
        yield from _parts(_closure(mask_function)["mask_function"])
    else:
        yield mask_function


def _name(function: Callable[..., Tensor]) -> str | None:
    if getattr(function, "__module__", None) != MASKING_UTILS:
        return None
    return getattr(function, "__qualname__", None)


def _closure(function: Callable[..., Tensor]) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals)


# ---- mask functions under torch.compile: what the arguments tell, and a probe of the rest ----


def recognise_traced(
    mask_function: Callable[..., Tensor],
    *,
    attention_mask: Tensor | None,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
    use_vmap: bool = False,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> MaskPattern:
    """The same where closures cannot be opened: from the arguments beside the mask function.

    When the compiled code runs, a probe finds a rule that lets a row see its successor (images
    whose tokens see each other), and one that hides its predecessor: packed sequences. Those are
    left to the attention function, which may have been given their bounds.
    """
    if use_vmap:
        raise ValueError(
            "sink_attention cannot look into or_mask_function and and_mask_function under "
            "torch.compile"
        )
    chunk_size = getattr(config, "attention_chunk_size", None)
    if chunk_size is not None and local_size == chunk_size:
        raise ValueError(f"sink_attention has no chunked attention (chunks of {chunk_size} tokens)")
    if "allow_is_bidirectional_skip" in kwargs:  # only the bidirectional masks pass it
        window_size = (-1, -1) if local_size is None else (local_size, local_size)
        return MaskPattern(causal=False, window_size=window_size)
    window_size = (-1 if local_size is None else local_size - 1, 0)
    if allow_is_causal_skip:  # transformers says that it is nothing but that
        return MaskPattern(causal=True, window_size=window_size)
    row = torch.arange(q_length, device=device) + q_offset
    sequence = torch.arange(batch_size, device=device)[:, None]

    def sees(key: Tensor, otherwise: bool) -> Tensor:
        exists = (key >= kv_offset) & (key < kv_offset + kv_length)
        return torch.where(
            exists, mask_function(sequence, 0, row, key.where(exists, row)), otherwise
        )

    torch._assert_async(
        ~sees(row + 1, otherwise=False).any(),
        "sink_attention computes causal masks only; this mask function lets rows see later keys",
    )
    is_packed = None if local_size == 1 else ~sees(row - 1, otherwise=True).all()
    return MaskPattern(causal=True, window_size=window_size, is_packed=is_packed)


# ---- masks that are written out ----


def pattern_of_mask(mask: Tensor, batch: int, source: str = "attention_mask") -> MaskPattern:
    """The pattern of a mask (batch or 1, heads or 1, q_length, kv_length), read off its values.

    bool (True: visible) or float (0: visible, the dtype's minimum or -inf: masked).

    Raises:
        ValueError: the values follow no rule that the kernels compute.
    """
    visible = _visible(mask, batch, source)
    _, q_length, kv_length = visible.shape
    column = torch.arange(kv_length, device=mask.device)
    count = visible.sum(-1)
    first = visible.int().argmax(-1)
    stop = kv_length - visible.flip(-1).int().argmax(
        -1
    )  # one past the last; of use where count > 0
    is_row = count > 0

    if bool((visible == visible[:, :1]).all()):  # all rows alike
        key_start, key_stop = first[:, 0], torch.where(is_row[:, 0], stop[:, 0], first[:, 0])
        expected = (column >= key_start[:, None]) & (column < key_stop[:, None])
        if bool((visible[:, 0] == expected).all()):
            return _written_out(False, (-1, -1), key_start, key_stop, kv_length - q_length)
        raise _refusal(source, "rows see keys with gaps in between")

    row = torch.arange(q_length, device=mask.device)
    shift = torch.where(is_row, stop - 1 - row, -kv_length)
    row_begin = int(
        shift.max()
    )  # the position of row 0, if the last key that a row sees is its own
    if row_begin + q_length <= kv_length:
        key_start = torch.where(is_row, first, kv_length).amin(-1)
        window = int(count.max()) - 1
        position = (row + row_begin)[None, :, None]
        expected = (column <= position) & (column >= key_start[:, None, None])
        if bool((visible == expected).all()):
            window = -1
        else:
            expected &= column >= position - window
        if window < 0 or bool((visible == expected).all()):
            key_stop = torch.full_like(key_start, row_begin + q_length)
            key_start = key_start.minimum(key_stop)  # of a sequence that sees no key
            return _written_out(True, (window, 0), key_start, key_stop, row_begin)
    if q_length == kv_length:
        pattern = _two_sided(visible)
        if pattern is not None:
            return pattern
    raise _refusal(
        source,
        "it is neither causal nor full, with or without a sliding window and padding on one side "
        "(windows to both sides where queries and keys are the same tokens)",
    )


def _two_sided(visible: Tensor) -> MaskPattern | None:
    """The pattern of a window to both sides with padding; None if `visible` is none.

    Args:
        visible: (batch, length, length) bool.
    """
    length = visible.shape[1]
    column = torch.arange(length, device=visible.device)
    ahead = column - column[:, None]  # how far a key stands behind its row
    anywhere = visible.any(0)
    left, right = (int(torch.where(anywhere, far, 0).max()) for far in (-ahead, ahead))
    is_key = visible.any(1)
    has_keys = is_key.any(-1)
    key_start = torch.where(has_keys, is_key.int().argmax(-1), 0)
    key_stop = torch.where(has_keys, length - is_key.flip(-1).int().argmax(-1), 0)
    is_between = (column >= key_start[:, None]) & (column < key_stop[:, None])
    expected = is_between[:, None] & (ahead >= -left) & (ahead <= right)
    if not bool((visible == expected).all()):
        return None
    return _written_out(False, (left, right), key_start, key_stop, 0)


def _written_out(
    causal: bool, window_size: tuple[int, int], key_start: Tensor, key_stop: Tensor, row_begin: int
) -> MaskPattern:
    return MaskPattern(
        causal,
        window_size,
        key_start=key_start.to(torch.int32),
        key_stop=key_stop.to(torch.int32),
        row_begin=row_begin,
    )


def _visible(mask: Tensor, batch: int, source: str) -> Tensor:
    """(batch, q_length, kv_length) bool of a mask that is the same for each head."""
    if mask.dtype == torch.bool:
        visible = mask
    elif mask.is_floating_point():
        visible = mask == 0
        masked = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((visible | masked).all()):
            raise _refusal(source, "it holds values other than 0 and the minimum (a bias)")
    else:
        raise _refusal(source, f"its dtype is {mask.dtype}, neither bool nor float")
    if visible.shape[1] > 1 and not bool((visible == visible[:, :1]).all()):
        raise _refusal(source, "it differs between heads")
    return visible[:, 0].expand(batch, -1, -1)


def _refusal(source: str, why: str) -> ValueError:
    return ValueError(
        f"sink_attention cannot compute {source}: {why}. Its kernels take causal or full "
        "visibility, a sliding window, padding by a 2D mask, and packed sequences by position_ids "
        "or cu_seq_lens_q; use attn_implementation='eager' for other masks"
    )
