"""Calls from other threads than the one that imported torch, as servers and autograd make them.

A thread that has made no CUDA call yet has no current context there, and memory may come from
torch's cache without one; what a launch needs of the driver must not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backends import EMULATED, Backend
from cases import generator, int32, normal
from torch import Tensor

pytestmark = pytest.mark.sm90

SEQLEN, HEADS, HEADS_KV, HEAD_DIM, PAGE_SIZE = 40, 4, 2, 64, 16
Results = tuple[Tensor, ...]


def train(backend: Backend, seed: int) -> Results:
    rng = generator(seed)
    shapes = ((1, SEQLEN, heads, HEAD_DIM) for heads in (HEADS, HEADS_KV, HEADS_KV))
    inputs = [normal(shape, rng, torch.bfloat16) for shape in shapes]
    inputs.append(normal((HEADS,), rng, torch.float32))
    q, k, v, s_aux = (tensor.to(backend.device).requires_grad_() for tensor in inputs)
    out, lse = backend.flash_attn(q, k, v, causal=True, s_aux=s_aux, deterministic=True)
    return (out, lse, *torch.autograd.grad(out.float().square().sum(), (q, k, v, s_aux)))


def decode(backend: Backend, seed: int) -> Results:
    rng = generator(seed)
    shapes = ((1, 1, HEADS, HEAD_DIM), *2 * ((3, PAGE_SIZE, HEADS_KV, HEAD_DIM),), (HEADS,))
    q, k_cache, v_cache, s_aux = (
        normal(shape, rng, torch.bfloat16).to(backend.device) for shape in shapes
    )
    return backend.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=int32([SEQLEN], backend.device),
        block_table=int32([[2, 0, 1]], backend.device),
        causal=True,
        s_aux=s_aux,
    )


calls = pytest.mark.parametrize("call", [train, decode], ids=lambda call: call.__name__)


def assert_same(results: Results, expected: Results) -> None:
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)


@calls
def test_fresh_thread(backend: Backend, call: Callable[[Backend, int], Results]) -> None:
    expected = call(backend, 0)  # warms torch's caches, so that the thread below need not
    with ThreadPoolExecutor(1) as thread:
        assert_same(thread.submit(call, backend, 0).result(), expected)


@calls
def test_threads_at_once(backend: Backend, call: Callable[[Backend, int], Results]) -> None:
    if backend.name in EMULATED:
        pytest.skip("the emulated card takes calls one after the other")
    expected = [call(backend, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        for result, other in zip(
            threads.map(lambda seed: call(backend, seed), range(8)), expected, strict=True
        ):
            assert_same(result, other)
