"""Who holds which tokens, and that the tiles of all ranks are the global mask, each pair once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sink_attention_ext.parallel import shard_sequence, unshard_sequence
from sink_attention_ext.parallel.layout import LAYOUTS, Sharding, tile_of_chunks
from sink_attention_ext.reference import is_visible


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_unshard_is_the_inverse(world_size: int, layout: str) -> None:
    for dim in (0, 1, -1):
        whole = torch.arange(24 * 24).view(24, 24)
        shards = [shard_sequence(whole, r, world_size, layout, dim) for r in range(world_size)]
        assert all(shard.shape[dim] == 24 // world_size for shard in shards)
        assert torch.equal(unshard_sequence(shards, layout, dim), whole)


def test_zigzag_pairs_a_chunk_near_the_beginning_with_one_near_the_end() -> None:
    positions = torch.arange(8)
    shards = [shard_sequence(positions, r, 2, "zigzag", dim=0).tolist() for r in range(2)]
    assert shards == [[0, 1, 6, 7], [2, 3, 4, 5]]


def global_mask(sharding: Sharding) -> tuple[Tensor, list[int]]:
    """How often each pair of the whole sequence is computed; how many pairs each rank computes."""
    world_size, length = sharding.world_size, sharding.shard_length
    seqlen = world_size * length
    positions = [
        shard_sequence(torch.arange(seqlen), r, world_size, sharding.layout, dim=0)
        for r in range(world_size)
    ]
    times, work = torch.zeros(seqlen, seqlen, dtype=torch.int), []
    for q_rank, k_rank in itertools.product(range(world_size), repeat=2):
        block = sharding.block(q_rank, k_rank)
        assert all(0 <= start < stop <= length for start, stop in block.ranges)
        sent = [positions[k_rank][start:stop] for start, stop in block.ranges]
        keys = torch.cat(sent) if sent else torch.empty(0, dtype=torch.long)
        assert len(keys) == block.num_keys
        pairs = 0
        for tile in block.tiles:
            rows = positions[q_rank][tile.q_start :][: tile.length]
            columns = keys[tile.k_start :][: tile.length]
            assert len(rows) == len(columns) == tile.length > 0
            window = (tile.window_left, tile.window_right)
            visible = is_visible(tile.length, tile.length, window_size=window)
            times[rows[:, None], columns] += visible.int()
            pairs += int(visible.sum())
        if keys.numel():  # the first and the last key of each range are seen: no token is sent idly
            for range_keys in sent:
                assert times[positions[q_rank]][:, range_keys[[0, -1]]].any(0).all()
        work.append(pairs)
    return times, [sum(work[r * world_size : (r + 1) * world_size]) for r in range(world_size)]


SIDES = (-1, 0, 1, 3, 4, 5, 7, 8, 9, 100)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_tiles_cover_each_visible_pair_once(world_size: int, layout: str) -> None:
    for length, left, right in itertools.product((2, 4, 8), SIDES, SIDES):
        sharding = Sharding(world_size, layout, length, (left, right))
        seqlen = world_size * length
        times, _ = global_mask(sharding)
        assert torch.equal(times, is_visible(seqlen, seqlen, window_size=(left, right)).int()), (
            sharding
        )
        diagonal = [t for r in range(world_size) for t in sharding.block(r, r).tiles]
        diagonal = [t for t in diagonal if t.is_diagonal]
        assert sum(tile.length for tile in diagonal) == seqlen  # every row once: where ds_aux is


def test_a_tile_by_hand() -> None:
    """Rows 8..15 with a window of 5 keys to the left, against keys 0..7: row 8 sees 3..7."""
    tile = tile_of_chunks(8, 8, (5, 0))
    assert (tile.q_start, tile.k_start, tile.length) == (0, 3, 5)
    assert (tile.window_left, tile.window_right) == (0, -1)
    assert tile_of_chunks(16, 8, (5, 0)) is None
    assert tile_of_chunks(-8, 8, (5, 0)) is None


def test_causal_zigzag_gives_every_rank_the_same_work() -> None:
    _, contiguous = global_mask(Sharding(4, "contiguous", 8, (-1, 0)))
    _, zigzag = global_mask(Sharding(4, "zigzag", 8, (-1, 0)))
    assert sum(contiguous) == sum(zigzag) == 32 * 33 // 2
    assert contiguous[3] > 6 * contiguous[0] and len(set(zigzag)) == 1


def test_a_window_smaller_than_a_shard_moves_only_its_own_length() -> None:
    sharding = Sharding(4, "contiguous", 1000, (127, 0))
    moved = {(q, k): sharding.block(q, k).ranges for q in range(4) for k in range(4) if q != k}
    needed = {pair: ranges for pair, ranges in moved.items() if ranges}
    assert needed == {(1, 0): ((873, 1000),), (2, 1): ((873, 1000),), (3, 2): ((873, 1000),)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shard_sequence(torch.zeros(1, 9), 0, 2), "multiple of 2 .* got 9"),
        (lambda: shard_sequence(torch.zeros(1, 6), 0, 2, "zigzag"), 'of 4 .*"zigzag".* got 6'),
        (lambda: shard_sequence(torch.zeros(1, 6), 2, 2), "rank must be from 0 .* got rank 2"),
        (lambda: shard_sequence(torch.zeros(1, 6), 0, 0), "rank .* rank 0 and world_size 0"),
        (lambda: shard_sequence(torch.zeros(1, 6), 0, 2, "ring"), "layout must be .*'ring'"),
        (lambda: unshard_sequence([]), r"shards must be one or more .* got \[\]"),
        (lambda: unshard_sequence([torch.zeros(1, 2), torch.zeros(1, 3)]), r"\(1, 2\), \(1, 3\)"),
        (lambda: unshard_sequence([torch.zeros(1, 3)], "zigzag"), "even length .* got 3"),
    ],
)
def test_what_does_not_divide_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
