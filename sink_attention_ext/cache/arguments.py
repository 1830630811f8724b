"""Validation of what PagedKVCache is given, and the sizes of its page pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sink_attention_ext import checks, ops
from sink_attention_ext.fake_checks import number_text
from sink_attention_ext.reference import WindowSize

MOST_BYTES = 2**62


def check_count(name: str, value: Any, at_least: int = 0, at_most: int = checks.INT32_MAX) -> int:
    value = checks.check_int(name, value)
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {number_text(value)}")
    if value > at_most:
        raise ValueError(f"{name} must be at most {at_most}; got {number_text(value)}")
    return value


def check_sizes(**sizes: Any) -> None:
    """Each is at least 1; head_dim and head_dim_v are what the kernels take."""
    for name, size in sizes.items():
        check_count(name, size, at_least=1)
        if name in ("head_dim", "head_dim_v") and size > checks.MAX_HEAD_DIM:
            raise ValueError(f"{name} must be at most {checks.MAX_HEAD_DIM}; got {size}")


def check_device(device: Any) -> torch.device:
    """One that this machine and this torch have; None is torch's default device."""
    device = torch.get_default_device() if device is None else device
    checked = checks.check_device_name(device)
    if checked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that is there; got {device}, but there is no CUDA")
    if checked.type == "cuda" and (checked.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one that is there; got {device} of {torch.cuda.device_count()}"
        )
    if checked.type not in (*ops.BACKENDS, "meta") and ops.LIBRARY_PATH is not None:
        raise ValueError(
            f"device must be one that this build has kernels for ({', '.join(ops.BACKENDS)}); got "
            f"{device}"
        )
    return checked


def check_padding(name: str, padded: Any, actual: int, most: int) -> int:
    """The padded number; None is the actual one."""
    if padded is None:
        return actual
    padded = check_count(name, padded)
    if padded < actual or padded > most:
        raise ValueError(f"{name} must be from {actual}, what there is, to {most}; got {padded}")
    return padded


def check_counts(num_new_tokens: Any, num_seqs: int) -> list[int]:
    """A number of new tokens for each sequence."""
    if not isinstance(num_new_tokens, Sequence):
        return [check_count("num_new_tokens", num_new_tokens)] * num_seqs
    if len(num_new_tokens) != num_seqs:
        raise ValueError(
            f"num_new_tokens must have one entry for each of the {num_seqs} seq_ids; got "
            f"{len(num_new_tokens)}"
        )
    return [check_count(f"num_new_tokens[{i}]", count) for i, count in enumerate(num_new_tokens)]


def check_causal_windows(window_sizes: Sequence[WindowSize]) -> tuple[tuple[int, int], ...]:
    """(window_left, 0) of each layer; window_left -1 is a full layer."""
    if not isinstance(window_sizes, Sequence) or isinstance(window_sizes, str):
        raise TypeError(
            f"window_sizes must be a list of a pair (left, right) for each layer; got "
            f"{window_sizes!r}"
        )
    if not window_sizes:
        raise ValueError("window_sizes must have one entry for each layer, at least one; got none")
    checked = []
    for layer, window_size in enumerate(window_sizes):
        try:
            left, right = checks.check_window(window_size, causal=False)
        except (TypeError, ValueError) as error:  # which names it as the operators' argument
            message = str(error).removeprefix("window_size")
            raise type(error)(f"window_sizes[{layer}]{message}") from None
        if right > 0:
            raise ValueError(
                f"window_sizes[{layer}] must be (left, 0), or (-1, -1) for a full layer: attention "
                f"to the cache is causal; got {window_size!r}"
            )
        checked.append((left, 0))
    return tuple(checked)


def scale_of_each_layer(
    name: str, scale: Tensor | Sequence[Tensor] | None, num_layers: int
) -> list[Tensor | None]:
    if scale is None or isinstance(scale, Tensor):
        return [scale] * num_layers
    if not isinstance(scale, Sequence):
        raise TypeError(
            f"{name} must be a tensor, or a list of one for each of the {num_layers} layers; got "
            f"{scale!r}"
        )
    if len(scale) != num_layers:
        raise ValueError(
            f"{name} must be one tensor, or one for each of the {num_layers} layers; got "
            f"{len(scale)}"
        )
    return list(scale)


def max_row_pages(
    window_left: int, num_sink_tokens: int, page_size: int, max_new_tokens: int, max_seqlen: int
) -> int:
    """The most pages of one sequence in a group of layers, after an append of max_new_tokens."""
    whole = -(-max_seqlen // page_size)
    if window_left < 0:
        return whole
    num_sink_pages = -(-num_sink_tokens // page_size)
    return min(whole, num_sink_pages + -(-(window_left + max_new_tokens) // page_size) + 1)


def pages_by_group(
    windows: Sequence[int],
    num_pages: int | Mapping[int, int] | None,
    memory_budget: int | None,
    page_bytes: Sequence[int],
    most_pages: Sequence[int],
) -> list[int]:
    """The pages of each group's pool.

    windows: window_left of each group; most_pages: what a windowed group can use at most;
    page_bytes: of one page in all layers of a group.
    """
    if (num_pages is None) == (memory_budget is None):
        raise ValueError("exactly one of num_pages and memory_budget must be given")
    if isinstance(num_pages, Mapping):
        if set(num_pages) != set(windows):
            raise ValueError(
                f"num_pages must have one entry for each window_left of the layers, "
                f"{sorted(windows)} (-1: full layers); got {sorted(num_pages)}"
            )
        return [check_count(f"num_pages[{left}]", num_pages[left], 1) for left in windows]
    if num_pages is not None:
        return [check_count("num_pages", num_pages, at_least=1)] * len(windows)

    pages = [0 if left < 0 else most for left, most in zip(windows, most_pages, strict=True)]
    rest = check_count("memory_budget", memory_budget, at_most=MOST_BYTES)
    rest -= sum(count * size for count, size in zip(pages, page_bytes, strict=True))
    for group, left in enumerate(windows):
        if left < 0:  # there is one such group at most
            pages[group], rest = rest // page_bytes[group], rest % page_bytes[group]
    if rest < 0 or 0 in pages:
        least = sum(
            size * (1 if left < 0 else most)
            for left, most, size in zip(windows, most_pages, page_bytes, strict=True)
        )
        raise ValueError(
            f"memory_budget must be at least {least} bytes, for the pages that windowed layers use "
            f"and one of the full layers; got {memory_budget}"
        )
    return pages
