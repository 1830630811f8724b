"""What a query sees, as the kernels ask it: intervals and blocks of keys against the plain rule,
query by query and key by key (csrc/attention/mask.h, block_list.h)."""

from __future__ import annotations

import itertools
import random
from types import ModuleType

import bindings_module
import pytest

LENGTHS = ((1, 1), (1, 40), (7, 40), (40, 40), (40, 7), (5, 0))
WINDOWS = ((-1, -1), (-1, 0), (0, 0), (5, 0), (5, 3), (-1, 2), (60, 0))


@pytest.fixture(scope="module")
def bindings() -> ModuleType:
    return bindings_module.build()


def is_visible(
    q: int, k: int, lengths: tuple[int, int], window: tuple[int, int], num_sink_tokens: int
) -> bool:
    seqlen_q, seqlen_k = lengths
    left, right = window
    p = q + seqlen_k - seqlen_q
    if k >= seqlen_k or (right >= 0 and k > p + right):
        return False
    return left < 0 or k >= p - left or (k < num_sink_tokens and p >= 0)


def tree_of(parents: list[int]) -> list[int]:
    """Each draft token's word: a bit for itself and each of its ancestors."""
    words: list[int] = []
    for token, parent in enumerate(parents):
        words.append(1 << token | (words[parent] if parent >= 0 else 0))
    return words


@pytest.mark.parametrize("num_sink_tokens", [0, 3, 100])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_intervals_are_the_rule(
    bindings: ModuleType, lengths: tuple[int, int], window: tuple[int, int], num_sink_tokens: int
) -> None:
    seqlen_q, seqlen_k = lengths
    mask = bindings.Mask(seqlen_q, seqlen_k, *window, num_sink_tokens)
    seen = [{k for k in range(seqlen_k) if mask.is_visible(q, k)} for q in range(seqlen_q)]
    for q, keys in enumerate(seen):
        position = q + seqlen_k - seqlen_q
        if position >= 0:  # a query before the first key sees none, sink tokens neither
            assert keys == {
                k for k in range(seqlen_k) if is_visible(q, k, lengths, window, num_sink_tokens)
            }
    for begin, end in itertools.combinations(range(0, seqlen_q + 1), 2):
        if (end - begin) % 3 and end - begin > 4:
            continue
        tile = seen[begin:end]
        sink_end, window_begin, window_end = mask.visible_keys(begin, end)
        keys = set(range(sink_end)) | set(range(window_begin, window_end))
        assert set().union(*tile) == {k for k in keys if 0 <= k < seqlen_k}
        all_begin, all_end = mask.keys_seen_by_all(begin, end)
        assert set(range(all_begin, all_end)) <= set.intersection(*tile)


@pytest.mark.parametrize("block_keys", [1, 4, 16])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("num_sink_tokens", [0, 3, 9])
def test_blocks_are_those_with_a_visible_key(
    bindings: ModuleType, window: tuple[int, int], num_sink_tokens: int, block_keys: int
) -> None:
    """Ascending, each once: a row's sums run in this order."""
    mask = bindings.Mask(20, 70, *window, num_sink_tokens)
    for begin, end in ((0, 1), (0, 20), (5, 13), (19, 20)):
        keys = {k for k in range(70) for q in range(begin, end) if mask.is_visible(q, k)}
        assert mask.blocks(begin, end, block_keys) == sorted({k // block_keys for k in keys})


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 0), (5, 3)])
def test_queries_that_see_a_block(bindings: ModuleType, window: tuple[int, int]) -> None:
    mask = bindings.Mask(20, 33, *window)
    for begin in range(0, 33, 4):
        end = min(begin + 4, 33)
        q_begin, q_end = mask.visible_queries(begin, end)
        for q in range(20):
            sees = any(mask.is_visible(q, k) for k in range(begin, end))
            assert (q_begin <= q < q_end) or not sees


def test_a_draft_token_sees_its_ancestors(bindings: ModuleType) -> None:
    """0 and 1 follow the context; 2 and 3 follow 0, 4 follows 1."""
    parents = [-1, -1, 0, 0, 1]
    mask = bindings.Mask(5, 12, -1, 0, 0, tree_of(parents))
    for q, path in enumerate(({0}, {1}, {0, 2}, {0, 3}, {1, 4})):
        seen = {k for k in range(12) if mask.is_visible(q, k)}
        assert seen == set(range(7)) | {7 + token for token in path}


@pytest.mark.parametrize("seed", range(8))
def test_a_path_of_a_tree_is_a_sequence(bindings: ModuleType, seed: int) -> None:
    """Window and sink tokens apply to a token's path as if it were all of the sequence."""
    rng = random.Random(seed)
    parents = [rng.randrange(-1, i) for i in range(12)]
    words, context = tree_of(parents), rng.choice((0, 5, 30))
    window, num_sink_tokens = (rng.choice((0, 2, 8)), 0), rng.choice((0, 2, 7))
    mask = bindings.Mask(12, context + 12, *window, num_sink_tokens, words)
    for q, word in enumerate(words):
        path = [token for token in range(12) if word >> token & 1]
        sequence = [*range(context), *(context + token for token in path)]
        lengths = (len(path), len(sequence))
        expected = {
            sequence[k]
            for k in range(len(sequence))
            if is_visible(len(path) - 1, k, lengths, window, num_sink_tokens)
        }
        assert {k for k in range(context + 12) if mask.is_visible(q, k)} == expected
