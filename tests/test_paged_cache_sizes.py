"""PagedKVCache: pages, tables and bytes of its layers, and where its tensors come from."""

from __future__ import annotations

import pytest
import torch
from cache_model import HEAD_DIM, HEAD_DIM_V, NUM_HEADS_KV, NUM_HEADS_Q, make_cache
from cases import FLOAT8

from sink_attention_ext.cache.page_storage import PageStorage


@pytest.mark.parametrize("within", ["construction", "use"])
def test_inference_mode_around_one_of_construction_and_use(within: str) -> None:
    """Steps equal those of a cache that knows no inference mode."""
    k, q = torch.randn(2, 9, NUM_HEADS_KV, HEAD_DIM), torch.randn(9, NUM_HEADS_Q, HEAD_DIM)
    outs = []
    for is_inference in (False, True):
        with torch.inference_mode(is_inference and within == "construction"):
            cache = make_cache()
        with torch.inference_mode(is_inference and within == "use"):
            seq = cache.allocate()
            for count in (9, 9, 3):  # the second drops pages of the windowed layer
                step = cache.append([seq], count)
                out = [step.attend(i, q[:count], *k[:, :count]) for i in range(2)]
            forked = cache.append([cache.fork(seq)])  # copies the last page
            out.append(forked.attend(0, q[:1], *k[:, :1]))
        outs.append(torch.cat(out))
    assert torch.equal(*outs)


def test_windowed_rows_stay_short() -> None:
    """ceil((window_left + new) / page_size) + 1 pages, and a table of as many columns."""
    cache = make_cache(page_size=4, num_pages={-1: 25, 5: 8})
    seq = cache.allocate()
    for new in (1, 1, 20, 1, 1, 1, 9, 1, 1, 13, 1):
        step = cache.append([seq], new)
        bound = -(-(5 + new) // 4) + 1
        assert cache.stats()[5].num_used_pages <= bound
        assert step.seqused_k(1).item() <= bound * 4
        assert step.block_table(1).shape == (1, -(-(5 + 20) // 4) + 1)
        assert step.seqused_k(0).item() == cache.seqlen(seq)
    assert cache.stats()[-1].num_used_pages == -(-cache.seqlen(seq) // 4)


def test_positions_and_packed_starts() -> None:
    cache = make_cache()
    a, b = cache.allocate(), cache.allocate()
    cache.append([a], 9)
    step = cache.append([b, a], [2, 3], pad_seqs_to=3, pad_tokens_to=7)
    assert step.positions.tolist() == [0, 1, 9, 10, 11, 0, 0]
    assert step.cu_seqlens_q.tolist() == [0, 2, 5, 5]
    assert (step.num_seqs, step.num_tokens, step.max_seqlen_q) == (3, 7, 3)
    assert step.slot_mapping(0)[5:].tolist() == [-1, -1]
    assert cache.append([], []).cu_seqlens_q.tolist() == [0]


def test_bytes() -> None:
    """Two layers of one window share tables, not memory; head_dim_v may be its own."""
    cache = make_cache([(-1, 0), (5, 0), (5, 0)], head_dim_v=6, num_pages={-1: 10, 5: 3})
    page = 4 * NUM_HEADS_KV * (HEAD_DIM + 6) * 4
    assert cache.memory_bytes() == 10 * page + 2 * 3 * page
    seq = cache.allocate()
    cache.append([seq], 5)
    stats = cache.stats()
    assert (stats[-1].used_bytes, stats[5].used_bytes) == (2 * page, 2 * 2 * page)
    assert (stats[-1].num_layers, stats[5].num_layers) == (1, 2)
    assert cache.num_free_pages == {-1: 8, 5: 1}
    assert cache.k_cache(2).shape == (3, 4, NUM_HEADS_KV, HEAD_DIM)
    assert cache.v_cache(0).shape == (10, 4, NUM_HEADS_KV, 6)


def test_memory_budget() -> None:
    """Windowed layers get what they can use, full ones the rest; all of it is within the budget."""
    cache = make_cache(num_pages=None, memory_budget=100_000)
    page = 4 * NUM_HEADS_KV * 2 * HEAD_DIM * 4
    stats = cache.stats()
    assert 100_000 - page < cache.memory_bytes() <= 100_000
    assert stats[5].num_pages == 3 * (1 + 3) + 5  # 3 sequences, and one step of 20 tokens
    assert stats[-1].num_pages > 100
    with pytest.raises(ValueError, match="memory_budget must be at least 9216 bytes"):
        make_cache(num_pages=None, memory_budget=9215)
    assert make_cache(num_pages=None, memory_budget=9216).stats()[-1].num_pages == 1
    windowed = make_cache([(5, 0)], num_pages=None, memory_budget=9216)
    seqs = [windowed.allocate() for _ in range(3)]
    for counts in ([18, 1, 1], [1, 18, 1], [7, 7, 6], [1, 1, 1], [3, 3, 3], [3, 3, 3]):
        windowed.append(seqs, counts)  # never short of pages


def test_copied_pages_of_every_layer_and_tensor() -> None:
    """Keys, values and scales of one page in all layers, and no other page."""
    storage = PageStorage(2, 5, 4, NUM_HEADS_KV, HEAD_DIM, HEAD_DIM_V, FLOAT8, "cpu", True)
    tensors = [x.view(torch.uint8) for x in storage._tensors()]
    assert len(tensors) == 4
    for tensor in tensors:
        tensor.random_(0, 255)
    before = [x.clone() for x in tensors]
    storage.copy_pages([(1, 4), (2, 0)])
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old[:, [2, 1, 2, 3, 1]])
    assert storage.num_bytes == sum(x.nbytes for x in tensors)
