"""One forward pass over a paged cache: where its new tokens go, and attention to what is cached."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sink_attention_ext import checks
from sink_attention_ext.cache.attention import attend
from sink_attention_ext.cache.functions import reshape_and_cache
from sink_attention_ext.cache.page_tables import PageTables, TablesDraft
from sink_attention_ext.dispatch_rules import refuse_gradient

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
        rows = 1 + len(tables)
        # positions, then slots, one row a group of layers; cu_seqlens_q, then seqused_k likewise.
        self.tokens = torch.zeros(rows, max_num_tokens, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows, max_num_seqs + 1, dtype=torch.int32, device=device)
        self.block_tables = [torch.zeros_like(t.table, device=device) for t in tables]

    def fill(
        self, drafts: Sequence[TablesDraft], rows: list[int], lengths: list[int], counts: list[int]
    ) -> None:
        """For the append of counts[i] tokens to the lengths[i] of rows[i], after which tables are
        as drafted; all else is padding."""
        cu_seqlens = list(itertools.accumulate(counts, initial=0))
        num_tokens, num_padded = cu_seqlens[-1], self.lengths.shape[1] - len(rows)
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        tokens = [[p for n, end in zip(lengths, ends, strict=True) for p in range(n, end)]]
        seqlens = [cu_seqlens + [num_tokens] * (num_padded - 1)]
        for draft, block_table in zip(drafts, self.block_tables, strict=True):
            places = [draft.place(row, n) for row, n in zip(rows, ends, strict=True)]
            seqlens.append(places + [0] * num_padded)
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
        upload(self.lengths, torch.tensor(seqlens, dtype=torch.int32, device="cpu"))


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

    def block_table(self, layer: int) -> Tensor:
        """(num_seqs, max_pages_per_seq) int32; of a windowed layer the pages still kept."""
        return self._cache._buffers.block_tables[self._group(layer)][: self.num_seqs]

    def seqused_k(self, layer: int) -> Tensor:
        """(num_seqs,) int32: tokens in the rows of block_table, the new ones included."""
        return self._cache._buffers.lengths[1 + self._group(layer), : self.num_seqs]

    def slot_mapping(self, layer: int) -> Tensor:
        """(num_tokens,) int64: page * page_size + place of each new token; -1 for padding."""
        return self._cache._buffers.tokens[1 + self._group(layer), : self.num_tokens]

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
        kwargs = self.attn_kwargs(layer)  # an index that does not exist is named here
        checks.check_tensor("q", q, ("num_tokens", "num_heads_q", "head_dim"))
        checks.check_size("q", q, 0, "num_tokens", self.num_tokens, "as the step has")
        write = None
        if k is not None or v is not None:
            refuse_gradient("CacheStep.attend", k, v)
            write = partial(self.write, layer, k, v)
        elif layer not in self._written:
            raise RuntimeError(
                f"layer {layer} has not been written in this step: give attend k and v"
            )
        return attend(
            q,
            self._cache.k_cache(layer),
            self._cache.v_cache(layer),
            softmax_scale=softmax_scale,
            softcap=softcap,
            s_aux=s_aux,
            return_lse=return_lse,
            num_splits=num_splits,
            tree_mask=tree_mask,
            write=write,
            function="CacheStep.attend",
            **kwargs,
        )

    def _group(self, layer: int) -> int:
        return self._cache._layer_place(layer)[0]

    def _check_current(self) -> None:
        if self._cache._current_step is not self._token:
            raise RuntimeError(
                "this step has ended: its slots may belong to others since the cache's last "
                "append, fork, truncate or free; use the step that the last append returned"
            )
