"""How much memory does a call take beside its inputs and outputs?

Each measurement is a fresh process: it makes the inputs, makes the peer run once on a tiny problem
(so that thread stacks and code pages are there), resets the kernel's high-water mark of its
resident memory (VmHWM, by writing 5 to /proc/self/clear_refs), makes one call, and reads the mark.
From the rise above the resident memory before the call it takes the bytes of the results (out and,
with the backward, dq, dk, dv, ds_aux). All else counts, the LSE too. The mask that eager and a
windowed SDPA need is made beforehand, so it counts as an input, which is generous to them.

malloc is told to return every block above 64 KiB to the system at once, and to trim what is left
before the call, for all peers: otherwise memory freed before would hide what the call takes.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from cases import DTYPES, GPT_OSS_FULL, GPT_OSS_WINDOW, Layer, Problem, Record, Settings
from peers import EAGER, OURS, SDPA, eager, ours, sdpa, why_not_eager
from timing import progress

TITLE = "Peak memory beside inputs and outputs"
LAYERS = {"full": GPT_OSS_FULL, "window": GPT_OSS_WINDOW}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TINY = Layer("tiny", 2, 1, 16)


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) << 10


def contender_of(peer: str, problem: Problem, backward: bool):
    if peer == SDPA:
        return sdpa(problem, backward=backward, expand=False)
    return (ours if peer == OURS else eager)(problem, backward=backward)


def measure_here(peer: str, layer: Layer, dtype: torch.dtype, seqlen: int, backward: bool) -> int:
    """Bytes of one call in this process, which should be fresh."""
    cpu = torch.device("cpu")
    a = torch.randn(256, 256, dtype=dtype)
    a @ a
    contender_of(peer, Problem(TINY, 64, dtype, cpu), backward).call()
    contender = contender_of(peer, Problem(layer, seqlen, dtype, cpu), backward)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    results = contender.call()
    peak = resident_bytes("VmHWM")
    contender.check(results)
    return max(0, peak - before - sum(result.nbytes for result in results))


def measure_in_child(arguments: list[str]) -> int:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | MALLOC)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout)


def measure(peer: str, layer_name: str, dtype_name: str, seqlen: int, backward: bool) -> Record:
    layer, dtype = LAYERS[layer_name], DTYPES[dtype_name]
    direction = "forward+backward" if backward else "forward"
    record = Record("memory", peer, layer.name, dtype_name, seqlen, direction)
    if peer == EAGER:
        record.reason = why_not_eager(layer, seqlen, dtype, backward=backward)
    if not record.reason:
        arguments = [peer, layer_name, dtype_name, str(seqlen), str(int(backward))]
        try:
            record.value = measure_in_child(arguments)
        except RuntimeError as error:
            record.reason = str(error)
    return record


def run(settings: Settings) -> list[Record]:
    if settings.device.type != "cpu":
        return []  # VmHWM says nothing of an accelerator's memory
    seqlens = (1024,) if settings.quick else (512, 2048, 8192)
    layer_names = ["full"] if settings.quick else ["full", "window"]
    dtypes = ["fp32"] if settings.quick else list(DTYPES)
    records = []
    for layer_name, dtype, backward in itertools.product(layer_names, dtypes, (False, True)):
        for seqlen in seqlens:
            progress(f"memory: {LAYERS[layer_name].name}, {dtype}, {seqlen} tokens")
            for peer in (OURS, SDPA, EAGER):
                records.append(measure(peer, layer_name, dtype, seqlen, backward))
    return records


def main() -> None:
    """The child process: prints the bytes of one measurement."""
    peer, layer_name, dtype, seqlen, backward = sys.argv[1:]
    layer = LAYERS[layer_name]
    print(measure_here(peer, layer, DTYPES[dtype], int(seqlen), bool(int(backward))))


if __name__ == "__main__":
    main()
