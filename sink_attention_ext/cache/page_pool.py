"""The host's bookkeeping of a paged key-value cache: who holds which page, and what a step changes.

Plain Python integers and one table in host memory; no keys or values, and no device. PagePool
counts references to pages, PageTables (page_tables.py) keeps the rows of the block table of one
group of layers.

Nothing here changes half-way. What is to change is worked out in a PoolDraft and a TablesDraft,
which leave the bookkeeping alone; ``commit`` then puts it in. A commit sets everything to values
that the draft holds. So one that was interrupted (Ctrl-C, too, comes between any two lines) is made
whole by another: PagedKVCache keeps a draft until its commit has come to an end.

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
row holds them, then the live pages. The kernels' mask over positions j of the row, ``j <= p and
(j < num_sink_tokens or j >= p - window_left)``, remains exact:

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
from collections.abc import Iterable


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

    def check_held(self, page: int, count: int, held: int) -> None:
        self._check(page)
        if held < count:
            raise ValueError(f"page {page} must be held at least {count} times; it is held {held}")

    def _check(self, page: int) -> None:
        if not 0 <= page < len(self._references):
            raise ValueError(f"page must be from 0 to {len(self._references) - 1}; got {page}")


class PoolDraft:
    """A PagePool as it would be after some changes."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._references: dict[int, int] = {}  # where they change
        self._num_kept = pool.num_free  # of the free pages, from the bottom of the stack
        self._freed: list[int] = []  # on top of those

    @property
    def num_free(self) -> int:
        return self._num_kept + len(self._freed)

    def references(self, page: int) -> int:
        count = self._references.get(page)
        return self._pool.references(page) if count is None else count

    def take(self, count: int) -> list[int]:
        """Pages that were free, each held once."""
        if not 0 <= count <= self.num_free:
            raise ValueError(f"count must be from 0 to {self.num_free} free pages; got {count}")
        pages = []
        for _ in range(count):
            if self._freed:
                pages.append(self._freed.pop())
            else:
                self._num_kept -= 1
                pages.append(self._pool._free[self._num_kept])
        self._references |= dict.fromkeys(pages, 1)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Holds each of the pages, which are held already, once more."""
        pages = list(pages)
        for page in pages:
            self._pool.check_held(page, 1, self.references(page))
        for page in pages:
            self._references[page] = self.references(page) + 1

    def drop(self, pages: Iterable[int]) -> None:
        """Holds each of the pages once less; those that nobody holds are free."""
        pages = list(pages)
        for page, count in Counter(pages).items():
            self._pool.check_held(page, count, self.references(page))
        for page in pages:
            self._references[page] = self.references(page) - 1
            if self._references[page] == 0:
                self._freed.append(page)

    def commit(self) -> None:
        """Any number of times."""
        for page, count in self._references.items():
            self._pool._references[page] = count
        self._pool._free[self._num_kept :] = self._freed
