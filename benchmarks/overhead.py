"""What does the sink cost? Our own call with s_aux and without, in turns."""

from __future__ import annotations

from cases import DTYPE_NAMES, GPT_OSS_FULL, GPT_OSS_WINDOW, HEAD_DIM_128, Problem, Record, Settings
from peers import ours
from sweep import record_of
from timing import Rounds, interleave, progress

TITLE = "Cost of the sink"
SEQLEN = 2048
QUICK_SEQLEN = 1024


def run(settings: Settings) -> list[Record]:
    # Many turns: the question is about a percent or two, which is less than one call's noise.
    rounds = Rounds(least=5, most=9, budget_s=1.0) if settings.quick else Rounds(9, 41, 5.0)
    seqlen = QUICK_SEQLEN if settings.quick else SEQLEN
    records = []
    for layer in (GPT_OSS_FULL, GPT_OSS_WINDOW, HEAD_DIM_128):
        for dtype, dtype_name in DTYPE_NAMES.items():
            for backward in (False, True):
                direction = "forward+backward" if backward else "forward"
                progress(f"overhead: {layer.name}, {dtype_name}, {direction}")
                problem = Problem(layer, seqlen, dtype, settings.device)
                pair = [ours(problem, backward=backward, sink=sink) for sink in (True, False)]
                timings = interleave(pair, rounds, settings.device)
                records += [
                    record_of(timing, "overhead", name, problem, direction)
                    for name, timing in timings.items()
                ]
    return records
