"""The extension against HuggingFace's eager attention: logits, time and memory of a training step.

Run as a script it measures one variant in a fresh process, which is how its memory is its own:

    python examples/compare.py sink_attention 2048
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from small_model import make_model
from torch import Tensor
from transformers import GptOssForCausalLM

# Blocks above 64 KiB go back to the system as soon as they are free (glibc), so that what is
# resident is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STATUS = Path("/proc/self/status")


@torch.no_grad()
def logits_difference(model: GptOssForCausalLM, tokens: Tensor) -> tuple[float, float]:
    """Largest |difference| of the logits of both codes on the same weights, and largest |logit|."""
    logits = {}
    for name in ("eager", "sink_attention"):
        model.set_attn_implementation(name)
        logits[name] = model(tokens, use_cache=False).logits
    difference = (logits["sink_attention"] - logits["eager"]).abs().max().item()
    return difference, logits["eager"].abs().max().item()


def measure_in_child(attention: str, seqlen: int) -> dict[str, float]:
    """{"seconds", "bytes"} of forward and backward of one sequence, measured in a fresh process."""
    command = [sys.executable, __file__, attention, str(seqlen)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | MALLOC, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(attention: str, seqlen: int) -> dict[str, float]:
    model = make_model()
    model.set_attn_implementation(attention)
    tokens = torch.randint(256, (1, seqlen))

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()

    model(tokens[:, :64], labels=tokens[:, :64], use_cache=False).loss.backward()  # warm up
    before = start_of_peak()
    step()
    peak = peak_bytes() - before
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "bytes": max(0, peak)}


def start_of_peak() -> int:
    """Resets the high-water mark of resident memory, if the system can; returns bytes in use."""
    if not STATUS.exists():
        return peak_bytes()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_bytes() -> int:
    if STATUS.exists():
        return status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def status_bytes(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) << 10


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
