"""How fast is the forward of a causal layer?"""

from __future__ import annotations

from cases import GPT_OSS_FULL, HEAD_DIM_128, Record, Settings
from sweep import sweep

TITLE = "Forward, causal"
LAYERS, DIRECTIONS = [GPT_OSS_FULL, HEAD_DIM_128], [False]


def run(settings: Settings) -> list[Record]:
    return sweep(settings, "forward", LAYERS, DIRECTIONS)
