"""Ids of the sequences of all PagedKVCaches, of this process and others."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator


def _count() -> Iterator[int]:
    """From a number that is drawn for this process: a cache that comes from another process, as by
    pickle, brings ids that none of this one's sequences has or will have."""
    return itertools.count(secrets.randbits(30) << 32)


_ids = _count()


def _draw_again() -> None:
    global _ids
    _ids = _count()


os.register_at_fork(after_in_child=_draw_again)


def new_id() -> int:
    """Never the same again; an int64."""
    return next(_ids)
