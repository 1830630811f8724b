"""torch.use_deterministic_algorithms(True) acts like deterministic=True, compiled or not.

It counts when the backward runs, for every function and for the operators themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import cases
import oracle
import pytest
import torch
from backends import Backend
from cases import int32
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from sink_attention_ext import ops


@contextlib.contextmanager
def deterministic_algorithms(on: bool = True) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Spy(TorchDispatchMode):
    """What the backward operators are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (ops.flash_attn_bwd, ops.flash_attn_varlen_bwd):
            self.asked.append(args[-2])
        return func(*args, **(kwargs or {}))


def dense(backend: Backend, **options: bool) -> Tensor:
    q, k, v = (torch.randn(1, 5, 2, 16, requires_grad=True) for _ in range(3))
    return backend.flash_attn(q, k, v, causal=True, **options)[0].sum()


def packed(backend: Backend, **options: bool) -> Tensor:
    q, k, v = (torch.randn(5, 2, 16, requires_grad=True) for _ in range(3))
    ends = int32([0, 2, 5])
    return backend.flash_attn_varlen(q, k, v, ends, ends, 3, 3, causal=True, **options)[0].sum()


def operator(backend: Backend) -> Tensor:
    q, k, v = (torch.randn(1, 5, 2, 16, requires_grad=True) for _ in range(3))
    return ops.flash_attn_fwd(q, k, v, None, 0.25, True, -1, 0, 0.0, False, 0)[0].sum()


@pytest.mark.parametrize("attend", [dense, packed, operator])
def test_the_backward_is_asked_for_it(
    backend: Backend, attend: Callable[[Backend], Tensor]
) -> None:
    asked = []
    for at_forward, at_backward in ((False, False), (True, True), (False, True), (True, False)):
        with deterministic_algorithms(at_forward):
            loss = attend(backend)
        with deterministic_algorithms(at_backward), Spy() as spy:
            loss.backward()
        asked += spy.asked
    assert asked == [False, True, True, False]


@pytest.mark.parametrize("attend", [dense, packed])
def test_the_argument_counts_without_it(backend: Backend, attend: Callable[..., Tensor]) -> None:
    loss = attend(backend, deterministic=True)
    with Spy() as spy:
        loss.backward()
    assert spy.asked == [True]


def test_it_only_warns_when_asked_to(backend: Backend) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        loss = dense(backend)
        with Spy() as spy:
            loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert spy.asked == [True]


def test_the_same_bits_as_the_argument_gives(backend: Backend) -> None:
    """Of a gradient that several blocks of keys add to."""
    case = cases.DenseCase(
        seqlen_q=40, seqlen_k=300, num_heads_q=2, num_heads_kv=1, head_dim=40, causal=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    inputs = cases.make_dense(case, backend.device)
    expected = oracle.run(backend.flash_attn, inputs, case.options() | {"deterministic": True})
    with deterministic_algorithms():
        actual = oracle.run(backend.flash_attn, inputs, case.options())
    for name, tensor in expected.items().items():
        assert torch.equal(getattr(actual, name), tensor), name


def test_compiled(backend: Backend) -> None:
    """Without a graph break, and again where it was switched."""
    if backend.name != "cpu":
        pytest.skip("what is compiled does not depend on the backend")
    asked: list[bool] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        asked.extend(
            node.args[-2] for node in graph.graph.nodes if node.target == ops.flash_attn_bwd
        )
        return graph

    def loss(q: Tensor) -> Tensor:
        return backend.flash_attn(q, q, q, causal=True)[0].sum()

    compiled = torch.compile(loss, backend=aot_autograd(fw_compiler=note), fullgraph=True)
    for on in (False, True):
        with deterministic_algorithms(on):
            compiled(torch.randn(1, 5, 2, 16, requires_grad=True)).backward()
    assert asked == [False, True]
