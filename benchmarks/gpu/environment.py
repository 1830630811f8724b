"""What a GPU check runs on: printed, and kept as environment.json.

python -m gpu.environment DIR
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
from gpu.steps import cuda_program

NVIDIA_SMI = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
LIBRARIES = ("transformers", "triton", "flash_attn", "flashinfer", "cutlass", "hypothesis")


def output_of(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def cards() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"card": "none"}
    facts = {}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        facts[f"card {index}"] = (
            f"{card.name}, compute capability {card.major}.{card.minor}, "
            f"{card.multi_processor_count} multiprocessors, {card.total_memory >> 20} MiB, "
            f"L2 {l2_bytes(index) >> 20} MiB"
        )
    return facts


def l2_bytes(index: int = 0) -> int:
    return getattr(torch.cuda.get_device_properties(index), "L2_cache_size", 64 << 20)


def library_version(name: str) -> str:
    try:
        from importlib.metadata import packages_distributions, version

        distribution = packages_distributions()[name][0]
        return f"{distribution} {version(distribution)}"
    except KeyError:
        return "not installed"


def version_of(program: str) -> str:
    """What a program of the CUDA toolkit says of itself."""
    return output_of(cuda_program(program) or program, "--version") or ""


def describe() -> dict[str, str]:
    nvcc = re.search(r"V([\d.]+)", version_of("nvcc"))
    commit = output_of("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD")
    sanitizer = re.search(r"[Vv]ersion ([\d.]+)", version_of("compute-sanitizer"))
    facts = {
        **cards(),
        "nvidia-smi": (output_of("nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv") or "no")
        .strip()
        .replace("\n", "; "),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "cuDNN": str(torch.backends.cudnn.version()),
        "nvcc": nvcc[1] if nvcc else "none",
        "compute-sanitizer": sanitizer[1] if sanitizer else "none",
        "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST", "those of the cards found"),
        "kernels forced": os.environ.get("SINK_ATTENTION_CUDA_KERNELS") or "none",
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": str(os.cpu_count()),
        "commit": (commit or "unknown").strip(),
    }
    return facts | {name: library_version(name) for name in LIBRARIES}


def main() -> None:
    facts = describe()
    for name, value in facts.items():
        print(f"{name:<20}{value}")
    Path(sys.argv[1], "environment.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
