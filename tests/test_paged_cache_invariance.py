"""num_splits=1 through PagedKVCache: the same bits alone, in a batch, and in other chunks.

A full layer's results have them for any chunks. A windowed layer's have them for the same chunks
only: which pages it has dropped, and so which keys are summed together, depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from backends import Backend
from torch import Tensor

from sink_attention_ext import PagedKVCache

HEADS_Q, HEADS_KV, DIM = 4, 2, 32
LENGTH = 150
FULL, WINDOWED = 0, 1


class Server:
    """A cache of a full and a windowed layer, and the outputs of one sequence that it serves."""

    def __init__(self, backend: Backend, dtype: torch.dtype) -> None:
        self.device, self.dtype = backend.device, dtype
        self.cache = PagedKVCache(
            [(-1, 0), (20, 0)], num_heads_kv=HEADS_KV, head_dim=DIM, page_size=4, num_pages=200,
            max_num_seqs=4, max_seqlen=256, max_num_batched_tokens=400, dtype=dtype,
            device=backend.device,
        )  # fmt: skip
        self.s_aux = torch.linspace(-1, 1, HEADS_Q, device=backend.device)

    def run(self, chunks: Sequence[int], others: Sequence[int] = ()) -> list[Tensor]:
        """The outputs of each layer, (LENGTH, heads, dim), of a sequence that comes in `chunks`;
        beside it, with its first chunk, other sequences of so many tokens."""
        torch.manual_seed(0)
        tokens = [self._normal(LENGTH) for _ in range(2)]
        other_seqs = [self.cache.allocate() for _ in others]
        seq = self.cache.allocate()
        outs: list[list[Tensor]] = [[], []]
        start = 0
        for i, count in enumerate(chunks):
            beside = list(others) if i == 0 else [1] * len(others)
            step = self.cache.append([*other_seqs, seq], [*beside, count])
            for layer in (FULL, WINDOWED):
                noise = self._normal(sum(beside))
                new = [x[start : start + count] for x in tokens[layer]]
                q, k, v = (torch.cat(pair) for pair in zip(noise, new, strict=True))
                out = step.attend(layer, q, k, v, s_aux=self.s_aux, num_splits=1)
                outs[layer].append(out[sum(beside) :])
            start += count
        return [torch.cat(parts) for parts in outs]

    def _normal(self, count: int) -> list[Tensor]:
        shapes = ((count, HEADS_Q, DIM), (count, HEADS_KV, DIM), (count, HEADS_KV, DIM))
        return [torch.randn(shape).to(self.device, self.dtype) for shape in shapes]


CHUNKS = ([LENGTH], [50, 50, 50], [7] * 21 + [3], [100] + [1] * 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_and_batches(backend: Backend, dtype: torch.dtype) -> None:
    whole = Server(backend, dtype).run(CHUNKS[0])
    for chunks in CHUNKS:
        alone = Server(backend, dtype).run(chunks)
        beside = Server(backend, dtype).run(chunks, others=(5, 61))
        for layer in (FULL, WINDOWED):
            assert torch.equal(alone[layer], beside[layer]), (layer, chunks)
        assert torch.equal(alone[FULL], whole[FULL]), chunks
        eps = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(alone[WINDOWED], whole[WINDOWED], rtol=eps, atol=eps)
