"""What the ranks of context parallelism tell each other: keys, values, their gradients, and whether
they were all called alike.

In step s = 0, 1, ..., world_size - 1 every rank works on the keys of the rank s places before it,
round the ring. They come straight from their owner, not from neighbour to neighbour, so that
each pair of ranks exchanges what the one's rows see of the other's keys and nothing else: under a
sliding window that is a few rows, whatever the length of a shard. It also lets a rank's gradients
of foreign keys go home in their own dtype, as one summand, where a sum on its way around would be
rounded at each stop or be sent in float32. While a step is computed, the next one's keys are under
way::

    rank r    computes with    under way meanwhile            and in the backward
    step 0    own keys         keys r - 1 -> r, r -> r + 1
    step 1    keys of r - 1    keys r - 2 -> r, r -> r + 2
    step 2    keys of r - 2    keys r - 3 -> r, r -> r + 3    dk, dv r -> r - 1, r + 1 -> r

Every rank posts the messages of each step in the same order, so that no two wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sink_attention_ext.parallel.layout import Block, Sharding

Message = tuple[Tensor, int]  # a contiguous tensor, and the rank within the group of the other end


class Pending:
    """Messages under way. Holds their tensors until they have arrived."""

    def __init__(
        self, group: dist.ProcessGroup, sends: Sequence[Message], receives: Sequence[Message]
    ) -> None:
        self._messages = (*sends, *receives)
        operations = [
            dist.P2POp(operation, tensor, dist.get_global_rank(group, peer), group)
            for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
            for tensor, peer in messages
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._messages = [], ()


def rows_of(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Those rows of (batch, rows, ...), one range behind the other, contiguous."""
    if len(ranges) == 1:
        start, stop = ranges[0]
        return tensor[:, start:stop].contiguous()
    return torch.cat([tensor[:, start:stop] for start, stop in ranges], dim=1)


def add_rows(tensor: Tensor, ranges: Sequence[tuple[int, int]], rows: Tensor) -> None:
    """tensor[those rows] += rows: what rows_of took out, put back."""
    lengths = [stop - start for start, stop in ranges]
    for (start, stop), part in zip(ranges, rows.split(lengths, dim=1), strict=True):
        tensor[:, start:stop] += part


@dataclass
class Step:
    """Keys and values of another rank (of this one in step 0), as far as this rank's rows see them.

    block.tiles is empty, and k and v have no rows, where they see nothing.
    """

    target: int  # the rank that works on this one's keys in the same step
    source: int  # the rank whose keys these are
    block: Block
    k: Tensor
    v: Tensor


class Exchange:
    """One pass, forward or backward, over everything that this rank's rows see."""

    def __init__(self, group: dist.ProcessGroup, sharding: Sharding) -> None:
        self._group, self._sharding = group, sharding
        self.rank = dist.get_rank(group)
        self._gradients: tuple[Pending, Block, Tensor, Tensor] | None = None

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Step]:
        """Every step in order, also those without a tile, whose messages others may wait for."""
        own = self._sharding.block(self.rank, self.rank)
        following = self._start(1, k, v)
        yield Step(self.rank, self.rank, own, rows_of(k, own.ranges), rows_of(v, own.ranges))
        for number in range(1, self._sharding.world_size):
            step, pending = following
            pending.wait()
            following = self._start(number + 1, k, v)
            yield step

    def _start(self, number: int, k: Tensor, v: Tensor) -> tuple[Step, Pending] | None:
        world_size = self._sharding.world_size
        if number == world_size:
            return None
        target, source = (self.rank + number) % world_size, (self.rank - number) % world_size
        seen_there = self._sharding.block(target, self.rank).ranges
        block = self._sharding.block(self.rank, source)
        sends = [(rows_of(x, seen_there), target) for x in (k, v)] if seen_there else []
        keys, values = _empty_rows(k, block), _empty_rows(v, block)
        receives = [(keys, source), (values, source)] if block.ranges else []
        step = Step(target, source, block, keys, values)
        return step, Pending(self._group, sends, receives)

    def return_gradients(self, step: Step, dk: Tensor, dv: Tensor, own: tuple[Tensor, ...]) -> None:
        """Sends home the gradients of a step's keys; adds those of this rank's that another made.

        dk, dv: of step.k and step.v, in their dtype. own: the sums (dk, dv) of the whole shard;
        complete after finish_gradients.
        """
        self.finish_gradients(own)
        seen_there = self._sharding.block(step.target, self.rank)
        sends = [(dk, step.source), (dv, step.source)] if step.block.ranges else []
        parts = [_empty_rows(part, seen_there) for part in (dk, dv)]
        receives = [(part, step.target) for part in parts] if seen_there.ranges else []
        self._gradients = Pending(self._group, sends, receives), seen_there, *parts

    def finish_gradients(self, own: tuple[Tensor, ...]) -> None:
        if self._gradients is None:
            return
        pending, block, *parts = self._gradients
        self._gradients = None
        pending.wait()
        for total, part in zip(own, parts, strict=True):
            add_rows(total, block.ranges, part)


def _empty_rows(like: Tensor, block: Block) -> Tensor:
    return like.new_empty(like.shape[0], block.num_keys, *like.shape[2:])


def check_agreement(
    group: dist.ProcessGroup, facts: dict[str, Any], error: Exception | None
) -> None:
    """Raises on every rank alike if one rank's arguments are wrong or differ from another's.

    facts: by the name that a message calls them. error: what this rank has to say against its own
    arguments; it is raised here, after the others have heard of it and so don't wait for this rank.
    """
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, facts if error is None else str(error), group)
    if error is not None:
        raise error
    for rank, theirs in enumerate(told):
        if isinstance(theirs, str):
            raise ValueError(f"rank {rank} of the group refuses its arguments: {theirs}")
    for rank, theirs in enumerate(told):
        for name, value in told[0].items():
            if theirs[name] != value:
                raise ValueError(
                    f"{name} must be the same on every rank of the group; rank 0 has {value}, rank "
                    f"{rank} has {theirs[name]}"
                )
