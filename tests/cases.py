"""The cases of the test matrix and the inputs that they stand for.

A case is a small frozen dataclass; its inputs are made on the CPU from its seed, the same on every
machine and for every backend. Whatever a kernel must not use is filled with NaN: the gaps between
padded rows, packed rows in no sequence, keys beyond seqused_k, cache slots beyond a sequence.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

INF = float("inf")
NAN = float("nan")
HALF_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (torch.float64, torch.float32, *HALF_DTYPES)
FLOAT8 = torch.float8_e4m3fn

# Lengths around which the kernels' vectors, strips, panels, tiles and blocks end.
EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
LONG_EDGES = (*EDGES, 191, 192, 193, 255, 256, 257, 383, 384, 385, 511, 512, 513, 767, 769)

SINKS: dict[str, Callable[[Tensor], Tensor | None]] = {  # from standard normal values
    "none": lambda z: None,
    "normal": lambda z: z,
    "4randn": lambda z: 4 * z,
    "15rand": lambda z: 15 * torch.special.ndtr(z),
    "above": lambda z: 1e4 + z,
    "below": lambda z: -1e4 + z,
    "inf": lambda z: torch.full_like(z, INF),
    "-inf": lambda z: torch.full_like(z, -INF),
    "mixed": lambda z: torch.stack(
        [(x, x + 1e4, x - 1e4, x * 0 + INF, x * 0 - INF)[i % 5] for i, x in enumerate(z)]
    ),
}
LAYOUTS = ("contiguous", "padded", "transposed", "broadcast", "unaligned")


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """What dense, packed and paged attention have in common."""

    num_heads_q: int = 2
    num_heads_kv: int = 1
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int | None, int | None] = (-1, -1)
    softcap: float = 0.0
    num_sink_tokens: int = 0
    sink: str = "normal"
    sink_dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def dim_v(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    def options(self) -> dict[str, Any]:
        options = {
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
        }
        if self.num_sink_tokens > 0:  # not every function has it
            options["num_sink_tokens"] = self.num_sink_tokens
        return options

    def __str__(self) -> str:
        """The fields that differ from their defaults; a test's id."""
        parts = []
        for name, field in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if value != field.default:
                value = str(value).removeprefix("torch.").replace(" ", "")
                parts.append(f"{name}={value}")
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class DenseCase(AttentionCase):
    seqlen_q: int
    seqlen_k: int
    batch: int = 1
    layout: str = "contiguous"


@dataclass(frozen=True, kw_only=True)
class VarlenCase(AttentionCase):
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    unused_k: tuple[int, ...] | None = None  # keys of each sequence beyond seqused_k
    extra_rows: int = 0  # rows of q, k and v that are in no sequence
    layout: str = "contiguous"


@dataclass(frozen=True, kw_only=True)
class PagedCase(AttentionCase):
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    page_size: int = 16
    packed_q: bool = False
    heads_first: bool = False  # cache strides (page, head, slot, dim)
    float8: str | None = None  # "scalar", "one" or "per head": the shape of the scales
    num_splits: int = 0
    tree: bool = False  # the queries are draft tokens, with a tree mask


@dataclass(frozen=True)
class Inputs:
    """Dense or packed; dout and dlse are what the results' gradients are taken with."""

    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor | None
    dout: Tensor
    dlse: Tensor
    lengths: tuple[Any, ...] = ()  # cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    seqused_k: Tensor | None = None


@dataclass(frozen=True)
class PagedInputs:
    q: Tensor
    k: list[Tensor]  # of each sequence, (seqlen_k, num_heads_kv, head_dim), as the cache holds it
    v: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seqlens_k: Tensor
    s_aux: Tensor | None
    cu_seqlens_q: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def max_seqlen_q(self) -> int | None:
        """The longest packed sequence; None where they are not packed."""
        if self.cu_seqlens_q is None:
            return None
        return int(self.cu_seqlens_q.diff().max()) if len(self.cu_seqlens_q) > 1 else 0


def int32(values: Sequence[Any], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def ends(lengths: Sequence[int]) -> list[int]:
    """cu_seqlens of lengths."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: Sequence[int], rng: torch.Generator, dtype: torch.dtype) -> Tensor:
    """The same values in every dtype, up to its rounding."""
    return torch.randn(tuple(shape), generator=rng, dtype=torch.float64).to(dtype)


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values (but for broadcast) in other memory; rows are (..., heads, dim)."""
    *outer, heads, dim = tensor.shape
    if layout == "contiguous" or tensor.numel() == 0:
        return tensor
    if layout == "padded":  # gaps of NaN behind rows and between tokens
        base = tensor.new_full((*outer, heads + 1, dim + 3), NAN)
        base[..., :heads, :dim] = tensor
        return base[..., :heads, :dim]
    if layout == "transposed":  # heads before tokens
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "broadcast":  # stride 0 over the batch, or over heads where there is none
        if len(outer) == 2 and outer[0] > 1:
            return tensor[:1].expand_as(tensor)
        return tensor[..., :1, :].expand_as(tensor)
    if layout == "unaligned":  # one number after an aligned address
        base = tensor.new_full((tensor.numel() + 1,), NAN)
        base[1:] = tensor.flatten()
        return base[1:].view(tensor.shape)
    raise ValueError(layout)


def make_sinks(case: AttentionCase, rng: torch.Generator) -> Tensor | None:
    sinks = SINKS[case.sink](normal((case.num_heads_q,), rng, torch.float64))
    return None if sinks is None else sinks.to(case.sink_dtype)


def _query_factor(case: AttentionCase) -> float:
    """So that scores reach into the bend of the softcap."""
    return case.softcap / 4 if case.softcap > 0 else 1.0


def make_dense(case: DenseCase, device: torch.device | str = "cpu") -> Inputs:
    rng = generator(case.seed)
    shape_q = (case.batch, case.seqlen_q, case.num_heads_q)
    shape_k = (case.batch, case.seqlen_k, case.num_heads_kv)
    q = normal((*shape_q, case.head_dim), rng, case.dtype) * _query_factor(case)
    k = normal((*shape_k, case.head_dim), rng, case.dtype)
    v = normal((*shape_k, case.dim_v), rng, case.dtype)
    dout = normal((*shape_q, case.dim_v), rng, case.dtype)
    lse_dtype = torch.promote_types(case.dtype, torch.float32)
    dlse = normal((case.batch, case.num_heads_q, case.seqlen_q), rng, lse_dtype)
    q, k, v, dout = (with_layout(x.to(device), case.layout) for x in (q, k, v, dout))
    s_aux = make_sinks(case, rng)
    return Inputs(q, k, v, _to(s_aux, device), dout, dlse.to(device))


def make_varlen(case: VarlenCase, device: torch.device | str = "cpu") -> Inputs:
    rng = generator(case.seed)
    unused_k = case.unused_k or (0,) * len(case.seqlens_k)
    ends_q = ends(case.seqlens_q)
    ends_k = ends([used + unused for used, unused in zip(case.seqlens_k, unused_k, strict=True)])
    rows_q, rows_k = ends_q[-1] + case.extra_rows, ends_k[-1] + case.extra_rows
    q = normal((rows_q, case.num_heads_q, case.head_dim), rng, case.dtype) * _query_factor(case)
    k = normal((rows_k, case.num_heads_kv, case.head_dim), rng, case.dtype)
    v = normal((rows_k, case.num_heads_kv, case.dim_v), rng, case.dtype)
    dout = normal((rows_q, case.num_heads_q, case.dim_v), rng, case.dtype)
    lse_dtype = torch.promote_types(case.dtype, torch.float32)
    dlse = normal((case.num_heads_q, rows_q), rng, lse_dtype)

    for rows in (q, dout, dlse.T):
        rows[ends_q[-1] :] = NAN
    for b, unused in enumerate(unused_k):
        k[ends_k[b + 1] - unused : ends_k[b + 1]] = NAN
        v[ends_k[b + 1] - unused : ends_k[b + 1]] = NAN
    k[ends_k[-1] :] = NAN
    v[ends_k[-1] :] = NAN

    q, k, v, dout = (with_layout(x.to(device), case.layout) for x in (q, k, v, dout))
    lengths_k = [end - start for start, end in zip(ends_k, ends_k[1:], strict=False)]
    lengths = (
        int32(ends_q, device),
        int32(ends_k, device),
        max(case.seqlens_q, default=0),
        max(lengths_k, default=0),
    )
    seqused_k = None if case.unused_k is None else int32(case.seqlens_k, device)
    s_aux = _to(make_sinks(case, rng), device)
    return Inputs(q, k, v, s_aux, dout, dlse.to(device), lengths, seqused_k)


def make_paged(case: PagedCase, device: torch.device | str = "cpu") -> PagedInputs:
    """Pages in random order; NaN in every slot, and garbage in every entry, that is not in use."""
    rng = generator(case.seed)
    batch, heads, page_size = len(case.seqlens_k), case.num_heads_kv, case.page_size
    k = [normal((n, heads, case.head_dim), rng, case.dtype) for n in case.seqlens_k]
    v = [normal((n, heads, case.dim_v), rng, case.dtype) for n in case.seqlens_k]
    k_scale, k = _quantise(case, k, rng)
    v_scale, v = _quantise(case, v, rng)

    pages_used = [-(-n // page_size) for n in case.seqlens_k]
    num_pages = sum(pages_used) + 3
    order = torch.randperm(num_pages, generator=rng).tolist()
    garbage = [-1, num_pages, 2**31 - 1, -(2**31), 0]
    width = max(pages_used, default=0) + 2
    table = [
        [order.pop() if i < pages_used[b] else garbage[(i + b) % 5] for i in range(width)]
        for b in range(batch)
    ]
    caches = []
    for tokens, dim in ((k, case.head_dim), (v, case.dim_v)):
        dtype = FLOAT8 if case.float8 else case.dtype
        shape = (num_pages, page_size, heads, dim)
        if case.heads_first:
            shape = (num_pages, heads, page_size, dim)
        cache = torch.full(shape, NAN).to(dtype)
        cache = cache.transpose(1, 2) if case.heads_first else cache
        for b, rows in enumerate(tokens):
            for i in range(pages_used[b]):
                page = rows[i * page_size : (i + 1) * page_size]
                cache[table[b][i], : len(page)] = page
        caches.append(cache.to(device))

    rows_q = sum(case.seqlens_q)
    q = normal((rows_q, case.num_heads_q, case.head_dim), rng, case.dtype) * _query_factor(case)
    if not case.packed_q:
        q = q.unflatten(0, (batch, case.seqlens_q[0]))
    return PagedInputs(
        q.to(device),
        [x.to(device) for x in k],
        [x.to(device) for x in v],
        *caches,
        int32(table, device).reshape(batch, width),
        int32(case.seqlens_k, device),
        _to(make_sinks(case, rng), device),
        int32(ends(case.seqlens_q), device) if case.packed_q else None,
        _to(k_scale, device),
        _to(v_scale, device),
    )


def _quantise(
    case: PagedCase, tokens: list[Tensor], rng: torch.Generator
) -> tuple[Tensor | None, list[Tensor]]:
    """Scales and the float8 elements of a cache; without float8 None and the tokens."""
    if case.float8 is None:
        return None, tokens
    shape = {"scalar": (), "one": (1,), "per head": (case.num_heads_kv,)}[case.float8]
    scale = torch.rand(shape, generator=rng) * 0.5 + 0.25
    return scale, [(x.float() / scale.reshape(-1, 1)).to(FLOAT8) for x in tokens]


def _to(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


# ---- drawing ----


def draw(count: int, seed: int, **choices: Sequence[Any]) -> list[dict[str, Any]]:
    """`count` combinations in which every choice of every field comes equally often, shuffled
    independently: each value meets many values of every other field. (Of more choices than `count`,
    the ones that come depend on the seed.)"""
    rng = random.Random(seed)
    columns = {}
    for name, values in choices.items():
        start = rng.randrange(len(values))
        column = [values[(start + i) % len(values)] for i in range(count)]
        rng.shuffle(column)
        columns[name] = column
    return [{name: columns[name][i] for name in columns} for i in range(count)]


def heads(num_heads_q: int, num_heads_kv: int) -> dict[str, int]:
    return {"num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv}


MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"causal": True, "window_size": (127, 0)},
    {"causal": True, "window_size": (16, -1)},
    {"window_size": (40, None)},
    {"window_size": (None, 17)},
    {"window_size": (63, 64)},
    {"window_size": (0, 0)},
    {"window_size": (10**6, 3)},
)


def merged(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields whose values are dicts (masks, heads) spread into the others."""
    result: dict[str, Any] = {}
    for name, value in fields.items():
        result.update(value if isinstance(value, dict) else {name: value})
    return result


@lru_cache(maxsize=64)
def is_visible_literally(case: DenseCase) -> Tensor:
    """(seqlen_q, seqlen_k) bool, key by key as the specification says it."""
    left, right = (-1 if bound is None else bound for bound in case.window_size)
    if case.causal:
        right = 0
    visible = torch.zeros(case.seqlen_q, case.seqlen_k, dtype=torch.bool)
    for i in range(case.seqlen_q):
        p = i + case.seqlen_k - case.seqlen_q
        for j in range(case.seqlen_k):
            in_window = left == -1 or p - left <= j or j < case.num_sink_tokens
            visible[i, j] = in_window and (right == -1 or j <= p + right)
    return visible
