"""The host's books of a paged key-value cache: who holds which page, and what a step changes.

Plain Python integers and one table in host memory; no keys or values, and no device. PagePool
counts references to pages, PageTables keeps the rows of the block table of one group of layers.

Full layers keep every page. Windowed layers (a token sees itself and window_left before it) keep
only what a next token can see. Let a sequence have ``length`` tokens, the first of which at
position 0; the next has position ``length`` and sees nothing before ``length - window_left``.
Whole pages before that are dropped, and the row of the block table closes up: column c holds page
``c + num_dropped`` of the sequence. To the kernels such a row is a shorter sequence of
``length - num_dropped * page_size`` tokens. That changes no result: keys were rotated by their true
positions before they came here, and the mask is aligned bottom-right, so that it depends on the
distance from the last token alone.

With num_sink_tokens (StreamingLLM, arXiv:2309.17453: the first tokens stay visible beside the
window) the first ``num_sink_pages = ceil(num_sink_tokens / page_size)`` pages are pinned, and the
row holds them, then the live pages. The kernels' mask over places j in the row, ``j <= p and (j <
num_sink_tokens or j >= p - window_left)``, remains exact:

* a pinned token has its own position for a place, and live ones come after all pinned ones, so the
  first term of the two is right;
* live tokens and queries are moved by the same ``num_dropped * page_size``, so the second is right
  among them;
* the second lets in no pinned token whose true position is out of the window. Such a token has
  ``j < num_sink_pages * page_size``. Pages are dropped only while ``(num_sink_pages + num_dropped)
  * page_size <= length - window_left``, hence the window of the first query begins, in the row, at
  ``length - window_left - num_dropped * page_size >= num_sink_pages * page_size > j``; those of
  later queries begin later. PageTables.min_length keeps this so when a sequence is truncated. Where
  nothing is dropped, places are positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


class OutOfPages(RuntimeError):
    """An append needs more pages than are free. Nothing has been changed: free or preempt, retry.

    Attributes:
        window_left: the group of layers that is short; -1 is the full layers.
        needed: pages that the append takes.
        available: pages that are free, with those that the append itself would release.
    """

    def __init__(self, window_left: int, needed: int, available: int, num_pages: int) -> None:
        group = "full layers" if window_left < 0 else f"layers with window_left = {window_left}"
        super().__init__(
            f"num_pages = {num_pages} of the {group} do not suffice: append needs {needed} more "
            f"pages, {available} are free; nothing was changed"
        )
        self.window_left, self.needed, self.available = window_left, needed, available


class PagePool:
    """Pages 0 to num_pages - 1, each free or held by one or more rows of a block table."""

    def __init__(self, num_pages: int) -> None:
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last goes first

    @property
    def num_pages(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_shared(self) -> int:
        return sum(count > 1 for count in self._references)

    def references(self, page: int) -> int:
        self._check(page)
        return self._references[page]

    def take(self, count: int) -> list[int]:
        """Pages that were free, each held once."""
        if not 0 <= count <= len(self._free):
            raise ValueError(f"count must be from 0 to {len(self._free)} free pages; got {count}")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Holds each of the pages, which are held already, once more."""
        pages = list(pages)
        for page in pages:
            self._check_held(page, 1)
        for page in pages:
            self._references[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """Holds each of the pages once less; those that nobody holds are free."""
        pages = list(pages)
        for page, count in Counter(pages).items():
            self._check_held(page, count)
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def _check(self, page: int) -> None:
        if not 0 <= page < len(self._references):
            raise ValueError(f"page must be from 0 to {len(self._references) - 1}; got {page}")

    def _check_held(self, page: int, count: int) -> None:
        self._check(page)
        if self._references[page] < count:
            raise ValueError(
                f"page {page} must be held at least {count} times; it is held "
                f"{self._references[page]} times"
            )


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
        self.table = torch.zeros(max_num_seqs, max_pages_per_seq, dtype=torch.int32)
        self._pages: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._num_dropped = [0] * max_num_seqs

    def pages(self, row: int) -> list[int]:
        return list(self._pages[row])

    def place(self, row: int, position: int) -> int:
        """Where in the row a live token is (one that may be pinned only while none is dropped)."""
        return position - self._num_dropped[row] * self.page_size

    def slots(self, row: int, begin: int, end: int) -> list[int]:
        """``page * page_size + token in page`` of the places from begin to end - 1 in the row."""
        pages, size = self._pages[row], self.page_size
        slots: list[int] = []
        for column in range(begin // size, -(-end // size)):
            shift = (pages[column] - column) * size
            slots += range(shift + max(begin, column * size), shift + min(end, (column + 1) * size))
        return slots

    def max_num_pages(self, rows: Sequence[int]) -> int:
        return max((len(self._pages[row]) for row in rows), default=0)

    # ---- appending, in two parts: plan() looks and refuses, apply() changes ----

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

    def apply(self, changes: Sequence[RowChange]) -> list[tuple[int, int]]:
        """Does what was planned; returns (source, target) of each page that must be copied."""
        for change in changes:  # all that leave first: the plan counts on them
            if change.num_leaving > 0:
                self.pool.drop(self._leaving(change.row, change.num_leaving))
                pages, first = self._pages[change.row], self.num_sink_pages
                del pages[first : first + change.num_leaving]
                self._num_dropped[change.row] += change.num_leaving
                self._store(change.row, 0)
        copies = []
        for change in changes:
            pages, column = self._pages[change.row], change.copied_column
            first_changed = len(pages)
            if column >= 0:
                (target,) = self.pool.take(1)
                copies.append((pages[column], target))
                self.pool.drop([pages[column]])
                pages[column] = target
                first_changed = column
            pages += self.pool.take(change.num_new)
            if first_changed < len(pages):
                self._store(change.row, first_changed)
        return copies

    # ---- whole rows ----

    def fork(self, row: int, new_row: int) -> None:
        """The empty new_row holds the pages of row too."""
        self.pool.share(self._pages[row])
        self._pages[new_row] = list(self._pages[row])
        self._num_dropped[new_row] = self._num_dropped[row]
        self._store(new_row, 0)

    def min_length(self, row: int) -> int:
        """The shortest length to go back to: all that its next token sees must still be there."""
        if self._num_dropped[row] == 0:
            return 0
        first_live = (self.num_sink_pages + self._num_dropped[row]) * self.page_size
        return first_live + self.window_left

    def truncate(self, row: int, length: int) -> None:
        """Gives back what lies behind `length` tokens, which are at least min_length."""
        num_kept = -(-length // self.page_size) - self._num_dropped[row]
        self.pool.drop(self._pages[row][num_kept:])
        del self._pages[row][num_kept:]

    def free(self, row: int) -> None:
        self.pool.drop(self._pages[row])
        self._pages[row], self._num_dropped[row] = [], 0

    def _num_droppable(self, length: int) -> int:
        """Pages that neither the token at position `length` nor a later one sees."""
        if self.window_left < 0:
            return 0
        return (length - self.window_left) // self.page_size - self.num_sink_pages

    def _leaving(self, row: int, count: int) -> list[int]:
        return self._pages[row][self.num_sink_pages : self.num_sink_pages + count]

    def _store(self, row: int, first: int) -> None:
        pages = self._pages[row]
        self.table[row, first : len(pages)] = torch.tensor(pages[first:], dtype=torch.int32)
