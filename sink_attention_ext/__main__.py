"""``python -m sink_attention_ext``: what was built, what runs here, and whether it is right."""

from __future__ import annotations

import platform
import sys

import torch

import sink_attention_ext
from sink_attention_ext import ops
from sink_attention_ext.selfcheck import run_self_check


def print_environment() -> None:
    facts = {
        "sink_attention_ext": sink_attention_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "library": str(ops.LIBRARY_PATH or "not built: run `make build`"),
        "backends": ", ".join(ops.BACKENDS) or "none",
    }
    if "cpu" in ops.BACKENDS:
        facts["instruction sets"] = (
            f"{ops.cpu_instruction_sets().replace(',', ', ')} (in use: {ops.cpu_instruction_set()})"
        )
        facts["threads"] = str(torch.get_num_threads())
    if "cuda" in ops.BACKENDS and torch.cuda.is_available():
        facts["CUDA device"] = torch.cuda.get_device_name()
    for name, value in facts.items():
        print(f"{name:<20}{value}")


def self_check(device: str) -> bool:
    print(f"\nself-check on {device} against the float64 reference (largest absolute errors)")
    all_ok = True
    for result in run_self_check(device):
        all_ok &= result.ok
        dtype = str(result.dtype).removeprefix("torch.")
        errors = "  ".join(f"{name} {error:.1e}" for name, error in result.errors.items())
        verdict = "ok    " if result.ok else "FAILED"
        print(f"{verdict} {result.name:<18}{dtype:<9} <= {result.tolerance:.0e}:  {errors}")
    return all_ok


def main() -> int:
    print_environment()
    if ops.LIBRARY_PATH is None:
        return 1
    devices = [d for d in ops.BACKENDS if d == "cpu" or torch.cuda.is_available()]
    all_ok = all([self_check(device) for device in devices])  # a list: each of them runs
    print("all right" if all_ok else "FAILED: this build computes wrong results on this machine")
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main())
