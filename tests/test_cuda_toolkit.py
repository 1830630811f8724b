"""What the build makes of a machine's toolkit, driver, cards and wishes; none of them is needed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("cuda_toolkit", ROOT / "tools/cuda_toolkit.py")
cuda_toolkit: ModuleType = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_toolkit)

NVCC = """#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
    --list-gpu-arch) printf '{archs}\\n' ;;
    --dryrun) echo "#\\$ TOP=$(dirname "$0")/.." >&2 ;;
esac
"""


def make_toolkit(root: Path, version: str = "13.0", archs: str = "80 90 100 120") -> Path:
    """A folder with an nvcc that answers questions."""
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    listed = "\\n".join(f"compute_{arch}" for arch in archs.split())
    nvcc.write_text(NVCC.format(version=version, archs=listed))
    nvcc.chmod(0o755)
    return root


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """One without toolkit, driver and card, whatever this one has."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(cuda_toolkit, "PLACE", tmp_path / "nothing")
    monkeypatch.setattr(cuda_toolkit, "driver_version", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return monkeypatch


def set_cards(machine: pytest.MonkeyPatch, *cards: tuple[int, int]) -> None:
    machine.setattr("torch.cuda.is_available", lambda: bool(cards))
    machine.setattr("torch.cuda.device_count", lambda: len(cards))
    machine.setattr("torch.cuda.get_device_capability", lambda index: cards[index])


# ---- where it is ----


def test_the_toolkit_is_found(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if os.path.exists("/usr/bin/nvcc"):
        pytest.skip("this system's nvcc is always on PATH")
    assert cuda_toolkit.nvcc_root() is None
    machine.setattr(cuda_toolkit, "PLACE", make_toolkit(tmp_path / "usual"))
    assert cuda_toolkit.nvcc_root() == tmp_path / "usual"
    on_path = make_toolkit(tmp_path / "on-path")
    machine.setenv("PATH", f"{on_path / 'bin'}:/usr/bin:/bin")
    assert cuda_toolkit.nvcc_root() == on_path
    machine.setenv(
        "CUDA_HOME", str(tmp_path / "empty")
    )  # left there by an image: no reason to fail
    assert cuda_toolkit.nvcc_root() == on_path
    machine.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "home")))
    assert cuda_toolkit.nvcc_root() == tmp_path / "home"


@pytest.mark.parametrize("folder", ["lib64", "lib", "targets/x86_64-linux/lib"])
def test_the_runtime_is_found(tmp_path: Path, folder: str) -> None:
    """A system's toolkit, pip's and conda's have it in different folders."""
    for other in ("lib64", "lib"):
        (tmp_path / other).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / "libcudart_static.a").touch()
    flags = cuda_toolkit.runtime_flags(tmp_path)
    assert flags[:2] == [f"-L{tmp_path / folder}", "-lcudart_static"]


def test_nvcc_takes_the_host_compiler_asked_for(machine: pytest.MonkeyPatch) -> None:
    assert cuda_toolkit.nvcc_host_flags() == []
    machine.setenv("CXX", "g++-13")
    assert cuda_toolkit.nvcc_host_flags() == ["-ccbin", "g++-13"]
    machine.setenv("CXX", "ccache g++")  # a command, not a compiler
    assert cuda_toolkit.nvcc_host_flags() == []


@pytest.mark.parametrize(
    ("nvcc", "driver", "of_torch", "doubt"),
    [
        ("13.0", (12, 4), "13.0", "driver runs CUDA up to 12.4"),
        ("13.0", None, "12.6", "torch is built for CUDA 12.6"),
        ("13.0", (13, 1), "12.6", None),  # the driver takes both
        ("12.4", None, "13.0", None),
        ("12.8", (12, 4), "12.6", None),  # within a major version
        ("13.0", None, "13.2", None),
    ],
)
def test_a_library_that_would_not_run_is_announced(
    machine: pytest.MonkeyPatch,
    tmp_path: Path,
    nvcc: str,
    driver: tuple[int, int] | None,
    of_torch: str,
    doubt: str | None,
) -> None:
    machine.setattr(cuda_toolkit, "driver_version", lambda: driver)
    machine.setattr(torch.version, "cuda", of_torch)
    said = cuda_toolkit.why_it_may_not_run(make_toolkit(tmp_path, nvcc))
    assert said is None if doubt is None else doubt in said


# ---- what is built for ----


@pytest.mark.parametrize(
    ("asked", "cards", "archs"),
    [
        ("", [], "8.0 9.0+PTX 12.0"),
        ("", [(9, 0), (8, 6), (9, 0)], "8.6 9.0"),
        ("", [(7, 5)], "8.0 9.0+PTX 12.0"),  # no kernel runs on it
        ("8.9", [(9, 0)], "8.9"),
        ("8.0; 9.0", [], "8.0 9.0"),
        ("8.0,9.0a+PTX", [], "8.0 9.0a+PTX"),
        ("5.2 6.0 7.5 8.0 8.6+PTX", [], "8.0 8.6+PTX"),  # as an image sets it for all it has
    ],
)
def test_kernels_are_built_for_what_is_asked_or_found(
    machine: pytest.MonkeyPatch,
    tmp_path: Path,
    asked: str,
    cards: list[tuple[int, int]],
    archs: str,
) -> None:
    machine.setenv("TORCH_CUDA_ARCH_LIST", asked)
    set_cards(machine, *cards)
    assert cuda_toolkit.choose_archs(make_toolkit(tmp_path)) == archs.split()


def test_an_older_nvcc_builds_for_what_it_knows(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = make_toolkit(tmp_path, "12.6", "70 75 80 86 89 90")
    assert cuda_toolkit.choose_archs(root) == ["8.0", "9.0+PTX"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("sm_80", "'sm_80' is not of the form 8.0"),
        ("Ampere", "'Ampere' is not of the form 8.0"),
        ("6.1;7.5", "the kernels need 8.0 or later"),
    ],
)
def test_other_lists_are_refused(machine: pytest.MonkeyPatch, asked: str, message: str) -> None:
    machine.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(SystemExit, match=message):
        cuda_toolkit.asked_archs()


def test_architectures_become_flags() -> None:
    assert cuda_toolkit.gencode_flags(["8.0", "9.0a+PTX"])[1::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90a,code=compute_90a",
    ]
