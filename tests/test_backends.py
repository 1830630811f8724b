"""Backends (backends.py): cases that fit Hopper's kernels, and tests that miss them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import backends
import conftest
import emulated
import emulated_selection
import pytest
import torch
from backends import BACKENDS, Backend
from cases import FLOAT_DTYPES, HALF_DTYPES, DenseCase, PagedCase

ROOT = Path(__file__).resolve().parent.parent
HALF = torch.bfloat16
needs_emulator = pytest.mark.skipif("emulated-sm90" not in BACKENDS, reason="make emulator")

DENSE = DenseCase(seqlen_q=5, seqlen_k=9, head_dim=12, head_dim_v=20, dtype=HALF)
DECODE = PagedCase(seqlens_q=(1,), seqlens_k=(9,), head_dim=24, dtype=HALF)


@contextmanager
def a_card(arch: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The backend of a real card, as far as choosing kernels goes; the emulator has the dispatch of
    a build with CUDA."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: divmod(arch, 10))
    with emulated.emulated(arch=arch):
        yield backends._backend("cuda", "cuda")


@needs_emulator
def test_what_fits_a_hopper_card(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_card(90, monkeypatch) as card:
        assert card.is_hopper and (card.dtype, card.dtypes) == (HALF, HALF_DTYPES)
        for backend in (card, BACKENDS["emulated-sm90"]):
            fitted = backend.fitting(DENSE)
            assert fitted == replace(DENSE, head_dim=48, head_dim_v=56)
            assert backend.hopper_takes(fitted) and not backend.hopper_takes(DENSE)
            assert backend.fitting(fitted) is fitted  # it is taken
            assert backend.fitting_dim(12) == 48 and backend.fitting_dim(64) == 64
            assert backend.fitting(DECODE) is DECODE  # small ones are taken there
            for change in ({"float8": "one"}, {}):
                stored = None if change else torch.int8
                narrow = backend.fitting(replace(DECODE, **change), stored)
                assert narrow.head_dim == 64, change
                assert backend.hopper_takes(narrow, stored)
            single = replace(DENSE, dtype=torch.float32)
            assert backend.fitting(single) is single and not backend.hopper_takes(single)


@needs_emulator
@pytest.mark.parametrize(("arch", "forced"), [(80, None), (120, None), (90, "sm80")])
def test_other_kernels_get_small_cases(
    arch: int, forced: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "FORCED", forced)
    with a_card(arch, monkeypatch) as card:
        assert card.fitting(DENSE) is DENSE and card.fitting_dim(12) == 12
        assert (card.dtype, card.dtypes) == (torch.float32, FLOAT_DTYPES)
        assert not card.hopper_takes(replace(DENSE, head_dim=64))


def test_the_cpu_is_no_card() -> None:
    for name in {"cpu", "emulated-sm80"} & BACKENDS.keys():
        backend = BACKENDS[name]
        assert not backend.is_hopper and backend.fitting(DENSE) is DENSE
        assert backend.arch == {"cpu": 0, "emulated-sm80": 80}[name]


MISSING = """
import pytest
import torch

pytestmark = pytest.mark.sm90

def call(backend, head_dim, dtype):
    x = torch.randn(1, 5, 1, head_dim, dtype=dtype)
    backend.flash_attn(x, x, x)

def test_fits(backend):
    call(backend, backend.fitting_dim(16), backend.dtype)

def test_misses(backend):
    call(backend, 16, torch.bfloat16)

@pytest.mark.no_sm90_blocks("it is allowed to")
def test_may_miss(backend):
    call(backend, 16, torch.bfloat16)

@pytest.mark.not_on_sm90("it is left out")
def test_of_others(backend):
    call(backend, 16, torch.float32)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_two_types(backend, dtype):
    call(backend, 64, dtype)
"""


@needs_emulator
def test_a_test_that_misses_hoppers_kernels_fails(tmp_path: Path) -> None:
    """In the processes that pytest-xdist starts, too."""
    (tmp_path / "test_dense.py").write_text(MISSING)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-p", "conftest"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {"PYTHONPATH": path, "SINK_ATTENTION_CUDA_KERNELS": ""}
    done = subprocess.run(
        [*command, "-n", "2", "-k", "emulated", "test_dense.py"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | environment,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    outcomes = [line for line in lines if line.startswith(("PASSED ", "FAILED "))]
    assert len(outcomes) == 6 + 4, done.stdout  # of sm80, of sm90
    (failed,) = (line for line in outcomes if line.startswith("FAILED "))
    assert "test_misses[emulated-sm90]" in failed
    assert conftest.NO_BLOCKS.splitlines()[0] in done.stdout


class Item:
    """What a mark's check asks of a collected test."""

    def __init__(self, file: str, name: str, backend: str, *marks: str) -> None:
        self.path, self.originalname, self.marks = Path(file), name, marks
        self.callspec = SimpleNamespace(params={"backend": backend})

    def get_closest_marker(self, name: str) -> bool:
        return name in self.marks


def test_a_mark_that_reaches_nothing_is_found() -> None:
    """A file marked sm90 without a test there, and a slow_when_emulated test without a backend."""
    left_out = Item("test_b.py", "test_y", "emulated-sm90", "sm90")
    items = [
        Item("test_a.py", "test_x", "emulated-sm90", "sm90"),
        left_out,
        Item("test_b.py", "test_y", "emulated-sm80", "sm90"),
        Item("test_c.py", "test_z", "cpu", "slow_when_emulated"),
        Item("test_c.py", "test_w", "emulated-sm80", "slow_when_emulated"),
    ]
    found = emulated_selection.marks_without_effect(items, {left_out})
    assert found == ["sm90 of test_b.py", "slow_when_emulated of test_c.py::test_z"]
    assert emulated_selection.marks_without_effect(items, set()) == found[1:]
