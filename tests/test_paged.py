"""Attention over paged and dense caches: decode, several tokens, prefill in chunks, appending.

Every slot beyond a sequence's length holds NaN and every block-table entry that is not in use holds
garbage (cases.make_paged), in all tests here.
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
from cases import FLOAT_DTYPES, LONG_EDGES, MASKS, PagedCase, PagedInputs, heads, int32
from conftest import Backend

from sink_attention_ext import ops

Threads = Callable[[int], None]
PAGE_SIZES = (1, 4, 16, 128, 256)


def attend(
    backend: Backend, case: PagedCase, inputs: PagedInputs, **options: Any
) -> oracle.Results:
    kwargs: dict[str, Any] = {
        "cache_seqlens": inputs.seqlens_k,
        "block_table": inputs.block_table,
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "s_aux": inputs.s_aux,
        "k_scale": inputs.k_scale,
        "v_scale": inputs.v_scale,
        "num_splits": case.num_splits,
    }
    kwargs |= case.options() | options
    out, lse = backend.flash_attn_with_kvcache(inputs.q, inputs.k_cache, inputs.v_cache, **kwargs)
    return oracle.Results(out, lse)


def check_paged(backend: Backend, case: PagedCase) -> None:
    case = backend.fitting(case)
    actual = attend(backend, case, cases.make_paged(case, backend.device))
    tolerance.check(actual, oracle.expected_paged(case), case.softcap)


def spread(longest: int, batch: int, seed: int) -> tuple[int, ...]:
    """Lengths of a batch: the longest, and others below it."""
    rng = cases.generator(seed)
    others = torch.randint(0, longest + 1, (batch - 1,), generator=rng).tolist()
    return (longest, *others)


# ---- FlashAttention's grid ----

PEER = ((1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048))
PEER_FIELDS = {
    "mask": ({"causal": True}, {"causal": True, "window_size": (200, 0)}, {"window_size": (90, 7)}),
    "page_size": PAGE_SIZES,
    "packed_q": (False, True),
    "head_dim": (64, 128),
    "heads": (heads(6, 6), heads(6, 3), heads(6, 1)),
    "num_splits": (0, 1, 3, 7),
    "heads_first": (False, True),
    "sink": ("normal", "none", "normal", "mixed"),
    "softcap": (0.0, 0.0, 0.0, 15.0),
}


def peer_cases(
    seqlens: tuple[tuple[int, int], ...], repeats: int, seed: int, batch: int, **fields: Any
) -> list[PagedCase]:
    drawn = cases.draw(len(seqlens) * repeats, seed, **PEER_FIELDS, **fields)
    result = []
    for i, (q, k) in enumerate(seqlens * repeats):
        options = cases.merged(drawn[i])
        lengths_q = spread(q, batch, seed + i) if options["packed_q"] else (q,) * batch
        lengths_k = spread(k, batch, seed - i)
        result.append(PagedCase(seqlens_q=lengths_q, seqlens_k=lengths_k, seed=seed + i, **options))
    return result


DTYPES = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)
FAST_DTYPES = (torch.bfloat16, torch.float32)  # torch's float16 products on a CPU are slow


@pytest.mark.parametrize("case", peer_cases(PEER, 8, 100, batch=5, dtype=DTYPES), ids=str)
def test_peer_grid(backend: Backend, case: PagedCase) -> None:
    check_paged(backend, case)


@pytest.mark.parametrize(
    "case", peer_cases(((16, 20000),), 2, 200, batch=2, dtype=FAST_DTYPES), ids=str
)
def test_peer_grid_long(backend: Backend, case: PagedCase) -> None:
    check_paged(backend, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    peer_cases(PEER, 50, 300, batch=5, dtype=DTYPES)
    + peer_cases(((16, 20000),), 16, 900, batch=5, dtype=FAST_DTYPES),
    ids=str,
)
def test_peer_grid_whole(backend: Backend, case: PagedCase) -> None:
    check_paged(backend, case)


GQA = ((1, 1), (2, 5), (3, 3), (1, 32), (5, 7), (8, 1), (1, 16), (12, 4), (8, 2), (8, 8))


def gqa_cases(contexts: tuple[int, ...], batches: tuple[int, ...], seed: int) -> list[PagedCase]:
    drawn = cases.draw(
        len(GQA) * len(contexts),
        seed,
        seqlen_q=(1, 16, 32, 128),
        batch=batches,
        page_size=(16, 128, 256),
        num_splits=(0, 3),
        dtype=(torch.bfloat16, torch.float32),
    )
    result = []
    for i, fields in enumerate(drawn):
        (num_heads_kv, ratio), context = GQA[i % len(GQA)], contexts[i // len(GQA)]
        batch, seqlen_q = fields.pop("batch"), fields.pop("seqlen_q")
        if seqlen_q * ratio * num_heads_kv > 512:  # of the oracle's memory
            seqlen_q = 1
        result.append(
            PagedCase(
                seqlens_q=(seqlen_q,) * batch,
                seqlens_k=spread(context, batch, i),
                num_heads_q=num_heads_kv * ratio,
                num_heads_kv=num_heads_kv,
                causal=True,
                seed=seed + i,
                **fields,
            )
        )
    return result


@pytest.mark.parametrize("case", gqa_cases((1024, 4096), (1, 2), 50), ids=str)
def test_gqa_ratios(backend: Backend, case: PagedCase) -> None:
    check_paged(backend, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", gqa_cases((4096, 16384), (4, 16), 80) + gqa_cases((65536,), (1,), 90), ids=str
)
def test_gqa_ratios_in_long_contexts(backend: Backend, case: PagedCase) -> None:
    check_paged(backend, case)


# ---- where tiles, blocks, pages and splits end ----


def edge_cases(count: int, seed: int) -> list[PagedCase]:
    drawn = cases.draw(
        count,
        seed,
        seqlen_q=(1, 1, 2, 5, 8, 17, 33, 130),
        seqlen_k=(0, *LONG_EDGES, 1025, 1537),
        heads=(heads(2, 2), heads(4, 2), heads(3, 1), heads(8, 1), heads(16, 2), heads(5, 5)),
        head_dim=(8, 16, 33, 64),
        head_dim_v=(None, 5, 16, 72),
        dtype=FLOAT_DTYPES,
        mask=MASKS,
        softcap=(0.0, 0.0, 15.0),
        sink=("normal", "none", "4randn", "mixed"),
        page_size=(1, 3, 4, 16, 128, 256),
        packed_q=(False, True),
        heads_first=(False, True),
        num_splits=(0, 1, 2, 3, 7, 64),
        float8=(None, None, None, None, "scalar", "one", "per head"),
    )
    result = []
    for i, fields in enumerate(drawn):
        q, k = fields.pop("seqlen_q"), fields.pop("seqlen_k")
        options = cases.merged(fields)
        lengths_q = spread(q, 3, seed + i) if options["packed_q"] else (q,) * 3
        result.append(
            PagedCase(seqlens_q=lengths_q, seqlens_k=spread(k, 3, i), seed=seed + i, **options)
        )
    return result


@pytest.mark.parametrize("case", edge_cases(150, 1000), ids=str)
def test_edges(backend: Backend, case: PagedCase) -> None:
    check_paged(backend, case)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", edge_cases(60, 2000), ids=str)
def test_edges_few(backend: Backend, case: PagedCase) -> None:
    check_paged(backend, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", edge_cases(1500, 3000), ids=str)
def test_edges_many(backend: Backend, case: PagedCase) -> None:
    check_paged(backend, case)


@pytest.mark.sanitize
@pytest.mark.parametrize("float8", ["scalar", "one", "per head"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_float8_caches(backend: Backend, dtype: torch.dtype, float8: str) -> None:
    for seqlen_q in (1, 40):
        case = PagedCase(
            seqlens_q=(seqlen_q,) * 2,
            seqlens_k=(300, 77),
            num_heads_q=6,
            num_heads_kv=3,
            head_dim=40,
            head_dim_v=72,
            dtype=dtype,
            causal=True,
            float8=float8,
        )
        check_paged(backend, case)


def test_float8_scales_of_k_and_v_may_differ_in_shape(backend: Backend) -> None:
    case = PagedCase(seqlens_q=(3,), seqlens_k=(90,), num_heads_kv=2, float8="per head")
    inputs = cases.make_paged(case, backend.device)
    inputs = replace(inputs, v_scale=torch.tensor(0.75, device=backend.device))
    actual = attend(backend, case, inputs)
    same = replace(inputs, v_scale=torch.full((2,), 0.75, device=backend.device))
    expected = attend(backend, case, same)
    assert torch.equal(actual.out, expected.out) and torch.equal(actual.lse, expected.lse)


# ---- one function, many ways to call it ----


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("seqlens_k", [(96, 96), (40, 95), (0, 7)], ids=str)
def test_cache_without_a_block_table(
    backend: Backend, seqlens_k: tuple[int, int], dtype: torch.dtype
) -> None:
    """(batch, seqlen_cache, heads, dim), lengths as a tensor, and as None where it is full."""
    case = PagedCase(seqlens_q=(5, 5), seqlens_k=seqlens_k, num_heads_q=4, causal=True, dtype=dtype)
    inputs = cases.make_paged(case, backend.device)
    k_cache, v_cache = (
        torch.stack([torch.cat([x, x.new_full((96 - len(x), *x.shape[1:]), cases.NAN)]) for x in y])
        for y in (inputs.k, inputs.v)
    )
    dense = replace(inputs, k_cache=k_cache, v_cache=v_cache)
    lengths: list[Any] = [inputs.seqlens_k]
    if seqlens_k == (96, 96):
        lengths += [None, 96]
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
        step = attend(backend, case, piece)
        assert torch.equal(step.out, trained[:, part.start : part.stop])
        assert torch.equal(step.lse, trained_lse[:, :, part.start : part.stop])


@pytest.mark.parametrize("num_splits", [2, 3, 5, 64])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_splits_change_nothing_but_rounding(
    backend: Backend, dtype: torch.dtype, num_splits: int
) -> None:
    """The sink enters once whatever the number of splits, and rows without a key stay empty."""
    case = PagedCase(
        seqlens_q=(9, 9, 9),
        seqlens_k=(1500, 3, 0),
        num_heads_q=10,
        head_dim=16,
        dtype=dtype,
        causal=True,
        sink="mixed",
        num_splits=num_splits,
    )
    check_paged(backend, case)


@pytest.mark.parametrize("seqlen_q", [1, 6])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_batch_invariance(backend: Backend, num_splits: int, seqlen_q: int) -> None:
    """A sequence gets the same bits alone and beside others (a fixed number of splits)."""
    case = PagedCase(
        seqlens_q=(seqlen_q,) * 5,
        seqlens_k=(700, 1, 0, 2049, 384),
        num_heads_q=8,
        num_heads_kv=2,
        dtype=torch.bfloat16,
        causal=True,
        num_splits=num_splits,
    )
    inputs = cases.make_paged(case, backend.device)
    together = attend(backend, case, inputs)
    for b in range(5):
        own = replace(
            inputs,
            q=inputs.q[b : b + 1],
            block_table=inputs.block_table[b : b + 1],
            seqlens_k=inputs.seqlens_k[b : b + 1],
        )
        alone = attend(backend, case, own)
        assert torch.equal(alone.out[0], together.out[b])
        assert torch.equal(alone.lse[0], together.lse[b])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 4, 16, 128])
@pytest.mark.parametrize("seqlen_q", [1, 7, 150])
def test_pages_before_the_window_are_not_used(
    backend: Backend, seqlen_q: int, page_size: int, dtype: torch.dtype
) -> None:
    """A windowed layer frees them: their table entries are garbage, or pages full of NaN."""
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
    inputs = cases.make_paged(case, backend.device)
    expected = attend(backend, case, inputs)
    tolerance.check(expected, oracle.expected_paged(case))
    used = set(inputs.block_table.flatten().tolist())
    nan_page = next(p for p in range(len(inputs.k_cache)) if p not in used)
    for entry in (nan_page, -1, 2**31 - 1):
        table = inputs.block_table.clone()
        for b, seqlen_k in enumerate(case.seqlens_k):
            table[b, : (seqlen_k - seqlen_q - 99) // page_size] = entry
        actual = attend(backend, case, replace(inputs, block_table=table))
        assert torch.equal(actual.out, expected.out) and torch.equal(actual.lse, expected.lse)


def test_sequences_share_pages(backend: Backend) -> None:
    """Two sequences with the same prefix, in the same pages."""
    case = PagedCase(seqlens_q=(2,) * 2, seqlens_k=(64, 80), num_heads_q=4, causal=True)
    inputs = cases.make_paged(case, backend.device)
    inputs.block_table[1, :4] = inputs.block_table[0, :4]
    actual = attend(backend, case, inputs)
    k, v = (torch.cat([x[0][:64], x[1][64:]]) for x in (inputs.k, inputs.v))
    for b, (keys, values) in enumerate(((inputs.k[0], inputs.v[0]), (k, v))):
        out, lse = backend.flash_attn(
            inputs.q[b : b + 1], keys[None], values[None], causal=True, s_aux=inputs.s_aux
        )
        torch.testing.assert_close(actual.out[b], out[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(actual.lse[b], lse[0], rtol=1e-5, atol=1e-6)


def test_out_overload_writes_where_it_is_told(backend: Backend) -> None:
    """paged_attn.out, into rows with gaps; what lies between stays."""
    case = PagedCase(seqlens_q=(3, 3), seqlens_k=(300, 9), num_heads_q=4, head_dim=24, causal=True)
    inputs = cases.make_paged(case, backend.device)
    expected = attend(backend, case, inputs)
    out = torch.full((2, 3, 5, 30), 7.0, device=backend.device)
    lse = torch.full((2, 5, 3), 7.0, device=backend.device)
    ops.paged_attn_out(
        inputs.q, inputs.k_cache, inputs.v_cache, inputs.block_table, inputs.seqlens_k, None,
        inputs.s_aux, None, None, 3, 24**-0.5, True, -1, 0, 0.0, 0, 0, None,
        out=out[:, :, :4, :24], lse=lse[:, :4],
    )  # fmt: skip
    assert torch.equal(out[:, :, :4, :24], expected.out) and torch.equal(lse[:, :4], expected.lse)
    assert (out[:, :, 4] == 7).all() and (out[..., 24:] == 7).all() and (lse[:, 4] == 7).all()
