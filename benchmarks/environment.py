"""What the numbers were measured on: written beside every result."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def cpu_model() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def last_level_cache_bytes() -> int:
    """Size of the largest cache that core 0 sees; 32 MiB where the system doesn't say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip()).groups()
        sizes.append(int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20}[unit])
    return max(sizes, default=32 << 20)


def available_memory_bytes(device: torch.device | None = None) -> int:
    """Memory that can be had without swapping, or that is free on a GPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(match[1]) << 10
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def git_commit() -> str:
    """The commit, with "+changes" where tracked files differ from it."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(device: torch.device) -> dict[str, str | int]:
    import sink_attention_ext  # noqa: F401  (registers the ops asked below)

    try:
        from transformers import __version__ as transformers_version
    except ImportError:
        transformers_version = "not installed"

    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": git_commit(),
        "device": str(device),
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "last-level cache (MiB)": last_level_cache_bytes() >> 20,
        "instruction set of sink_attention_ext": torch.ops.sink_attention_ext.cpu_instruction_set(),
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "python": platform.python_version(),
        "load average at start": load,
    }
