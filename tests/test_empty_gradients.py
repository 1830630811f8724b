"""Gradients of calls without rows are zeros of the right shapes, however the loss was formed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sink_attention_ext import (
    apply_sink,
    flash_attn_func,
    flash_attn_varlen_func,
    merge_attn_states,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda out: out.sum(),
    "mean": lambda out: out.mean().nan_to_num(),
    "squares": lambda out: out.square().sum(),
    "expanded": lambda out: (out * torch.ones((), dtype=out.dtype)).sum(),
    "transposed": lambda out: (out.transpose(-1, -2) * 2).sum(),
}
SHAPES = {  # batch, seqlen_q, seqlen_k
    "batch 0": (0, 4, 3), "seqlen_q 0": (2, 0, 3), "seqlen_k 0": (2, 4, 0), "nothing": (0, 0, 0),
}  # fmt: skip


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def check(call: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor]) -> None:
    """Through out, through lse and through both."""
    for loss in LOSSES.values():
        for used in ((0,), (1,), (0, 1)):
            results = call(*leaves)
            total = sum(loss(results[i]) for i in used)
            for x, gradient in zip(
                leaves, torch.autograd.grad(total, leaves, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
                    assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["batch 0", "seqlen_q 0", "nothing"])
@pytest.mark.parametrize("compiled", [False, True])
def test_dense(name: str, dtype: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()
    batch, seqlen_q, seqlen_k = SHAPES[name]
    if compiled and dtype != torch.float32:
        pytest.skip("the compiler is the same for all")

    def call(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attn_func(q, k, v, s_aux=s_aux, return_lse=True)

    leaves = [
        leaf(batch, seqlen_q, 2, 8, dtype=dtype), leaf(batch, seqlen_k, 1, 8, dtype=dtype),
        leaf(batch, seqlen_k, 1, 6, dtype=dtype), leaf(2, dtype=torch.float32),
    ]  # fmt: skip
    check(torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_keys(dtype: torch.dtype) -> None:
    """out is 0 whatever q is, and lse is the sink."""
    q, k, v = (leaf(2, n, h, 8, dtype=dtype) for n, h in ((4, 2), (0, 1), (0, 1)))
    s_aux = leaf(2, dtype=torch.float32)
    for loss in LOSSES.values():
        out, lse = flash_attn_func(q, k, v, s_aux=s_aux, return_lse=True)
        gradients = torch.autograd.grad(loss(out) + lse.sum(), (q, k, v, s_aux))
        assert not any(x.any() for x in gradients[:3])
        assert torch.equal(gradients[3], torch.full((2,), 8.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [0, 5])
def test_varlen(dtype: torch.dtype, keys: int) -> None:
    ends = [torch.tensor([0, n], dtype=torch.int32) for n in (0, keys)]

    def call(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attn_varlen_func(q, k, v, *ends, 1, 5, s_aux=s_aux, return_lse=True)

    leaves = [leaf(n, h, 8, dtype=dtype) for n, h in ((0, 2), (keys, 1), (keys, 1))]
    check(call, [*leaves, leaf(2, dtype=torch.float32)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)])
def test_merge_and_apply_sink(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lse_shape = (*shape[:-1], 2, shape[-1])

    def merge(a: Tensor, b: Tensor, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attn_states([a, b], [x, y], s)

    outs = [leaf(*shape, 2, 8, dtype=dtype) for _ in range(2)]
    lses = [leaf(*lse_shape, dtype=lse_dtype) for _ in range(2)]
    s_aux = leaf(2, dtype=torch.float32)
    check(merge, [*outs, *lses, s_aux])
    check(apply_sink, [outs[0], lses[0], s_aux])


@pytest.mark.parametrize("function", ["merge", "apply", "dense"])
def test_sinks_beside_no_heads_are_refused_by_name(function: str) -> None:
    out, lse, s_aux = torch.zeros(1, 3, 0, 4), torch.zeros(1, 0, 3), torch.zeros(2)
    with pytest.raises(ValueError, match=r"s_aux must have shape \(num_heads_q,\) = \(0,\)|q must"):
        if function == "merge":
            merge_attn_states([out], [lse], s_aux)
        elif function == "apply":
            apply_sink(out, lse, s_aux)
        else:
            flash_attn_func(out, out, out, s_aux=s_aux)
