"""The loss, each head's sink, and the share of attention that the sink takes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def draw(path: Path, losses: list[float], sinks: Tensor, shares: Tensor, kinds: list[str]) -> None:
    """losses per step; sinks and shares (layers, heads); kinds of the layers."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    smooth = [sum(losses[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(losses))]
    left.plot(losses, color="0.8")
    left.plot(smooth, color="C0")
    left.set(title="Training loss", xlabel="step", ylabel="nats per byte", ylim=(0, None))
    num_layers, num_heads = sinks.shape
    for axes, values, title in (
        (middle, sinks, "Learned sink of each head (started at 0)"),
        (right, 100 * shares, "Attention that goes to the sink, %"),
    ):
        for layer in range(num_layers):
            offset = layer * (num_heads + 1)
            sliding = kinds[layer] == "sliding_attention"
            places = [offset + head for head in range(num_heads)]
            axes.bar(places, values[layer].tolist(), color="C1" if sliding else "C0")
        middles = [layer * (num_heads + 1) + (num_heads - 1) / 2 for layer in range(num_layers)]
        names = [f"layer {i}\n{kind.split('_')[0]}" for i, kind in enumerate(kinds)]
        axes.set_xticks(middles, names)
        axes.set_title(title)
        axes.axhline(0, color="0.5", linewidth=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
