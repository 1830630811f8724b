"""The project's goals, as ratios between peers of one run, and whether they are reached."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cases import Record
from peers import EAGER, OURS, OURS_NO_SINK, READ, SDPA
from timing import paired_ratio


@dataclass(frozen=True)
class Goal:
    """`ratios` yields the (shape, ratio) of each fitting pair in a run's records."""

    text: str
    at_least: bool
    target: float
    unit: str
    ratios: Callable[[list[Record]], Iterator[tuple[str, float]]]

    def holds(self, ratio: float) -> bool:
        return (operator.ge if self.at_least else operator.lt)(ratio, self.target)

    def show(self, ratio: float) -> str:
        return f"{ratio:.2f}x" if self.unit == "x" else f"{100 * ratio:.1f}%"


def pairs(records: list[Record], section: str, peer: str, other: str) -> Iterator[tuple]:
    """(record of `peer`, record of `other`) of each shape of a section where both have a value."""
    others = {r.shape: r for r in records if r.section == section and r.peer == other}
    for record in records:
        if record.section == section and record.peer == peer and record.value is not None:
            partner = others.get(record.shape)
            if partner is not None and partner.value is not None:
                yield record, partner


def label(record: Record) -> str:
    batch = f"{record.batch} x " if record.direction == "decode" else ""
    return f"{record.layer}, {record.dtype}, {record.direction}, {batch}{record.seqlen} tokens"


def speedup(section: str, dtypes: tuple[str, ...], longest_only: bool = False):
    """SDPA's time over ours."""

    def ratios(records: list[Record]) -> Iterator[tuple[str, float]]:
        found = [p for p in pairs(records, section, OURS, SDPA) if p[0].dtype in dtypes]
        longest = max((ours.seqlen for ours, _ in found), default=0)
        for ours, sdpa in found:
            if not longest_only or ours.seqlen == longest:
                yield label(ours), paired_ratio(sdpa.samples, ours.samples)

    return ratios


def share_of_bandwidth(records: list[Record]) -> Iterator[tuple[str, float]]:
    for ours, read in pairs(records, "decode", OURS, READ):
        bytes_ratio = ours.kv_bytes / read.kv_bytes
        yield label(ours), bytes_ratio * paired_ratio(read.samples, ours.samples)


def sink_cost(records: list[Record]) -> Iterator[tuple[str, float]]:
    for with_sink, without in pairs(records, "overhead", OURS, OURS_NO_SINK):
        yield label(with_sink), paired_ratio(with_sink.samples, without.samples) - 1


def share_of_eager_memory(records: list[Record]) -> Iterator[tuple[str, float]]:
    for ours, eager in pairs(records, "memory", OURS, EAGER):
        yield label(ours), ours.value / eager.value


GOALS = [
    Goal("forward vs SDPA, fp32", True, 1.15, "x", speedup("forward", ("fp32",))),
    Goal("forward vs SDPA, bf16", True, 2.0, "x", speedup("forward", ("bf16",))),
    Goal("forward+backward vs SDPA, fp32", True, 1.3, "x", speedup("backward", ("fp32",))),
    Goal("forward+backward vs SDPA, bf16", True, 1.3, "x", speedup("backward", ("bf16",))),
    Goal(
        "windowed layer vs SDPA with a mask, longest",
        True,
        10.0,
        "x",
        speedup("window", ("fp32", "bf16"), longest_only=True),
    ),
    Goal("decode, share of read bandwidth", True, 0.70, "%", share_of_bandwidth),
    Goal("cost of the sink", False, 0.02, "%", sink_cost),
    Goal("peak memory, share of eager's", False, 0.05, "%", share_of_eager_memory),
]


def verdicts(records: list[Record]) -> list[dict[str, str]]:
    """One row a goal: what was measured, worst to best, and whether it was reached."""
    rows = []
    for goal in GOALS:
        measured = list(goal.ratios(records))
        row = {"goal": goal.text}
        row["target"] = f"{'>=' if goal.at_least else '<'} {goal.show(goal.target)}"
        if not measured:
            rows.append(row | {"verdict": "not measured in this run"})
            continue
        measured.sort(key=lambda pair: pair[1], reverse=not goal.at_least)
        values = [ratio for _, ratio in measured]
        row["worst"] = f"{goal.show(values[0])} ({measured[0][0]})"
        row["median"] = goal.show(statistics.median(values))
        row["best"] = goal.show(values[-1])
        good = sum(map(goal.holds, values))
        if good == len(values):
            row["verdict"] = f"reached at all {good} shapes"
        else:
            row["verdict"] = f"**not reached**: {good} of {len(values)} shapes"
        rows.append(row)
    return rows
