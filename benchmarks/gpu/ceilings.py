"""What the card can do at best, measured: the yardsticks for TFLOP/s and GB/s."""

from __future__ import annotations

import torch
from timing import Contender, Rounds, interleave

COPY_BYTES = 1 << 30
GEMM_SIZE = 8192
ROUNDS = Rounds(least=10, most=30, budget_s=3.0)


def measure(device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy (read and written), FLOP a second of a bfloat16 product."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).bfloat16() for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}
    timings = interleave([Contender(name, call) for name, call in calls.items()], ROUNDS, device)
    return {
        "copy": 2 * COPY_BYTES / timings["copy"].median,
        "gemm": 2 * GEMM_SIZE**3 / timings["gemm"].median,
    }


def describe(ceilings: dict[str, float]) -> dict[str, str]:
    return {
        "copy, GB/s": f"{ceilings['copy'] / 1e9:.0f}",
        "bfloat16 GEMM, TFLOP/s": f"{ceilings['gemm'] / 1e12:.0f}",
    }
