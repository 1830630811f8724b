"""A plain model of PagedKVCache, and attention by an explicit mask over all that was ever appended.

The model of a sequence is the list of its tokens. A token is a number; its keys and values in each
layer are drawn once and looked up by that number, so that contents can be compared exactly.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import cases
import torch
from torch import Tensor

from sink_attention_ext import PagedKVCache
from sink_attention_ext.cache.page_tables import PageTables, TablesDraft
from sink_attention_ext.cache.step import CacheStep

NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM, HEAD_DIM_V = 4, 2, 8, 6


SIZES: dict[str, Any] = {
    "num_heads_kv": NUM_HEADS_KV,
    "head_dim": HEAD_DIM,
    "page_size": 4,
    "max_num_seqs": 3,
    "max_seqlen": 100,
    "max_num_batched_tokens": 20,
    "dtype": torch.float32,
}
BOTH = [(-1, -1), (5, 0)]  # a full layer and a windowed one


def make_cache(window_sizes: Any = BOTH, **options: Any) -> PagedKVCache:
    return PagedKVCache(window_sizes, **SIZES | {"num_pages": 8} | options)


def is_visible(seqlen_q: int, seqlen_k: int, window_left: int, num_sink_tokens: int) -> Tensor:
    """(seqlen_q, seqlen_k): causal, bottom-right; the window and the first num_sink_tokens."""
    position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k)[None, :]
    seen = key <= position
    if window_left >= 0:
        seen &= (key >= position - window_left) | (key < num_sink_tokens)
    return seen


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, s_aux: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One sequence (seqlen, heads, dim) in float64, sees what `visible` says."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    sink = torch.full((q.shape[1],), -torch.inf) if s_aux is None else s_aux
    logits = torch.cat([scores, sink.double()[:, None, None].expand(*scores.shape[:2], 1)], dim=-1)
    out = torch.einsum("hij,jhd->ihd", logits.softmax(-1)[..., :-1], v)
    return out, logits.logsumexp(-1)


class CacheModel:
    """A PagedKVCache and what should be in it."""

    def __init__(
        self,
        windows: Sequence[int] = (-1, 5),
        num_tokens: int = 2000,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        head_dim_v: int = HEAD_DIM_V,
        **options: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "num_heads_kv": NUM_HEADS_KV,
            "head_dim": HEAD_DIM,
            "head_dim_v": head_dim_v,
            "page_size": 4,
            "num_pages": 64,
            "max_num_seqs": 6,
            "max_seqlen": 200,
            "max_num_batched_tokens": 48,
            "dtype": dtype,
            "device": device,
        }
        self.cache = PagedKVCache([(left, 0) for left in windows], **defaults | options)
        for storage in self.cache._storage:  # an unwritten slot must not be read
            if storage.k_cache.is_floating_point() and storage.k_cache.itemsize > 1:
                storage.k_cache.fill_(cases.NAN)
                storage.v_cache.fill_(cases.NAN)
        rng = cases.generator(1)
        shape = (len(windows), num_tokens, NUM_HEADS_KV)
        self.k = torch.randn(*shape, HEAD_DIM, generator=rng).to(device, dtype)
        self.v = torch.randn(*shape, head_dim_v, generator=rng).to(device, dtype)
        self.windows = windows
        self.tokens: dict[int, list[int]] = {}
        self.shortest: dict[int, int] = {}  # where each could always be truncated to
        self.last_count: dict[int, int] = {}
        self._next_token = 0

    # ---- the operations, on both ----

    def allocate(self) -> int:
        seq = self.cache.allocate()
        assert seq not in self.tokens
        self.tokens[seq], self.shortest[seq], self.last_count[seq] = [], 0, 0
        return seq

    def append(
        self, seqs: Sequence[int], counts: Sequence[int], write: bool = True, **padding: int
    ) -> CacheStep:
        step = self.cache.append(seqs, counts, **padding)
        for seq, count in zip(seqs, counts, strict=True):
            if count > 0:  # an append of nothing changes neither
                self.shortest[seq], self.last_count[seq] = len(self.tokens[seq]), count
            new = range(self._next_token, self._next_token + count)
            self.tokens[seq] += [token % self.k.shape[1] for token in new]
            self._next_token += count
        if write:
            for layer in range(len(self.windows)):
                step.write(layer, *self.new_kv(layer, seqs, counts, step.num_tokens))
        return step

    def new_kv(
        self, layer: int, seqs: Sequence[int], counts: Sequence[int], num_tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the step's tokens; NaN behind them."""
        parts = [
            self.tokens[s][len(self.tokens[s]) - n :] for s, n in zip(seqs, counts, strict=True)
        ]
        new = list(itertools.chain.from_iterable(parts))
        rows = [
            x.new_full((num_tokens or len(new), *x.shape[2:]), cases.NAN) for x in (self.k, self.v)
        ]
        for row, bank in zip(rows, (self.k, self.v), strict=True):
            row[: len(new)] = bank[layer, new]
        return rows[0], rows[1]

    def fork(self, seq: int) -> int:
        new = self.cache.fork(seq)
        assert new not in self.tokens
        self.tokens[new] = list(self.tokens[seq])
        self.shortest[new], self.last_count[new] = self.shortest[seq], self.last_count[seq]
        return new

    def truncate(self, seq: int, length: int) -> None:
        self.cache.truncate(seq, length)
        del self.tokens[seq][length:]
        self.shortest[seq] = min(self.shortest[seq], length)

    def free(self, seq: int) -> None:
        self.cache.free(seq)
        del self.tokens[seq]

    # ---- what must be true ----

    def check(self) -> None:
        """Lengths, contents, and the bookkeeping of every group."""
        for group, tables in enumerate(self.cache._tables):
            self._check_books(tables)
            for seq in self.tokens:
                self._check_contents(group, tables, seq)
        for seq, tokens in self.tokens.items():
            assert self.cache.seqlen(seq) == len(tokens)
        assert self.cache.num_seqs == len(self.tokens)

    def _row(self, seq: int) -> int:
        return self.cache._sequences[seq].row

    def _check_books(self, tables: PageTables) -> None:
        pool, size = tables.pool, self.cache.page_size
        held: Counter[int] = Counter()
        for seq, tokens in self.tokens.items():
            pages = tables.pages(self._row(seq))
            assert len(set(pages)) == len(pages), "a page twice in one row"
            held.update(pages)
            assert tables.table[self._row(seq), : len(pages)].tolist() == pages
            if tables.window_left < 0:
                assert len(pages) == -(-len(tokens) // size)
            else:
                bound = -(-(tables.window_left + self.last_count[seq]) // size) + 1
                assert len(pages) <= bound + -(-self.cache.num_sink_tokens // size)
        assert {p: pool.references(p) for p in range(pool.num_pages) if pool.references(p)} == held
        free = pool._free
        assert len(set(free)) == len(free) == pool.num_free == pool.num_pages - len(held)
        assert not held.keys() & set(free)

    def _check_contents(self, group: int, tables: PageTables, seq: int) -> None:
        """All that a next token would see is where the block table says."""
        tokens, sinks = self.tokens[seq], self.cache.num_sink_tokens
        seen = is_visible(1, len(tokens) + 1, tables.window_left, sinks)[0, :-1]
        positions = seen.nonzero()[:, 0].tolist()
        pages, size = tables.pages(self._row(seq)), self.cache.page_size
        pinned = tables.num_sink_pages * size
        place = partial(TablesDraft(tables).place, self._row(seq))
        places = [p if p < pinned else place(p) for p in positions]
        slots = [pages[place // size] * size + place % size for place in places]
        wanted = [tokens[p] for p in positions]
        for layer, left in enumerate(self.windows):
            if left == tables.window_left:
                for cache, bank in (
                    (self.cache.k_cache(layer), self.k),
                    (self.cache.v_cache(layer), self.v),
                ):
                    assert torch.equal(cache.flatten(0, 1)[slots], bank[layer, wanted])

    def expected(
        self,
        layer: int,
        q: Tensor,
        seqs: Sequence[int],
        counts: Sequence[int],
        s_aux: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of the last counts[i] tokens of each sequence to its whole history."""
        outs, lses, begin = [], [], 0
        for seq, count in zip(seqs, counts, strict=True):
            tokens = self.tokens[seq]
            k, v = self.k[layer, tokens].cpu(), self.v[layer, tokens].cpu()
            sinks = self.cache.num_sink_tokens
            seen = is_visible(count, len(tokens), self.windows[layer], sinks)
            out, lse = masked_attention(q[begin : begin + count].cpu(), k, v, seen, s_aux)
            outs.append(out)
            lses.append(lse)
            begin += count
        return torch.cat(outs), torch.cat(lses, dim=1)
