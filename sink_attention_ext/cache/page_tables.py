"""PageTables: the block table of one group of layers, part of the bookkeeping of page_pool.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sink_attention_ext.cache.page_pool import OutOfPages, PagePool, PoolDraft


@dataclass(frozen=True)
class RowChange:
    """What an append does to one row of a block table."""

    row: int
    num_leaving: int  # pages behind the pinned ones that have left the window
    copied_column: int  # after that: the shared page that is written into and so copied; -1: none
    num_new: int


class PageTables:
    """The pages of every sequence in one group of layers, as rows of a block table."""

    def __init__(
        self,
        window_left: int,
        num_sink_tokens: int,
        page_size: int,
        num_pages: int,
        max_num_seqs: int,
        max_pages_per_seq: int,
    ) -> None:
        self.window_left = window_left
        self.page_size = page_size
        self.num_sink_pages = -(-num_sink_tokens // page_size)
        self.pool = PagePool(num_pages)
        # What the kernels see, in host memory; entries behind a row's last page are old ones.
        self.table = torch.zeros(max_num_seqs, max_pages_per_seq, dtype=torch.int32, device="cpu")
        self._pages: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._num_dropped = [0] * max_num_seqs

    def pages(self, row: int) -> list[int]:
        return list(self._pages[row])

    # ---- appending: plan() looks and refuses, draft() works out what then changes ----

    def plan(
        self, rows: Sequence[int], lengths: Sequence[int], counts: Sequence[int]
    ) -> list[RowChange]:
        """What it takes to append counts[i] tokens to the lengths[i] of rows[i].

        Raises:
            OutOfPages: the pool has too few. Nothing changes here in any case.
        """
        leaving: Counter[int] = Counter()  # how many of a page's references go away
        num_leaving = []
        for row, length, count in zip(rows, lengths, counts, strict=True):
            # Without a new token nothing moves on: truncate may still go back as far as before.
            left = 0 if count == 0 else self._num_droppable(length) - self._num_dropped[row]
            left = max(0, left)
            num_leaving.append(left)
            if left > 0:
                leaving.update(self._leaving(row, left))
        changes, needed = [], 0
        for row, length, count, left in zip(rows, lengths, counts, num_leaving, strict=True):
            column, copied_column = length // self.page_size - self._num_dropped[row], -1
            if count > 0 and length % self.page_size != 0:  # the last page has room
                page = self._pages[row][column]
                if self.pool.references(page) - leaving[page] > 1:
                    leaving[page] += 1
                    copied_column = column - left
            num_new = -(-(length + count) // self.page_size) - -(-length // self.page_size)
            needed += num_new + (copied_column >= 0)
            changes.append(RowChange(row, left, copied_column, num_new))
        freed = sum(self.pool.references(page) == count for page, count in leaving.items())
        if needed > self.pool.num_free + freed:
            available = self.pool.num_free + freed
            raise OutOfPages(self.window_left, needed, available, self.pool.num_pages)
        return changes

    def draft(self, changes: Sequence[RowChange]) -> TablesDraft:
        """After what was planned; its copies are the pages that must be copied then."""
        draft = TablesDraft(self)
        for change in changes:  # all that leave first: the plan counts on them
            if change.num_leaving > 0:
                draft.pool.drop(self._leaving(change.row, change.num_leaving))
                rest = self._pages[change.row][self.num_sink_pages + change.num_leaving :]
                draft.set_pages(change.row, self.num_sink_pages, rest, change.num_leaving)
        for change in changes:
            column = change.copied_column
            if column >= 0:
                source = draft.page(change.row, column)
                (target,) = draft.pool.take(1)
                draft.copies.append((source, target))
                draft.pool.drop([source])
                draft.set_pages(change.row, column, [target])
            if change.num_new > 0:
                new = draft.pool.take(change.num_new)
                draft.set_pages(change.row, draft.num_pages(change.row), new)
        return draft

    # ---- whole rows ----

    def forked(self, row: int, new_row: int) -> TablesDraft:
        """After the empty new_row holds the pages of row too."""
        draft = TablesDraft(self)
        draft.pool.share(self._pages[row])
        draft.set_pages(new_row, 0, list(self._pages[row]), self._num_dropped[row])
        return draft

    def min_length(self, row: int) -> int:
        """The shortest length to go back to: all that its next token sees must still be there."""
        if self._num_dropped[row] == 0:
            return 0
        first_live = (self.num_sink_pages + self._num_dropped[row]) * self.page_size
        return first_live + self.window_left

    def truncated(self, row: int, length: int) -> TablesDraft:
        """After what lies behind `length` tokens, which are at least min_length, is given back."""
        num_kept = -(-length // self.page_size) - self._num_dropped[row]
        draft = TablesDraft(self)
        if behind := self._pages[row][num_kept:]:
            draft.pool.drop(behind)
            draft.set_pages(row, num_kept, [])
        return draft

    def freed(self, row: int) -> TablesDraft:
        draft = TablesDraft(self)
        draft.pool.drop(self._pages[row])
        draft.set_pages(row, 0, [], -self._num_dropped[row])
        return draft

    def _num_droppable(self, length: int) -> int:
        """Pages that neither the token at position `length` nor a later one sees."""
        if self.window_left < 0:
            return 0
        return (length - self.window_left) // self.page_size - self.num_sink_pages

    def _leaving(self, row: int, count: int) -> list[int]:
        return self._pages[row][self.num_sink_pages : self.num_sink_pages + count]


class TablesDraft:
    """A PageTables as it would be after some changes.

    Attributes:
        pool: the same of its pool.
        copies: (source, target) of the pages whose contents must be copied.
    """

    def __init__(self, tables: PageTables) -> None:
        self._tables = tables
        self.pool = PoolDraft(tables.pool)  # which changes only where rows do
        self.copies: list[tuple[int, int]] = []
        self._ends: dict[int, tuple[int, list[int]]] = {}  # of changed rows: from a column on
        self._num_dropped: dict[int, int] = {}  # of rows in which that changes

    def set_pages(self, row: int, first: int, pages: list[int], num_dropped: int = 0) -> None:
        """The row has these pages from column `first` on, and num_dropped more are dropped."""
        begin, end = self._ends.get(row, (first, []))
        if first < begin:  # what was set before lies behind, and so is overwritten or gone
            begin, end = first, []
        self._ends[row] = begin, end[: first - begin] + pages
        if num_dropped != 0:
            self._num_dropped[row] = self._dropped(row) + num_dropped

    @property
    def is_change(self) -> bool:
        """Whether there is anything to commit: most steps of decode stay on their pages."""
        return bool(self._ends)

    def num_pages(self, row: int) -> int:
        if row in self._ends:
            first, pages = self._ends[row]
            return first + len(pages)
        return len(self._tables._pages[row])

    def page(self, row: int, column: int) -> int:
        first, pages = self._ends.get(row, (column + 1, []))
        return self._tables._pages[row][column] if column < first else pages[column - first]

    def place(self, row: int, position: int) -> int:
        """Where in the row a live token is (one that may be pinned only while none is dropped)."""
        return position - self._dropped(row) * self._tables.page_size

    def slots(self, row: int, begin: int, end: int) -> list[int]:
        """``page * page_size + token in page`` of the places from begin to end - 1 in the row."""
        size, pages = self._tables.page_size, self._tables._pages[row]
        first, changed = self._ends.get(row, (len(pages), ()))
        slots: list[int] = []
        for column in range(begin // size, -(-end // size)):
            page = pages[column] if column < first else changed[column - first]
            shift = (page - column) * size
            slots += range(shift + max(begin, column * size), shift + min(end, (column + 1) * size))
        return slots

    def rows(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), the most pages of one of them) int32, in host memory."""
        width = max(map(self.num_pages, rows), default=0)
        indices = torch.tensor(rows, dtype=torch.int64, device="cpu")
        table = self._tables.table[:, :width].index_select(0, indices)
        if self._ends:
            for i, row in enumerate(rows):
                if row in self._ends:
                    _store(table[i], *self._ends[row])
        return table

    def commit(self) -> None:
        """Any number of times."""
        tables = self._tables
        self.pool.commit()
        for row, (first, pages) in self._ends.items():
            tables._pages[row][first:] = pages
            _store(tables.table[row], first, pages)
        for row, num_dropped in self._num_dropped.items():
            tables._num_dropped[row] = num_dropped

    def _dropped(self, row: int) -> int:
        num_dropped = self._num_dropped.get(row)
        return self._tables._num_dropped[row] if num_dropped is None else num_dropped


def _store(row: Tensor, first: int, pages: list[int]) -> None:
    if pages:
        end = first + len(pages)
        row[first:end] = torch.tensor(pages, dtype=torch.int32, device="cpu")
