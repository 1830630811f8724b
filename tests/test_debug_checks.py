"""set_debug_checks: values on CUDA are checked as on the CPU, before any kernel uses them.

In the emulator the host reads values as on CUDA, from copies and under the switch only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import EMULATED, Backend
from cases import int32

from sink_attention_ext import ops, set_debug_checks
from sink_attention_ext.cache import checks as cache_checks


@pytest.fixture
def switched_on(backend: Backend) -> Iterator[None]:
    set_debug_checks(True)
    yield
    set_debug_checks(False)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def varlen() -> dict[str, Any]:
    """Sequences of 4 and 2 queries, 5 and 4 keys."""
    arguments = {"q": randn(6, 4, 8), "k": randn(9, 2, 8), "v": randn(9, 2, 8)}
    arguments |= {"cu_seqlens_q": int32([0, 4, 6]), "cu_seqlens_k": int32([0, 5, 9])}
    return arguments | {"max_seqlen_q": 4, "max_seqlen_k": 5}


def paged() -> dict[str, Any]:
    """5 and 7 keys in pages of 4; the columns of the block table are not neighbours of the next
    row's."""
    arguments = {"q": randn(2, 2, 4, 8), "k_cache": randn(6, 4, 2, 8), "v_cache": randn(6, 4, 2, 8)}
    table = int32([[0, 1, 99], [3, 5, 99]])[:, :2]
    return arguments | {"cache_seqlens": int32([5, 7]), "block_table": table}


def packed() -> dict[str, Any]:
    return paged() | {"q": randn(4, 4, 8), "cu_seqlens_q": int32([0, 1, 4]), "max_seqlen_q": 3}


def write() -> dict[str, Any]:
    arguments = {
        "k": randn(3, 2, 8),
        "v": randn(3, 2, 8),
        "slot_mapping": torch.tensor([1, 23, -1]),
    }
    return arguments | {"k_cache": randn(6, 4, 2, 8), "v_cache": randn(6, 4, 2, 8)}


def quantised_write() -> dict[str, Any]:
    caches = {name: torch.zeros(6, 4, 2, 8, dtype=torch.int8) for name in ("k_cache", "v_cache")}
    scales = {name: torch.ones(6, 4, 2) for name in ("k_scale", "v_scale")}
    return write() | caches | scales


ARGUMENTS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "varlen": ("flash_attn_varlen", varlen),
    "paged": ("flash_attn_with_kvcache", paged),
    "packed": ("flash_attn_with_kvcache", packed),
    "write": ("reshape_and_cache", write),
    "quantised write": ("reshape_and_cache", quantised_write),
}
BAD_TABLE = int32([[0, 1, 99], [3, 6, 99]])[:, :2]
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("varlen", {"cu_seqlens_q": int32([1, 2, 6])}, "cu_seqlens_q[0] must be 0; got 1"),
    ("varlen", {"cu_seqlens_q": int32([0, 4, 3])}, "cu_seqlens_q must not fall; got cu_seqlens_q["),
    ("varlen", {"cu_seqlens_q": int32([0, 4, 7])}, "cu_seqlens_q[2] must be at most total_q = 6"),
    ("varlen", {"cu_seqlens_k": int32([0, 5, 10])}, "cu_seqlens_k[2] must be at most total_k = 9"),
    ("varlen", {"max_seqlen_q": 3}, "max_seqlen_q must be at least every sequence's length; got 3"),
    ("varlen", {"max_seqlen_k": 4}, "max_seqlen_k must be at least every sequence's length; got 4"),
    (
        "varlen",
        {"seqused_k": int32([5, 5])},
        "seqused_k[1] must be in [0, 4] (the sequence's keys)",
    ),
    (
        "paged",
        {"cache_seqlens": int32([5, 9])},
        "cache_seqlens[1] must be in [0, 8] (what the cache",
    ),
    ("paged", {"cache_seqlens": int32([-1, 7])}, "cache_seqlens[0] must be in [0, 8]"),
    ("paged", {"block_table": BAD_TABLE}, "block_table[1, 1] must be in [0, 6) (k_cache's pages)"),
    ("packed", {"cu_seqlens_q": int32([0, 2, 1])}, "cu_seqlens_q must not fall"),
    ("packed", {"cu_seqlens_q": int32([0, 1, 5])}, "cu_seqlens_q[2] must be at most total_q = 4"),
    (
        "paged",
        {"tree_mask": torch.tensor([[1, 3], [1, 5]]), "causal": True},
        "tree_mask must have bit 1 set and none above it in the word of draft token 1 of",
    ),
    (
        "packed",
        {"tree_mask": torch.tensor([1, 1, 2, 2]), "causal": True},
        "tree_mask must have bit 2 set and none above it in the word of draft token 2 of",
    ),
    ("packed", {"max_seqlen_q": 2}, "max_seqlen_q must be at least every sequence's length; got 2"),
    (
        "write",
        {"slot_mapping": torch.tensor([1, 24, 2])},
        "slot_mapping[1] must be -1 (skip) or in",
    ),
    (
        "quantised write",
        {"slot_mapping": torch.tensor([1, 24, 2])},
        "slot_mapping[1] must be -1 (skip) or in",
    ),
    (
        "write",
        {"slot_mapping": torch.tensor([1, 2, -2])},
        "slot_mapping[2] must be -1 (skip) or in",
    ),
]


def call(backend: Backend, arguments: dict[str, Any], name: str) -> Any:
    on_device = {
        key: value.to(backend.device) if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }
    result = getattr(backend, ARGUMENTS[name][0])(**on_device)
    for key in ("k_cache", "v_cache", "k_scale", "v_scale"):  # what reshape_and_cache wrote
        if key in arguments:
            arguments[key].copy_(on_device[key])
    return result


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'-'.join(case[1])}")
def test_each_bad_value_is_named(backend: Backend, case: tuple[str, dict[str, Any], str]) -> None:
    name, changes, message = case
    arguments = ARGUMENTS[name][1]() | changes
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(ValueError) as refused:
        call(backend, arguments, name)
    assert message in str(refused.value)
    for key, copy in before.items():
        assert torch.equal(arguments[key], copy), f"{key} was written"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_good_values_give_the_same_bits(backend: Backend, name: str) -> None:
    results = []
    for on in (False, True):
        torch.manual_seed(1)
        arguments = ARGUMENTS[name][1]()
        set_debug_checks(on)
        try:
            results.append(call(backend, arguments, name) or tuple(arguments.values()))
        finally:
            set_debug_checks(False)
    for off, on in zip(*results, strict=True):
        assert off is on or torch.equal(torch.as_tensor(off), torch.as_tensor(on))


@pytest.mark.usefixtures("switched_on")
def test_entries_out_of_sight_may_be_anything(backend: Backend) -> None:
    """Behind the last key, and older than the window."""
    arguments = paged() | {"block_table": int32([[0, -7], [99, 5]]), "causal": True}
    arguments |= {"cache_seqlens": int32([4, 7]), "window_size": (1, 0)}
    out, _ = call(backend, arguments, "paged")
    assert out.isfinite().all()


@pytest.mark.usefixtures("switched_on")
def test_a_backward_checks_too(backend: Backend) -> None:
    """Lengths may have changed since the forward."""
    lengths = int32([0, 4, 6]).to(backend.device)
    arguments = varlen() | {"cu_seqlens_q": lengths}
    q, k, v = (arguments[name].to(backend.device) for name in "qkv")
    out, lse = ops.flash_attn_varlen_fwd(
        q, k, v, lengths, int32([0, 5, 9]).to(q.device), None, None, 4, 5, 1.0, True, -1, 0, 0.0,
        False, 0,
    )  # fmt: skip
    lengths[1] = 7
    with pytest.raises(ValueError, match="cu_seqlens_q must not fall"):
        ops.flash_attn_varlen_bwd(
            out, None, q, k, v, out, lse, lengths, int32([0, 5, 9]).to(q.device), None, None, 4, 5,
            1.0, True, -1, 0, 0.0, False, 0,
        )  # fmt: skip


def test_without_it_slots_out_of_range_are_skipped(backend: Backend) -> None:
    if backend.name == "cpu":
        pytest.skip("the CPU refuses them always")
    arguments = write() | {"slot_mapping": torch.tensor([2**40, 1, -2])}
    before = arguments["k_cache"].clone()
    call(backend, arguments, "write")
    before[0, 1] = arguments["k"][1]
    assert torch.equal(arguments["k_cache"], before)


@contextlib.contextmanager
def capture(backend: Backend) -> Iterator[None]:
    if backend.name in EMULATED:
        torch.ops.sink_attention_emulated.pretend_to_capture(True)
        try:
            yield
        finally:
            torch.ops.sink_attention_emulated.pretend_to_capture(False)
    else:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            yield


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_capture_is_refused(backend: Backend, name: str) -> None:
    if backend.name == "cpu":
        pytest.skip("there are no graphs on the CPU")
    arguments = ARGUMENTS[name][1]()
    arguments = {
        key: value.to(backend.device) if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }
    function = getattr(backend, ARGUMENTS[name][0])
    with capture(backend), pytest.raises(RuntimeError, match=r"set_debug_checks\(False\) before"):
        function(**arguments)
    set_debug_checks(False)
    with capture(backend):
        function(**arguments)


def test_the_switch(backend: Backend) -> None:
    assert ops.debug_checks() is False
    lengths = int32([1]).to(backend.device)
    assert cache_checks.can_read_values(lengths) == (backend.device == "cpu")
    set_debug_checks(True)
    assert ops.debug_checks() is True
    assert cache_checks.can_read_values(lengths)
    set_debug_checks(False)
    assert ops.debug_checks() is False
    with pytest.raises(TypeError, match="on must be True or False; got 1"):
        set_debug_checks(1)
