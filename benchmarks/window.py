"""Does a sliding-window layer's time grow with seqlen * window, and not with seqlen squared?

SDPA gets the window as a boolean mask, ready before the timing: it has no other way to be told.
"""

from __future__ import annotations

import dataclasses

from cases import GPT_OSS_WINDOW, Record, Settings
from sweep import sweep

TITLE = "Sliding window of 128 tokens"
LAYERS, DIRECTIONS = [GPT_OSS_WINDOW], [False, True]


def lengths(settings: Settings) -> tuple[int, ...]:
    # The question is what happens at length, so quick means fewer lengths, not shorter ones.
    return (512, 4096) if settings.quick else settings.seqlens


def run(settings: Settings) -> list[Record]:
    settings = dataclasses.replace(settings, seqlens=lengths(settings))
    return sweep(settings, "window", LAYERS, DIRECTIONS)
