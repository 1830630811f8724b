"""How much attention goes to the sinks, and the demo's picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from small_model import WINDOW, smooth
from torch import Tensor, nn
from transformers import AttentionInterface, GptOssForCausalLM

from sink_attention_ext import flash_attn_func


@torch.no_grad()
def sink_shares(model: GptOssForCausalLM, tokens: Tensor) -> Tensor:
    """(layers, heads): which part of its attention each head gives to its sink, mean over the rows.

    lse is the logarithm of the softmax's denominator, the sink's exp(s_aux) included, so that the
    part of one row is exp(s_aux - lse). The weights themselves are never formed.
    """
    shares: dict[int, Tensor] = {}

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float,
        s_aux: Tensor,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # to (batch, seqlen, heads, d)
        out, lse = flash_attn_func(
            q,
            k,
            v,
            softmax_scale=scaling,
            causal=True,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            s_aux=s_aux,
            return_lse=True,
        )
        shares[module.layer_idx] = (s_aux[:, None] - lse).exp().mean(dim=(0, 2))
        return out, None

    AttentionInterface.register("sink_attention_shares", attention)
    model.set_attn_implementation("sink_attention_shares")
    model(tokens, use_cache=False)
    model.set_attn_implementation("sink_attention")
    return torch.stack([shares[i] for i in sorted(shares)])


def draw(
    path: Path, losses: list[float], before: Tensor, after: Tensor, shares: Tensor, kinds: list[str]
) -> None:
    """The loss; each head's sink, before and after; the part of attention that it takes."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")  # not pyplot: no screen is needed
    left, middle, right = figure.subplots(1, 3)
    blue, orange = "#2a6f97", "#e07a2f"

    left.plot(losses, color=blue, alpha=0.25, linewidth=1, label="each step")
    left.plot(smooth(losses), color=blue, linewidth=2, label="mean of 20 steps")
    left.set(title="Training loss", xlabel="step", ylabel="nats per byte")
    left.legend(frameon=False)

    layers, heads = after.shape
    width = 0.8 / heads
    for layer in range(layers):
        color = orange if kinds[layer] == "sliding_attention" else blue
        x = layer + width * (torch.arange(heads) - (heads - 1) / 2)
        middle.bar(x, after[layer], width * 0.85, color=color)
        middle.scatter(x, before[layer], s=10, color="black", zorder=3)
        right.bar(x, 100 * shares[layer], width * 0.85, color=color)

    names = {"sliding_attention": f"sliding ({WINDOW})", "full_attention": "full"}
    labels = [f"layer {i}\n{names[kind]}" for i, kind in enumerate(kinds)]
    for axes in (middle, right):
        axes.set_xticks(range(layers), labels)
    middle.axhline(0, color="gray", linewidth=0.8)
    middle.set(title="Sink of each head (dot: before training)", ylabel="sink, a logit")
    right.set(title="Attention that each head gives to its sink", ylabel="% (mean over rows)")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
