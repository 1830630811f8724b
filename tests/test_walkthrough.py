"""csrc/README.md's "add head_dim 160", done on a copy of the tree, to the letter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from kernel_cases import CallCase

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "build" / "emulator"
CASE = CallCase(head_dim=160, head_dim_v=160)


class Step(NamedTuple):
    path: str  # the last that the text before the block names
    kind: str  # diff: lines to add to a file; cpp: a new file
    block: str


def steps(readme: str) -> Iterator[Step]:
    section = readme.partition("## How to add")[2].partition("\nNothing else names a bucket")[0]
    for match in re.finditer(r"^```(diff|cpp)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        paths = re.findall(r"`(csrc/[\w/]+\.\w+)`", section[: match.start()])
        yield Step(paths[-1], match[1], match[2])


def apply(root: Path, step: Step) -> None:
    path = root / step.path
    if step.kind == "cpp":
        assert not path.exists(), f"{step.path} is there already"
        path.write_text(step.block)
        return
    lines = step.block.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] == " ")
    after = "".join(line[1:] for line in lines)
    text = path.read_text()
    assert text.count(before) == 1, f"{step.path} holds this {text.count(before)} times:\n{before}"
    path.write_text(text.replace(before, after))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree with the new bucket; only what differs is rebuilt in it."""
    root = tmp_path_factory.mktemp("walkthrough")
    for name in ("csrc", "tools", "tests", "build/bindings"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, root / name)
    shutil.copy2(ROOT / "setup.py", root)
    for step in steps((ROOT / "csrc" / "README.md").read_text()):
        apply(root, step)
    return root


def test_the_walk_has_all_of_its_steps() -> None:
    kinds = [step.kind for step in steps((ROOT / "csrc" / "README.md").read_text())]
    assert kinds == ["diff", "diff", "diff", "cpp", "diff", "diff", "cpp"]


DECODE = CASE._replace(paged=True, seqlen_q=1)
CHOICES = [  # a call, a card, its kernel before and after
    (CASE, 80, "sm80::flash_fwd_hdim192", "sm80::flash_fwd_hdim160"),
    (CASE, 90, "sm90::flash_fwd_hdim192", "sm90::flash_fwd_hdim160"),
    (CASE, 120, "sm80::flash_fwd_hdim192", "sm80::flash_fwd_hdim160"),
    (DECODE, 80, "sm80::decode_hdim192", "sm80::decode_hdim160"),
    (CASE._replace(head_dim=136), 80, "sm80::flash_fwd_hdim192", "sm80::flash_fwd_hdim160"),
    (CASE._replace(head_dim=168), 80, "sm80::flash_fwd_hdim192", "sm80::flash_fwd_hdim192"),
    (CallCase(), 80, "sm80::flash_fwd_hdim64", "sm80::flash_fwd_hdim64"),
]


def kernels(root: Path) -> list[str]:
    """Of CHOICES, by the tree's bindings; in a process of their own, which holds one module."""
    code = """if True:
        import bindings_module, test_walkthrough as walk
        bindings = bindings_module.build()
        for case, arch, *_ in walk.CHOICES:
            print(bindings.plan(case.op, case.shape(bindings), arch=arch)["kernel"])
    """
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_new_bucket_is_chosen(copy: Path) -> None:
    assert kernels(ROOT) == [before for _, _, before, _ in CHOICES]
    assert kernels(copy) == [after for *_, after in CHOICES]


@pytest.mark.slow
@pytest.mark.skipif(not (EMULATOR / "_emulated.so").exists(), reason="make emulator")
def test_the_new_kernels_are_right(copy: Path, tmp_path: Path) -> None:
    """Compiled for the emulator, whose other parts are built already, and run against the
    reference."""
    tests = copy / "tests"
    ninja = (EMULATOR / "build.ninja").read_text()
    sources = [
        *sorted((copy / "csrc/cuda").rglob("*hdim160.cu")),
        *sorted((copy / "csrc/cuda").rglob("*.cpp")),
        *(tests / "cpp" / f"{name}.cpp" for name in ("main", "scenario", "reference")),
        tests / "walkthrough" / "test_new_bucket.cpp",
    ]
    flags = ["-std=c++20", "-O1", "-DSA_EMULATE"]
    flags += [f"-I{folder}" for folder in (copy / "csrc", tests, tests / "cpp")]
    objects = []
    for source in sources:
        objects.append(str(tmp_path / f"{len(objects)}.o"))
        command = ["g++", *flags, "-x", "c++", "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    link = re.search(r"^build _emulated.so: link (.*)$", ninja, re.MULTILINE)[1].split()
    objects += [
        str(EMULATOR / name)
        for name in link
        if (name.startswith("tests/") and "ops_" not in name) or name.endswith("/combine.o")
    ]
    program = tmp_path / "new_bucket"
    subprocess.run(["g++", *objects, "-lpthread", "-o", str(program)], check=True)
    done = subprocess.run([str(program), "new_bucket"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
