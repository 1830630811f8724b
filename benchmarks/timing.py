"""Timing of several contenders against each other on a machine whose speed drifts.

On a GPU a call is timed by events around it, with an L2 cache that holds nothing of its inputs.

The contenders are interleaved (A B C, A B C, ...), so a slow minute hits all of them, and a ratio
is the median of the ratios within each turn. Before anything is timed, each contender's result is
checked.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# A first, checked call this long is not distorted by cold caches and thread start-up: it counts as
# the contender's first turn. A shorter one is repeated. (On a GPU all are: what takes long there is
# loading and compiling.)
WARM_CALL_SECONDS = 1.0
FLUSH_BYTES = 256 << 20  # more than any L2 cache
FLUSHES = 4  # some 0.3 ms of writing, in which the host prepares the measured call


def progress(message: str) -> None:
    print(f"... {message}", file=sys.stderr, flush=True)


class WrongResultError(Exception):
    """A contender's result is not the reference's."""


@dataclass
class Contender:
    """`call()` is measured; `check(result)` returns its error or raises WrongResultError."""

    name: str
    call: Callable[[], Any]
    check: Callable[[Any], float] | None = None
    most_turns: int = 1_000  # fewer for a peer so slow that it would eat the others' time


@dataclass
class Timing:
    """Seconds of each turn, or why there are none."""

    samples: list[float] = field(default_factory=list)
    error: float | None = None
    reason: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    @property
    def best(self) -> float | None:
        return min(self.samples, default=None)


@dataclass(frozen=True)
class Rounds:
    """Turns go on until `budget_s` seconds are spent, but at least `least` and at most `most`."""

    least: int = 2
    most: int = 15
    budget_s: float = 3.0


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of numerator / denominator over the turns that both had; both start with turn 0."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=False))


@functools.cache
def flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


def timed_on_cuda(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of the device's time; the host's only as far as it keeps the device waiting."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(FLUSHES):
        flush_buffer(device).zero_()
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result


def timed_call(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, and its result. An accelerator's queue is drained around it."""
    if device.type == "cuda":
        return timed_on_cuda(call, device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start, result


def interleave(
    contenders: list[Contender], rounds: Rounds, device: torch.device
) -> dict[str, Timing]:
    """Checks each contender once, then times them in turns. A contender that fails drops out."""
    timings = {contender.name: Timing() for contender in contenders}
    running = []
    for contender in contenders:
        timing = timings[contender.name]
        try:
            seconds, result = timed_call(contender.call, device)
            timing.error = contender.check(result) if contender.check else None
        except Exception as error:  # peers refuse a problem in ways of their own
            text = (str(error).strip().splitlines() or ["no message"])[0]
            timing.reason = f"{type(error).__name__}: {text}"
            continue
        finally:
            result = None  # free the outputs before the next contender allocates its own
        if seconds >= WARM_CALL_SECONDS and device.type == "cpu":
            timing.samples.append(seconds)
        running.append(contender)

    gc.collect()
    gc.disable()
    try:
        spent, turn = 0.0, 0
        while turn < rounds.most and (turn < rounds.least or spent < rounds.budget_s):
            for contender in running:
                samples = timings[contender.name].samples
                if not len(samples) <= turn < contender.most_turns:
                    continue  # its checked first call was this turn, or it has had its turns
                seconds, result = timed_call(contender.call, device)
                del result
                samples.append(seconds)
                spent += seconds
            turn += 1
    finally:
        gc.enable()
    return timings
