"""A plain training loop that ends in time on slow machines."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tiny_gpt_oss import text

WARMUP = 20


def optimizer_of(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, so not on the sinks."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def train(
    model: nn.Module,
    data: Tensor,
    steps: int,
    seconds: float,
    batch_size: int,
    seqlen: int,
    learning_rate: float = 3e-3,
) -> list[float]:
    """Trains for `steps` steps, or for `seconds` if they are over before; the loss of each step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = optimizer_of(model, learning_rate)
    losses: list[float] = []
    model.train()
    start = time.perf_counter()
    bar = tqdm(total=steps, desc="  training", unit="step", ncols=88, mininterval=1.0)
    while len(losses) < steps:
        progress = max(len(losses) / steps, (time.perf_counter() - start) / seconds)
        if progress >= 1:
            break
        rate = learning_rate * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (len(losses) + 1) / WARMUP)
        ids = text.batch(data, batch_size, seqlen, generator)
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {sum(losses[-20:]) / len(losses[-20:]):.2f}", refresh=False)
        bar.update()
    bar.close()
    return losses


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensor, seqlen: int) -> float:
    model.eval()
    rows = data[: len(data) // seqlen * seqlen].view(-1, seqlen)
    return model(rows, labels=rows, use_cache=False).loss.item()
