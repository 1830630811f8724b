"""The CUDA toolkit and the cards that kernels are built for: what setup.py asks of a machine."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

LEAST_ARCH = (8, 0)
DEFAULT_ARCHS = ["8.0", "9.0+PTX", "12.0"]  # where no card is found; the PTX serves later ones
PLACE = Path("/usr/local/cuda")  # where installers put a toolkit, often without touching PATH


def nvcc_root() -> Path | None:
    """The toolkit's folder. nvcc on PATH may be a wrapper script, so nvcc itself is asked."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(PLACE / "bin"))
    if nvcc is None:
        return None
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else None


def ask_nvcc(root: Path, question: str) -> str:
    asked = subprocess.run([f"{root}/bin/nvcc", question], capture_output=True, text=True)
    return asked.stdout


def nvcc_version(root: Path) -> tuple[int, int] | None:
    found = re.search(r"release (\d+)\.(\d+)", ask_nvcc(root, "--version"))
    return (int(found.group(1)), int(found.group(2))) if found else None


def runtime_flags(root: Path) -> list[str]:
    """What links CUDA's runtime, from wherever a system's, pip's or conda's toolkit has it."""
    folders = [root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))]
    held = [folder for folder in folders if (folder / "libcudart_static.a").exists()]
    return [f"-L{(held or folders)[0]}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


def nvcc_host_flags() -> list[str]:
    """nvcc takes the host compiler that the other files are compiled with."""
    cxx = os.environ.get("CXX", "")
    return ["-ccbin", cxx] if cxx and len(cxx.split()) == 1 else []


def driver_version() -> tuple[int, int] | None:
    """The latest CUDA that this machine's driver runs."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def why_it_may_not_run(root: Path) -> str | None:
    """The library holds its toolkit's runtime, which runs on drivers from its major version on."""
    built = nvcc_version(root)
    if built is None:
        return None
    driver = driver_version()
    if driver is not None and driver[0] < built[0]:
        return (
            f"nvcc is {built[0]}.{built[1]}, but this machine's driver runs CUDA up to "
            f"{driver[0]}.{driver[1]}: here every call on CUDA tensors would fail"
        )
    of_torch = torch.version.cuda or ""
    if driver is None and of_torch and int(of_torch.split(".")[0]) < built[0]:
        return (
            f"nvcc is {built[0]}.{built[1]}, torch is built for CUDA {of_torch}: calls on CUDA "
            f"tensors need a driver for CUDA {built[0]}, which torch does not"
        )
    return None


# ---- architectures, in torch's notation: "8.0;9.0a+PTX" ----


def parse_arch(arch: str) -> tuple[tuple[int, int], str, bool]:
    """ "9.0a+PTX" is ((9, 0), "90a", True)."""
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
    if match is None:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {arch!r} is not of the form 8.0 or 9.0a+PTX")
    major, minor, letter, ptx = match.groups()
    return (int(major), int(minor)), major + minor + letter, ptx is not None


def asked_archs() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, which images set for all of a machine's packages, without the cards
    that are too old for these kernels."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    asked = [arch for arch in re.split(r"[;,\s]+", text) if arch]
    usable = [arch for arch in asked if parse_arch(arch)[0] >= LEAST_ARCH]
    if asked and not usable:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={text}: the kernels need 8.0 or later")
    return usable


def found_archs() -> list[str]:
    """Of the cards that torch finds and that the kernels can run on."""
    if not torch.cuda.is_available():
        return []
    cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    usable = sorted(card for card in cards if card >= LEAST_ARCH)
    return [f"{major}.{minor}" for major, minor in usable]


def default_archs(root: Path) -> list[str]:
    """What nvcc knows of them: toolkits before 12.8 have no 12.0."""
    known = re.findall(r"compute_(\w+)", ask_nvcc(root, "--list-gpu-arch"))
    return [arch for arch in DEFAULT_ARCHS if parse_arch(arch)[1] in known]


def choose_archs(root: Path) -> list[str]:
    return asked_archs() or found_archs() or default_archs(root)


def gencode_flags(archs: list[str]) -> list[str]:
    """-gencode flags of each, PTX too where asked for."""
    flags = []
    for arch in archs:
        _, number, ptx = parse_arch(arch)
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if ptx:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags
