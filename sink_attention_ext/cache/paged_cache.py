"""PagedKVCache: the key-value cache of an inference server, full and windowed layers, in pages.

Modules: page_pool.py has the host's bookkeeping and says why a windowed layer's block table may
close up, page_storage.py the device memory, step.py what a model's layers call in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from sink_attention_ext import checks
from sink_attention_ext.cache import arguments as cache_arguments
from sink_attention_ext.cache import checks as cache_checks
from sink_attention_ext.cache.journal import Journal
from sink_attention_ext.cache.page_pool import OutOfPages
from sink_attention_ext.cache.page_storage import (
    GroupStats,
    PageStorage,
    bytes_per_page,
    clone_inference_tensors,
)
from sink_attention_ext.cache.page_tables import PageTables, TablesDraft
from sink_attention_ext.cache.sequence_ids import new_id
from sink_attention_ext.cache.step import CacheStep, StepBuffers
from sink_attention_ext.reference import WindowSize


@dataclass
class _Sequence:
    row: int  # of the host's tables
    length: int


def _commits(drafts: Sequence[TablesDraft]) -> list[Callable[[], None]]:
    return [draft.commit for draft in drafts if draft.is_change]


def _set_lengths(sequences: Sequence[_Sequence], lengths: Sequence[int]) -> None:
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.length = length


class PagedKVCache:
    """Keys and values of many sequences in pages, for all layers of a model.

    Layers with the same window form a group, which has a page pool and block tables of its own.
    A full layer's sequence takes ``ceil(length / page_size)`` pages; a windowed one at most
    ``ceil((window_left + new_tokens) / page_size) + 1``, whatever its length, new_tokens being
    those of its last append (of more than 0): an append gives pages that have left the window back
    to the pool. Forked sequences share pages until one of them writes into a shared page, which it
    then copies first.

    Keys are cached as attention reads them: with rotary embeddings, rotate them by
    ``step.positions`` first.

    One forward pass::

        cache = PagedKVCache(
            [(127, 0), (-1, -1)],  # as in GPT-OSS: a window of 128 tokens, and a full layer
            num_heads_kv=8,
            head_dim=64,
            num_pages=1024,
            max_num_seqs=64,
            max_seqlen=4096,
            max_num_batched_tokens=512,
            dtype=torch.float32,
        )
        a, b = cache.allocate(), cache.allocate()
        step = cache.append([a, b], [5, 1])
        q = torch.randn(step.num_tokens, 64, 64)
        k, v = torch.randn(2, step.num_tokens, 8, 64)
        for layer in range(2):
            out = step.attend(layer, q, k, v, s_aux=torch.zeros(64))

    CUDA graphs: block tables, lengths and slots live in buffers of fixed addresses, which append
    fills in stream order without making the host wait. Capture the forward pass of a step padded to
    certain sizes (``pad_seqs_to``, ``pad_tokens_to``) with its longest max_seqlen_q; then append to
    the same sizes and replay.

    Not thread-safe, and a lock inside could not make it so: append, the kernels that read the
    buffers which it filled, and the next append are one order on one stream. Let one thread (a
    server's engine loop) own the cache, and hand requests to it through a queue.

    Args:
        window_sizes: for each layer ``(left, right)`` as flash_attn_func takes it. A sliding window
            of N tokens, the token itself included (transformers' ``sliding_window=N``), is
            ``(N - 1, 0)``; a full layer ``(-1, -1)`` or ``(-1, 0)``: attention is causal.
        num_heads_kv, head_dim: of every layer; head_dim 1 to 256.
        head_dim_v: of the values; None is head_dim.
        page_size: tokens in a page.
        num_pages: pages of each group, or a mapping from each window_left (-1: full layers) to
            that group's; every layer of a group has that many. Exactly one of num_pages and
            memory_budget is given.
        memory_budget: bytes for all of them. Windowed groups get what any step can take while the
            sequences to which it adds nothing last had one new token; full layers get the rest.
        max_num_seqs: the most sequences at a time.
        max_seqlen: the most tokens of a sequence.
        max_num_batched_tokens: the most new tokens of one step, all sequences together.
        num_sink_tokens: the first tokens of a sequence that windowed layers keep, and see, beside
            the window (StreamingLLM; unlike the paper's, keys keep their own positions'
            rotation). Not to be confused with the learnable s_aux; both may be used.
        dtype: float64, float32, float16, bfloat16; or a quantised type that reshape_and_cache
            takes, with scales.
        device: where the caches lie.
        k_scale: for quantised caches, and only for them: float32 of shape (), (1,) or
            (num_heads_kv,) for all layers, or a sequence with one such tensor for each layer.
        v_scale: the same for v.
        per_token_head_scales: for quantised caches, in place of k_scale and v_scale: scales of each
            token and head, (num_pages, page_size, num_heads_kv) for each layer, kept in pages too.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        window_sizes: Sequence[WindowSize],
        *,
        num_heads_kv: int,
        head_dim: int,
        head_dim_v: int | None = None,
        page_size: int = 16,
        num_pages: int | Mapping[int, int] | None = None,
        memory_budget: int | None = None,
        max_num_seqs: int,
        max_seqlen: int,
        max_num_batched_tokens: int,
        num_sink_tokens: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        k_scale: Tensor | Sequence[Tensor] | None = None,
        v_scale: Tensor | Sequence[Tensor] | None = None,
        per_token_head_scales: bool = False,
    ) -> None:
        self.window_sizes = cache_arguments.check_causal_windows(window_sizes)
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        cache_arguments.check_sizes(
            num_heads_kv=num_heads_kv,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_seqlen=max_seqlen,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype; got {dtype!r}")
        if dtype not in checks.CACHE_DTYPES:
            raise TypeError(
                "dtype must be float64, float32, float16, bfloat16, float8_e4m3fn or int8; got "
                f"{dtype}"
            )
        device = cache_arguments.check_device(device)
        cache_arguments.check_count("num_sink_tokens", num_sink_tokens)
        checks.check_bool("per_token_head_scales", per_token_head_scales)
        if per_token_head_scales and not (k_scale is None and v_scale is None):
            raise ValueError(
                "k_scale and v_scale must be None with per_token_head_scales: the cache keeps them"
            )
        if per_token_head_scales and dtype not in checks.QUANTISED_DTYPES:
            raise ValueError(
                "per_token_head_scales must be False unless dtype is a quantised one, "
                f"{' or '.join(map(str, checks.QUANTISED_DTYPES))}; got dtype {dtype}"
            )
        self.page_size, self.num_sink_tokens = page_size, num_sink_tokens
        self.max_num_seqs, self.max_seqlen = max_num_seqs, max_seqlen
        self.max_num_batched_tokens = max_num_batched_tokens

        lefts = [left for left, _ in self.window_sizes]
        windows = list(dict.fromkeys(lefts))  # one a group
        # The group of each layer, and its place among the layers of that group.
        self._layer_places = [
            (windows.index(left), lefts[:layer].count(left)) for layer, left in enumerate(lefts)
        ]
        page = (page_size, num_heads_kv, head_dim, head_dim_v, dtype)
        layer_bytes = bytes_per_page(*page, has_scales=per_token_head_scales)
        self._page_bytes = [lefts.count(left) * layer_bytes for left in windows]
        limits = (num_sink_tokens, page_size)
        num_pages_of_group = cache_arguments.pages_by_group(
            windows,
            num_pages,
            memory_budget,
            self._page_bytes,
            [
                # n tokens take at most 1 + n / page_size pages more than one token does.
                max_num_seqs * (1 + cache_arguments.max_row_pages(left, *limits, 1, max_seqlen))
                + -(-max_num_batched_tokens // page_size)
                for left in windows
            ],
        )
        self._tables = []
        self._storage = []
        # Tensors that were made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            for left, pages in zip(windows, num_pages_of_group, strict=True):
                most = cache_arguments.max_row_pages(
                    left, *limits, max_num_batched_tokens, max_seqlen
                )
                self._tables.append(
                    PageTables(left, num_sink_tokens, page_size, pages, max_num_seqs, most)
                )
                self._storage.append(
                    PageStorage(lefts.count(left), pages, *page, device, per_token_head_scales)
                )
            self._buffers = StepBuffers(self._tables, max_num_seqs, max_num_batched_tokens, device)
        num_layers = len(lefts)
        self._k_scales = cache_arguments.scale_of_each_layer("k_scale", k_scale, num_layers)
        self._v_scales = cache_arguments.scale_of_each_layer("v_scale", v_scale, num_layers)
        for layer in range(num_layers):  # what the operators will say, before any forward pass
            cache_checks.check_caches(self.k_cache(layer), self.v_cache(layer))
            cache_checks.check_cache_scales(*self.scales(layer), self.k_cache(layer))

        self._sequences: dict[int, _Sequence] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._current_step: object | None = None  # the token of the one that may write
        self._journal = Journal()

    # ---- sequences ----

    def allocate(self) -> int:
        """A new, empty sequence; its id, an int below 2**63, is never used again, by this cache or
        another.

        Raises:
            RuntimeError: there are max_num_seqs sequences already.
        """
        self._journal.finish()
        row = self._free_row()
        seq_id = new_id()
        self._journal.change(
            partial(self._free_rows.__delitem__, slice(len(self._free_rows) - 1, None)),
            partial(self._sequences.__setitem__, seq_id, _Sequence(row, 0)),
        )
        return seq_id

    def fork(self, seq_id: int) -> int:
        """A new sequence with the tokens of another, for a shared prefix or a beam.

        It takes no page: both hold the same ones, until one of them writes into a page that is not
        full; that page is then copied.

        Raises:
            RuntimeError: there are max_num_seqs sequences already.
        """
        source = self._sequence(seq_id)
        row = self._free_row()
        forked_id = new_id()
        drafts = [tables.forked(source.row, row) for tables in self._tables]
        self._current_step = None
        self._journal.change(
            *_commits(drafts),
            partial(self._free_rows.__delitem__, slice(len(self._free_rows) - 1, None)),
            partial(self._sequences.__setitem__, forked_id, _Sequence(row, source.length)),
        )
        return forked_id

    def free(self, seq_id: int) -> None:
        """Ends a sequence; its pages that no fork holds are free."""
        sequence = self._sequence(seq_id)
        drafts = [tables.freed(sequence.row) for tables in self._tables]
        free_rows = [*self._free_rows, sequence.row]
        self._current_step = None
        self._journal.change(
            *_commits(drafts),
            partial(self._free_rows.__setitem__, slice(None), free_rows),
            partial(self._sequences.pop, seq_id, None),
        )

    def truncate(self, seq_id: int, length: int) -> None:
        """Takes the last tokens of a sequence back, as rejected drafts of speculative decoding.

        Windowed layers have given up older pages, so they can only go back as far as what the
        next token sees is still there: always to the length before the last append that gave the
        sequence any tokens.

        Raises:
            ValueError: length is more than the sequence has, or too far back; nothing was changed.
        """
        sequence = self._sequence(seq_id)
        cache_arguments.check_count("length", length)
        if length > sequence.length:
            raise ValueError(
                f"length must be at most {sequence.length}, the tokens of sequence {seq_id}; got "
                f"{length}"
            )
        for tables in self._tables:
            if length < (least := tables.min_length(sequence.row)):
                raise ValueError(
                    f"length must be at least {least}: layers with window_left = "
                    f"{tables.window_left} have given up pages of sequence {seq_id} that a token "
                    f"at {length} would see"
                )
        drafts = [tables.truncated(sequence.row, length) for tables in self._tables]
        self._current_step = None
        self._journal.change(*_commits(drafts), partial(setattr, sequence, "length", length))

    def seqlen(self, seq_id: int) -> int:
        """Tokens of a sequence."""
        return self._sequence(seq_id).length

    # ---- steps ----

    def append(
        self,
        seq_ids: Sequence[int],
        num_new_tokens: int | Sequence[int] = 1,
        *,
        pad_seqs_to: int | None = None,
        pad_tokens_to: int | None = None,
    ) -> CacheStep:
        """Makes room for new tokens, and says where each layer is to write them.

        The sequences have the new tokens from now on: write them in every layer, or truncate.

        Args:
            seq_ids: the sequences of the batch, each once.
            num_new_tokens: for each sequence, from 0: 1 in decode, more in prefill, whole or in
                chunks, or for draft tokens; one int is for all.
            pad_seqs_to, pad_tokens_to: the step's num_seqs and num_tokens, for CUDA graphs that
                were captured with them; None: as many as there are.

        Raises:
            OutOfPages: a group of layers has too few pages.
            TypeError, ValueError: an argument does not fit.
            In all these cases nothing has been changed in any group. Whatever else ends an append
            (no memory, Ctrl-C), the step before has ended, and the sequences either have all the
            new tokens or none.
        """
        rows, lengths, counts = self._check_append(seq_ids, num_new_tokens)
        num_seqs = cache_arguments.check_padding(
            "pad_seqs_to", pad_seqs_to, len(rows), self.max_num_seqs
        )
        num_tokens = cache_arguments.check_padding(
            "pad_tokens_to", pad_tokens_to, sum(counts), self.max_num_batched_tokens
        )
        plans = [tables.plan(rows, lengths, counts) for tables in self._tables]  # all may refuse
        drafts = [tables.draft(plan) for tables, plan in zip(self._tables, plans, strict=True)]
        self._current_step = None  # before the buffers that it reads change
        self._buffers.fill(drafts, rows, lengths, counts)
        self._journal.change(
            *(
                partial(storage.copy_pages, draft.copies)
                for storage, draft in zip(self._storage, drafts, strict=True)
                if draft.copies
            ),
            *_commits(drafts),
            partial(
                _set_lengths,
                [self._sequences[seq_id] for seq_id in seq_ids],
                [length + count for length, count in zip(lengths, counts, strict=True)],
            ),
        )
        return CacheStep(self, num_seqs, num_tokens, max(counts, default=0))

    def can_append(self, seq_ids: Sequence[int], num_new_tokens: int | Sequence[int] = 1) -> bool:
        """Whether there are pages for such an append; nothing is changed.

        Raises:
            TypeError, ValueError: an argument does not fit append, max_seqlen and
                max_num_batched_tokens among what it has to fit.
        """
        rows, lengths, counts = self._check_append(seq_ids, num_new_tokens)
        try:
            for tables in self._tables:
                tables.plan(rows, lengths, counts)
        except OutOfPages:
            return False
        return True

    # ---- memory ----

    def k_cache(self, layer: int) -> Tensor:
        """(num_pages, page_size, num_heads_kv, head_dim)."""
        group, place = self._layer_place(layer)
        return self._storage[group].k_cache[place]

    def v_cache(self, layer: int) -> Tensor:
        """(num_pages, page_size, num_heads_kv, head_dim_v)."""
        group, place = self._layer_place(layer)
        return self._storage[group].v_cache[place]

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """k_scale and v_scale of a layer; (None, None) where the cache is not quantised."""
        group, place = self._layer_place(layer)
        storage = self._storage[group]
        if storage.k_scale is not None and storage.v_scale is not None:
            return storage.k_scale[place], storage.v_scale[place]
        return self._k_scales[layer], self._v_scales[layer]

    def memory_bytes(self) -> int:
        """Of all pages, free ones too: the memory that the cache has taken."""
        return sum(storage.num_bytes for storage in self._storage)

    @property
    def num_seqs(self) -> int:
        self._journal.finish()
        return len(self._sequences)

    @property
    def num_free_pages(self) -> dict[int, int]:
        """By window_left of the group (-1: full layers)."""
        self._journal.finish()
        return {tables.window_left: tables.pool.num_free for tables in self._tables}

    def stats(self) -> dict[int, GroupStats]:
        """By window_left of the group (-1: full layers)."""
        self._journal.finish()
        return {
            tables.window_left: GroupStats(
                tables.window_left,
                storage.k_cache.shape[0],
                tables.pool.num_pages,
                tables.pool.num_free,
                tables.pool.num_shared,
                page_bytes,
            )
            for tables, storage, page_bytes in zip(
                self._tables, self._storage, self._page_bytes, strict=True
            )
        }

    # ---- copies ----

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy.deepcopy. A step stays with the cache that it is of."""
        self._journal.finish()
        return self.__dict__ | {"_current_step": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Sequences keep their ids, which allocate() will not draw again (sequence_ids.py)."""
        self.__dict__ |= state
        for owner in (*self._storage, self._buffers, *self._tables):
            clone_inference_tensors(owner)
        with torch.inference_mode(False):
            for storage in self._storage:
                storage.make_views()

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "copy.copy of a PagedKVCache would share pages with it, unknown to either: use "
            "copy.deepcopy"
        )

    # ---- arguments ----

    def _free_row(self) -> int:
        if not self._free_rows:
            raise RuntimeError(
                f"max_num_seqs = {self.max_num_seqs} sequences are in the cache: free one first"
            )
        return self._free_rows[-1]

    def _sequence(self, seq_id: int) -> _Sequence:
        self._journal.finish()
        if isinstance(seq_id, bool) or not isinstance(seq_id, int):
            raise TypeError(f"seq_id must be an int that allocate or fork returned; got {seq_id!r}")
        if seq_id not in self._sequences:
            raise ValueError(
                f"seq_id must be a sequence of this cache; got {seq_id}, which was freed or never "
                "allocated here"
            )
        return self._sequences[seq_id]

    def _check_append(
        self, seq_ids: Sequence[int], num_new_tokens: int | Sequence[int]
    ) -> tuple[list[int], list[int], list[int]]:
        """Rows, lengths and numbers of new tokens of the sequences."""
        self._journal.finish()
        if not isinstance(seq_ids, Sequence) or isinstance(seq_ids, str):
            raise TypeError(f"seq_ids must be a list of sequence ids; got {seq_ids!r}")
        sequences = [self._sequence(seq_id) for seq_id in seq_ids]
        if len(set(seq_ids)) < len(seq_ids):
            raise ValueError(f"seq_ids must name each sequence once; got {list(seq_ids)}")
        counts = cache_arguments.check_counts(num_new_tokens, len(seq_ids))
        if sum(counts) > self.max_num_batched_tokens:
            raise ValueError(
                f"num_new_tokens must be at most max_num_batched_tokens = "
                f"{self.max_num_batched_tokens} together; got {sum(counts)}"
            )
        for seq_id, sequence, count in zip(seq_ids, sequences, counts, strict=True):
            if sequence.length + count > self.max_seqlen:
                raise ValueError(
                    f"max_seqlen = {self.max_seqlen} tokens is all that a sequence may have; got "
                    f"{count} new ones for sequence {seq_id} of {sequence.length}"
                )
        return [s.row for s in sequences], [s.length for s in sequences], counts

    def _layer_place(self, layer: int) -> tuple[int, int]:
        """The group of a layer, and its place in there."""
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layer must be an int; got {layer!r}")
        if not 0 <= layer < len(self._layer_places):
            raise ValueError(f"layer must be from 0 to {len(self._layer_places) - 1}; got {layer}")
        return self._layer_places[layer]
