"""``python -m sink_attention_ext``: what was built, what runs here, and whether it is right.

``python -m sink_attention_ext kernel-path``: the folder for LOCAL_KERNELS, by which transformers
takes our operators for those of kernels-community/vllm-flash-attn3.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

import sink_attention_ext
from sink_attention_ext import ops
from sink_attention_ext.integrations import flash_attention_3
from sink_attention_ext.selfcheck import run_self_check
from sink_attention_ext.support import supports


def describe_cuda_kernels() -> str:
    """Which families run on the current card, and whether one is forced."""
    shape = {"head_dim": 64, "num_heads_q": 8, "device": "cuda"}
    calls = {"training": {"backward": True}, "serving": {"paged": True}}
    parts = []
    for name, call in calls.items():
        answer = supports(dtype=torch.bfloat16, **shape, **call)
        parts.append(f"{name} {answer.kernel or answer.reason}")
    forced = ops.cuda_kernels()
    forced_by = f" (forced to {forced})" if forced else ""
    return f"{', '.join(parts)} at head_dim 64 in bfloat16{forced_by}"


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
        facts["CUDA kernels"] = describe_cuda_kernels()
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


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sink_attention_ext",
        description="Without a command: prints what was built, and checks its results here.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["kernel-path"],
        help="kernel-path: print the folder that transformers takes as hub kernel, "
        'LOCAL_KERNELS="kernels-community/vllm-flash-attn3=<path>"',
    )
    if parser.parse_args(arguments).command == "kernel-path":
        try:
            flash_attention_3.local_kernels()
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        print(flash_attention_3.KERNEL_FOLDER)
        return 0

    print_environment()
    if ops.LIBRARY_PATH is None:
        return 1
    devices = [d for d in ops.BACKENDS if d == "cpu" or torch.cuda.is_available()]
    all_ok = all([self_check(device) for device in devices])  # a list: each of them runs
    print("all right" if all_ok else "FAILED: this build computes wrong results on this machine")
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
