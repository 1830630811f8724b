"""What does it save to attend to a shared prefix once? 64 sequences over one prefix of 4096 tokens.

One new token per sequence, GPT-OSS's heads (64 query, 8 kv, head_dim 64), pages of 16 tokens; the
table counts each sequence's tokens behind the prefix, its new one included. The plain call is
flash_attn_with_kvcache over the same block table: it reads the shared pages for each sequence again
(out of the last-level cache, as far as they stay there). Both calls' results are compared with
float64 attention for the first and the last sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from cases import DTYPE_NAMES, GPT_OSS_FULL, Record, Settings
from check import TOLERANCE, relative_error
from peers import OURS, OURS_PLAIN
from sweep import record_of
from timing import Contender, Rounds, WrongResultError, interleave, progress
from torch import Tensor

from sink_attention_ext import cascade_attn_with_kvcache, flash_attn_with_kvcache, reference

TITLE = "Shared prefix (cascade)"
LAYER = GPT_OSS_FULL
PAGE_SIZE = 16
BATCH = 64
PREFIX = 4096


class SharedCache:
    """Caches `(num_pages, 16, 8, 64)`; each sequence has the prefix's pages, then its own."""

    def __init__(self, own_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(own_tokens)
        prefix_pages, own_pages = PREFIX // PAGE_SIZE, -(-own_tokens // PAGE_SIZE)
        num_pages = prefix_pages + BATCH * own_pages
        shape = (num_pages, PAGE_SIZE, LAYER.num_heads_kv, LAYER.head_dim)
        self.k_cache, self.v_cache = (
            torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)
        )
        order = torch.randperm(num_pages, generator=generator).to(device, torch.int32)
        shared = order[:prefix_pages].expand(BATCH, -1)
        own = order[prefix_pages:].view(BATCH, own_pages)
        self.block_table = torch.cat([shared, own], dim=1)
        length = PREFIX + own_tokens
        self.cache_seqlens = torch.full((BATCH,), length, dtype=torch.int32, device=device)
        q = torch.randn(BATCH, 1, LAYER.num_heads_q, LAYER.head_dim, generator=generator)
        self.q = q.to(device, dtype)
        self.s_aux = torch.randn(LAYER.num_heads_q, generator=generator).to(device, dtype)


def make_check(cache: SharedCache) -> Callable[[Tensor], float]:
    picked = [0, BATCH - 1]
    expected, _ = reference.paged_attention(
        cache.q[picked].double().cpu(),
        cache.k_cache.double().cpu(),
        cache.v_cache.double().cpu(),
        cache.block_table[picked].cpu(),
        cache.cache_seqlens[picked].cpu(),
        causal=True,
        s_aux=cache.s_aux.double().cpu(),
    )

    def check(out: Tensor) -> float:
        error = relative_error(out[picked].cpu(), expected)
        if not error <= TOLERANCE[cache.q.dtype]:
            raise WrongResultError(f"out is off the float64 reference by {error:.1e}")
        return error

    return check


def contenders(cache: SharedCache) -> list[Contender]:
    check = make_check(cache)
    options = {"causal": True, "s_aux": cache.s_aux}

    def cascade() -> Tensor:
        return cascade_attn_with_kvcache(
            cache.q, cache.k_cache, cache.v_cache, cache.cache_seqlens, cache.block_table, PREFIX,
            **options,
        )  # fmt: skip

    def plain() -> Tensor:
        return flash_attn_with_kvcache(
            cache.q, cache.k_cache, cache.v_cache, cache_seqlens=cache.cache_seqlens,
            block_table=cache.block_table, **options,
        )  # fmt: skip

    return [Contender(OURS, cascade, check), Contender(OURS_PLAIN, plain, check)]


def own_tokens(settings: Settings) -> tuple[int, ...]:
    return (128,) if settings.quick else (16, 128, 512)


def run(settings: Settings) -> list[Record]:
    rounds = Rounds(3, 9, 1.0) if settings.quick else Rounds(5, 25, 5.0)
    records = []
    for dtype, length in itertools.product(DTYPE_NAMES, own_tokens(settings)):
        progress(f"cascade: {DTYPE_NAMES[dtype]}, {length} tokens of each sequence's own")
        cache = SharedCache(length, dtype, settings.device)
        with torch.no_grad():
            timings = interleave(contenders(cache), rounds, settings.device)
        shape = SimpleNamespace(layer=LAYER, dtype=dtype, seqlen=length)
        for name, timing in timings.items():
            record = record_of(timing, "cascade", name, shape, "decode")
            record.batch = BATCH
            records.append(record)
    return records
