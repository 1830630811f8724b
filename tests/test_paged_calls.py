"""Calls over a cache that must agree: paged, dense, packed, in chunks, row by row, with pages that
are shared or freed, into a given tensor.

test_batch_invariance.py has what may be computed beside a sequence, test_decode.py the splits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from backends import Backend
from cases import FLOAT_DTYPES, PagedCase, int32
from test_paged import attend

from sink_attention_ext import ops

pytestmark = pytest.mark.sm90

Threads = Callable[[int], None]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("seqlens_k", [(96, 96), (40, 95), (0, 7), (40, 40), (0, 0)], ids=str)
def test_cache_without_a_block_table(
    backend: Backend, seqlens_k: tuple[int, int], dtype: torch.dtype
) -> None:
    """(batch, seqlen_cache, heads, dim); lengths are a tensor, an int, or None if full."""
    case = PagedCase(seqlens_q=(5, 5), seqlens_k=seqlens_k, num_heads_q=4, causal=True, dtype=dtype)
    inputs = cases.make_paged(case, backend.device)
    k_cache, v_cache = (
        torch.stack([torch.cat([x, x.new_full((96 - len(x), *x.shape[1:]), cases.NAN)]) for x in y])
        for y in (inputs.k, inputs.v)
    )
    dense = replace(inputs, k_cache=k_cache, v_cache=v_cache)
    lengths: list[Any] = [inputs.seqlens_k]
    lengths += [seqlens_k[0]] if seqlens_k[0] == seqlens_k[1] else []
    lengths += [None] if seqlens_k == (96, 96) else []
    for cache_seqlens in lengths:
        actual = attend(backend, case, dense, block_table=None, cache_seqlens=cache_seqlens)
        tolerance.check(actual, oracle.expected_paged(case))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_prefill_and_decode_equal_the_training_forward(
    backend: Backend, set_num_threads: Threads, dtype: torch.dtype
) -> None:
    """Bitwise: whole, in chunks, row by row, over pages and densely (one thread: no splits)."""
    set_num_threads(1)
    case = PagedCase(
        seqlens_q=(333,),
        seqlens_k=(333,),
        num_heads_q=8,
        num_heads_kv=2,
        head_dim=24,
        dtype=dtype,
        causal=True,
        window_size=(150, 0),
        num_splits=1,
    )
    case = backend.fitting(case)
    inputs = cases.make_paged(case, backend.device)
    trained, trained_lse = backend.flash_attn(
        inputs.q, inputs.k[0][None], inputs.v[0][None], s_aux=inputs.s_aux, **case.options()
    )
    prefill = attend(backend, case, inputs)
    assert torch.equal(prefill.out, trained) and torch.equal(prefill.lse, trained_lse)
    chunks = [range(0, 100), range(100, 101), range(101, 260), range(260, 333)]
    rows = [range(i, i + 1) for i in (0, 1, 127, 128, 255, 256, 332)]
    for part in chunks + rows:
        piece = replace(
            inputs,
            q=inputs.q[:, part.start : part.stop],
            seqlens_k=int32([part.stop], backend.device),
        )
        whole_caches = {"k_cache": inputs.k[0][None], "v_cache": inputs.v[0][None]}
        dense = attend(backend, case, replace(piece, **whole_caches), block_table=None)
        for step in (attend(backend, case, piece), dense):
            assert torch.equal(step.out, trained[:, part.start : part.stop])
            assert torch.equal(step.lse, trained_lse[:, :, part.start : part.stop])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 4, 16, 128])
@pytest.mark.parametrize("seqlen_q", [1, 7, 150])
def test_pages_before_the_window_are_not_used(
    backend: Backend, seqlen_q: int, page_size: int, dtype: torch.dtype
) -> None:
    """A windowed layer frees them: their table entries are garbage, or pages full of NaN.

    The queries' own tokens are also appended once more, which looks up their pages for writing.
    """
    case = PagedCase(
        seqlens_q=(seqlen_q,) * 2,
        seqlens_k=(700, 530),
        num_heads_q=4,
        num_heads_kv=2,
        head_dim=16,
        dtype=dtype,
        causal=True,
        window_size=(99, 0),
        page_size=page_size,
    )
    case = backend.fitting(case)
    inputs = cases.make_paged(case, backend.device)
    expected = attend(backend, case, inputs)
    tolerance.check(expected, oracle.expected_paged(case))
    used = set(inputs.block_table.flatten().tolist())
    nan_page = next(p for p in range(len(inputs.k_cache)) if p not in used)
    for entry in (nan_page, -1, 2**31 - 1):
        table = inputs.block_table.clone()
        for b, seqlen_k in enumerate(case.seqlens_k):
            table[b, : (seqlen_k - seqlen_q - 99) // page_size] = entry
        freed = replace(inputs, block_table=table)
        again = {"cache_seqlens": inputs.seqlens_k - seqlen_q} | {
            name: torch.stack([x[-seqlen_q:] for x in tokens])
            for name, tokens in (("k", inputs.k), ("v", inputs.v))
        }
        for actual in (attend(backend, case, freed), attend(backend, case, freed, **again)):
            assert torch.equal(actual.out, expected.out) and torch.equal(actual.lse, expected.lse)


def test_sequences_share_pages(backend: Backend) -> None:
    """Two sequences with the same prefix, in the same pages."""
    case = PagedCase(
        seqlens_q=(2,) * 2, seqlens_k=(64, 80), num_heads_q=4, dtype=backend.dtype, causal=True
    )
    inputs = cases.make_paged(case, backend.device)
    inputs.block_table[1, :4] = inputs.block_table[0, :4]
    actual = attend(backend, case, inputs)
    k, v = (torch.cat([x[0][:64], x[1][64:]]) for x in (inputs.k, inputs.v))
    for b, (keys, values) in enumerate(((inputs.k[0], inputs.v[0]), (k, v))):
        out, lse = backend.flash_attn(
            inputs.q[b : b + 1], keys[None], values[None], causal=True, s_aux=inputs.s_aux
        )
        torch.testing.assert_close(actual.out[b], out[0], **tolerance.short_rows(case.dtype))
        torch.testing.assert_close(actual.lse[b], lse[0], rtol=1e-5, atol=1e-6)


def test_packed_queries_equal_the_packed_function(backend: Backend) -> None:
    """Over a cache, and over the same keys packed without one."""
    case = PagedCase(
        seqlens_q=(1, 2, 3), seqlens_k=(3, 90, 140), num_heads_q=4, dtype=backend.dtype,
        causal=True, window_size=(60, 0), page_size=4, packed_q=True,
    )  # fmt: skip
    inputs = cases.make_paged(case, backend.device)
    paged = attend(backend, case, inputs, max_seqlen_q=3)
    tolerance.check(paged, oracle.expected_paged(case))
    cu_seqlens_k = int32(cases.ends(case.seqlens_k), backend.device)
    out, lse = backend.flash_attn_varlen(
        inputs.q, torch.cat(inputs.k), torch.cat(inputs.v), inputs.cu_seqlens_q, cu_seqlens_k,
        3, 140, s_aux=inputs.s_aux, **case.options(),
    )  # fmt: skip
    torch.testing.assert_close(paged.out, out, **tolerance.short_rows(case.dtype))
    torch.testing.assert_close(paged.lse, lse, rtol=1e-5, atol=1e-6)


def test_out_overload_writes_where_it_is_told(backend: Backend) -> None:
    """paged_attn.out, into rows with gaps; what lies between stays."""
    case = PagedCase(
        seqlens_q=(3, 3), seqlens_k=(300, 9), num_heads_q=4, head_dim=24, dtype=backend.dtype,
        causal=True,
    )  # fmt: skip
    inputs = cases.make_paged(case, backend.device)
    expected = attend(backend, case, inputs)
    out = torch.full((2, 3, 5, 30), 7.0, dtype=case.dtype, device=backend.device)
    lse = torch.full((2, 5, 3), 7.0, device=backend.device)
    ops.paged_attn_out(
        inputs.q, inputs.k_cache, inputs.v_cache, inputs.block_table, inputs.seqlens_k, None,
        inputs.s_aux, None, None, 3, 999, 24**-0.5, True, -1, 0, 0.0, 0, 0, None,
        out=out[:, :, :4, :24], lse=lse[:, :4],
    )  # fmt: skip
    assert torch.equal(out[:, :, :4, :24], expected.out) and torch.equal(lse[:, :4], expected.lse)
    assert (out[:, :, 4] == 7).all() and (out[..., 24:] == 7).all() and (lse[:, 4] == 7).all()
