"""Draws the plots of a run from its JSON file: `python benchmarks/plots.py DIR/results.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

COLORS = {
    "sink_attention_ext": "#c1272d",
    "sink_attention_ext sm80": "#e8a0a3",
    "torch SDPA (no sink)": "#0072b2",
    "HuggingFace eager": "#555555",
    "FlexAttention": "#009e73",
    "memory read": "#bbbbbb",
    "SDPA flash": "#0072b2",
    "SDPA cuDNN": "#56b4e9",
    "SDPA efficient": "#004c7a",
    "SDPA math": "#999999",
    "flash-attn 2": "#e69f00",
    "flash-attn 3": "#d55e00",
    "flash-attn 4": "#a04000",
    "FlashInfer": "#cc79a7",
}
SWEEPS = {"forward": "Forward", "backward": "Forward + backward", "window": "Window 128"}


def values_of(records: list[dict], key: str) -> list[str]:
    """The distinct values of a key, in order of appearance."""
    return list(dict.fromkeys(record[key] for record in records))


def grid(num_rows: int, num_columns: int, title: str):
    """Panels; those of a row share their y axis, so that dtypes can be compared by eye."""
    size = (4.2 * num_columns, 2.8 * num_rows + 0.9)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    figure.suptitle(title)
    return figure, axes


def plot_lines(records: list[dict], title: str, unit: str, scale: float, target: Path) -> None:
    """One panel for each (layer, direction) x dtype: value over length, both axes logarithmic."""
    rows = list(dict.fromkeys((r["layer"], r["direction"]) for r in records))
    dtypes = values_of(records, "dtype")
    figure, axes = grid(len(rows), len(dtypes), title)
    for i, (layer, direction) in enumerate(rows):
        for j, dtype in enumerate(dtypes):
            axis = axes[i][j]
            for peer, color in COLORS.items():
                points = [
                    (r["seqlen"], r["value"] * scale)
                    for r in records
                    if (r["layer"], r["direction"], r["dtype"], r["peer"])
                    == (layer, direction, dtype, peer)
                    and r.get("value")
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=color, label=peer)
            lengths = sorted({r["seqlen"] for r in records})
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(lengths, [str(length) for length in lengths])
            axis.set_title(f"{layer}\n{direction}, {dtype}", fontsize=9)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter("{x:,g}")
            axis.yaxis.set_tick_params(labelleft=True)
            axis.grid(alpha=0.3)
            if i == len(rows) - 1:
                axis.set_xlabel("tokens")
            if j == 0:
                axis.set_ylabel(unit)
    save(figure, target)


def plot_decode(records: list[dict], target: Path) -> None:
    """Bars of GB/s for each cache, and the memory's read bandwidth measured in the same turns."""
    dtypes = values_of(records, "dtype")
    figure, axes = grid(1, len(dtypes), "Decode: K and V read per second")
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        of_dtype = [r for r in records if r["dtype"] == dtype]
        shapes = list(dict.fromkeys((r["batch"], r["seqlen"]) for r in of_dtype))
        peers = [peer for peer in COLORS if any(r["peer"] == peer for r in of_dtype)]
        width = 0.8 / len(peers)
        for number, peer in enumerate(peers):
            for r in of_dtype:
                if r["peer"] == peer and r.get("value"):
                    x = shapes.index((r["batch"], r["seqlen"])) + width * number
                    height = r["kv_bytes"] / r["value"] / 1e9
                    axis.bar(x, height, width, color=COLORS[peer])
            axis.bar(0, 0, 0, color=COLORS[peer], label=peer)  # its entry in the legend
        ticks = [f"{batch} x\n{seqlen // 1024}k" for batch, seqlen in shapes]
        axis.set_xticks([x + 0.4 - width / 2 for x in range(len(shapes))], ticks, fontsize=8)
        axis.set_xlabel("sequences x tokens of each", fontsize=8)
        axis.set_title(dtype, fontsize=9)
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
    axes[0][0].set_ylabel("GB/s")
    save(figure, target)


def save(figure, target: Path) -> None:
    """One legend for all panels, below them: inside a panel it hides what is drawn there."""
    legend = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if legend:
        names = [name for name in COLORS if name in legend]
        handles = [legend[name] for name in names]
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw(records: list[dict], folder: Path) -> list[Path]:
    """Writes a PNG for each section that has records; returns their paths."""
    written = []
    for section, title in SWEEPS.items():
        chosen = [r for r in records if r["section"] == section]
        if chosen:
            written.append(folder / f"{section}.png")
            plot_lines(chosen, title, "ms", 1e3, written[-1])
    if chosen := [r for r in records if r["section"] == "decode"]:
        written.append(folder / "decode.png")
        plot_decode(chosen, written[-1])
    if chosen := [r for r in records if r["section"] == "memory"]:
        written.append(folder / "memory.png")
        title = "Peak memory beside inputs and outputs"
        plot_lines(chosen, title, "MB", 1e-6, written[-1])
    return written


if __name__ == "__main__":
    source = Path(sys.argv[1])
    for path in draw(json.loads(source.read_text())["records"], source.parent):
        print(path)
