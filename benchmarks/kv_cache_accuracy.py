"""What 8-bit caches cost in accuracy, on the keys and values of a trained model.

    python benchmarks/kv_cache_accuracy.py        trains the demo's model (examples/small_model.py)

Every layer's q, k and v are recorded on text that was not trained on. Its attention is computed
over a paged cache of each kind and compared with float64 attention on k and v as the model made
them (float32). q is rounded to bfloat16 first, for the reference too, so that what differs is the
cache and the kernel's own rounding, which the row of bfloat16 shows. Scales per tensor and per head
are chosen as a server would beforehand, from the largest magnitudes on other text.

Writes benchmarks/results/kv-cache/accuracy.json and .md. Errors do not depend on the machine's
speed or load; a training run on another machine may end in slightly other weights.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import torch
from torch import Tensor, nn

from sink_attention_ext import flash_attn_with_kvcache, reference, reshape_and_cache

sys.path.insert(0, str(environment.ROOT / "examples"))
import small_model as small  # noqa: E402
from transformers import AttentionInterface, GptOssForCausalLM  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "kv-cache"
PAGE_SIZE = 16
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
GPT_OSS_SHAPE = (8, 64)  # num_heads_kv, head_dim


@dataclass(frozen=True)
class Layer:
    """What a layer's attention was called with; q, k and v are (batch, seqlen, num_heads, dim)."""

    kind: str
    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor
    softmax_scale: float
    window_left: int


@dataclass(frozen=True)
class Cache:
    """A kind of cache; scales: "tensor", "head" or "token" (one for each token and head)."""

    dtype: torch.dtype
    scales: str | None = None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").removesuffix("fn")
        return dtype if self.scales is None else f"{dtype}, per {self.scales}"

    def bytes_per_token(self, num_heads_kv: int, head_dim: int) -> int:
        """Of one layer: keys, values and the scales of each token."""
        scales = 4 if self.scales == "token" else 0
        return 2 * num_heads_kv * (head_dim * self.dtype.itemsize + scales)


CACHES = (
    Cache(torch.bfloat16),
    *(Cache(dtype, scales) for dtype in LARGEST for scales in ("tensor", "head", "token")),
)


@torch.no_grad()
def record(model: GptOssForCausalLM, tokens: Tensor) -> list[Layer]:
    """Every layer of a forward over tokens (batch, seqlen)."""
    layers: dict[int, Layer] = {}

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
        q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        window_left = -1 if sliding_window is None else sliding_window - 1
        kind = "full" if sliding_window is None else "sliding"
        sinks = s_aux.detach()
        layers[module.layer_idx] = Layer(kind, q, k, v, sinks, scaling, window_left)
        out, _ = reference.attention(q, k, v, scaling, True, (window_left, 0), 0.0, s_aux)
        return out, None

    AttentionInterface.register("sink_attention_recorded", attention)
    model.set_attn_implementation("sink_attention_recorded")
    model(tokens, use_cache=False)
    model.set_attn_implementation("sink_attention")
    return [layers[i] for i in sorted(layers)]


def static_scale(cache: Cache, tokens: Tensor) -> Tensor:
    """From the largest magnitude of tokens (batch, seqlen, num_heads_kv, dim), over all or each
    head."""
    magnitude = tokens.abs().amax(dim=(0, 1, 3))
    magnitude = magnitude.amax() if cache.scales == "tensor" else magnitude
    return magnitude.float() / LARGEST[cache.dtype]


def attend(layer: Layer, cache: Cache, calibration: Layer) -> Tensor:
    """The layer's output over a paged cache that holds all its tokens, in bfloat16."""
    batch, seqlen, num_heads_kv, _ = layer.k.shape
    pages = -(-seqlen // PAGE_SIZE)
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    position = torch.arange(seqlen)
    slots = table[:, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
    caches, scales, new = [], [], []
    for x, seen in ((layer.k, calibration.k), (layer.v, calibration.v)):
        shape = (batch * pages, PAGE_SIZE, num_heads_kv, x.shape[-1])
        caches.append(torch.zeros(shape).to(cache.dtype))
        new.append(x.flatten(0, 1).to(x.dtype if cache.scales else cache.dtype))
        if cache.scales == "token":
            scales.append(torch.ones(shape[:3]))
        else:
            scales.append(static_scale(cache, seen) if cache.scales else None)
    reshape_and_cache(*new, *caches, slots.flatten(), *scales)
    return flash_attn_with_kvcache(
        layer.q.bfloat16(),
        *caches,
        cache_seqlens=seqlen,
        block_table=table,
        softmax_scale=layer.softmax_scale,
        causal=True,
        window_size=(layer.window_left, 0),
        s_aux=layer.s_aux,
        k_scale=scales[0],
        v_scale=scales[1],
    )


def exact(layer: Layer) -> Tensor:
    """float64 attention of the rounded q on k and v as they are."""
    out, _ = reference.attention(
        layer.q.bfloat16().double(),
        layer.k.double(),
        layer.v.double(),
        layer.softmax_scale,
        True,
        (layer.window_left, 0),
        0.0,
        layer.s_aux.double(),
    )
    return out


def row_errors(out: Tensor, expected: Tensor) -> Tensor:
    """|out - expected| / |expected| of each row (token, head), Euclidean norms."""
    difference = (out.double() - expected).norm(dim=-1)
    return (difference / expected.norm(dim=-1)).flatten()


def measure(layers: list[Layer], calibration: list[Layer]) -> list[dict[str, Any]]:
    """A record for each cache and kind of layer."""
    expected = [exact(layer) for layer in layers]
    records = []
    for cache in CACHES:
        errors: dict[str, list[Tensor]] = {}
        for layer, seen, out in zip(layers, calibration, expected, strict=True):
            row = row_errors(attend(layer, cache, seen), out)
            errors.setdefault(layer.kind, []).append(row)
        shape = layers[0].k.shape[2:]
        for kind, parts in errors.items():
            rows = torch.cat(parts)
            records.append(
                {
                    "cache": cache.name,
                    "layers": kind,
                    "rows": len(rows),
                    "max": float(rows.max()),
                    "rms": math.sqrt(float(rows.square().mean())),
                    "bytes_per_token": cache.bytes_per_token(*shape),
                    "bytes_per_token_gpt_oss": cache.bytes_per_token(*GPT_OSS_SHAPE),
                }
            )
    return records


def markdown(records: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    kinds = sorted({record["layers"] for record in records})
    rows = []
    for name in dict.fromkeys(record["cache"] for record in records):
        of_kind = {r["layers"]: r for r in records if r["cache"] == name}
        any_kind = next(iter(of_kind.values()))
        errors = [f"{of_kind[kind][key]:.2%}" for kind in kinds for key in ("rms", "max")]
        size = [str(any_kind[key]) for key in ("bytes_per_token", "bytes_per_token_gpt_oss")]
        rows.append([name, *errors, *size])
    errors = [f"{kind} layers, {key}" for kind in kinds for key in ("RMS", "max")]
    columns = ["cache", *errors, "bytes a token", "at GPT-OSS's shape"]
    counts = ", ".join(
        f"{record['rows']} in {record['layers']} layers" for record in records[: len(kinds)]
    )
    lines = [
        "# Accuracy of quantised KV caches",
        "",
        "Written by `python benchmarks/kv_cache_accuracy.py`. Relative error of an output row (one",
        "token, one head), |out - exact| / |exact|: root mean square and largest over all rows",
        f"({counts}).",
        "exact: float64 attention on k and v as the model made them, q in bfloat16 as everywhere",
        "here. The row of bfloat16 is what 16-bit caches and results cost. Bytes are of one layer,",
        "keys, values and scales of each token: of the model measured, and of GPT-OSS",
        f"({GPT_OSS_SHAPE[0]} kv heads, head_dim {GPT_OSS_SHAPE[1]}).",
        "",
        *(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows]),
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="training steps (600)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    described = environment.describe(torch.device("cpu"))
    keys = ("date", "command", "commit", "torch", "transformers")
    facts: dict[str, Any] = {key: described[key] for key in keys}
    facts["kernels"] = described["instruction set of sink_attention_ext"]

    text, held_out = small.load_text()
    model = small.make_model()
    small.train(model, text, args.steps)
    facts["model"] = (
        f"GPT-OSS, {model.num_parameters() / 1e6:.1f} million parameters, {args.steps} steps, "
        f"held-out loss {small.held_out_loss(model, held_out):.2f} nats per byte"
    )
    facts["text"] = "8 sequences of 512 bytes; scales per tensor and head from 8 others"
    records = measure(
        record(model, held_out[: 8 * 512].view(8, 512)), record(model, text[: 8 * 512].view(8, 512))
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "accuracy.json").write_text(
        json.dumps({"environment": facts, "records": records}, indent=1) + "\n"
    )
    report = markdown(records, facts)
    (args.out / "accuracy.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
