"""Lengths that no caller should pass, and which sequences must be right all the same."""

from __future__ import annotations

import random
from collections.abc import Iterator

MIN, MAX = -(2**31), 2**31 - 1


def bad_cumulative(true: list[int]) -> list[list[int]]:
    """cu_seqlens of three sequences, each with some wrong entry."""
    zero, first, second, total = true
    return [
        [zero, first, second, 5000],
        [zero, first, 5000, total],
        [zero, 5000, second, total],
        [zero, first, second, total + 1],
        [7, first, second, total],
        [zero, first, first // 2, total],
        [zero, first, -5, -7],
        [zero, -5, second, total],
        [MIN, first, second, total],
        [MAX, first, second, total],
        [zero, first, MAX, total],
        [zero, MIN, MAX, total],
        [zero, first, second, MIN],
        [zero, first, second, MAX],
        [MAX, MIN, MAX, MIN],
        [MIN, MAX, MIN, MAX],
        [MAX] * 4,
        [MIN] * 4,
        true[::-1],
        [zero, total, zero, total],
        [second, total, zero, first],
        [0, 0, 0, 0],
        [0, 1, 1, 0],
    ]


def bad_used(true: list[int]) -> list[list[int]]:
    """seqused_k, or cache_seqlens, likewise."""
    first, second, third = true
    return [
        [MAX, second, third],
        [first, MIN, third],
        [first, second, -1],
        [first + 1000, MIN, MAX],
        [MAX] * 3,
        [MIN] * 3,
        [first, 2**30, -(2**30)],
    ]


def random_cumulative(true: list[int], rng: random.Random) -> list[int]:
    values = [MIN, MIN + 1, -(2**30), -1, 0, 1, 2**30, MAX - 1, MAX]
    values += [x + rng.randint(-3, 3) for x in true] + [rng.randint(-100, 400) for _ in true]
    bad = list(true)
    for place in rng.sample(range(len(true)), rng.randint(1, len(true))):
        bad[place] = rng.choice(values)
    return bad


def ranges(cu_seqlens: list[int], total: int) -> list[tuple[int, int]]:
    """The rows that kernels take each sequence for."""
    ends = [min(max(end, 0), total) for end in cu_seqlens]
    return list(zip(ends, ends[1:], strict=False))


def untouched(cu_seqlens: list[int], true: list[int]) -> Iterator[int]:
    """Sequences whose ends are right, and no row of which is another's too."""
    given = ranges(cu_seqlens, true[-1])
    for i, (begin, end) in enumerate(given):
        if cu_seqlens[i : i + 2] != true[i : i + 2]:
            continue
        others = given[:i] + given[i + 1 :]
        if all(max(begin, b) >= min(end, e) for b, e in others):
            yield i
