"""The backends that the grid runs on, and seeds.

Tests take `backend` and call the library through it, so that the same grid runs over every backend
that this machine has: the CPU, the CUDA kernels in the emulator (`make emulator`), and a GPU
where both the build and the machine have one. How many tests ran on each is printed at the end.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Read when torch is loaded. Threads that spin while they wait for each other take the core that the
# awaited one needs: beside other programs the many small tensors here took ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import cases
import emulated
import pytest
import torch

import sink_attention_ext
from sink_attention_ext import ops

EMULATED = "emulated-sm80"


@dataclass(frozen=True)
class Backend:
    """The public functions on one device; attention always returns (out, lse)."""

    name: str
    device: str
    use: Callable[[], contextlib.AbstractContextManager]  # while a test runs on it
    flash_attn: Callable[..., Any]
    flash_attn_varlen: Callable[..., Any]
    flash_attn_with_kvcache: Callable[..., Any]
    reshape_and_cache: Callable[..., Any]
    merge_attn_states: Callable[..., Any]


def _backend(name: str, device: str, use: Callable = contextlib.nullcontext) -> Backend:
    return Backend(
        name,
        device,
        use,
        functools.partial(sink_attention_ext.flash_attn_func, return_lse=True),
        functools.partial(sink_attention_ext.flash_attn_varlen_func, return_lse=True),
        functools.partial(sink_attention_ext.flash_attn_with_kvcache, return_lse=True),
        sink_attention_ext.reshape_and_cache,
        sink_attention_ext.merge_attn_states,
    )


def _available_backends() -> dict[str, Backend]:
    backends = {}
    if "cpu" in ops.BACKENDS:
        backends["cpu"] = _backend("cpu", "cpu")
    if emulated.load():
        backends[EMULATED] = _backend(EMULATED, "cpu", emulated.emulated)
    if "cuda" in ops.BACKENDS and torch.cuda.is_available():
        backends["cuda"] = _backend("cuda", "cuda")
    return backends


BACKENDS = _available_backends()


# ---- which of the grid's tests run on which backend ----

# What one emulated test may multiply, in the products of its forward. The emulator does about 1e9
# multiplications a second; the backward takes 2.5 times the forward's.
EMULATED_PRODUCTS = 1.5e7
EMULATED_PRODUCTS_SLOW = 4e8


def _products(case: cases.AttentionCase) -> float:
    """Multiplications of Q K^T and P V, as if every query saw every key."""
    if isinstance(case, cases.DenseCase):
        pairs = case.batch * case.seqlen_q * case.seqlen_k
    else:
        pairs = sum(q * k for q, k in zip(case.seqlens_q, case.seqlens_k, strict=True))
    return pairs * case.num_heads_q * (case.head_dim + case.dim_v)


def _runs(params: dict[str, Any], slow: bool) -> bool:
    """Whether a test runs on its backend: the emulator is slow."""
    if params["backend"] == "cpu":
        return True
    case = params.get("case")
    if params["backend"] == EMULATED and isinstance(case, cases.AttentionCase):
        return _products(case) <= (EMULATED_PRODUCTS_SLOW if slow else EMULATED_PRODUCTS)
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = set()
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        slow = item.get_closest_marker("slow") is not None
        if params.get("backend") in BACKENDS and not _runs(params, slow):
            left_out.add(item)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


_ran: Counter[str] = Counter()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _ran:
        parts = [f"{count} on {name}" for name, count in sorted(_ran.items())]
        terminalreporter.write_line(f"tests of the grid: {', '.join(parts)}")
    if EMULATED in _ran:
        terminalreporter.write_line(f"thread blocks run by the emulator: {emulated.blocks_run()}")


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = BACKENDS[request.param]
    with backend.use():
        yield backend
    _ran[backend.name] += 1


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
