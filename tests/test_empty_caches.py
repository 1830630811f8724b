"""Dense caches without room for a token, and tables without pages: only the sinks count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sink_attention_ext import flash_attn_with_kvcache, reshape_and_cache
from sink_attention_ext.integrations import flash_attention_3

BATCH, ROWS, HEADS_Q, HEADS, DIM, DIM_V = 2, 3, 4, 2, 8, 6
SINKS = torch.tensor([-20.0, 0.0, 1.5, 20.0])


def dense(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (torch.zeros(BATCH, 0, HEADS, d, dtype=dtype) for d in (DIM, DIM_V))


def check_sinks_only(results: tuple[Tensor, Tensor], sinks: Tensor | None, shape: tuple) -> None:
    out, lse = results
    assert out.shape == shape and not out.any()
    expected = torch.full_like(lse, -torch.inf) if sinks is None else sinks[:, None].expand_as(lse)
    torch.testing.assert_close(lse, expected.float())


@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("lengths", [None, 0, torch.zeros(BATCH, dtype=torch.int32)])
def test_attention(lengths: int | Tensor | None, sinks: Tensor | None) -> None:
    q = torch.randn(BATCH, ROWS, HEADS_Q, DIM)
    for options in ({}, {"causal": True}, {"window_size": (2, 0), "num_sink_tokens": 1}):
        results = flash_attn_with_kvcache(
            q, *dense(), cache_seqlens=lengths, s_aux=sinks, return_lse=True, **options
        )
        check_sinks_only(results, sinks, (BATCH, ROWS, HEADS_Q, DIM_V))


def test_packed_queries_quantised_caches_and_gradients_mode() -> None:
    q = torch.randn(BATCH * ROWS, HEADS_Q, DIM)
    starts = torch.tensor([0, 1, BATCH * ROWS], dtype=torch.int32)
    results = flash_attn_with_kvcache(
        q, *dense(), cu_seqlens_q=starts, max_seqlen_q=BATCH * ROWS, s_aux=SINKS, return_lse=True
    )
    check_sinks_only(results, SINKS, (BATCH * ROWS, HEADS_Q, DIM_V))
    for scale in (torch.tensor(0.5), torch.full((HEADS,), 0.5), torch.ones(BATCH, 0, HEADS)):
        results = flash_attn_with_kvcache(
            q.view(BATCH, ROWS, HEADS_Q, DIM), *dense(torch.int8), s_aux=SINKS, return_lse=True,
            k_scale=scale, v_scale=scale,
        )  # fmt: skip
        check_sinks_only(results, SINKS, (BATCH, ROWS, HEADS_Q, DIM_V))


def test_an_append_does_not_fit() -> None:
    q = torch.randn(BATCH, 1, HEADS_Q, DIM)
    k, v = (torch.randn(BATCH, 1, HEADS, d) for d in (DIM, DIM_V))
    with pytest.raises(ValueError, match=r"cache_seqlens\[0\] .* 1 new tokens fit into the 0"):
        flash_attn_with_kvcache(q, *dense(), k, v, 0)
    results = flash_attn_with_kvcache(
        q[:, :0], *dense(), k[:, :0], v[:, :0], 0, s_aux=SINKS, return_lse=True
    )
    check_sinks_only(results, SINKS, (BATCH, 0, HEADS_Q, DIM_V))
    starts = torch.zeros(BATCH + 1, dtype=torch.int32)  # all tokens are padding
    out = flash_attn_with_kvcache(
        q[:, 0], *dense(), k[:, 0], v[:, 0], 0, cu_seqlens_q=starts, max_seqlen_q=1, s_aux=SINKS
    )
    assert out.shape == (BATCH, HEADS_Q, DIM_V) and not out.any()


def test_a_table_without_columns() -> None:
    pages = torch.zeros(2, 3, 4, HEADS, DIM)
    q, k = torch.randn(BATCH, 1, HEADS_Q, DIM), torch.randn(BATCH, 1, HEADS, DIM)
    table = torch.zeros(BATCH, 0, dtype=torch.int32)
    results = flash_attn_with_kvcache(q, *pages, None, None, 0, table, s_aux=SINKS, return_lse=True)
    check_sinks_only(results, SINKS, (BATCH, 1, HEADS_Q, DIM))
    with pytest.raises(ValueError, match=r"cache_seqlens\[0\]"):
        flash_attn_with_kvcache(q, *pages, k, k, 0, table)
    starts = torch.zeros(BATCH + 1, dtype=torch.int32)
    flash_attn_with_kvcache(q[:, 0], *pages, k[:, 0], k[:, 0], 0, table, starts, 1)
    assert not pages.any()


def test_compiled() -> None:
    q = torch.randn(BATCH, ROWS, HEADS_Q, DIM)
    compiled = torch.compile(flash_attn_with_kvcache, backend="aot_eager", fullgraph=True)
    check_sinks_only(
        compiled(q, *dense(), s_aux=SINKS, return_lse=True), SINKS, (BATCH, ROWS, HEADS_Q, DIM_V)
    )
    torch._dynamo.reset()


def test_flash_attention_3() -> None:
    q = torch.randn(BATCH, ROWS, HEADS_Q, DIM)
    results = flash_attention_3.flash_attn_with_kvcache(
        q, *dense(), s_aux=SINKS, return_softmax_lse=True
    )
    check_sinks_only(results, SINKS, (BATCH, ROWS, HEADS_Q, DIM_V))


def test_pages_have_a_size() -> None:
    q, k = torch.randn(BATCH, 1, HEADS_Q, DIM), torch.randn(1, HEADS, DIM)
    cache = torch.zeros(BATCH, 0, HEADS, DIM)
    message = "k_cache must have page_size of at least 1"
    with pytest.raises(ValueError, match=message):
        table = torch.zeros(BATCH, 1, dtype=torch.int32)
        flash_attn_with_kvcache(q, cache, cache.clone(), block_table=table)
    with pytest.raises(ValueError, match=message):
        reshape_and_cache(k, k, cache, cache.clone(), torch.tensor([-1]))
