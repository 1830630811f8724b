"""Does a sliding-window layer's time grow with seqlen * window, and not with seqlen squared?

SDPA gets the window as a boolean mask, ready before the timing: it has no other way to be told.
"""

from __future__ import annotations

import dataclasses

from cases import GPT_OSS_WINDOW, Record, Settings
from sweep import sweep

TITLE = "Sliding window of 128 tokens"


def run(settings: Settings) -> list[Record]:
    if settings.quick:
        # The question is what happens at length, so quick means fewer lengths, not shorter ones.
        settings = dataclasses.replace(settings, seqlens=(512, 4096))
    return sweep(settings, "window", [GPT_OSS_WINDOW], [False, True])
