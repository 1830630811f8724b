"""A fixed num_splits: a token's result has the same bits whatever is computed beside it.

A sequence alone, in a batch, at another place of the batch, prefilled whole or in chunks, decoded
token by token, wherever its pages lie: out and lse are compared bit for bit. That training gives
the same bits is in test_paged_calls.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cases
import pytest
import torch
from backends import Backend
from cases import NAN, SINKS, PagedCase, ends, generator, int32, normal
from test_paged import attend
from torch import Tensor

pytestmark = pytest.mark.sm90

LENGTHS = (75, 4, 130)  # of the sequences; the first is looked at
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Setting:
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    page_size: int
    sink: str
    options: dict[str, Any]


SETTINGS = (
    Setting(8, 1, 64, 16, "normal", {"causal": True}),
    Setting(4, 2, 24, 1, "mixed", {"causal": True, "window_size": (19, 0)}),
    Setting(3, 3, 72, 16, "none", {"causal": True, "softcap": 3.0}),
    Setting(2, 1, 136, 1, "normal", {"causal": True, "window_size": (40, 0), "softcap": 8.0}),
)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
settings = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"head_dim{s.head_dim}")


@dataclass(frozen=True, eq=False)
class Tokens:
    """A sequence's, (seqlen, heads, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor

    def __len__(self) -> int:
        return self.q.shape[0]


def fitting(backend: Backend, setting: Setting) -> Setting:
    return replace(setting, head_dim=backend.fitting_dim(setting.head_dim))


def make_sequences(setting: Setting, dtype: torch.dtype, device: str) -> list[Tokens]:
    rng = generator(1)
    heads = (setting.num_heads_q, setting.num_heads_kv, setting.num_heads_kv)
    return [
        Tokens(*(normal((n, h, setting.head_dim), rng, dtype).to(device) for h in heads))
        for n in LENGTHS
    ]


def make_sinks(setting: Setting, device: str) -> Tensor | None:
    sinks = SINKS[setting.sink](normal((setting.num_heads_q,), generator(2), torch.float64))
    return None if sinks is None else sinks.float().to(device)


def serve(
    backend: Backend, setting: Setting, sequences: Sequence[Tokens], chunk: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) of each sequence, after appending `chunk` tokens of all of them at a time to a
    cache whose pages are in an order of `seed`. A sequence that has ended gets no more tokens."""
    device, size = backend.device, setting.page_size
    pages = [-(-len(tokens) // size) for tokens in sequences]
    order = torch.randperm(sum(pages), generator=generator(seed)).tolist()
    table = [[order.pop() if i < n else -1 for i in range(max(pages))] for n in pages]
    shape = (sum(pages), size, setting.num_heads_kv, setting.head_dim)
    k_cache, v_cache = (
        torch.full(shape, NAN, dtype=sequences[0].q.dtype, device=device) for _ in range(2)
    )
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sequences]
    for start in range(0, max(map(len, sequences)), chunk):
        before = [min(start, len(tokens)) for tokens in sequences]
        news = [
            [x[n : n + chunk] for x in (t.q, t.k, t.v)]
            for n, t in zip(before, sequences, strict=True)
        ]
        starts = ends([len(new[0]) for new in news])
        out, lse = backend.flash_attn_with_kvcache(
            torch.cat([new[0] for new in news]),
            k_cache,
            v_cache,
            torch.cat([new[1] for new in news]),
            torch.cat([new[2] for new in news]),
            int32(before, device),
            int32(table, device),
            int32(starts, device),
            max_seqlen_q=chunk,
            s_aux=make_sinks(setting, device),
            num_splits=1,
            **setting.options,
        )
        for part, begin, end in zip(parts, starts, starts[1:], strict=False):
            part.append((out[begin:end], lse[:, begin:end]))
    return [
        (torch.cat([out for out, _ in part]), torch.cat([lse for _, lse in part], 1))
        for part in parts
    ]


def check_same_bits(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, one, other in zip(("out", "lse"), actual, expected, strict=True):
        rows = (one != other).flatten(1).any(1).nonzero().flatten().tolist()
        assert torch.equal(one, other), f"{name} differs in rows (heads of lse) {rows}"


@over_dtypes
@settings
def test_alone_and_in_a_batch(backend: Backend, setting: Setting, dtype: torch.dtype) -> None:
    """Whole, at each place of a batch, and with other pages."""
    setting = fitting(backend, setting)
    first, short, long = make_sequences(setting, dtype, backend.device)
    alone = serve(backend, setting, [first], chunk=len(first), seed=0)[0]
    for seed, batch in enumerate(([first], [first, short, long], [long, first], [short, first])):
        results = serve(backend, setting, batch, chunk=max(map(len, batch)), seed=1 + seed)
        check_same_bits(results[batch.index(first)], alone)


@pytest.mark.parametrize("chunk", [1, 3, 16])
@over_dtypes
@settings
def test_whole_and_chunked(
    backend: Backend, setting: Setting, dtype: torch.dtype, chunk: int
) -> None:
    """Chunks of 1 are decoding token by token; beside a sequence that ends earlier."""
    setting = fitting(backend, setting)
    first, short, _ = make_sequences(setting, dtype, backend.device)
    whole = serve(backend, setting, [first], chunk=len(first), seed=0)[0]
    check_same_bits(serve(backend, setting, [short, first], chunk, seed=chunk)[1], whole)


@over_dtypes
@settings
def test_decode_beside_a_prefill(backend: Backend, setting: Setting, dtype: torch.dtype) -> None:
    """One call with a single new token of one sequence and all tokens of another."""
    setting = fitting(backend, setting)
    first, _, long = make_sequences(setting, dtype, backend.device)
    whole = serve(backend, setting, [first], chunk=len(first), seed=0)[0]
    device, size = backend.device, setting.page_size
    pages = [-(-len(tokens) // size) for tokens in (first, long)]
    k_cache, v_cache = (
        torch.full((sum(pages) * size, *x.shape[1:]), NAN, dtype=dtype, device=device)
        for x in (first.k, first.v)
    )
    for cache, old, new in ((k_cache, first.k, long.k), (v_cache, first.v, long.v)):
        cache[: len(old)] = old
        cache[pages[0] * size : pages[0] * size + len(new)] = new
    table = [[first_page + i for i in range(max(pages))] for first_page in (0, pages[0])]
    out, lse = backend.flash_attn_with_kvcache(
        torch.cat([first.q[-1:], long.q]),
        k_cache.unflatten(0, (-1, size)),
        v_cache.unflatten(0, (-1, size)),
        cache_seqlens=int32([len(first), len(long)], device),
        block_table=int32(table, device),
        cu_seqlens_q=int32([0, 1, 1 + len(long)], device),
        max_seqlen_q=len(long),
        s_aux=make_sinks(setting, device),
        num_splits=1,
        **setting.options,
    )
    check_same_bits((out[:1], lse[:, :1]), (whole[0][-1:], whole[1][:, -1:]))


@pytest.mark.parametrize("seqlen_q", [1, 6])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_fixed_number_of_splits(backend: Backend, num_splits: int, seqlen_q: int) -> None:
    """Of several, too, when the call fixes their number."""
    case = PagedCase(
        seqlens_q=(seqlen_q,) * 5,
        seqlens_k=(700, 1, 0, 2049, 384),
        num_heads_q=8,
        num_heads_kv=2,
        dtype=torch.bfloat16,
        causal=True,
        num_splits=num_splits,
    )
    inputs = cases.make_paged(case, backend.device)
    together = attend(backend, case, inputs)
    for b in range(5):
        own = replace(
            inputs,
            q=inputs.q[b : b + 1],
            block_table=inputs.block_table[b : b + 1],
            seqlens_k=inputs.seqlens_k[b : b + 1],
        )
        alone = attend(backend, case, own)
        assert torch.equal(alone.out[0], together.out[b])
        assert torch.equal(alone.lse[0], together.lse[b])
