"""tools/cuda_resources.py: what ptxas says, the table, and what makes `make check-cuda` fail."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
import cuda_sass  # noqa: E402

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
    version, kernels = TOOL["parse"](LOG, {})
    assert version == "13.0.88"
    assert kernels == [
        Kernel("CombineKernel<Float16>", "sm_80", 128, 38, 512, 0, 4, 0, 8),
        Kernel(PREFILL, "sm_90", 128, 255, 0, 65536, 40, 44, 48),
    ]


@needs_demangler
def test_a_message_that_is_cut_off_is_an_error() -> None:
    with pytest.raises(ValueError, match="ptxas said too little of .* for sm_80"):
        TOOL["parse"](LOG[: LOG.index("ptxas info    : Used 38")], {})


@needs_demangler
def test_sizes_sort_by_their_value() -> None:
    sizes = (32, 96, 128)
    log = "".join(LOG.replace("Li128ELi128EEEEE", f"Li{n}ELi{n}EEEEE") for n in reversed(sizes))
    names = [kernel.name for kernel in TOOL["parse"](log, {})[1] if "Prefill" in kernel.name]
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
    failures = TOOL["check"](TOOL["markdown"]("13.0.88", []), "13.0.88", [hot()], [])
    assert "benchmarks/results/resources.md is out of date: run `make resources`" in failures


def test_another_compiler_s_table_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    table = TOOL["markdown"]("12.8.61", [hot()])
    assert TOOL["check"](table, "13.0.88", [hot(spill_loads=4)], []) == []
    printed = capsys.readouterr().out
    assert "not of nvcc 13.0.88" in printed and "spills 4 bytes" in printed


def test_the_committed_table_is_the_tool_s() -> None:
    text = TOOL["TABLE"].read_text()
    assert text.startswith(TOOL["markdown"]("", []).split("nvcc")[0])
    hot_rows = [line for line in text.splitlines() if TOOL["HOT"].match(line[3:])]
    assert {line.split("|")[2].strip() for line in hot_rows} >= {"sm_80", "sm_90", "sm_120"}


# ---- Hopper's kernels ----

HOPPER = (
    "_ZN14sink_attention10primitives12kernel_entryINS_4cuda4sm9014FlashFwdKernelILi64EEELi256"
    "ELi65536EEEvNT_7ProblemE"
)
HOPPER_LOG = f"""\
Cuda compilation tools, release 13.0, V13.0.88
object sm90/flash_fwd/hdim64.sm_90a.o
ptxas info    : Compiling entry function '{HOPPER}' for 'sm_90a'
ptxas info    : Function properties for {HOPPER}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
object common/combine.sm_80.o
"""
# As cuobjdump prints it. A loop with the warpgroup's products (70 to b0) waits for a barrier out of
# line (110), which jumps back into it; a box is copied in another loop (c0 to f0), once for each
# value of a uniform register (d0 to e0); a product comes after the loops.
SASS = f"""\
Fatbin elf code:
	code for sm_90a
		Function : {HOPPER}
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90"
        /*0050*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;  /* 0x00 */
                                                                             /* 0x00 */
        /*0060*/              @!P0 BRA 0x50 ;  /* 0x00 */
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R0 ;  /* 0x00 */
        /*0080*/              @!P0 BRA 0x110 ;  /* 0x00 */
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;  /* 0x00 */
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;  /* 0 */
        /*00b0*/              @!P1 BRA 0x70 ;  /* 0x00 */
        /*00b8*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;  /* 0x00 */
        /*00c0*/                   SYNCS.ARRIVE.TRANS64 RZ, [UR8+0xea60], R2 ;  /* 0x00 */
        /*00d0*/                   UTMALDG.5D [UR8], [UR14] ;  /* 0x00 */
        /*00e0*/               @P1 BRA.U.ANY 0xd0 ;  /* 0x00 */
        /*00f0*/              @!P2 BRA 0xc0 ;  /* 0x00 */
        /*0100*/                   EXIT ;  /* 0x00 */
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R0 ;  /* 0x00 */
        /*0120*/              @!P0 BRA 0x110 ;  /* 0x00 */
        /*0130*/                   BRA 0x90 ;  /* 0x00 */
        /*0140*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;  /* 0x00 */
        /*0150*/                   BRA 0x150;  /* 0x00 */
"""


def hopper(**changes) -> tuple:
    kernel = Kernel(
        "sm90::FlashFwdKernel<64>", "sm_90a", 384, 168, 0, 65536, 0, 0, 0,
        "HGMMA 2, UTMALDG 1", "24, 240",
    )  # fmt: skip
    return kernel._replace(**changes)


def test_a_softmax_is_beside_a_product() -> None:
    shuffle = "        /*0150*/                   SHFL.BFLY PT, R5, R4, 0x2, 0x1f ;  /* 0x00 */\n"
    some_wait, all_wait = (
        f"        /*0160*/                   WARPGROUP.DEPBAR.LE gsb0, 0x{left} ;  /* 0x00 */\n"
        for left in (1, 0)
    )
    beside = SASS + some_wait + shuffle + all_wait
    after = SASS + some_wait + all_wait + shuffle
    assert cuda_sass.exchanging_beside_products(beside) == {HOPPER}
    assert cuda_sass.exchanging_beside_products(after) == set()
    name = "sm90::FlashFwdKernel<64>"
    assert TOOL["alone"]([HOPPER]) == [f"{name}: its softmax waits for all products"]
    assert TOOL["alone"]([HOPPER.replace("FlashFwd", "FlashBwd")]) == []


def test_instructions_in_loops_are_counted() -> None:
    code = cuda_sass.read(SASS)
    assert code == {HOPPER: cuda_sass.Code(Counter(HGMMA=2, UTMALDG=1), [24], [240])}


def test_a_loop_for_the_lanes_values_alone_is_none() -> None:
    straight = SASS.replace("@!P2 BRA 0xc0 ;", "@!P2 EXIT ;  ")
    assert cuda_sass.read(straight)[HOPPER].in_loops == Counter(HGMMA=2)


@needs_demangler
def test_the_machine_code_becomes_two_columns() -> None:
    _, (kernel,) = TOOL["parse"](HOPPER_LOG, cuda_sass.read(SASS))
    assert kernel == hopper(threads=256)
    hopper_s, common = TOOL["objects"](HOPPER_LOG)
    assert hopper_s.parts[-3:] == ("sm90", "flash_fwd", "hdim64.sm_90a.o")
    assert common.parts[-2:] == ("common", "combine.sm_80.o")


# As nvcc 13.0 compiled warp_idx(), a shuffle of all lanes, called by half of them: for compute
# capability 8.0, and for 9.0 in straight code and in a loop that half go round once more.
HALF_OF_A_WARP = {
    "8.0": """\
        /*00a0*/               @P0 BRA 0x110 ;  /* 0x00 */
                                                /* 0x00 */
        /*00c0*/                   BRA.CONV ~URZ, 0x100 ;  /* 0x00 */
        /*00e0*/                   CALL.REL.NOINC 0x160 ;  /* 0x00 */
        /*0100*/                   SHFL.IDX PT, R5, R0, RZ, 0x1f ;  /* 0x00 */
""",
    "9.0": """\
        /*00a0*/               @P0 BRA 0x110 ;  /* 0x00 */
                                                /* 0x00 */
        /*00d0*/                   WARPSYNC.ALL ;  /* 0x00 */
                                                   /* 0x00 */
        /*00e0*/                   SHFL.IDX PT, R5, R0, RZ, 0x1f ;  /* 0x00 */
""",
    "9.0, any()": """\
        /*00d0*/                   WARPSYNC.ALL ;  /* 0x00 */
                                                   /* 0x00 */
        /*00e0*/                   ISETP.GT.AND P0, PT, R0, RZ, PT ;  /* 0x00 */
                                                   /* 0x00 */
        /*00f0*/                   VOTE.ANY P0, P0 ;  /* 0x00 */
""",
    "9.0, a loop": """\
        /*0150*/                   BRA.DIV UR7, 0x410 ;  /* 0x00 */
        /*0160*/                   SHFL.IDX PT, R5, R2, RZ, 0x1f ;  /* 0x00 */
        /*0410*/                   WARPSYNC.COLLECTIVE R8, 0x430 ;  /* 0x00 */
        /*0420*/                   SHFL.IDX P0, R11, R2, R13, R15 ;  /* 0x00 */
""",
}
# And what stands around exchanges and barriers that all lanes come to.
WHOLE_WARP = """\
        /*0080*/                   SHFL.IDX PT, R5, R4, RZ, 0x1f ;  /* 0x00 */
        /*0090*/                   WARPSYNC.ALL ;  /* 0x00 */
                                                   /* 0x00 */
        /*00a0*/                   BSSY B3, 0x8fa0 ;  /* 0x00 */
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;  /* 0x00 */
        /*00c0*/                   SHFL.IDX PT, R5, R4, RZ, 0x1f ;  /* 0x00 */
        /*00d0*/                   WARPSYNC 0xffffffff ;  /* 0x00 */
        /*00e0*/                   SHFL.BFLY PT, R0, R35, 0x1, 0x1f ;  /* 0x00 */
        /*00f0*/                   VOTE.ANY P0, P0 ;  /* 0x00 */
"""


@needs_demangler
@pytest.mark.parametrize("code", HALF_OF_A_WARP.values(), ids=HALF_OF_A_WARP)
def test_lanes_that_part_before_a_shuffle(code: str) -> None:
    whole = f"\t\tFunction : {COMBINE}\n{WHOLE_WARP}"
    assert cuda_sass.parted(f"{SASS}{whole}") == []
    found = cuda_sass.parted(f"{whole}\t\tFunction : {HOPPER}\n{code}")
    assert TOOL["parted"](found) == ["sm90::FlashFwdKernel<64>: lanes part before a shuffle"]


@needs_demangler
def test_without_a_disassembler_the_other_columns_are_compared() -> None:
    _, unread = TOOL["parse"](HOPPER_LOG, {})
    table = TOOL["markdown"]("13.0.88", [hopper(threads=256)])
    assert unread[0].in_loops == "?" and TOOL["differences"](table, unread) == []
    assert len(TOOL["differences"](table, [unread[0]._replace(registers=160)])) == 2
    assert len(TOOL["differences"](table, [hopper(threads=256, in_loops="HGMMA 3")])) == 2
    assert TOOL["unused_units"](unread) == []


@pytest.mark.parametrize(
    ("name", "in_loops", "lacking"),
    [
        ("sm90::FlashFwdKernel<64>", "HMMA 8, UTMALDG 1", "HGMMA or QGMMA"),
        ("sm90::FlashBwdKernel<64>", "HGMMA 8, LDGSTS 4", "UTMALDG"),
        ("sm90::PagedAttnKernel<64>", "HMMA 8", "UTMALDG or UBLKCP or LDGSTS"),
        ("sm90::PagedAttnKernel<64>", "HMMA 8, UBLKCP 2", None),
        ("sm80::FlashFwdKernel<64>", "", None),
    ],
)
def test_hopper_s_units_must_be_used(name: str, in_loops: str, lacking: str | None) -> None:
    found = TOOL["unused_units"]([hopper(name=name, in_loops=in_loops)])
    assert found == ([] if lacking is None else [f"{name} has no {lacking} in its loops"])


def test_hopper_s_kernels_must_not_spill() -> None:
    (failure,) = TOOL["spilling"]([hopper(spill_stores=8)])
    assert "spills 8 bytes on sm_90a" in failure


def test_registers_that_nobody_gave_are_found() -> None:
    assert TOOL["over_budget"]([hopper(), hot()]) == []
    (failure,) = TOOL["over_budget"]([hopper(setmaxnreg="40, 240")])
    assert "setmaxnreg to 40, 240 is 66560 registers a block, which starts with 64512" in failure
    (failure,) = TOOL["over_budget"]([hopper(registers=176)])
    assert "needs 67584 registers a block" in failure


@pytest.mark.parametrize(
    "advice",
    [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources for the wgmma pipeline in the function",
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain "
        "minimum register requirements in the function",
        "ptxas warning : (C7999) Something that later versions say",
    ],
)
def test_what_ptxas_advises_fails(advice: str) -> None:
    assert TOOL["warnings"](LOG) == []
    (found,) = TOOL["warnings"](f"{LOG}{advice} '{HOPPER}'\n{advice} '{HOPPER}'\n")
    assert found.startswith(advice)
    assert found in TOOL["check"]("", "13.0.88", [hot()], [found])
