"""One forward pass over a paged cache: where its new tokens go, and attention to what is cached."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sink_attention_ext import checks
from sink_attention_ext.cache.attention import attend
from sink_attention_ext.cache.functions import reshape_and_cache
from sink_attention_ext.cache.page_tables import PageTables, TablesDraft

if TYPE_CHECKING:
    from sink_attention_ext.cache.paged_cache import PagedKVCache


def upload(target: Tensor, values: Tensor) -> None:
    """target[:] = values, from host memory, in place and in stream order; the host does not wait.

    Pinned memory comes from torch's allocator, which does not hand it out again before the copy has
    been made: a later upload cannot overwrite what an earlier one still reads.
    """
    if target.device.type == "cuda":
        values = values.pin_memory()
    target.copy_(values, non_blocking=True)


class StepBuffers:
    """What kernels read in a step, at addresses that never change: CUDA graphs may replay."""

    def __init__(
        self,
        tables: Sequence[PageTables],
        max_num_seqs: int,
        max_num_tokens: int,
        device: torch.device | str,
    ) -> None:
        groups = len(tables)
        # positions, then slots, one row a group of layers
        self.tokens = torch.zeros(1 + groups, max_num_tokens, dtype=torch.int64, device=device)
        # cu_seqlens_q, then keys after the append and keys before it, a row of each a group
        shape = (1 + 2 * groups, max_num_seqs + 1)
        self.lengths = torch.zeros(shape, dtype=torch.int32, device=device)
        self.block_tables = [torch.zeros_like(t.table, device=device) for t in tables]
        self.longest = [0] * groups  # of the keys after the append

    def fill(
        self, drafts: Sequence[TablesDraft], rows: list[int], lengths: list[int], counts: list[int]
    ) -> None:
        """For the append of counts[i] tokens to the lengths[i] of rows[i], after which tables are
        as drafted; all else is padding."""
        cu_seqlens = list(itertools.accumulate(counts, initial=0))
        num_tokens, num_padded = cu_seqlens[-1], self.lengths.shape[1] - len(rows)
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        tokens = [[p for n, end in zip(lengths, ends, strict=True) for p in range(n, end)]]
        after, before = [], []
        for draft, block_table in zip(drafts, self.block_tables, strict=True):
            places = [draft.place(row, n) for row, n in zip(rows, ends, strict=True)]
            firsts = [place - count for place, count in zip(places, counts, strict=True)]
            after.append(places + [0] * num_padded)
            before.append(firsts + [0] * num_padded)
            tokens.append([])
            for row, count, place in zip(rows, counts, places, strict=True):
                tokens[-1] += draft.slots(row, place - count, place)
            table = draft.rows(rows)
            upload(block_table[: len(rows), : table.shape[1]], table)
        # Host memory, whatever torch.set_default_device says.
        padded = torch.full(self.tokens.shape, -1, dtype=torch.int64, device="cpu")  # -1: no slot
        padded[0] = 0
        padded[:, :num_tokens] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        upload(self.tokens, padded)
        seqlens = [cu_seqlens + [num_tokens] * (num_padded - 1), *after, *before]
        upload(self.lengths, torch.tensor(seqlens, dtype=torch.int32, device="cpu"))
        self.longest = [max(places, default=0) for places in after]


class _GroupPlan:
    """What the layers of one group share in a step."""

    def __init__(self, step: CacheStep, layer: int, group: int) -> None:
        cache, num_seqs = step._cache, step.num_seqs
        lengths, num_groups = cache._buffers.lengths, len(cache._tables)
        self.after = lengths[1 + group, :num_seqs]
        self.before = lengths[1 + num_groups + group, :num_seqs]
        self.block_table = cache._buffers.block_tables[group][:num_seqs]
        self.window_size = cache.window_sizes[layer]
        # A full layer sees the first tokens anyway.
        self.num_sink_tokens = cache.num_sink_tokens if self.window_size[0] >= 0 else 0


class CacheStep:
    """What PagedKVCache.append returns: the metadata of one forward pass, and two operations.

    The new tokens of all sequences are packed one behind the other, in the order in which append
    was given the sequences: q is (num_tokens, num_heads_q, head_dim), k and v are (num_tokens,
    num_heads_kv, head_dim[_v]). Each layer calls ``attend`` once (or ``write``, then its own
    attention on ``attn_kwargs``).

    The tensors here are views of buffers that the cache keeps and refills at every append:
    a step ends with the next append, fork, truncate or free, also where an exception other than a
    refusal ends that. In a CUDA graph that was captured with this step they are what a later append
    of the same padded sizes has put there.

    Attributes:
        num_tokens: tokens of q, k and v; with padding.
        num_seqs: sequences; with padding.
        max_seqlen_q: the most new tokens of one sequence.
        cu_seqlens_q: (num_seqs + 1,) int32, starts of the sequences among the tokens. Padded
            sequences are empty; padded tokens are in no sequence: their output is 0.
        positions: (num_tokens,) int64, of each token in its sequence, for rotary embeddings; 0 for
            padding.
    """

    def __init__(
        self, cache: PagedKVCache, num_seqs: int, num_tokens: int, max_seqlen_q: int
    ) -> None:
        self._cache = cache
        self._token = object()  # not the step itself, which the cache would hold and it the cache
        cache._current_step = self._token
        self._written: set[int] = set()
        self.num_seqs = num_seqs
        self.num_tokens = num_tokens
        self.max_seqlen_q = max_seqlen_q
        self.cu_seqlens_q = cache._buffers.lengths[0, : num_seqs + 1]
        self.positions = cache._buffers.tokens[0, :num_tokens]
        groups = range(len(cache._tables))
        self._plans: list[_GroupPlan | None] = [None for _ in groups]

    def block_table(self, layer: int) -> Tensor:
        """(num_seqs, max_pages_per_seq) int32; of a windowed layer the pages still kept."""
        return self._cache._buffers.block_tables[self._group(layer)][: self.num_seqs]

    def seqused_k(self, layer: int) -> Tensor:
        """(num_seqs,) int32: tokens in the rows of block_table, the new ones included."""
        return self._cache._buffers.lengths[1 + self._group(layer), : self.num_seqs]

    def slot_mapping(self, layer: int) -> Tensor:
        """(num_tokens,) int64: page * page_size + place of each new token; -1 for padding."""
        return self._cache._buffers.tokens[1 + self._group(layer), : self.num_tokens]

    def max_seqlen_k(self, layer: int) -> int:
        """At least the most keys of one sequence in block_table: what splits go by.

        In a CUDA graph that is being captured, and under torch.compile, all that a row of
        block_table has room for: a later step may have longer sequences.
        """
        return self._max_seqlen_k(self._group(layer))

    def _max_seqlen_k(self, group: int) -> int:
        buffers = self._cache._buffers
        capacity = buffers.block_tables[group].shape[1] * self._cache.page_size
        if torch.compiler.is_compiling() or (
            buffers.lengths.is_cuda and torch.cuda.is_current_stream_capturing()
        ):
            return capacity
        return min(buffers.longest[group], capacity)

    def window_size(self, layer: int) -> tuple[int, int]:
        """``(left, right)`` of a layer, as the cache was made with."""
        self._group(layer)
        return self._cache.window_sizes[layer]

    def attn_kwargs(self, layer: int) -> dict[str, Any]:
        """What flash_attn_with_kvcache takes after q, k_cache and v_cache: masks, tables, scales.

        For calls of one's own after ``write``, as ``flash_attn_with_kvcache(q,
        cache.k_cache(layer), cache.v_cache(layer), s_aux=s_aux, **step.attn_kwargs(layer))``.
        """
        kwargs: dict[str, Any] = {
            "cache_seqlens": self.seqused_k(layer),
            "block_table": self.block_table(layer),
            "cu_seqlens_q": self.cu_seqlens_q,
            "max_seqlen_q": self.max_seqlen_q,
            "max_seqlen_k": self.max_seqlen_k(layer),
            "causal": True,
            "window_size": self._cache.window_sizes[layer],
        }
        if self._cache.num_sink_tokens > 0 and self._cache.window_sizes[layer][0] >= 0:
            kwargs["num_sink_tokens"] = self._cache.num_sink_tokens  # a full layer sees them anyway
        k_scale, v_scale = self._cache.scales(layer)
        if k_scale is not None:
            kwargs |= {"k_scale": k_scale, "v_scale": v_scale}
        return kwargs

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Puts a layer's new keys (already rotated) and values into their slots.

        Args:
            layer: from 0.
            k: (num_tokens, num_heads_kv, head_dim), the cache's dtype, or any float dtype for a
                quantised cache.
            v: (num_tokens, num_heads_kv, head_dim_v).

        Raises:
            RuntimeError: the step has ended.
            TypeError, ValueError: an argument does not fit; nothing has been written.
        """
        self._check_current()
        slots = self.slot_mapping(layer)
        if isinstance(k, Tensor) and k.dim() > 0:  # all else is refused in reshape_and_cache
            checks.check_size("k", k, 0, "num_tokens", self.num_tokens, "as the step has")
        caches = self._cache.k_cache(layer), self._cache.v_cache(layer)
        reshape_and_cache(k, v, *caches, slots, *self._cache.scales(layer))
        self._written.add(layer)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        s_aux: Tensor | None = None,
        return_lse: bool = False,
        num_splits: int = 0,
        tree_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Writes k and v, then causal attention of the new tokens to all that their window holds.

        Args:
            layer: from 0.
            q: (num_tokens, num_heads_q, head_dim), rotated.
            k, v: as in write; None: this layer has been written in this step.
            softmax_scale, softcap, s_aux, return_lse, num_splits: as in flash_attn_with_kvcache.
                (num_splits=1 in a windowed layer: the same bits alone and in any batch, for the
                same chunks; where pages are dropped depends on the chunks, and with it which keys
                are summed together, so other chunks agree to rounding.)
            tree_mask: (num_tokens,) int64, as in flash_attn_with_kvcache: the new tokens of each
                sequence are a tree of drafts. (Their positions, for rotary embeddings, are then the
                length before them plus their depth, not those of the step.)

        Returns:
            out (num_tokens, num_heads_q, head_dim_v); with return_lse ``(out, lse)``, lse
            (num_heads_q, num_tokens).

        Raises:
            RuntimeError: the step has ended, or k is None and the layer has not been written.
            TypeError, ValueError: an argument does not fit; nothing has been written.
        """
        self._check_current()
        cache = self._cache
        group, place = cache._layer_place(layer)  # an index that does not exist is named here
        plan = self._plans[group]
        if plan is None:
            plan = self._plans[group] = _GroupPlan(self, layer, group)
        if torch.compiler.is_compiling():
            k_cache, v_cache = cache.k_cache(layer), cache.v_cache(layer)
            k_scale, v_scale = cache.scales(layer)
        else:
            k_cache, v_cache, k_scale, v_scale = cache._storage[group].layers[place]
            if k_scale is None:
                k_scale, v_scale = cache._k_scales[layer], cache._v_scales[layer]
        if not isinstance(q, Tensor) or q.dim() != 3 or q.shape[0] != self.num_tokens:
            checks.check_tensor("q", q, checks.Q_PACKED)
            checks.check_size("q", q, 0, "num_tokens", self.num_tokens, "as the step has")
        writes = k is not None or v is not None
        if not writes and layer not in self._written:
            raise RuntimeError(
                f"layer {layer} has not been written in this step: give attend k and v"
            )
        result = attend(
            "CacheStep.attend", q, k_cache, v_cache, k, v,
            plan.before if writes else plan.after, plan.block_table, self.cu_seqlens_q,
            self.max_seqlen_q, self._max_seqlen_k(group), softmax_scale, True, plan.window_size,
            softcap, s_aux, return_lse, num_splits, k_scale, v_scale, plan.num_sink_tokens,
            tree_mask, None,
        )  # fmt: skip
        if writes:
            self._written.add(layer)
        return result

    def _group(self, layer: int) -> int:
        return self._cache._layer_place(layer)[0]

    def _check_current(self) -> None:
        if self._cache._current_step is not self._token:
            raise RuntimeError(
                "this step has ended: its slots may belong to others since the cache's last "
                "append, fork, truncate or free; use the step that the last append returned"
            )
