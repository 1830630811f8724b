"""The sweep over lengths that forward.py, backward.py and window.py share."""

from __future__ import annotations

import itertools

import flex
import gpu.peers
import torch
from cases import DTYPE_NAMES, Layer, Problem, Record, Settings
from peers import EAGER, FLEX, SDPA, eager, faster_sdpa_expands, ours, sdpa, why_not_eager
from timing import Rounds, Timing, interleave, progress

EAGER_TURNS = 2


def rounds_for(settings: Settings, backward: bool) -> Rounds:
    """At least two turns at every length; more as long as a few seconds allow."""
    if settings.device.type == "cuda":
        return Rounds(least=5, most=20, budget_s=0.5) if settings.quick else Rounds(10, 50, 2.0)
    if settings.quick:
        return Rounds(least=2, most=5, budget_s=1.0)
    return Rounds(least=2, most=15, budget_s=6.0 if backward else 4.0)


def record_of(timing: Timing, section: str, peer: str, problem: Problem, direction: str) -> Record:
    return Record(
        section,
        peer,
        problem.layer.name,
        DTYPE_NAMES[problem.dtype],
        problem.seqlen,
        direction,
        value=timing.median,
        best=timing.best,
        samples=timing.samples,
        error=timing.error,
        reason=timing.reason,
    )


def measure_shape(
    settings: Settings,
    section: str,
    problem: Problem,
    *,
    backward: bool,
    sdpa_expands: bool,
    eager_seconds: float,
) -> dict[str, Record]:
    """All peers on one shape; eager_seconds is what eager is expected to take."""
    direction = "forward+backward" if backward else "forward"
    contenders = [ours(problem, backward=backward)]
    left_out = {}
    if settings.device.type == "cuda":
        others, left_out = gpu.peers.contenders(problem, backward=backward)
        contenders += others
    else:
        contenders.append(sdpa(problem, backward=backward, expand=sdpa_expands))
    eager_limit_s = 1.5 if settings.quick else 12.0
    reason = why_not_eager(
        problem.layer,
        problem.seqlen,
        problem.dtype,
        backward=backward,
        seconds=eager_seconds,
        limit_s=eager_limit_s,
        device=settings.device,
    )
    if reason:
        left_out[EAGER] = reason
    else:
        contender = eager(problem, backward=backward)
        contender.most_turns = EAGER_TURNS
        contenders.append(contender)

    device, dtype = settings.device, problem.dtype
    flex_detail = None
    if settings.quick:
        left_out[FLEX] = "left out of --quick: compiling takes seconds for each shape"
    elif problem.seqlen not in flex.SEQLENS:
        left_out[FLEX] = f"measured at {' and '.join(map(str, flex.SEQLENS))} tokens only"
    elif reason := flex.why_not(device, dtype, backward=backward, sink=False):
        left_out[FLEX] = reason
    else:
        no_sink = flex.why_not(device, dtype, backward=backward, sink=True)
        contenders.append(flex.build(problem, backward=backward, sink=no_sink is None))
        flex_detail = f"without sink, since with its LSE: {no_sink}" if no_sink else "LSE rescale"

    rounds = rounds_for(settings, backward)
    timings = interleave(contenders, rounds, device)
    timings |= {name: Timing(reason=reason) for name, reason in left_out.items()}
    records = {
        name: record_of(timing, section, name, problem, direction)
        for name, timing in timings.items()
    }
    if SDPA in records:
        records[SDPA].detail = "K, V expanded" if sdpa_expands else "enable_gqa"
    records[FLEX].detail = flex_detail
    return records


def sweep(
    settings: Settings, section: str, layers: list[Layer], directions: list[bool]
) -> list[Record]:
    """Records of every layer, dtype, direction (is it with the backward?) and length."""
    records = []
    for layer, dtype, backward in itertools.product(layers, DTYPE_NAMES, directions):
        on_cpu = settings.device.type == "cpu"
        expands = on_cpu and faster_sdpa_expands(layer, dtype, settings.device, backward)
        eager_seconds, previous_seqlen = 0.0, settings.seqlens[0]
        for seqlen in settings.seqlens:
            progress(f"{section}: {layer.name}, {DTYPE_NAMES[dtype]}, {seqlen} tokens")
            eager_seconds *= (seqlen / previous_seqlen) ** 2
            shape = measure_shape(
                settings,
                section,
                Problem(layer, seqlen, dtype, settings.device),
                backward=backward,
                sdpa_expands=expands,
                eager_seconds=eager_seconds,
            )
            eager_seconds = shape[EAGER].value or eager_seconds
            previous_seqlen = seqlen
            records += shape.values()
    torch.compiler.reset()
    return records
