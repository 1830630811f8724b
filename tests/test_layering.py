"""The rules of the tree (csrc/README.md), held by reading it.

Each rule is a function from a tree's root to its violations. It runs on this tree, and on a small
tree with one violation, which it must find.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CXX_SUFFIXES = {".cpp", ".h", ".inc", ".cu", ".cuh"}
MAX_LINES = 500

# What a file of a folder may include: an include points to the right in
# torch -> params -> cpu:: or cuda:: entry -> launch -> kernel -> tile -> device -> primitives.
MAY_INCLUDE = {
    "torch": ["torch/", "cpu/backend.h", "cuda/backend.h", "attention/"],
    "cpu": ["cpu/", "attention/"],
    "cpu/simd": ["cpu/simd/", "attention/"],
    "cuda": ["cuda/", "attention/", "primitives/"],
    "cuda/kernels": [
        *("cuda/kernels/", "cuda/tile/", "cuda/device/", "attention/", "primitives/"),
        *("cuda/backend.h", "cuda/bounded.h", "cuda/call_shape.h"),
    ],
    "cuda/tile": ["cuda/tile/", "cuda/device/", "attention/", "primitives/"],
    "cuda/device": ["cuda/device/", "attention/", "primitives/"],
    "attention": ["attention/"],
    "primitives": ["primitives/", "attention/host_device.h", "attention/numeric.h"],
    # The emulation of the instructions is of the emulated GPU, which is test equipment.
    "primitives/host": ["primitives/", "attention/numeric.h", "emulator/machine.h"],
}
# Where an include is searched for.
INCLUDE_FOLDERS = {"emulator": "tests"}
TORCH_NAMES = re.compile(r"#\s*include\s*<(torch|ATen|c10)/|\b(torch|at|c10)::")
HARDWARE_NAMES = re.compile(
    r"\b(asm|__asm__|threadIdx|blockIdx|blockDim|gridDim|__syncthreads|__syncwarp|__shfl\w*)\b"
)


def cxx_files(root: Path) -> Iterator[tuple[Path, str]]:
    """Each source file's path within csrc and its text without comments."""
    csrc = root / "csrc"
    for path in sorted(csrc.rglob("*")):
        if path.suffix in CXX_SUFFIXES:
            text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
            yield path.relative_to(csrc), re.sub(r"//[^\n]*", "", text)


def layer_of(path: Path) -> str:
    """The longest folder of MAY_INCLUDE that holds the file."""
    return max((layer for layer in MAY_INCLUDE if path.is_relative_to(layer)), key=len, default="")


def includes_to_the_left(root: Path) -> list[str]:
    found = []
    for path, text in cxx_files(root):
        allowed = MAY_INCLUDE.get(layer_of(path))
        if allowed is None:
            found.append(f"{path}: in no layer")
            continue
        for include in re.findall(r'#\s*include\s*"([^"]+)"', text):
            if not include.startswith(tuple(allowed)):
                found.append(f"{path} includes {include}; {layer_of(path)} may include {allowed}")
    return found


def missing_includes(root: Path) -> list[str]:
    return [
        f"{path} includes {include}, which is not there"
        for path, text in cxx_files(root)
        for include in re.findall(r'#\s*include\s*"([^"]+)"', text)
        if not (root / INCLUDE_FOLDERS.get(include.split("/")[0], "csrc") / include).exists()
    ]


def torch_outside_its_folder(root: Path) -> list[str]:
    return [
        f"{path}: {match.group()}"
        for path, text in cxx_files(root)
        if not path.is_relative_to("torch")
        for match in TORCH_NAMES.finditer(text)
    ]


def hardware_outside_ptx(root: Path) -> list[str]:
    return [
        f"{path}: {match.group()}"
        for path, text in cxx_files(root)
        if not path.is_relative_to("primitives/ptx")
        for match in HARDWARE_NAMES.finditer(text)
    ]


def primitives_without_a_part(root: Path) -> list[str]:
    """Each primitive is a contract x.h, the instruction ptx/x.h, and its emulation host/x.h."""
    folder = root / "csrc" / "primitives"
    parts = {"": "contract", "ptx": "instruction", "host": "emulation"}
    names = {part: {path.name for path in (folder / part).glob("*.h")} for part in parts}
    return [
        f"primitives/{name} has no {parts[part]}, {folder.relative_to(root) / part / name}"
        for name in sorted(set().union(*names.values()))
        for part in parts
        if name not in names[part]
    ]


def long_files(root: Path) -> list[str]:
    found = []
    for folder in ("csrc", "sink_attention_ext", "tests", "benchmarks", "examples", "tools"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in CXX_SUFFIXES | {".py"}:
                lines = len(path.read_text().splitlines())
                if lines > MAX_LINES:
                    found.append(f"{path.relative_to(root)}: {lines} lines")
    return found


Rule = Callable[[Path], list[str]]
RULES_AND_VIOLATIONS: list[tuple[Rule, str, str]] = [
    (includes_to_the_left, "csrc/attention/mask.h", '#include "cpu/backend.h"\n'),
    (includes_to_the_left, "csrc/cpu/simd/pack.h", '#include "cpu/parallel.h"\n'),
    (includes_to_the_left, "csrc/torch/ops_cpu.cpp", '#include "cpu/instruction_set.h"\n'),
    (includes_to_the_left, "csrc/new_folder/file.cpp", "int x;\n"),
    (missing_includes, "csrc/cpu/flash_fwd.cpp", '#include "cpu/gone.h"\n'),
    (torch_outside_its_folder, "csrc/cpu/flash_fwd.cpp", "#include <ATen/ATen.h>\n"),
    (torch_outside_its_folder, "csrc/attention/mask.h", "at::Tensor mask;\n"),
    (includes_to_the_left, "csrc/primitives/mma.h", '#include "emulator/machine.h"\n'),
    (includes_to_the_left, "csrc/primitives/ptx/mma.h", '#include "emulator/machine.h"\n'),
    (missing_includes, "csrc/primitives/host/mma.h", '#include "emulator/machine.h"\n'),
    (hardware_outside_ptx, "csrc/cuda/sm80/flash_fwd/kernel.cuh", "int i = threadIdx.x;\n"),
    (hardware_outside_ptx, "csrc/cuda/tile/gemm.cuh", 'asm volatile("");\n'),
    (hardware_outside_ptx, "csrc/primitives/mma.h", 'asm volatile("");\n'),
    (hardware_outside_ptx, "csrc/primitives/host/mma.h", "__syncthreads();\n"),
    (long_files, "tests/test_long.py", "\n" * (MAX_LINES + 1)),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in RULES_AND_VIOLATIONS))
RULES.append(primitives_without_a_part)


@pytest.mark.parametrize("left_out", ["", "ptx", "host"])
def test_each_part_of_a_primitive_is_missed(left_out: str, tmp_path: Path) -> None:
    folder = tmp_path / "csrc" / "primitives"
    for part in ("", "ptx", "host"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "mma.h").write_text("")
    assert primitives_without_a_part(tmp_path) == []
    (folder / left_out / "mma.h").unlink()
    assert len(primitives_without_a_part(tmp_path)) == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree_obeys(rule: Rule) -> None:
    assert sum(1 for _ in cxx_files(ROOT)) > 20, "the tree was not read"
    assert rule(ROOT) == []


@pytest.mark.parametrize(
    ("rule", "file", "text"),
    RULES_AND_VIOLATIONS,
    ids=[f"{rule.__name__}-{file.split('/')[-1]}" for rule, file, _ in RULES_AND_VIOLATIONS],
)
def test_rule_finds_a_violation(rule: Rule, file: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert len(rule(tmp_path)) == 1


def test_comments_break_no_rule(tmp_path: Path) -> None:
    path = tmp_path / "csrc/attention/mask.h"
    path.parent.mkdir(parents=True)
    path.write_text("// at::Tensor and threadIdx are not used here\n/* nor\n   asm */\n")
    assert torch_outside_its_folder(tmp_path) == []
    assert hardware_outside_ptx(tmp_path) == []
