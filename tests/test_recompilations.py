"""Numbers that change from call to call recompile no more than torch's own operators' do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from sink_attention_ext import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Q = torch.randn(1, 6, 4, 8)
CACHE = torch.randn(2, 1, 16, 4, 8)
ENDS = torch.tensor([0, 6], dtype=torch.int32)
INTEGERS, FLOATS = (3, 4, 5, 7), (0.1, 0.2, 0.3, 0.4)

Function = Callable[[Tensor, Any], Tensor]
INTEGER: dict[str, Function] = {
    "window": lambda q, n: flash_attn_func(q, q, q, window_size=(n, 0)),
    "right": lambda q, n: flash_attn_func(q, q, q, window_size=(2, n)),
    "sink tokens": lambda q, n: flash_attn_func(q, q, q, window_size=(2, 0), num_sink_tokens=n),
    "varlen window": lambda q, n: flash_attn_varlen_func(
        q[0], q[0], q[0], ENDS, ENDS, 6, 6, window_size=(n, 0)
    ),
    "max_seqlen": lambda q, n: flash_attn_varlen_func(q[0], q[0], q[0], ENDS, ENDS, n + 6, n + 7),
    "num_splits": lambda q, n: flash_attn_with_kvcache(q, *CACHE, num_splits=n),
    "window of a cache": lambda q, n: flash_attn_with_kvcache(
        q, *CACHE, causal=True, window_size=(n, 0)
    ),
}
FLOAT: dict[str, Function] = {
    "softmax_scale": lambda q, x: flash_attn_func(q, q, q, softmax_scale=x),
    "softcap": lambda q, x: flash_attn_func(q, q, q, softcap=x),
    "scale of a cache": lambda q, x: flash_attn_with_kvcache(q, *CACHE, softmax_scale=x),
}


def compilations(function: Function, values: tuple[Any, ...], dynamic: bool | None) -> int:
    """How many graphs a function of q and a number takes; its results are right."""
    torch._dynamo.reset()
    count = 0

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    call = torch.compile(
        function, backend=aot_autograd(fw_compiler=compiler), fullgraph=True, dynamic=dynamic
    )
    for value in values:
        torch.testing.assert_close(call(Q, value), function(Q, value))
    return count


@pytest.mark.parametrize("dynamic", [None, True])
def test_integers(dynamic: bool | None) -> None:
    torch_takes = compilations(lambda q, n: torch.roll(q, n, 1), INTEGERS, dynamic)
    assert torch_takes == (1 if dynamic else 2)
    for name, function in INTEGER.items():
        assert compilations(function, INTEGERS, dynamic) <= torch_takes, name


@pytest.mark.parametrize("dynamic", [None, True])
def test_floats(dynamic: bool | None) -> None:
    torch_takes = compilations(
        lambda q, x: F.scaled_dot_product_attention(q, q, q, scale=x), FLOATS, dynamic
    )
    for name, function in FLOAT.items():
        assert compilations(function, FLOATS, dynamic) <= torch_takes, name


def test_gradients_of_a_window_that_is_a_symbol() -> None:
    torch._dynamo.reset()
    call = torch.compile(INTEGER["window"], backend="aot_eager", fullgraph=True, dynamic=True)
    for n in INTEGERS:
        results = []
        for function in (call, INTEGER["window"]):
            q = Q.clone().requires_grad_()
            function(q, n).square().sum().backward()
            results.append(q.grad)
        torch.testing.assert_close(*results)
