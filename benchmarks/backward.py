"""How fast is a training step's attention, forward and backward, of a causal layer?"""

from __future__ import annotations

from cases import GPT_OSS_FULL, HEAD_DIM_128, Record, Settings
from sweep import sweep

TITLE = "Forward + backward, causal"
LAYERS, DIRECTIONS = [GPT_OSS_FULL, HEAD_DIM_128], [True]


def run(settings: Settings) -> list[Record]:
    return sweep(settings, "backward", LAYERS, DIRECTIONS)
