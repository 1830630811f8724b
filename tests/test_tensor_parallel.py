"""Heads and sinks sharded over ranks, without transformers: who holds what, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from two_ranks import on_ranks

from sink_attention_ext import flash_attn_func, flash_attn_varlen_func
from sink_attention_ext.parallel import shard_heads, shard_s_aux

HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3), (12, 4)]


def attend(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True, window_size=(5, 0), s_aux=s_aux)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_shards_together_are_the_whole(heads: tuple[int, int], world_size: int) -> None:
    """Gradients too: those of the ranks that share a kv head add up."""
    num_q, num_kv = heads
    if num_q % world_size or (num_kv % world_size and world_size % num_kv):
        with pytest.raises(ValueError, match=rf"world_size must divide .* {world_size} .* {num_q}|"
                           rf"world_size must divide num_heads_kv, .* {num_kv}"):  # fmt: skip
            shard_heads(num_q, num_kv, 0, world_size)
        return
    inputs = [torch.randn(2, 9, n, 4) for n in (num_q, num_kv, num_kv)] + [torch.randn(num_q)]
    q, k, v, s_aux = (t.requires_grad_() for t in inputs)
    whole = attend(q, k, v, s_aux)
    dout = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, inputs, dout)
    parts = []
    for rank in range(world_size):
        heads_q, heads_kv = shard_heads(num_q, num_kv, rank, world_size)
        local = (q[..., heads_q, :], k[..., heads_kv, :], v[..., heads_kv, :])
        assert local[0].shape[2] == num_q // world_size
        assert local[1].shape[2] == max(num_kv // world_size, 1)
        parts.append(attend(*local, shard_s_aux(s_aux, rank, world_size)))
    together = torch.cat(parts, dim=2)
    torch.testing.assert_close(together, whole)
    for actual, right in zip(torch.autograd.grad(together, inputs, dout), expected, strict=True):
        torch.testing.assert_close(actual, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shard_heads(8, 2, 2, 2), "rank must be from 0 .* rank 2 and world_size 2"),
        (lambda: shard_heads(8, 3, 0, 2), "num_heads_kv must divide num_heads_q; got 3 and 8"),
        (lambda: shard_heads(12, 4, 0, 3), "multiple of it .* world_size 3 and num_heads_kv 4"),
        (lambda: shard_s_aux(torch.zeros(6), 0, 4), "world_size 4 and num_heads_q 6"),
        (lambda: shard_s_aux(torch.zeros(6), -1, 2), "rank must be .* rank -1"),
        (lambda: shard_s_aux(torch.zeros(1, 6), 0, 2), r"s_aux must have 1 dimensions .*\(1, 6\)"),
    ],
)
def test_what_does_not_divide_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_sinks_of_all_heads_are_refused_with_advice() -> None:
    q, k, v = (torch.randn(1, 5, heads, 8) for heads in (4, 1, 1))
    advice = r"\(4,\).*\(8,\).*s_aux has 8 logits, q has 4 heads: under tensor .*GPT_OSS_TP_PLAN"
    with pytest.raises(ValueError, match=advice):
        attend(q, k, v, torch.zeros(8))
    with pytest.raises(ValueError, match=advice):
        lengths = (torch.tensor([0, 5], dtype=torch.int32),) * 2
        flash_attn_varlen_func(q[0], k[0], v[0], *lengths, 5, 5, s_aux=torch.zeros(8))
    with pytest.raises(ValueError, match=r"got shape \(6,\)$"):  # no multiple: some other mistake
        attend(q, k, v, torch.zeros(6))


# ---- DTensors ----


def dtensors(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, heads, 4) for heads in (8, 2, 2))
    s_aux, dout = torch.randn(8, requires_grad=True), torch.randn_like(q)
    whole = attend(q, k, v, s_aux)
    (expected,) = torch.autograd.grad(whole, s_aux, dout)

    heads_q, heads_kv = shard_heads(8, 2, rank, 2)
    local = (q[..., heads_q, :], k[..., heads_kv, :], v[..., heads_kv, :])
    sharded = distribute_tensor(s_aux.detach(), mesh, [Shard(0)]).requires_grad_()
    out = attend(*local, sharded)
    torch.testing.assert_close(out, whole[..., heads_q, :])
    out.backward(dout[..., heads_q, :])
    assert isinstance(sharded.grad, DTensor) and sharded.grad.placements == (Shard(0),)
    torch.testing.assert_close(sharded.grad.full_tensor(), expected)

    replicated = distribute_tensor(s_aux.detach(), mesh, [Replicate()])
    torch.testing.assert_close(attend(q, k, v, replicated), whole)
    with pytest.raises(ValueError, match="s_aux has 8 logits, q has 4 heads"):
        attend(*local, replicated)
    partial = DTensor.from_local(s_aux.detach(), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"s_aux must be .* Shard or Replicate .*Partial"):
        attend(q, k, v, partial)
    for i, name in enumerate("qkv"):
        tensors = [*local]
        tensors[i] = DTensor.from_local(local[i], mesh, [Shard(2)])
        with pytest.raises(TypeError, match=rf"{name} must be a plain .* pass {name}\.to_local\("):
            attend(*tensors, sharded)


def test_dtensors() -> None:
    """A sharded s_aux by its local part, gradients back as a DTensor; q, k and v are refused."""
    on_ranks(2, dtensors)
