"""Step time and peak memory of training, each attention in a process of its own.

As a script, with the name of an attention: prints seconds per step and peak bytes above what the
process held before its first step of full length, as JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

SEQLEN = 2048


def measure(attention: str) -> dict[str, float]:
    """One sequence of SEQLEN tokens, forward and backward: {"seconds", "bytes"}."""
    command = [sys.executable, __file__, attention]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _main(attention: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_gpt_oss import model as tiny
    from tiny_gpt_oss import text

    model = tiny.build(attention)
    data, _ = text.load()

    def step(seqlen: int) -> float:
        ids = data[None, :seqlen]
        start = time.perf_counter()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return time.perf_counter() - start

    step(32)  # gradients exist, libraries are loaded
    before = _resident_bytes()
    seconds = min(step(SEQLEN) for _ in range(3))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps({"seconds": seconds, "bytes": peak - before, "threads": torch.get_num_threads()})
    )


if __name__ == "__main__":
    _main(sys.argv[1])
