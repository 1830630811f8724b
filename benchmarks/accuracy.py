"""How large are the errors, over the number of keys and of query rows?

    python benchmarks/accuracy.py            a few minutes; measures no time

Ours (every instruction set of this machine), torch's SDPA, which has no sink, and eager softmax
with the sink as another column, as transformers computes it, against float64 on the same inputs.
An error is the largest difference over the largest number of the float64 result; of several seeds,
the largest. Two kinds of inputs: normal, with values and dout around 1, and equal, where all keys
and all values are the same, so that the roundings of a sum all point the same way. There dq and dk
are 0 but for rounding, and are left out.

Writes benchmarks/results/accuracy/results.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sink_attention_ext import flash_attn_func, flash_attn_with_kvcache, ops

RESULTS = Path(__file__).resolve().parent / "results" / "accuracy"
DIM = 64
SEEDS = 3
LENGTHS = (256, 1024, 4096, 16384, 65536, 131072)
SINK = 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SDPA, EAGER = "SDPA (no sink)", "eager (sink)"
FIELDS = ("out", "lse", "dq", "dk", "dv", "ds_aux")

Results = dict[str, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Question:
    name: str
    title: str
    rows: Callable[[int], int]  # of the length in the table
    keys: Callable[[int], int]
    fields: tuple[str, ...]
    is_decode: bool = False


QUESTIONS = (
    Question("keys", "8 query rows over many keys", lambda n: 8, lambda n: n, FIELDS),
    Question(
        "rows", "64 keys under many query rows", lambda n: n, lambda n: 64, ("dk", "dv", "ds_aux")
    ),
    Question(
        "decode", "decode: one row over many keys", lambda n: 1, lambda n: n, ("out", "lse"), True
    ),
)


@dataclass(frozen=True)
class Inputs:
    """(1, rows or keys, 1 head, DIM), and the sink (1,)"""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    s_aux: Tensor


def make_inputs(kind: str, rows: int, keys: int, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, around: float, equal: bool) -> Tensor:
        if not equal:
            return around + torch.randn(1, count, 1, DIM, generator=generator)
        row = around + 0.1 * torch.randn(1, 1, 1, DIM, generator=generator)
        return row.expand(1, count, 1, DIM).contiguous()

    equal_keys, equal_rows = kind == "equal", kind == "equal" and rows > keys
    tensors = (
        draw(rows, 0, equal_rows),
        draw(keys, 0, equal_keys),
        draw(keys, 1, equal_keys),
        draw(rows, 1, equal_rows),
    )
    return Inputs(*(x.to(dtype) for x in tensors), torch.tensor([SINK]))


def run(attend: Attend, inputs: Inputs, dtype: torch.dtype, backward: bool) -> Results:
    leaves = [x.to(dtype) for x in (inputs.q, inputs.k, inputs.v)]
    leaves.append(inputs.s_aux.to(torch.promote_types(dtype, torch.float32)))
    leaves = [x.detach().requires_grad_(backward) for x in leaves]
    out, lse = attend(*leaves)
    results = {"out": out.detach()} | ({} if lse is None else {"lse": lse.detach()})
    if backward:
        gradients = torch.autograd.grad(out, leaves, inputs.dout.to(dtype), allow_unused=True)
        named = zip(("dq", "dk", "dv", "ds_aux"), gradients, strict=True)
        results |= {name: tensor for name, tensor in named if tensor is not None}
    return results


def ours(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    return flash_attn_func(q, k, v, s_aux=s_aux, return_lse=True)


def ours_without_sink(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    return flash_attn_func(q, k, v, return_lse=True)


def decode(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    return flash_attn_with_kvcache(
        q, k, v, cache_seqlens=k.shape[1], s_aux=s_aux, return_lse=True, num_splits=1
    )


def decode_without_sink(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    return flash_attn_with_kvcache(q, k, v, cache_seqlens=k.shape[1], return_lse=True, num_splits=1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, None]:
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2), None


def eager(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' GPT-OSS: logits with the sink's column, less their maximum, softmax."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) * DIM**-0.5
    sinks = s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1).to(logits.dtype)
    logits = torch.cat([logits, sinks], dim=-1)
    shifted = logits - logits.max(dim=-1, keepdim=True).values
    weights = shifted.softmax(dim=-1)[..., :-1]
    return (weights @ v).transpose(1, 2), logits.logsumexp(dim=-1)


def exact_without_sink(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    """eager in float64, the sink too small to count."""
    return eager(q, k, v, torch.full_like(s_aux, -math.inf))


def error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.abs().max())


def measured(question: Question, kind: str, field: str) -> bool:
    is_noise = kind == "equal" and (field == "dk" or (field == "dq" and question.name == "keys"))
    return field in question.fields and not is_noise


def records_of(question: Question, dtype: str, kind: str, length: int) -> Iterator[dict[str, Any]]:
    """The largest errors over the seeds, a record for each who and field."""
    worst: dict[tuple[str, str], float] = {}
    backward = not question.is_decode
    names = ops.cpu_instruction_sets().split(",")
    for seed in range(SEEDS):
        rows, keys = question.rows(length), question.keys(length)
        inputs = make_inputs(kind, rows, keys, DTYPES[dtype], seed)
        exact = run(eager, inputs, torch.float64, backward)
        exact_plain = run(exact_without_sink, inputs, torch.float64, backward)
        found = {
            SDPA: (run(sdpa, inputs, DTYPES[dtype], backward), exact_plain),
            EAGER: (run(eager, inputs, DTYPES[dtype], backward), exact),
        }
        plain, with_sink = (
            (decode_without_sink, decode) if question.is_decode else (ours_without_sink, ours)
        )
        for name in names:
            ops.set_cpu_instruction_set(name)
            found[f"{name}, no sink"] = (run(plain, inputs, DTYPES[dtype], backward), exact_plain)
            found[f"{name}, sink"] = (run(with_sink, inputs, DTYPES[dtype], backward), exact)
        for who, (results, expected) in found.items():
            for field, tensor in results.items():
                if not measured(question, kind, field):
                    continue
                largest = max(worst.get((who, field), 0.0), error(tensor, expected[field]))
                worst[who, field] = largest
    for (who, field), largest in worst.items():
        yield {
            "question": question.name,
            "dtype": dtype,
            "inputs": kind,
            "length": length,
            "who": who,
            "field": field,
            "error": largest,
        }


def table(records: list[dict[str, Any]], field: str, lengths: list[int]) -> list[str]:
    errors = {(r["who"], r["length"]): r["error"] for r in records if r["field"] == field}
    rows = [
        [who, *(f"{errors[who, n]:.1e}" for n in lengths)]
        for who in dict.fromkeys(who for who, _ in errors)
    ]
    head = [field, *(f"{n:,}" for n in lengths)]
    return [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]] + [""]


def markdown(records: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lengths = sorted({record["length"] for record in records})
    lines = [
        "# Accuracy over length",
        "",
        "Written by `python benchmarks/accuracy.py`. Largest error over the largest number of the",
        f"float64 result, of {SEEDS} seeds; one head of {DIM}, softmax scale 1/8, sink {SINK}.",
        "normal: standard normal q and k, v and dout around 1. equal: all keys and all values are",
        "the same, and under many rows all rows. SDPA is to be set beside our rows without a sink,",
        "eager beside those with one.",
        "",
    ]
    for question in QUESTIONS:
        for dtype in DTYPES:
            for kind in ("normal", "equal"):
                of_case = [
                    r
                    for r in records
                    if (r["question"], r["dtype"], r["inputs"]) == (question.name, dtype, kind)
                ]
                if not of_case:
                    continue
                lines += [f"## {question.title}: {dtype}, {kind}", ""]
                for field in question.fields:
                    if any(r["field"] == field for r in of_case):
                        lines += table(of_case, field, lengths)
    return "\n".join(lines + [f"- {name}: {value}" for name, value in facts.items()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="leave out what is longer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    described = environment.describe(torch.device("cpu"))
    keys = ("date", "command", "commit", "cpu", "instruction set of torch", "torch")
    facts: dict[str, Any] = {key: described[key] for key in keys}
    facts["instruction sets measured"] = ops.cpu_instruction_sets().replace(",", ", ")
    before = ops.cpu_instruction_set()
    records = [
        record
        for question in QUESTIONS
        for dtype in DTYPES
        for kind in ("normal", "equal")
        for length in LENGTHS
        if length <= args.longest
        for record in records_of(question, dtype, kind, length)
    ]
    ops.set_cpu_instruction_set(before)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(
        json.dumps({"environment": facts, "records": records}, indent=1) + "\n"
    )
    report = markdown(records, facts)
    (args.out / "results.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
