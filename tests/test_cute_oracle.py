"""Our maps of fragments and tiles, and the emulator's, against NVIDIA's CuTe (tests/cute).

CuTe is headers that the host's compiler can evaluate; they need a CUDA toolkit's, and no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
SUITES = [
    *("cute_mma", "cute_ldmatrix", "cute_fragments", "cute_tiles", "cute_tma"),
    *("cute_wgmma_operands", "cute_wgmma_tiles", "cute_wgmma_fragments"),
]


def cuda_headers() -> list[Path]:
    """The toolkit's headers. nvcc on PATH may be a wrapper script, so nvcc itself is asked."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(f"{home}/bin/nvcc") if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH or in CUDA_HOME: CuTe needs the headers of its toolkit")
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    assert top, dry_run.stderr
    include = Path(top.group(1)).resolve() / "include"
    return [include, include / "cccl"]


def cute_headers() -> Path:
    spec = importlib.util.find_spec("cutlass_library")
    assert spec is not None and spec.submodule_search_locations, (
        "nvidia-cutlass is missing: python tools/install_missing.py test"
    )
    return Path(spec.submodule_search_locations[0]) / "source" / "include"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cute") / "cute_tests"
    emulator = [s for s in (TESTS / "emulator").glob("*.cpp") if not s.stem.startswith("ops_")]
    sources = [*(TESTS / "cute").glob("*.cpp"), TESTS / "cpp" / "main.cpp", *emulator]
    theirs = [*cuda_headers(), cute_headers()]
    ours = [TESTS, CSRC, TESTS / "cpp", TESTS / "emulator" / "unit"]
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-DSA_EMULATE"]
        + [flag for folder in theirs for flag in ("-isystem", str(folder))]
        + [f"-I{folder}" for folder in ours]
        + [*map(str, sources), "-o", str(output)],
        check=True,
    )
    return output


@pytest.mark.parametrize("suite", SUITES)
def test_layouts_are_those_of_cute(program: Path, suite: str) -> None:
    run = subprocess.run([program, suite], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
