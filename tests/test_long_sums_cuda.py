"""Errors of the CUDA kernels' sums do not grow with the number of terms.

In float32 they are at most those of torch's own attention on the CPU, whose matrix products sum in
blocks. A sum of n terms one by one rounds n times at the result's size: at 16384 keys the error is
13 times that of a sum of block sums.
"""

from __future__ import annotations

import pytest
import torch
from backends import EMULATED, Backend
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sink_attention_ext import flash_attn_func, merge_attn_states

pytestmark = pytest.mark.not_on_sm90("float32 runs the same kernels on every card")
LENGTHS = [256, 1024, 4096, 16384]
# Below it an error is that of few roundings: as many as a softmax takes, whatever is summed.
FLOOR = 8e-7


@pytest.fixture(autouse=True)
def only_emulated(backend: Backend) -> None:
    if backend.name not in EMULATED:
        pytest.skip("of the CUDA kernels")


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def randn(*shape: int, mean: float = 0.0) -> Tensor:
    return torch.randn(shape) + mean


@pytest.mark.parametrize("keys", LENGTHS)
def test_forward(backend: Backend, keys: int) -> None:
    q, k, v = randn(1, 16, 1, 16), randn(1, keys, 1, 16), randn(1, keys, 1, 16, mean=1.0)
    expected = sdpa(q.double(), k.double(), v.double())
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    assert error(out, expected) <= max(error(sdpa(q, k, v), expected), FLOOR / 2)
    scores = q.double()[0, :, 0] @ k.double()[0, :, 0].T / 4
    assert error(lse[0, 0], scores.logsumexp(-1)) < 2e-7


def gradients(attend, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN001
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(attend(*leaves), leaves, dout.to(leaves[0].dtype))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("long", ["queries", "keys"])
def test_backward(backend: Backend, long: str, length: int) -> None:
    rows, keys = (length, 16) if long == "queries" else (16, length)
    inputs = [randn(1, rows, 1, 16), randn(1, keys, 1, 16), randn(1, keys, 1, 16, mean=1.0)]
    dout = randn(1, rows, 1, 16, mean=1.0)
    expected = gradients(sdpa, [x.double() for x in inputs], dout)
    theirs = gradients(sdpa, inputs, dout)
    ours = gradients(flash_attn_func, inputs, dout)
    for name, actual, other, true in zip(("dq", "dk", "dv"), ours, theirs, expected, strict=True):
        assert error(actual, true) <= max(error(other, true), FLOOR), name


def test_sums_go_on_where_they_were_left(backend: Backend) -> None:
    """Of rows whose largest score comes late, or whose keys are apart: sink tokens and a window."""
    keys = 5000
    q, k, v = randn(1, 40, 2, 24), randn(1, keys, 1, 24), randn(1, keys, 1, 20)
    k *= torch.linspace(0.1, 5.0, keys)[:, None, None]
    s_aux = torch.tensor([20.0, -20.0])
    for window, sinks in (((-1, 0), 0), ((2500, 0), 1500), ((100, 0), 3)):
        options = {"causal": True, "window_size": window, "num_sink_tokens": sinks}
        results = [
            flash_attn_func(*(x.to(dtype) for x in (q, k, v)), s_aux=s_aux, **options)
            for dtype in (torch.float32, torch.float64)
        ]
        assert error(results[0], results[1]) < 3e-6
        one = flash_attn_func(q[:, -1:], k, v, s_aux=s_aux, **options)
        assert torch.equal(one, results[0][:, -1:])  # whatever rows are beside it


@pytest.mark.parametrize("rows", [1024, 8192])
def test_gradient_of_a_sink(backend: Backend, rows: int) -> None:
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.bfloat16, 2e-3)):
        q, k, v = (randn(1, n, 1, 16, mean=1.0).to(dtype) for n in (rows, 16, 16))
        grads = []
        for computed in (dtype, torch.float64):
            s_aux = torch.zeros(1, dtype=torch.float64, requires_grad=True)
            out = flash_attn_func(*(x.to(computed) for x in (q, k, v)), s_aux=s_aux)
            out.sum().backward()
            grads.append(s_aux.grad)
        assert error(grads[0], grads[1]) < tolerance


def test_merging_many_parts(backend: Backend) -> None:
    parts = 1500
    outs = [randn(1, 8, 1, 16, mean=1.0) for _ in range(parts)]
    lses = [torch.randn(1, 1, 8) for _ in range(parts)]
    merged, lse = merge_attn_states(outs, lses)
    weights = torch.stack(lses).double().softmax(0).transpose(-1, -2)[..., None]
    expected = (weights * torch.stack(outs).double()).sum(0)
    assert error(merged, expected) < 6e-7
    assert error(lse, torch.stack(lses).double().logsumexp(0)) < 4e-7
