"""The backends that the grid runs on, and seeds.

Tests take `backend` and call the library through it, so that the same grid runs over every backend
that this machine has: the CPU, and a GPU where both the build and the machine have one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Read when torch is loaded. Threads that spin while they wait for each other take the core that the
# awaited one needs: beside other programs the many small tensors here took ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import sink_attention_ext
from sink_attention_ext import ops


@dataclass(frozen=True)
class Backend:
    """The public functions on one device; attention always returns (out, lse)."""

    name: str
    device: str
    flash_attn: Callable[..., Any]
    flash_attn_varlen: Callable[..., Any]
    flash_attn_with_kvcache: Callable[..., Any]
    reshape_and_cache: Callable[..., Any]
    merge_attn_states: Callable[..., Any]


def _backend(name: str, device: str) -> Backend:
    return Backend(
        name,
        device,
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
    if "cuda" in ops.BACKENDS and torch.cuda.is_available():
        backends["cuda"] = _backend("cuda", "cuda")
    return backends


BACKENDS = _available_backends()


@pytest.fixture(params=sorted(BACKENDS), scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


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
