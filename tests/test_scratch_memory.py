"""What a call on the CPU takes beside its inputs and results, where a request or a shape is odd.

Each call is made in a process of its own, whose largest address space is read from VmPeak: what is
allocated counts, whether or not it is touched, and other programs don't.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import BACKENDS

from sink_attention_ext import ops

pytestmark = pytest.mark.skipif(
    "cpu" not in BACKENDS or not Path("/proc/self/status").exists(),
    reason="needs the CPU kernels and Linux's /proc",
)

MEASURE = """
import torch
from sink_attention_ext import flash_attn_func, flash_attn_with_kvcache

def peak_mib():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmPeak")).split()[1]) / 1024

torch.set_num_threads(1)
small = torch.randn(1, 3, 1, 16, requires_grad=True)
flash_attn_func(small, small, small).sum().backward()  # loads what is loaded once
flash_attn_with_kvcache(small.detach(), small.detach(), small.detach(), cache_seqlens=3)
{setup}
before = peak_mib()
result = {call}
print(peak_mib() - before)
"""


def mib_of(setup: str, call: str) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = str(ops.LIBRARY_PATH.parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    code = MEASURE.format(setup=setup, call=call)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_splits_of_few_keys() -> None:
    """One block of keys has one part, whatever is asked for: 541 MiB were 64 copies of out."""
    setup = "q, cache = torch.randn(1, 1000, 32, 64), torch.randn(1, 16, 2, 64)"
    call = "flash_attn_with_kvcache(q, cache, cache, cache_seqlens=10, num_splits=64)"
    assert mib_of(setup, call) < 64


def test_splits_of_many_rows() -> None:
    """There are keys for 16 parts, but the rows alone give all threads work: out has 32 MiB."""
    setup = "q, cache = torch.randn(1, 4096, 32, 64), torch.randn(1, 4096, 1, 64)"
    call = "flash_attn_with_kvcache(q, cache, cache, cache_seqlens=4096, num_splits=64)"
    assert mib_of(setup, call) < 160


@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_many_kv_heads(seqlen_q: int) -> None:
    """A job takes some of them at a time: the inputs have 4 MiB, scratch for all had 1.1 GiB."""
    setup = f"q, k = torch.randn(1, {seqlen_q}, 20000, 16), torch.randn(1, 3, 20000, 16)"
    assert mib_of(setup, "flash_attn_func(q, k, k)") < 64


def test_many_kv_heads_with_a_window_and_gradients() -> None:
    setup = """
leaves = [torch.randn(1, 3, 20000, 16, requires_grad=True) for _ in range(3)]
out = flash_attn_func(*leaves, causal=True, window_size=(1, 0))
dout = torch.ones_like(out)
"""
    assert mib_of(setup, "torch.autograd.grad(out, leaves, dout)") < 96


def test_many_short_sequences() -> None:
    """Packed keys and accumulators are of one sequence at a time, or of those that need them."""
    setup = """
leaves = [torch.randn(20000, 3, 1, 16, requires_grad=True) for _ in range(3)]
out = flash_attn_func(*leaves, causal=True)
dout = torch.ones_like(out)
"""
    assert mib_of(setup, "torch.autograd.grad(out, leaves, dout)") < 96
