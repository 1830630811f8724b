"""Which rank holds which part of a sequence, and which keys its queries need from which rank.

Plain arithmetic, no communication: every rank works out what it sends and what it receives, and
all of them come to the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sink_attention_ext import checks
from sink_attention_ext.tensor_kinds import check_kind

LAYOUTS = ("contiguous", "zigzag")


def check_rank(rank: int, world_size: int) -> None:
    checks.check_int("rank", rank)
    checks.check_int("world_size", world_size)
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"rank must be from 0 to world_size - 1; got rank {rank} and world_size {world_size}"
        )


def chunks_of(rank: int, world_size: int, layout: str) -> tuple[int, ...]:
    """The chunks that a rank holds, in order, of the equal chunks that the sequence is cut into.

    contiguous: world_size chunks, one a rank. zigzag: 2 * world_size chunks, of which rank r has
    r and 2 * world_size - 1 - r, one near the beginning and one as near the end. Under a causal
    mask a late row sees many keys and an early one few: contiguous shards leave the last rank with
    almost twice the mean work, zigzag shards have all the same.
    """
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f'layout must be "contiguous" or "zigzag"; got {layout!r}')
    return (rank,) if layout == "contiguous" else (rank, 2 * world_size - 1 - rank)


def _check_dim(dim: int, name: str, tensor: Tensor) -> None:
    checks.check_int("dim", dim)
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(
            f"dim must be a dimension of {name}, of which there are {tensor.dim()}; got {dim} for "
            f"shape {checks.shape_text(tensor)}"
        )


def _num_chunks(world_size: int, layout: str) -> int:
    return world_size * len(chunks_of(0, world_size, layout))


def shard_sequence(
    tensor: Tensor, rank: int, world_size: int, layout: str = "contiguous", dim: int = 1
) -> Tensor:
    """The part of a sequence that a rank of context parallelism holds.

    Cut everything that has a row per token with it: q, k and v (or better the hidden states that
    they are made of), labels, and the position ids, which are no longer a range under zigzag.

    Args:
        tensor: any shape; its length in `dim` is a multiple of world_size (contiguous) or of 2 *
            world_size (zigzag).
        rank: from 0 to world_size - 1.
        world_size: number of ranks.
        layout: "contiguous": the rank'th of world_size parts. "zigzag": the chunks rank and 2 *
            world_size - 1 - rank of 2 * world_size, one behind the other.
        dim: the dimension that counts tokens.

    Returns:
        The shard, length / world_size in `dim`; contiguous layout: a view.

    Raises:
        TypeError: an argument has another type.
        ValueError: the length does not divide, or the layout, rank or dimension does not exist.

    Example::

        position_ids = shard_sequence(torch.arange(4096), rank, world_size, "zigzag", dim=0)
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor must be a torch.Tensor; got {type(tensor).__name__}")
    check_rank(rank, world_size)
    _check_dim(dim, "tensor", tensor)
    num_chunks = _num_chunks(world_size, layout)
    length = tensor.shape[dim]
    if length % num_chunks != 0:
        raise ValueError(
            f"tensor must have a length in dimension {dim} that is a multiple of {num_chunks} (the "
            f'chunks of {world_size} ranks in layout "{layout}"); got {length}: pad the sequence'
        )
    size = length // num_chunks
    parts = [tensor.narrow(dim, c * size, size) for c in chunks_of(rank, world_size, layout)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def unshard_sequence(shards: Sequence[Tensor], layout: str = "contiguous", dim: int = 1) -> Tensor:
    """The inverse of shard_sequence.

    Args:
        shards: of all ranks, by rank; equal shapes. As torch.distributed.all_gather gives them.
        layout, dim: as in shard_sequence. Of an lse (batch, num_heads, seqlen) the dim is 2.

    Returns:
        The whole, its rows in the order of the sequence.

    Raises:
        TypeError: an argument has another type.
        ValueError: no shards, unequal ones, or a length that the layout does not cut.
    """
    if isinstance(shards, Tensor) or not isinstance(shards, Sequence):
        raise TypeError(
            f"shards must be a list or tuple of tensors, one a rank; got {type(shards).__name__}"
        )
    for rank, shard in enumerate(shards):
        if not isinstance(shard, Tensor):
            raise TypeError(f"shards[{rank}] must be a torch.Tensor; got {type(shard).__name__}")
        check_kind(f"shards[{rank}]", shard)
    if len(shards) == 0 or any(shard.shape != shards[0].shape for shard in shards):
        raise ValueError(
            "shards must be one or more tensors of one shape; got "
            f"{[tuple(shard.shape) for shard in shards]}"
        )
    for rank, shard in enumerate(shards):
        if shard.dtype != shards[0].dtype:
            raise TypeError(
                f"shards[{rank}] must have the dtype of shards[0], {shards[0].dtype}; got "
                f"{shard.dtype}"
            )
        checks.check_device(f"shards[{rank}]", shard, shards[0].device)
    _check_dim(dim, "shards", shards[0])
    world_size = len(shards)
    parts = len(chunks_of(0, world_size, layout))
    length = shards[0].shape[dim]
    if length % parts != 0:
        raise ValueError(
            f'shards must have an even length in dimension {dim} in layout "{layout}"; got {length}'
        )
    pieces = {}
    for rank, shard in enumerate(shards):
        chunks = chunks_of(rank, world_size, layout)
        pieces |= dict(zip(chunks, shard.split(length // parts, dim), strict=True))
    return torch.cat([pieces[chunk] for chunk in sorted(pieces)], dim)


# ---- which rows against which keys ----


@dataclass(frozen=True)
class Tile:
    """`length` rows from q_start against `length` keys from k_start, with an ordinary window.

    As there are as many keys as rows, bottom-right alignment adds nothing: row i stands at key i.
    """

    q_start: int
    k_start: int
    length: int
    window_left: int  # -1: unbounded
    window_right: int
    is_diagonal: bool = False  # a chunk against itself; there is one for every row


def tile_of_chunks(shift: int, length: int, window: tuple[int, int]) -> Tile | None:
    """What rows of one chunk see of another chunk, both of `length`; None if nothing.

    shift: by how many tokens the rows' chunk is behind the keys' chunk (negative: before it).

    Row i of its chunk sees key j of the other if ``lower <= j - i <= upper``, where lower = shift -
    left and upper = shift + right: the global window with both positions made local. Then

    * lower > 0 (the window has begun to leave the chunk): row i >= length - lower would need j >=
      length, and no row sees a key j < lower. Left over are the rows [0, length - lower) and the
      keys [lower, length), equally many. With j counted from lower, the bounds of j - i become 0
      and upper - lower.
    * upper < 0 (the window only just reaches ahead): by the same argument the other way round, rows
      [-upper, length) and keys [0, length + upper), bounds lower - upper and 0.
    * else all rows and keys, with the bounds as they are.

    Both cannot be, since lower <= upper. In every case the bounds include 0, so that they are
    an ordinary window (-lower, upper) for a kernel; a side of length - 1 or more bounds nothing.
    """
    reach = abs(shift) + length  # no two tokens of the chunks are further apart: -1, unbounded
    left, right = (reach if side < 0 else min(side, reach) for side in window)
    lower, upper = shift - left, shift + right
    if lower >= length or upper <= -length:
        return None
    k_start, q_start = max(lower, 0), max(-upper, 0)
    rows = length - k_start - q_start
    window_left, window_right = (
        -1 if side >= rows - 1 else side
        for side in (k_start - q_start - lower, upper - k_start + q_start)
    )
    return Tile(q_start, k_start, rows, window_left, window_right, is_diagonal=shift == 0)


@dataclass(frozen=True)
class Block:
    """What one rank's rows see of one rank's keys.

    ranges: (start, stop) of the keys in their shard that anything sees, which are what is sent, one
        range behind the other.
    tiles: rows by their place in the shard, keys by their place among what is sent.
    """

    ranges: tuple[tuple[int, int], ...]
    tiles: tuple[Tile, ...]

    @property
    def num_keys(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class Sharding:
    """How a sequence and its attention's window lie over the ranks."""

    world_size: int
    layout: str
    shard_length: int
    window: tuple[int, int]  # (left, right), -1: unbounded; causal: right = 0

    def block(self, q_rank: int, k_rank: int) -> Block:
        """The rows of q_rank against the keys of k_rank."""
        q_chunks = chunks_of(q_rank, self.world_size, self.layout)
        k_chunks = chunks_of(k_rank, self.world_size, self.layout)
        size = self.shard_length // len(k_chunks)
        ranges, tiles = [], []
        num_keys = 0
        for k_place, k_chunk in enumerate(k_chunks):
            of_chunk = []
            for q_place, q_chunk in enumerate(q_chunks):
                tile = tile_of_chunks((q_chunk - k_chunk) * size, size, self.window)
                if tile is not None:
                    of_chunk.append(replace(tile, q_start=tile.q_start + q_place * size))
            if not of_chunk:
                continue
            start = min(tile.k_start for tile in of_chunk)
            stop = max(tile.k_start + tile.length for tile in of_chunk)
            ranges.append((k_place * size + start, k_place * size + stop))
            tiles += [replace(t, k_start=t.k_start - start + num_keys) for t in of_chunk]
            num_keys += stop - start
        return Block(tuple(ranges), tuple(tiles))
