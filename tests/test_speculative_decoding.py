"""Speculative decoding on a PagedKVCache: a tree of drafts; its accepted path stays."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tolerance
import torch
from backends import Backend
from torch import Tensor

from sink_attention_ext import PagedKVCache, reference

pytestmark = pytest.mark.sm90

HEADS_Q, HEADS_KV, DIM = 4, 2, 32
CONTEXT = 23
# Of each draft token: two branches, and one of them branches again.
PARENTS = (-1, 0, 0, 1, 2, 2, 4)
ACCEPTED = (0, 2, 4, 6)  # a path from the root
WINDOWS = [(-1, 0), (6, 0), (2, 0)]  # the last one is shorter than the path


def path_of(draft: int) -> list[int]:
    path = [draft]
    while PARENTS[path[0]] >= 0:
        path.insert(0, PARENTS[path[0]])
    return path


def tree_words() -> Tensor:
    words = [sum(1 << d for d in path_of(i)) for i in range(len(PARENTS))]
    return torch.tensor(words, dtype=torch.int64)


def expected(q: Tensor, k: Tensor, v: Tensor, left: int, sinks: int, s_aux: Tensor) -> Tensor:
    """The last row of attention over a whole history."""
    out, _ = reference.attention(
        q[None, None].double(), k[None].double(), v[None].double(), causal=True,
        window_size=(left, 0), s_aux=s_aux.double(), num_sink_tokens=sinks,
    )  # fmt: skip
    return out[0, 0]


def kv(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(count, HEADS_KV, DIM).to(dtype) for _ in range(2))


def cat(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])


@pytest.mark.parametrize("num_sink_tokens", [0, 3])
def test_tree_then_accepted_path_then_next_token(backend: Backend, num_sink_tokens: int) -> None:
    """The context comes in chunks: windowed layers have dropped pages when the tree comes."""
    s_aux, dtype = torch.randn(HEADS_Q), backend.dtype
    cache = PagedKVCache(
        WINDOWS, num_heads_kv=HEADS_KV, head_dim=DIM, page_size=4, num_pages=24, max_num_seqs=2,
        max_seqlen=64, max_num_batched_tokens=16, dtype=dtype, device=backend.device,
        num_sink_tokens=num_sink_tokens,
    )  # fmt: skip
    seq = cache.allocate()
    context = [kv(CONTEXT, dtype) for _ in WINDOWS]
    drafts = [kv(len(PARENTS), dtype) for _ in WINDOWS]
    for start in range(0, CONTEXT, 5):
        step = cache.append([seq], [min(5, CONTEXT - start)])
        for layer, (k, v) in enumerate(context):
            step.write(layer, *(x[start : start + 5].to(backend.device) for x in (k, v)))

    step = cache.append([seq], [len(PARENTS)])
    queries = torch.randn(len(PARENTS), HEADS_Q, DIM).to(dtype)
    for layer, (left, _) in enumerate(WINDOWS):
        tensors = [x.to(backend.device) for x in (queries, *drafts[layer])]
        words = tree_words().to(backend.device)
        out = step.attend(layer, *tensors, s_aux=s_aux.to(backend.device), tree_mask=words).cpu()
        for i in range(len(PARENTS)):
            path = [tuple(x[path_of(i)] for x in drafts[layer])]
            whole = cat([context[layer], *path])
            ref = expected(queries[i], *whole, left, num_sink_tokens, s_aux)
            torch.testing.assert_close(out[i].double(), ref, **tolerance.short_rows(dtype))

    # Keys of the accepted path were rotated by their depth: they only move to the path's places.
    cache.truncate(seq, CONTEXT)
    step = cache.append([seq], [len(ACCEPTED)])
    for layer in range(len(WINDOWS)):
        k, v = (x[list(ACCEPTED)].to(backend.device) for x in drafts[layer])
        step.write(layer, k, v)
    assert cache.seqlen(seq) == CONTEXT + len(ACCEPTED)

    step = cache.append([seq], [1])
    for layer, (left, _) in enumerate(WINDOWS):
        query, new = torch.randn(1, HEADS_Q, DIM).to(dtype), kv(1, dtype)
        tensors = [x.to(backend.device) for x in (query, *new)]
        out = step.attend(layer, *tensors, s_aux=s_aux.to(backend.device)).cpu()
        accepted = tuple(x[list(ACCEPTED)] for x in drafts[layer])
        whole = cat([context[layer], accepted, new])
        ref = expected(query[0], *whole, left, num_sink_tokens, s_aux)
        torch.testing.assert_close(out[0].double(), ref, **tolerance.short_rows(dtype))
