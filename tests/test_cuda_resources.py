"""tools/cuda_resources.py: what ptxas says, the table, and what makes `make check-cuda` fail."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "cuda_resources.py"))
Kernel = TOOL["Kernel"]

FWD = (
    "_ZN14sink_attention10primitives12kernel_entryINS_4cuda4sm8014FlashFwdKernelINS_9attention"
    "8BFloat16ENS3_7PrefillILi128ELi128EEEEELi128ELi65536EEEvNT_7ProblemE"
)
COMBINE = (
    "_ZN14sink_attention10primitives12kernel_entryINS_4cuda13CombineKernelINS_9attention7Float16"
    "EEELi128ELi0EEEvNT_7ProblemE"
)
LOG = f"""\
nvcc: NVIDIA (R) Cuda compiler driver
Cuda compilation tools, release 13.0, V13.0.88
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{FWD}' for 'sm_90'
ptxas info    : Function properties for {FWD}
    48 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1008 bytes cmem[0]
ptxas info    : Compile time = 1252.751 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{COMBINE}' for 'sm_80'
ptxas info    : Function properties for {COMBINE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for __internal_slowpath
    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 0 barriers, 512 bytes smem, 736 bytes cmem[0]
"""
PREFILL = "sm80::FlashFwdKernel<BFloat16, Prefill<128, 128>>"

needs_demangler = pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")


def hot(spill_stores: int = 0, spill_loads: int = 0, name: str = PREFILL) -> tuple:
    return Kernel(name, "sm_80", 128, 255, 0, 65536, spill_stores, spill_loads, 0)


@needs_demangler
def test_messages_are_understood() -> None:
    version, kernels = TOOL["parse"](LOG)
    assert version == "13.0.88"
    assert kernels == [
        Kernel("CombineKernel<Float16>", "sm_80", 128, 38, 512, 0, 4, 0, 8),
        Kernel(PREFILL, "sm_90", 128, 255, 0, 65536, 40, 44, 48),
    ]


@needs_demangler
def test_a_message_that_is_cut_off_is_an_error() -> None:
    with pytest.raises(ValueError, match="ptxas said too little of .* for sm_80"):
        TOOL["parse"](LOG[: LOG.index("ptxas info    : Used 38")])


@needs_demangler
def test_sizes_sort_by_their_value() -> None:
    sizes = (32, 96, 128)
    log = "".join(LOG.replace("Li128ELi128EEEEE", f"Li{n}ELi{n}EEEEE") for n in reversed(sizes))
    names = [kernel.name for kernel in TOOL["parse"](log)[1] if "Prefill" in kernel.name]
    assert names == [f"sm80::FlashFwdKernel<BFloat16, Prefill<{n}, {n}>>" for n in sizes]


def test_other_kernels_than_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="not an instantiation of kernel_entry"):
        TOOL["readable"]("void some_kernel<1, 2>(int)")


def test_a_hot_kernel_must_not_spill() -> None:
    (failure,) = TOOL["spilling"]([hot(spill_loads=4), hot(name=PREFILL[:-5])])
    assert failure == f"{PREFILL} spills 4 bytes on sm_80"
    assert TOOL["spilling"]([hot()]) == []


def test_another_kernel_may_spill() -> None:
    cold = hot(spill_stores=64, name="simt::FlashFwdKernel<FlashFwdTiles<double, 64>>")
    assert TOOL["spilling"]([hot(), cold]) == []


def test_a_pattern_without_a_kernel_is_found() -> None:
    (failure,) = TOOL["spilling"]([hot(name="sm80::Renamed<Float16>")])
    assert "no kernel is hot" in failure


def test_a_changed_table_is_found() -> None:
    kernels = [hot(), hot(name="CombineKernel<Float16>")._replace(arch="sm_90")]
    table = TOOL["markdown"]("13.0.88", kernels)
    assert TOOL["differences"](table, kernels) == []
    changed = [kernels[0]._replace(registers=254), kernels[1]]
    found = TOOL["differences"](table, changed)
    assert [line[0] for line in found] == ["+", "-"] and "| 254 |" in found[0]
    # Of the architectures compiled now.
    assert TOOL["differences"](table, kernels[:1]) == []


def test_an_outdated_table_says_how_to_write_it() -> None:
    failures = TOOL["check"](TOOL["markdown"]("13.0.88", []), "13.0.88", [hot()])
    assert "benchmarks/results/resources.md is out of date: run `make resources`" in failures


def test_another_compiler_s_table_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    table = TOOL["markdown"]("12.8.61", [hot()])
    assert TOOL["check"](table, "13.0.88", [hot(spill_loads=4)]) == []
    printed = capsys.readouterr().out
    assert "not of nvcc 13.0.88" in printed and "spills 4 bytes" in printed


def test_the_committed_table_is_the_tool_s() -> None:
    text = TOOL["TABLE"].read_text()
    assert text.startswith(TOOL["markdown"]("", []).split("nvcc")[0])
    hot_rows = [line for line in text.splitlines() if TOOL["HOT"].match(line[3:])]
    assert {line.split("|")[2].strip() for line in hot_rows} == {"sm_80", "sm_90", "sm_120"}
