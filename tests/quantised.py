"""Paged caches of 8-bit elements, and what attention over them should be.

The oracle is reference.quantise, what a cache should hold byte for byte, and reference.attention on
the numbers that it then stands for. Slots that are not in use hold garbage, and so do their scales.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import oracle
import tolerance
import torch
from backends import Backend
from cases import FLOAT8, PagedCase, PagedInputs
from test_paged import attend
from torch import Tensor

from sink_attention_ext import reference

INT8 = torch.int8
STORED = (FLOAT8, INT8)
LARGEST = {FLOAT8: 448.0, INT8: 127.0}
KINDS = ("tensor", "head", "token")  # what has a scale of its own


def static_scale(kind: str, num_heads: int, rng: torch.Generator, stored: torch.dtype) -> Tensor:
    """For standard normal numbers."""
    shape = {"tensor": (), "head": (num_heads,)}[kind]
    return (torch.rand(shape, generator=rng) * 0.5 + 3.5) / LARGEST[stored]


def garbage_like(cache: Tensor) -> Tensor:
    """NaN where the dtype has it, else -128, which no write leaves."""
    return torch.full_like(cache, -128 if cache.dtype == INT8 else cases.NAN)


def quantise_inputs(
    case: PagedCase, inputs: PagedInputs, kind: str, stored: torch.dtype
) -> PagedInputs:
    """The same tokens in a quantised cache; inputs.k and .v become what it stands for, float64."""
    rng = cases.generator(case.seed + 1)
    changes: dict[str, Any] = {}
    for name in ("k", "v"):
        cache = getattr(inputs, f"{name}_cache").cpu()
        # Slots beyond a sequence are NaN there: their scales are to be garbage too.
        scale = None if kind == "token" else static_scale(kind, case.num_heads_kv, rng, stored)
        numbers, scales = reference.quantise(cache, stored, scale)
        is_unused = cache.isnan().all(-1)
        numbers = torch.where(is_unused[..., None], garbage_like(numbers), numbers)
        if kind == "token":
            scales = torch.where(is_unused, cases.NAN, scales)
        tokens = []
        for x in getattr(inputs, name):
            row, row_scale = reference.quantise(x.cpu(), stored, scale)
            factor = row_scale[..., None] if kind == "token" else row_scale.reshape(-1, 1)
            tokens.append(row.double() * factor.double())
        if case.heads_first:
            numbers = numbers.transpose(1, 2).contiguous().transpose(1, 2)
            scales = (
                scales.transpose(1, 2).contiguous().transpose(1, 2) if kind == "token" else scales
            )
        device = inputs.q.device
        changes[name] = tokens
        changes[f"{name}_cache"] = numbers.to(device)
        changes[f"{name}_scale"] = scales.to(device)
    return replace(inputs, **changes)


def empty_caches(
    stored: torch.dtype,
    dims: tuple[int, int],
    num_heads: int,
    page_size: int,
    num_pages: int,
    heads_first: bool,
    device: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Garbage everywhere, in the scales of each token too."""
    caches, scales = [], []
    for dim in dims:
        shape = (num_pages, page_size, num_heads, dim)
        if heads_first:
            shape = (num_pages, num_heads, page_size, dim)
        cache = torch.zeros(shape, device=device).to(stored)
        cache = garbage_like(cache.float()).to(stored) if stored == FLOAT8 else garbage_like(cache)
        scale = torch.full(shape[:3], cases.NAN, device=device)
        caches.append(cache.transpose(1, 2) if heads_first else cache)
        scales.append(scale.transpose(1, 2) if heads_first else scale)
    return caches, scales


def read_as(
    backend: Backend, case: PagedCase, kind: str, stored: torch.dtype, tokens: list[Tensor]
) -> list[Tensor]:
    """What a backend reads. On CUDA a token's values are multiplied with its scale, then rounded to
    q's dtype. Hopper's decode multiplies scores and P instead, and rounds nothing."""
    if kind == "token" and backend.name != "cpu" and not backend.hopper_takes(case, stored):
        return [x.to(case.dtype).double() for x in tokens]
    return tokens


def expected(case: PagedCase, inputs: PagedInputs, k: list[Tensor], v: list[Tensor]) -> Any:
    starts = cases.ends(case.seqlens_q)
    rows = (inputs.q if case.packed_q else inputs.q.flatten(0, 1)).cpu()
    s_aux = None if inputs.s_aux is None else inputs.s_aux.cpu()

    def compute(dtype: torch.dtype) -> oracle.Results:
        outs, lses = [], []
        for b, (keys, values) in enumerate(zip(k, v, strict=True)):
            out, lse = reference.attention(
                rows[None, starts[b] : starts[b + 1]].to(dtype),
                keys[None].to(dtype),
                values[None].to(dtype),
                s_aux=s_aux if s_aux is None or dtype != torch.float64 else s_aux.double(),
                **case.options(),
            )
            outs.append(out[0])
            lses.append(lse[0])
        return oracle.joined(case, outs, lses)

    return oracle.Expected(compute(torch.float64), compute(case.dtype), {})


def check_read(backend: Backend, case: PagedCase, kind: str, stored: torch.dtype) -> None:
    case = backend.fitting(case, stored)
    inputs = quantise_inputs(case, cases.make_paged(case, backend.device), kind, stored)
    k, v = (read_as(backend, case, kind, stored, x) for x in (inputs.k, inputs.v))
    tolerance.check(attend(backend, case, inputs), expected(case, inputs, k, v), case.softcap)
