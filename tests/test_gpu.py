"""What only a GPU shows, besides graphs: streams, waiting, autocast, compiled graphs, devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backends import BACKENDS
from cache_model import CacheModel
from torch import Tensor

from sink_attention_ext import flash_attn_func, flash_attn_with_kvcache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU and a build for it"),
]
DEVICE = "cuda"
BF16 = torch.bfloat16
MASK = {"causal": True, "window_size": (20, 0)}


@pytest.fixture(autouse=True)
def as_the_matrix() -> Iterator[None]:
    with BACKENDS[DEVICE].use():
        yield


def inputs(dtype: torch.dtype = BF16, device: str = DEVICE) -> list[Tensor]:
    """q, k, v, s_aux that have gradients."""
    shapes = ((2, 70, 8, 64), (2, 70, 2, 64), (2, 70, 2, 64), (8,))
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def train(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, ...]:
    out = flash_attn_func(q, k, v, s_aux=s_aux, deterministic=True, **MASK)
    return (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, s_aux)))


def decode(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> Tensor:
    """k and v as caches of two pages, the sequence in the second and then the first."""
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=q.device)
    used = torch.full((1,), 100, dtype=torch.int32, device=q.device)
    pages = [cache[:, :64].contiguous() for cache in (k, v)]
    with torch.no_grad():
        return flash_attn_with_kvcache(
            q[:1, :1], *pages, cache_seqlens=used, block_table=table, s_aux=s_aux, **MASK
        )


def assert_same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result.cpu(), other.cpu())


def test_other_streams() -> None:
    """Work goes to the stream that is current, which need not wait for any other."""
    leaves = inputs()
    expected = (*train(*leaves), decode(*leaves))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # on this stream: what is on another does not see it
        changed = [(leaf.detach() * 2).requires_grad_() for leaf in leaves]
        halved = [(leaf.detach() / 2).requires_grad_() for leaf in changed]
        results = (*train(*halved), decode(*halved))
    stream.synchronize()
    assert_same(results, expected)


def test_nothing_waits_for_the_device() -> None:
    leaves = inputs()
    used = torch.full((1,), 100, dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=DEVICE)
    pages = [leaf.detach()[:, :64].contiguous() for leaf in leaves[1:3]]
    new = [page[:1, :1].clone() for page in pages]
    train(*leaves)  # what is loaded at a first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(*leaves)
        with torch.no_grad():
            flash_attn_with_kvcache(leaves[0][:1, :1], *pages, *new, used, table, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_append_does_not_wait_for_the_device() -> None:
    model = CacheModel(device=DEVICE)
    seq = model.allocate()
    model.append([seq], [6])
    fork = model.fork(seq)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.cache.append([seq, fork], [1, 1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast() -> None:
    leaves = inputs(torch.float32)
    with torch.autocast(DEVICE, BF16):
        out = flash_attn_func(*leaves[:3], s_aux=leaves[3], **MASK)
    q, k, v = (leaf.to(BF16) for leaf in leaves[:3])
    assert out.dtype == BF16
    assert_same((out,), (flash_attn_func(q, k, v, s_aux=leaves[3], **MASK),))
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_compiled_into_graphs() -> None:
    """Forward and backward, replayed with other numbers."""
    torch._dynamo.reset()

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def forward(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, s_aux=s_aux, deterministic=True, **MASK) * 2

    for _ in range(4):
        leaves = inputs()
        out = forward(*leaves)
        gradients = torch.autograd.grad(out.sum(), leaves)
        eager = 2 * flash_attn_func(*leaves[:3], s_aux=leaves[3], deterministic=True, **MASK)
        assert_same((out, *gradients), (eager, *torch.autograd.grad(eager.sum(), leaves)))
    torch._dynamo.reset()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current() -> None:
    leaves = inputs()
    there = [leaf.detach().to("cuda:1").requires_grad_() for leaf in leaves]
    assert torch.cuda.current_device() == 0
    assert_same((*train(*there), decode(*there)), (*train(*leaves), decode(*leaves)))
