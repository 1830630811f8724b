"""Nested, sparse, mkldnn and quantised tensors are refused by name; lazily negated ones work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sink_attention_ext import (
    apply_sink,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attn_states,
    ops,
    reshape_and_cache,
)

FLOAT8 = torch.float8_e4m3fn


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(tensor.unbind()) or [tensor], layout=torch.jagged)


def nested_strided(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(tensor.unbind()))


def negated(tensor: Tensor) -> Tensor:
    """The same values, negated with a bit and again in memory."""
    return torch._neg_view(-tensor)


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "jagged": nested,
    "nested": nested_strided,
    "sparse": lambda tensor: tensor.to_sparse(),
    "mkldnn": lambda tensor: tensor.to_mkldnn(),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "proxy": lambda tensor: fx.Proxy(fx.Graph().placeholder("x"), fx.Tracer()),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def dense() -> dict[str, Any]:
    return {"q": randn(2, 3, 4, 8), "k": randn(2, 5, 2, 8), "v": randn(2, 5, 2, 8),
            "s_aux": randn(4)}  # fmt: skip


def varlen() -> dict[str, Any]:
    return {"q": randn(3, 4, 8), "k": randn(5, 2, 8), "v": randn(5, 2, 8), "s_aux": randn(4)}


def cached() -> dict[str, Any]:
    caches = {"k_cache": randn(2, 8, 2, 8), "v_cache": randn(2, 8, 2, 8)}
    new = {"k": randn(2, 3, 2, 8), "v": randn(2, 3, 2, 8)}
    return {"q": randn(2, 3, 4, 8), **caches, **new, "s_aux": randn(4)}


def write() -> dict[str, Any]:
    return {"k": randn(3, 2, 8), "v": randn(3, 2, 8), "k_cache": randn(2, 4, 2, 8),
            "v_cache": randn(2, 4, 2, 8)}  # fmt: skip


def write_scaled(k_scale: Tensor, v_scale: Tensor) -> None:
    caches = torch.zeros(2, 2, 4, 2, 8, dtype=torch.int8)
    k = randn(3, 2, 8)
    reshape_and_cache(k, k, *caches, torch.tensor([3, 0, 1]), k_scale, v_scale)


def scales() -> dict[str, Any]:
    return {"k_scale": torch.rand(2) + 0.5, "v_scale": torch.rand(2) + 0.5}


def merged() -> dict[str, Any]:
    return {"outs[0]": randn(2, 3, 4, 8), "lses[0]": randn(2, 4, 3), "s_aux": randn(4)}


def applied() -> dict[str, Any]:
    return {"out": randn(2, 3, 4, 8), "lse": randn(2, 4, 3), "s_aux": randn(4)}


def float8() -> dict[str, Any]:
    return {"q_descale": torch.rand(2, 2) + 0.5, "k_descale": torch.rand(2, 2) + 0.5}


def attend_float8(**descales: Tensor) -> Tensor:
    q, k = torch.ones(2, 3, 4, 8).to(FLOAT8), torch.ones(2, 5, 2, 8).to(FLOAT8)
    return flash_attn_func(q, k, k, **descales)


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "dense": (flash_attn_func, dense),
    "varlen": (
        lambda **x: flash_attn_varlen_func(
            cu_seqlens_q=int32(0, 3), cu_seqlens_k=int32(0, 5), max_seqlen_q=3, max_seqlen_k=5, **x
        ),
        varlen,
    ),
    "kvcache": (lambda **x: flash_attn_with_kvcache(cache_seqlens=2, **x), cached),
    "write": (lambda **x: reshape_and_cache(slot_mapping=torch.tensor([3, 0, 1]), **x), write),
    "merge": (lambda **x: merge_attn_states([x["outs[0]"]], [x["lses[0]"]], x["s_aux"]), merged),
    "apply_sink": (apply_sink, applied),
    "float8": (attend_float8, float8),
    "scales": (write_scaled, scales),
}
CASES = [(name, argument) for name, (_, make) in FUNCTIONS.items() for argument in make()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "argument"), CASES)
def test_refused_by_name(name: str, argument: str, kind: str) -> None:
    function, make_arguments = FUNCTIONS[name]
    arguments = make_arguments()
    tensors = [x for key, x in arguments.items() if key != argument]
    before = [x.clone() for x in tensors]
    try:
        other = KINDS[kind](arguments[argument])
    except RuntimeError:
        pytest.skip(f"torch makes no {kind} tensor of this shape")
    with pytest.raises(TypeError) as refused:
        function(**arguments | {argument: other})
    assert str(refused.value).startswith(f"{argument} must ")
    assert all(map(torch.equal, tensors, before)), "it wrote"


WRITTEN = {("kvcache", "k_cache"), ("kvcache", "v_cache"), ("write", "k_cache"),
           ("write", "v_cache")}  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), [case for case in CASES if case not in WRITTEN])
def test_lazily_negated_tensors_are_read(name: str, argument: str) -> None:
    function, make_arguments = FUNCTIONS[name]
    arguments = make_arguments()
    copies = {key: tensor.clone() for key, tensor in arguments.items()}
    expected = function(**copies)
    actual = function(**arguments | {argument: negated(arguments[argument])})
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for key in {"k_cache", "v_cache"} & arguments.keys():
        assert torch.equal(arguments[key], copies[key])


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize(("name", "argument"), sorted(WRITTEN))
def test_a_lazily_negated_cache_is_not_written(
    name: str, argument: str, inference_mode: bool
) -> None:
    function, make_arguments = FUNCTIONS[name]
    with torch.inference_mode(inference_mode):
        arguments = make_arguments()
        before = [tensor.clone() for tensor in arguments.values()]
        with pytest.raises(TypeError, match=f"{argument} is written in place .* negative"):
            function(**arguments | {argument: negated(arguments[argument])})
        assert all(map(torch.equal, arguments.values(), before))


def test_operators_refuse_to_write_to_lazily_negated_tensors() -> None:
    k, cache, slots = randn(3, 2, 8), torch.zeros(2, 4, 2, 8), torch.tensor([3, 0, 1])
    with pytest.raises(TypeError, match="v_cache is written in place"):
        ops.reshape_and_cache(k, k, cache, negated(cache), slots, None, None)
    assert not cache.any()


@pytest.mark.parametrize("which", ["out", "lse"])
@pytest.mark.parametrize("name", ["dense", "varlen", "merge"])
def test_gradients_of_other_layouts_are_refused_by_name(name: str, which: str) -> None:
    class Sparse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return torch.ones(shape).to_sparse()

    function, make_arguments = FUNCTIONS[name]
    arguments = {key: tensor.requires_grad_() for key, tensor in make_arguments().items()}
    options = {} if name == "merge" else {"return_lse": True}
    out, lse = function(**arguments, **options)
    used = out if which == "out" else lse
    shape = used.shape
    with pytest.raises(TypeError, match=f"d{which} must be a dense tensor"):
        Sparse.apply(used).backward()


@pytest.mark.parametrize("make", [lambda x: negated(x), lambda x: x.expand(x.shape)])
def test_gradients_that_are_lazily_negated(make: Callable[[Tensor], Tensor]) -> None:
    arguments = dense()
    q = arguments.pop("q").requires_grad_()
    out = flash_attn_func(q, **arguments)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, q, dout, retain_graph=True)
    assert torch.equal(torch.autograd.grad(out, q, make(dout))[0], expected[0])
