"""How much memory does a cache take while one sequence of 200,000 tokens is decoded?

    python benchmarks/long_decode.py --out DIR

A windowed layer (GPT-OSS's 128 tokens) and a full one, each in a process of its own, so that the
resident memory is that layer's. Every token is appended and written. The windowed layer attends at
every token, the full one where outputs are compared, since each of its steps reads all before it.
They are compared with reference.attention in float64 over the whole history, which lies in memory
before the run starts and so counts in no curve.

Memory is counted, not timed: other programs on the machine do not change it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from environment import ROOT, describe
from memory import MALLOC, resident_bytes
from report import markdown_table

from sink_attention_ext import PagedKVCache, reference

NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM, PAGE_SIZE, WINDOW = 8, 2, 64, 16, 128
LAYERS = {"windowed": (WINDOW - 1, 0), "full": (-1, -1)}
COLORS = {"windowed": "#c1272d", "full": "#0072b2"}
NAMES = {"windowed": f"window of {WINDOW} tokens", "full": "full layer"}
SAMPLES, COMPARISONS = 200, 20


def is_among(token: int, num_tokens: int, count: int) -> bool:
    """Whether a token is one of about `count`, the first and the last among them."""
    return (token + 1) % max(1, num_tokens // count) == 0 or token in (0, num_tokens - 1)


def measure_here(layer: str, num_tokens: int) -> dict:
    """One layer in this process, which should be fresh."""
    window_size = LAYERS[layer]
    torch.manual_seed(0)
    history_k, history_v = torch.randn(2, num_tokens, NUM_HEADS_KV, HEAD_DIM)
    s_aux = torch.randn(NUM_HEADS_Q)
    full_pages = -(-num_tokens // PAGE_SIZE)
    cache = PagedKVCache(
        [window_size],
        num_heads_kv=NUM_HEADS_KV,
        head_dim=HEAD_DIM,
        page_size=PAGE_SIZE,
        num_pages=full_pages,  # the same pool for both: what is not used is never touched
        max_num_seqs=1,
        max_seqlen=num_tokens,
        max_num_batched_tokens=1,
        dtype=torch.float32,
    )
    group = window_size[0]
    seq = cache.allocate()
    records, worst = [], 0.0
    start = None
    for token in range(num_tokens):
        step = cache.append([seq])
        new = slice(token, token + 1)
        step.write(0, history_k[new], history_v[new])
        is_compared = is_among(token, num_tokens, COMPARISONS)
        if layer == "windowed" or is_compared:
            q = torch.randn(1, NUM_HEADS_Q, HEAD_DIM)
            out = step.attend(0, q, s_aux=s_aux)
        if is_compared:
            k, v = (x[None, : token + 1].double() for x in (history_k, history_v))
            expected, _ = reference.attention(
                q[None].double(), k, v, causal=True, window_size=window_size, s_aux=s_aux.double()
            )
            worst = max(worst, (out.double() - expected[0]).abs().max().item())
            del k, v, expected
        if is_among(token, num_tokens, SAMPLES):
            stats, resident = cache.stats()[group], resident_bytes("VmRSS")
            start = resident if start is None else start
            records.append(
                {
                    "tokens": token + 1,
                    "pages": stats.num_used_pages,
                    "bytes": stats.used_bytes,
                    "rss": resident - start,
                }
            )
    return {"layer": layer, "records": records, "max_error": worst}


def measure(layer: str, num_tokens: int) -> dict:
    command = [sys.executable, __file__, "--layer", layer, "--tokens", str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | MALLOC)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def draw(runs: list[dict], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    titles = {"bytes": "Pages in use", "rss": "Resident memory since the first token"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for run in runs:
            points = [(r["tokens"] / 1e3, r[key] / 1e6) for r in run["records"]]
            name, color = NAMES[run["layer"]], COLORS[run["layer"]]
            axis.plot(*zip(*points, strict=True), color=color, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("thousand tokens")
        axis.set_ylabel("MB")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def write_report(environment: dict, runs: list[dict], num_tokens: int) -> str:
    rows = []
    for run in runs:
        records = run["records"]
        early = next(r for r in records if r["tokens"] > WINDOW)
        rows.append(
            [
                NAMES[run["layer"]],
                f"{early['pages']} after {early['tokens']} tokens",
                str(records[-1]["pages"]),
                str(max(r["pages"] for r in records)),
                f"{records[-1]['bytes'] / 1e6:.3f} MB",
                f"{records[-1]['rss'] / 1e6:.1f} MB",
                f"{run['max_error']:.1e}",
            ]
        )
    columns = [
        "layer",
        "pages early",
        "pages at the end",
        "most pages at a sample",
        "bytes at the end",
        "resident memory since the first token",
        "max error against the full history",
    ]
    measured = markdown_table(
        ["measured on", ""], [[name, str(value)] for name, value in environment.items()]
    )
    return f"""# Decoding {num_tokens:,} tokens

{measured}

One sequence, token by token, through `PagedKVCache`: {NUM_HEADS_Q} query heads, {NUM_HEADS_KV} kv
heads, head_dim {HEAD_DIM}, fp32, pages of {PAGE_SIZE} tokens, a sink for each head. Each layer in a
process of its own. `benchmarks/long_decode.py` says how memory is counted; outputs are compared at
{COMPARISONS + 1} positions.

{markdown_table(columns, rows)}

![memory over tokens](long_decode.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks" / "long-decode")
    parser.add_argument("--layer", choices=LAYERS, help=argparse.SUPPRESS)  # the child process
    options = parser.parse_args()
    if options.layer:
        print(json.dumps(measure_here(options.layer, options.tokens)))
        return
    environment = describe(torch.device("cpu"))
    runs = [measure(layer, options.tokens) for layer in LAYERS]
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment, "runs": runs}
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    report = write_report(environment, runs, options.tokens)
    (options.out / "results.md").write_text(report)
    draw(runs, options.out / "long_decode.png")
    print(report)


if __name__ == "__main__":
    main()
