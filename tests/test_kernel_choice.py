"""Which kernel runs, with which tiles and splits: a committed table of calls on five cards and the
CPU, so that a change of choice shows as a diff.

    python tests/test_kernel_choice.py    writes the table, tests/kernel_choice.txt
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import bindings_module
import kernel_cases
import pytest
from kernel_cases import CARDS, CallCase

TABLE = Path(__file__).resolve().parent / "kernel_choice.txt"


@pytest.fixture(scope="session")
def bindings() -> ModuleType:
    return bindings_module.build()


def choice(bindings: ModuleType, case: CallCase, arch: int) -> str:
    """ "sm90::decode_hdim64 16x64 splits=8", or why nothing runs."""
    try:
        plan = bindings.plan(case.op, case.shape(bindings), arch=arch, num_sms=CARDS[arch])
    except RuntimeError as error:
        return f"refused: {error}"
    if not plan["kernel"]:
        return "dequantised"
    splits = f" splits={plan['num_splits']}" * (plan["num_splits"] != 1)
    return f"{plan['kernel']} {plan['tile_rows']}x{plan['tile_keys']}{splits}"


def lines_of(bindings: ModuleType, case: CallCase) -> list[str]:
    """The case, then a line for each choice with the cards that make it."""
    cards: dict[str, list[str]] = {}
    for arch in CARDS:
        cards.setdefault(choice(bindings, case, arch), []).append(f"{arch // 10}.{arch % 10}")
    lines = [case.name()]
    lines += [f"    {', '.join(archs)}: {text}" for text, archs in cards.items()]
    if case.op == "flash_fwd":
        positions, keys = bindings.cpu_tile(case.shape(bindings))
        lines.append(f"    cpu/portable: {positions} positions x {keys} keys")
    return lines


def table(bindings: ModuleType) -> str:
    calls = dict.fromkeys(kernel_cases.cases())
    return "\n".join(line for case in calls for line in lines_of(bindings, case)) + "\n"


def test_the_committed_table_is_what_runs(bindings: ModuleType) -> None:
    assert table(bindings).splitlines() == TABLE.read_text().splitlines(), (
        "another kernel runs than tests/kernel_choice.txt says; if that is meant, rewrite it: "
        "python tests/test_kernel_choice.py"
    )


def test_the_table_is_large_and_reaches_each_kernel(bindings: ModuleType) -> None:
    text = TABLE.read_text()
    calls = [line for line in text.splitlines() if not line.startswith(" ")]
    assert len(calls) == len(set(calls)) >= 400
    assert [row["name"] for row in bindings.kernel_table() if row["name"] + " " not in text] == []


def test_rows_of_the_kernel_table(bindings: ModuleType) -> None:
    rows = bindings.kernel_table()
    assert len({row["name"] for row in rows}) == len(rows)
    for op in {row["op"] for row in rows}:  # whatever torch lets through has a bucket
        largest = max(row["head_dim"] for row in rows if row["op"] == op)
        assert largest == bindings.MAX_HEAD_DIM
    for row in rows:
        assert row["least_arch"] >= 80
        assert (row["greatest_arch"] == 90) == (row["family"] == "sm90")
        assert row["name"].startswith(f"{row['family']}::{row['op']}_hdim{row['head_dim']}")


def plan(bindings: ModuleType, case: CallCase, arch: int, **device: Any) -> dict[str, Any]:
    return bindings.plan(case.op, case.shape(bindings), arch=arch, **device)


FORWARD = CallCase()
BACKWARD = CallCase(op="flash_bwd")


@pytest.mark.parametrize("case", [FORWARD, BACKWARD, FORWARD._replace(dtype="float32")])
@pytest.mark.parametrize("arch", [70, 75])
def test_older_cards_run_nothing(bindings: ModuleType, case: CallCase, arch: int) -> None:
    reason = f"on compute capability 7.{arch % 10}: .*they need compute capability 8.0 or later"
    with pytest.raises(RuntimeError, match=reason):
        plan(bindings, case, arch)


@pytest.mark.parametrize(
    ("archs", "arch", "kernel"),
    [
        ("8.0", 80, "sm80::flash_fwd_hdim64"),
        ("8.0", 86, "sm80::flash_fwd_hdim64"),  # machine code of an earlier minor version
        ("8.0", 89, "sm80::flash_fwd_hdim64"),
        ("8.6", 80, None),
        ("8.0", 90, None),
        ("8.0+PTX", 90, "sm80::flash_fwd_hdim64"),
        ("8.0+PTX", 120, "sm80::flash_fwd_hdim64"),
        ("9.0", 80, None),
        ("9.0", 90, "sm90::flash_fwd_hdim64"),  # Hopper's files are compiled for 9.0a then
        ("9.0a", 90, "sm90::flash_fwd_hdim64"),
        ("9.0a", 100, None),
        ("9.0a+PTX", 100, None),  # such PTX runs on 9.0 alone
        ("9.0+PTX", 100, "sm80::flash_fwd_hdim64"),
        ("10.0f", 103, "sm80::flash_fwd_hdim64"),
        ("10.0f", 120, None),
        ("8.0;9.0+PTX;12.0", 80, "sm80::flash_fwd_hdim64"),
        ("8.0;9.0+PTX;12.0", 90, "sm90::flash_fwd_hdim64"),
        ("8.0;9.0+PTX;12.0", 100, "sm80::flash_fwd_hdim64"),
        ("8.0;9.0+PTX;12.0", 120, "sm80::flash_fwd_hdim64"),
        ("8.0;12.0", 90, None),
    ],
)
def test_a_build_runs_what_it_was_built_for(
    bindings: ModuleType, archs: str, arch: int, kernel: str | None
) -> None:
    if kernel is not None:
        assert plan(bindings, FORWARD, arch, build_archs=archs)["kernel"] == kernel
        return
    with pytest.raises(RuntimeError) as error:
        plan(bindings, FORWARD, arch, build_archs=archs)
    card = f"on compute capability {arch // 10}.{arch % 10}, built for {archs}: "
    reason = "sm80::flash_fwd_hdim64: this library was built without them: TORCH_CUDA_ARCH_LIST"
    assert card in str(error.value) and reason in str(error.value)


def test_each_table_says_why_it_does_not_take_a_call(bindings: ModuleType) -> None:
    why_not = plan(bindings, FORWARD, 80)["why_not"]
    assert why_not == [
        "they run on compute capability 9.0 only",
        "it is no decode of few rows over a cache",
        "they run on compute capability 9.0 only",
    ]
    assert plan(bindings, FORWARD, 90)["why_not"][0] == "k and v are not in a paged cache"


@pytest.mark.parametrize("dims", kernel_cases.HEAD_DIMS)
@pytest.mark.parametrize("op", ["flash_fwd", "flash_bwd"])
@pytest.mark.parametrize("arch", [80, 90])
def test_the_smallest_bucket_that_fits(
    bindings: ModuleType, op: str, arch: int, dims: tuple[int, int]
) -> None:
    case = CallCase(op=op, head_dim=dims[0], head_dim_v=dims[1])
    rows = {row["name"]: row for row in bindings.kernel_table()}
    chosen = rows[plan(bindings, case, arch)["kernel"]]
    for row in rows.values():
        fits = dims[0] <= row["head_dim"] and dims[1] <= row["head_dim_v"]
        if (row["family"], row["op"]) == (chosen["family"], chosen["op"]) and fits:
            larger = row["head_dim"] + row["head_dim_v"]
            assert larger >= chosen["head_dim"] + chosen["head_dim_v"]
    assert chosen["head_dim"] >= dims[0] and chosen["head_dim_v"] >= dims[1]


# README's table of what runs where: its ops, and the tables of kernels that they go through.
README_OPS = {
    "flash_attn_fwd": {"flash_fwd", "flash_fwd_float32", "flash_fwd_float64"},
    "flash_attn_bwd": {"flash_bwd", "flash_bwd_float32", "flash_bwd_float64"},
    "flash_attn_fp8_fwd": {"flash_fwd_fp8"},
    "paged_attn": {"decode", "flash_fwd", "flash_fwd_float32", "flash_fwd_float64"},
}


@pytest.mark.parametrize("op", README_OPS)
def test_readme_names_the_families_of_an_op(bindings: ModuleType, op: str) -> None:
    lines = (TABLE.parent.parent / "README.md").read_text().splitlines()
    (begin,) = (i for i, line in enumerate(lines) if line.startswith(f"| `{op}`"))
    listed: dict[str, str] = {}  # family -> what it is compiled for
    for line in lines[begin:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if listed and cells[0]:
            break
        listed |= dict.fromkeys(cells[1].split(", "), cells[2])
    rows = [row for row in bindings.kernel_table() if row["op"] in README_OPS[op]]
    assert listed.keys() == {row["family"] for row in rows}
    for row in rows:
        archs = listed[row["family"]]
        assert (archs == "9.0a") == (row["least_arch"] == row["greatest_arch"] == 90)


if __name__ == "__main__":
    TABLE.write_text(table(bindings_module.build()))
