"""Every instruction set that the machine has gives right results, and nearly the same ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import cases
import oracle
import pytest
import tolerance
import torch
from backends import BACKENDS, Backend
from cases import FLOAT_DTYPES, MASKS, DenseCase, PagedCase, VarlenCase, heads
from test_merge import MergeCase, check_merge
from test_paged import check_paged

from sink_attention_ext import ops

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="no CPU kernels in this build")
NAMES = ops.cpu_instruction_sets().split(",") if "cpu" in BACKENDS else []
FLOAT_ARITHMETIC = [  # all but the pair whose weights are bfloat16
    (name, dtype)
    for name in NAMES
    for dtype in cases.HALF_DTYPES
    if (name, dtype) != ("avx512_bf16", torch.bfloat16)
]
KNOWN = ("portable", "avx2", "avx512", "avx512_bf16")

SetInstructionSet = Callable[[str], None]


def dense_cases() -> list[DenseCase]:
    drawn = cases.draw(
        72,
        5,
        seqlen_q=(1, 3, 4, 5, 8, 9, 16, 31, 64, 65, 129, 200),
        seqlen_k=(1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 129, 257, 300, 513),
        heads=(heads(1, 1), heads(4, 2), heads(3, 1), heads(8, 1), heads(5, 5)),
        head_dim=(1, 3, 4, 7, 8, 9, 16, 33, 64, 80, 127, 256),
        head_dim_v=(None, 1, 5, 24, 96, 255),
        dtype=FLOAT_DTYPES,
        mask=MASKS,
        softcap=(0.0, 0.0, 15.0),
        sink=("normal", "none", "4randn", "mixed"),
        layout=cases.LAYOUTS,
        num_sink_tokens=(0, 0, 3, 40),
    )
    return [DenseCase(seed=i, **cases.merged(fields)) for i, fields in enumerate(drawn)]


@pytest.fixture
def cpu() -> Backend:
    return BACKENDS["cpu"]


@pytest.mark.sanitize
@pytest.mark.parametrize("case", dense_cases(), ids=str)
def test_dense(cpu: Backend, set_instruction_set: SetInstructionSet, case: DenseCase) -> None:
    """Against the oracle each, and against each other: their differences are roundings too."""
    results = {}
    for name in NAMES:
        set_instruction_set(name)
        assert ops.cpu_instruction_set() == name
        results[name] = oracle.run(cpu.flash_attn, cases.make_dense(case), case.options())
        try:
            tolerance.check(results[name], oracle.expected(case), case.softcap)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    if case.dtype == torch.float64:
        for name in NAMES:
            for field, tensor in results[name].items().items():
                other = getattr(results[NAMES[0]], field)
                torch.testing.assert_close(tensor, other, rtol=1e-10, atol=1e-11)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_varlen(
    cpu: Backend, set_instruction_set: SetInstructionSet, dtype: torch.dtype, name: str
) -> None:
    set_instruction_set(name)
    for i, mask in enumerate(MASKS):
        case = VarlenCase(
            seqlens_q=(5, 0, 70, 131, 1),
            seqlens_k=(9, 4, 0, 270, 33),
            unused_k=(1, 0, 2, 3, 4),
            extra_rows=2,
            num_heads_q=6,
            num_heads_kv=2,
            head_dim=20 + 7 * i,
            head_dim_v=40,
            dtype=dtype,
            **mask,
        )
        actual = oracle.run(cpu.flash_attn_varlen, cases.make_varlen(case), case.options())
        tolerance.check(actual, oracle.expected(case))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("float8", [None, "per head"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_paged(
    cpu: Backend,
    set_instruction_set: SetInstructionSet,
    dtype: torch.dtype,
    float8: str | None,
    name: str,
) -> None:
    set_instruction_set(name)
    for seqlen_q, num_splits in ((1, 0), (1, 3), (6, 2), (70, 1)):
        case = PagedCase(
            seqlens_q=(seqlen_q,) * 3,
            seqlens_k=(700, 0, 33),
            page_size=4,
            num_heads_q=6,
            num_heads_kv=2,
            head_dim=72,
            head_dim_v=33,
            dtype=dtype,
            causal=True,
            float8=float8,
            num_splits=num_splits,
        )
        check_paged(cpu, case)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_merge(
    cpu: Backend, set_instruction_set: SetInstructionSet, dtype: torch.dtype, name: str
) -> None:
    set_instruction_set(name)
    for head_dim in (1, 16, 33, 300):
        case = MergeCase(
            rows=(2, 19), num_heads=5, head_dim=head_dim, num_parts=3, dtype=dtype, sink="mixed"
        )
        check_merge(cpu, case)


@pytest.mark.sanitize
@pytest.mark.parametrize("head_dim", [5, 16, 40, 64, 129])
@pytest.mark.parametrize(("name", "dtype"), FLOAT_ARITHMETIC, ids=str)
def test_half_results_are_float32_results_rounded(
    cpu: Backend,
    set_instruction_set: SetInstructionSet,
    name: str,
    dtype: torch.dtype,
    head_dim: int,
) -> None:
    """To nearest even, bit for bit."""
    set_instruction_set(name)
    case = DenseCase(seqlen_q=60, seqlen_k=90, num_heads_q=4, head_dim=head_dim, dtype=dtype)
    inputs = cases.make_dense(case)
    half = cpu.flash_attn(inputs.q, inputs.k, inputs.v, s_aux=inputs.s_aux)
    wide = (x.float() for x in (inputs.q, inputs.k, inputs.v))
    single = cpu.flash_attn(*wide, s_aux=inputs.s_aux)
    assert torch.equal(half[0], single[0].to(dtype))
    assert torch.equal(half[1], single[1])


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_twice(cpu: Backend, set_instruction_set: SetInstructionSet, name: str) -> None:
    """Also after another instruction set has run in between."""
    case = DenseCase(seqlen_q=150, seqlen_k=300, num_heads_q=4, dtype=torch.bfloat16, causal=True)
    inputs = cases.make_dense(case)
    runs = []
    for current in (name, *NAMES, name):
        set_instruction_set(current)
        runs.append(oracle.run(cpu.flash_attn, inputs, case.options()))
    for field, tensor in runs[0].items().items():
        assert torch.equal(tensor, getattr(runs[-1], field)), field


# ---- choosing ----


def test_names_are_known_and_the_best_is_last() -> None:
    assert NAMES[0] == "portable"
    assert [name for name in KNOWN if name in NAMES] == NAMES


def test_an_unknown_name_is_refused_and_changes_nothing() -> None:
    before = ops.cpu_instruction_set()
    with pytest.raises((RuntimeError, ValueError), match="'sse9'.*portable"):
        ops.set_cpu_instruction_set("sse9")
    assert ops.cpu_instruction_set() == before


def run_python(code: str, instruction_set: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SINK_ATTENTION_CPU_ISA": instruction_set}
    root = str(ops.LIBRARY_PATH.parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )


PRINT_SET = "from sink_attention_ext import ops; print(ops.cpu_instruction_set())"


@pytest.mark.parametrize("wanted", ["portable", ""])
def test_environment_chooses(wanted: str) -> None:
    done = run_python(PRINT_SET, wanted)
    assert done.stdout.strip() == (wanted or NAMES[-1]), done.stderr


def test_environment_with_an_unknown_name_is_refused() -> None:
    done = run_python(PRINT_SET, "sse9")
    assert done.returncode != 0
    assert "'sse9'" in done.stderr and "portable" in done.stderr
