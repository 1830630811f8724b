"""Fixtures, and what pytest asks about the test matrix: what runs, and what ran on each backend.

backends.py has the backends, emulated_selection.py which tests the emulated ones run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when torch is loaded. Threads that spin while they wait for each other take the core that the
# awaited one needs: beside other programs the many small tensors here took ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import emulated
import emulated_selection
import pytest
import torch
from backends import BACKENDS, EMULATED, FORCED, NOT_TAKEN, Backend

from sink_attention_ext import ops

TESTS = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = emulated_selection.select(items)
    is_whole = any(Path(config.invocation_params.dir, arg) == TESTS for arg in config.args)
    if is_whole and set(EMULATED) <= BACKENDS.keys():
        without = emulated_selection.marks_without_effect(items, left_out)
        if without:
            raise pytest.UsageError(f"marks that reach no test: {', '.join(without)}")
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


# ---- what a test on a GPU must have run ----

NO_BLOCKS = """no thread block of sm90's kernels ran: they do not take what the test calls.
Use backend.fitting, .fitting_dim and .dtype, or mark it: not_on_sm90(reason) leaves it out there,
no_sm90_blocks(reason) lets it pass."""


def _must_reach_hopper(item: pytest.Function) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return (
        params.get("backend") == "emulated-sm90"
        and BACKENDS["emulated-sm90"].is_hopper
        and item.get_closest_marker("no_sm90_blocks") is None
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A test of what the forced kernels do not take is skipped: it is one of the others'. One on
    the emulated Hopper card that ran none of Hopper's kernels has shown nothing."""
    before = emulated.blocks_run() if _must_reach_hopper(pyfuncitem) else None
    try:
        result = yield
    except RuntimeError as error:
        if FORCED and NOT_TAKEN in str(error):
            pytest.skip(f"{FORCED} is forced, and has no kernels for this")
        raise
    if before is not None and not (emulated.blocks_run() - before)["sm90"]:
        pytest.fail(NO_BLOCKS, pytrace=False)
    return result


_ran: Counter[str] = Counter()  # passed tests on each backend
_blocks: Counter[str] = Counter()  # the emulator's thread blocks of each family of kernels


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called where results are collected, also when other processes run the tests."""
    if report.when == "teardown" and report.passed:
        properties = dict(report.user_properties)
        _ran.update([properties["backend"]] if "backend" in properties else [])
        _blocks.update(properties.get("thread blocks", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _ran:
        parts = [f"{count} on {name}" for name, count in sorted(_ran.items())]
        terminalreporter.write_line(f"tests of the matrix: {', '.join(parts)}")
    if _blocks:
        counts = ", ".join(f"{_blocks[family]} ({family})" for family in emulated.FAMILIES)
        terminalreporter.write_line(
            f"thread blocks run by the emulator: {counts}, {_blocks['common']} (others)"
        )


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = BACKENDS[request.param]
    is_emulated = backend.name in EMULATED
    before = emulated.blocks_run() if is_emulated else Counter()
    with backend.use():
        yield backend
    request.node.user_properties.append(("backend", backend.name))
    if is_emulated:
        blocks = emulated.blocks_run() - before
        request.node.user_properties.append(("thread blocks", dict(blocks)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def set_instruction_set() -> Iterator[Callable[[str], None]]:
    """ops.set_cpu_instruction_set for the length of a test."""
    before = ops.cpu_instruction_set()
    yield ops.set_cpu_instruction_set
    ops.set_cpu_instruction_set(before)
