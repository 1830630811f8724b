"""The CUDA kernels in place of the CPU's, run by the emulator (tests/emulator) on CPU tensors.

While `emulated()` is active, every operator of sink_attention_ext on CPU tensors is computed by the
CUDA kernels' own source, compiled for the host: `python setup.py build_emulator`. All above the
operators (public functions, autograd, torch.compile) is as it always is.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from sink_attention_ext import fp8, ops

LIBRARY = Path(__file__).resolve().parent.parent / "build" / "emulator" / "_emulated.so"
MULTIPROCESSORS = 4  # of the emulated device: what the choice of splits goes by
FAMILIES = ("sm80", "sm90", "simt")  # of kernels, by the folders of csrc/cuda
SETTINGS = (
    "cuda_kernels", "set_cuda_kernels", "cuda_kernel_family", "debug_checks", "set_debug_checks",
)  # fmt: skip


def load() -> bool:
    """Whether the emulator is built, and loaded now."""
    if not LIBRARY.exists():
        return False
    torch.ops.load_library(str(LIBRARY))
    return True


def operator(name: str):
    """The emulator's own operator, which `emulated()` puts in its place."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.sink_attention_emulated, packet), overload or "default")


@contextlib.contextmanager
def emulated(
    seed: int = 1, multiprocessors: int = MULTIPROCESSORS, arch: int = 80
) -> Iterator[None]:
    """`seed` draws the order in which warps and lanes run; `arch` is the device's compute
    capability, 10 * major + minor, by which the kernels are chosen."""
    torch.ops.sink_attention_emulated.configure(seed, multiprocessors, arch)
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every override
        for name in (*(ops.FAKE_KERNELS.keys() - fp8.OPERATORS), "flash_attn_fp8_kernel"):
            library.impl(name, operator(name), "CPU", allow_override=True)
        for name in SETTINGS:
            key = "CompositeExplicitAutograd"
            library.impl(name, operator(name), key, allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def blocks_run() -> Counter[str]:
    """How many thread blocks have run in the emulator so far, of each family of kernels; "common":
    of those that belong to none."""
    count = torch.ops.sink_attention_emulated.blocks_run
    blocks = Counter({family: count(family + "::") for family in FAMILIES})
    blocks["common"] = count("") - blocks.total()
    return blocks


def launches(kernel: str = "") -> int:
    """How many kernels have been launched in the emulator so far: those whose C++ name contains
    `kernel`, or all. An empty grid launches none."""
    return torch.ops.sink_attention_emulated.launches(kernel)
