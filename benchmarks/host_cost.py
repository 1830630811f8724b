"""What does a call cost the host, beside what it computes? Tiny tensors on one thread.

    python benchmarks/host_cost.py --out DIR                       # results.json, results.md
    python benchmarks/host_cost.py --out DIR --before before.json  # with an earlier run's columns

One query row and one key of float32, so that checks, dispatch and allocation are what is measured.
Time is the thread's CPU time (other programs do not count), the median over turns in which every
function takes part; a ratio is the median over the turns of the time over SDPA's own call in that
turn: without gradients, with gradients recorded, or with the backward.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import ROOT, describe
from report import markdown_table

from sink_attention_ext import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attn_states,
    reshape_and_cache,
)

NUM_HEADS, HEAD_DIM, PAGE_SIZE = 2, 64, 16
PLAIN, RECORDED, BACKWARD = "no gradient", "forward with gradient", "forward and backward"
SDPA = "torch SDPA"


@dataclass(frozen=True)
class Case:
    name: str
    kind: str  # whose SDPA it is set against
    call: Callable[[], Any]
    most: float | None = None  # times SDPA's, which it should not exceed


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rows(*shape: int, grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(*shape, NUM_HEADS, HEAD_DIM, requires_grad=grad) for _ in range(3)]


def plain_cases() -> list[Case]:
    q, k, v = rows(1, 1)
    sdpa = [x.transpose(1, 2) for x in (q, k, v)]
    packed, starts, sinks = [x[0] for x in (q, k, v)], int32(0, 1), torch.zeros(NUM_HEADS)
    caches = tuple(torch.randn(2, 2, PAGE_SIZE, NUM_HEADS, HEAD_DIM))
    lengths, table, slots = int32(1), int32([0]), torch.tensor([0])
    outs, lses = [q, k], [torch.zeros(1, NUM_HEADS, 1)] * 2
    return [
        Case(SDPA, PLAIN, lambda: F.scaled_dot_product_attention(*sdpa, is_causal=True)),
        Case("flash_attn_func", PLAIN, lambda: flash_attn_func(q, k, v, causal=True), 2.0),
        Case(
            "flash_attn_func, sinks and window", PLAIN,
            lambda: flash_attn_func(q, k, v, causal=True, window_size=(127, 0), s_aux=sinks), 2.0,
        ),
        Case(
            "flash_attn_varlen_func", PLAIN,
            lambda: flash_attn_varlen_func(*packed, starts, starts, 1, 1, causal=True), 2.0,
        ),
        Case(
            "flash_attn_with_kvcache, paged", PLAIN,
            lambda: flash_attn_with_kvcache(
                q, *caches, cache_seqlens=lengths, block_table=table, causal=True
            ), 2.0,
        ),
        Case(
            "flash_attn_with_kvcache, append and attend", PLAIN,
            lambda: flash_attn_with_kvcache(
                q, *caches, k, v, cache_seqlens=lengths, block_table=table, causal=True
            ), 2.5,
        ),
        Case(
            "reshape_and_cache", PLAIN,
            lambda: reshape_and_cache(*packed[1:], *caches, slots), 1.2,
        ),
        Case("merge_attn_states, two parts", PLAIN, lambda: merge_attn_states(outs, lses)),
    ]  # fmt: skip


def differentiated_cases() -> list[Case]:
    q, k, v = rows(1, 1, grad=True)
    sdpa = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    packed = [x.detach()[0].requires_grad_() for x in (q, k, v)]
    starts = int32(0, 1)
    calls = {
        SDPA: lambda: F.scaled_dot_product_attention(*sdpa, is_causal=True),
        "flash_attn_func": lambda: flash_attn_func(q, k, v, causal=True),
        "flash_attn_varlen_func": lambda: flash_attn_varlen_func(
            *packed, starts, starts, 1, 1, causal=True
        ),
    }
    inputs = {SDPA: sdpa, "flash_attn_func": [q, k, v], "flash_attn_varlen_func": packed}
    cases = []
    for name, call in calls.items():
        dout = torch.ones_like(call())

        def both(call: Any = call, of: Any = inputs[name], dout: Any = dout) -> Any:
            return torch.autograd.grad(call(), of, dout)

        most = None if name == SDPA else 5.0
        cases += [Case(name, RECORDED, call, most), Case(name, BACKWARD, both, most)]
    return cases


def measure(cases: list[Case], turns: int, calls: int) -> list[dict[str, Any]]:
    for case in cases:
        for _ in range(calls):
            case.call()
    samples: list[list[float]] = [[] for _ in cases]
    gc.collect()
    for _ in range(turns):
        for case, times in zip(cases, samples, strict=True):
            start = time.thread_time()
            for _ in range(calls):
                case.call()
            times.append((time.thread_time() - start) / calls)
    peers = {case.kind: times for case, times in zip(cases, samples, strict=True)
             if case.name == SDPA}  # fmt: skip
    return [
        {
            "name": case.name, "kind": case.kind, "most": case.most,
            "microseconds": 1e6 * statistics.median(times),
            "ratio": statistics.median(
                a / b for a, b in zip(times, peers[case.kind], strict=True)
            ),
        }
        for case, times in zip(cases, samples, strict=True)
    ]  # fmt: skip


def table(records: list[dict[str, Any]], before: list[dict[str, Any]] | None) -> str:
    earlier = {(r["kind"], r["name"]): r for r in before or []}
    columns = ["call", "", "us", "of SDPA's", "at most"]
    if before is not None:
        columns[2:2] = ["us before", "of SDPA's before"]
    lines = []
    for record in records:
        most = "" if record["most"] is None else f"{record['most']:.1f}x"
        line = [record["name"], record["kind"], f"{record['microseconds']:.1f}",
                f"{record['ratio']:.2f}x", most]  # fmt: skip
        if before is not None:
            old = earlier.get((record["kind"], record["name"]))
            line[2:2] = [f"{old['microseconds']:.1f}", f"{old['ratio']:.2f}x"] if old else ["-"] * 2
        lines.append(line)
    return markdown_table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks" / "host-cost")
    parser.add_argument("--before", type=Path, help="results.json of an earlier run")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--calls", type=int, default=300, help="of each function in a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    records = measure([*plain_cases(), *differentiated_cases()], options.turns, options.calls)
    before = json.loads(options.before.read_text())["records"] if options.before else None
    text = table(records, before)
    environment = describe(torch.device("cpu"))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(
        json.dumps({"environment": environment, "records": records}, indent=1) + "\n"
    )
    described = "\n".join(f"- {key}: {value}" for key, value in environment.items())
    (options.out / "results.md").write_text(
        "# Host cost of a call\n\nWritten by `python benchmarks/host_cost.py`, which says how it "
        f"is measured.\n\n{text}\n\n{described}\n"
    )
    print(text)


if __name__ == "__main__":
    main()
