"""Gradients that nobody can have: of a gradient, through a cache."""

from __future__ import annotations

import pytest
import torch
from test_autograd import qkvs
from torch import Tensor

from sink_attention_ext import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    ops,
    reshape_and_cache,
)


@pytest.mark.parametrize("packed", [False, True])
def test_double_backward_is_refused(packed: bool) -> None:
    q, k, v, s_aux = qkvs()
    if packed:
        ends = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 7], dtype=torch.int32)
        out = flash_attn_varlen_func(q[0], k[0], v[0], *ends, 5, 7, s_aux=s_aux)
    else:
        out = flash_attn_func(q, k, v, s_aux=s_aux)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward.*reference.attention"):
        dq.sum().backward()


def cache_arguments() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 1, 2, 4), torch.randn(1, 8, 2, 4), torch.randn(1, 8, 2, 4)


@pytest.mark.parametrize("which", [0, 1, 2, "k", "v", "s_aux"])
def test_gradient_through_the_cache_is_refused(which: int | str) -> None:
    arguments = cache_arguments()
    before = [tensor.clone() for tensor in arguments]
    new = {"k": torch.randn(1, 1, 2, 4), "v": torch.randn(1, 1, 2, 4), "s_aux": torch.zeros(2)}
    (arguments[which] if isinstance(which, int) else new[which]).requires_grad_()
    with pytest.raises(RuntimeError, match="flash_attn_with_kvcache is not differentiable"):
        flash_attn_with_kvcache(*arguments, cache_seqlens=2, **new)
    assert all(map(torch.equal, arguments, before)), "the refused call wrote"
    with torch.no_grad():
        flash_attn_with_kvcache(*arguments, cache_seqlens=2, **new)


def test_gradient_through_the_operators_themselves_is_refused() -> None:
    q, k_cache, v_cache = cache_arguments()
    tables = torch.zeros(1, 1, dtype=torch.int32), torch.full((1,), 8, dtype=torch.int32)
    options = (None, None, None, None, 1, 8, 0.5, True, -1, -1, 0.0, 0, 0, None)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="sink_attention_ext::paged_attn is not differentiable"):
        ops.paged_attn(q, k_cache, v_cache, *tables, *options)
    results = {"out": torch.zeros(1, 1, 2, 4), "lse": torch.zeros(1, 2, 1)}
    with pytest.raises(RuntimeError, match="paged_attn.out is not differentiable"):
        ops.paged_attn_out(q, k_cache, v_cache, *tables, *options, **results)
    k = torch.randn(1, 2, 4, requires_grad=True)
    slots = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="reshape_and_cache is not differentiable"):
        ops.reshape_and_cache(k, k, k_cache, v_cache, slots, None, None)
    with pytest.raises(RuntimeError, match="reshape_and_cache is not differentiable"):
        reshape_and_cache(k, k, k_cache, v_cache, slots)
    assert results["out"].eq(0).all()


def test_writing_into_a_saved_cache_is_noticed() -> None:
    """autograd sees that the operator changed a tensor that a backward still needs."""
    q, k_cache, v_cache = cache_arguments()
    out = flash_attn_func(q.requires_grad_(), k_cache, v_cache)
    with torch.no_grad():
        reshape_and_cache(
            torch.ones(1, 2, 4),
            torch.ones(1, 2, 4),
            k_cache,
            v_cache,
            torch.zeros(1, dtype=torch.int64),
        )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
