"""What each of two ranks does when attention's heads, and their sinks, are sharded over them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from sink_attention_ext import flash_attn_func


def whole_attention(path: str) -> dict[str, torch.Tensor]:
    """Draws inputs, attends with all heads on one rank, and saves both to `path`."""
    torch.manual_seed(0)
    q, dout = torch.randn(2, 2, 50, 8, 16)
    k, v = torch.randn(2, 2, 50, 4, 16)
    s_aux = torch.randn(8)
    leaves = [t.requires_grad_() for t in (q, k, v, s_aux)]
    out = flash_attn_func(q, k, v, causal=True, window_size=(9, 0), s_aux=s_aux)
    gradients = torch.autograd.grad(out, leaves, dout)
    saved = {"inputs": [t.detach() for t in leaves], "dout": dout, "out": out.detach()}
    saved["gradients"] = list(gradients)
    torch.save(saved, path)
    return saved


def sharded_attention(rank: int, path: str) -> None:
    """This rank's half of the heads; all ranks' results together must be the whole, bit for bit."""
    saved = torch.load(path)
    world = dist.get_world_size()
    q, k, v, s_aux = (
        t.chunk(world, dim=0 if t.dim() == 1 else 2)[rank].clone().requires_grad_()
        for t in saved["inputs"]
    )
    dout = saved["dout"].chunk(world, dim=2)[rank]
    out = flash_attn_func(q, k, v, causal=True, window_size=(9, 0), s_aux=s_aux)
    gradients = torch.autograd.grad(out, (q, k, v, s_aux), dout)
    for part, whole in zip((out, *gradients), (saved["out"], *saved["gradients"]), strict=True):
        parts = [torch.empty_like(part) for _ in range(world)]
        dist.all_gather(parts, part.detach().contiguous())
        together = torch.cat(parts, dim=0 if part.dim() == 1 else 2)
        torch.testing.assert_close(together, whole, atol=1e-6, rtol=1e-5)
