"""Attention over paged caches: decode, several tokens, prefill, in every size.

Every slot beyond a sequence's length holds NaN and every block-table entry that is not in use holds
garbage (cases.make_paged), in all tests here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from backends import Backend
from cases import FLOAT_DTYPES, LONG_EDGES, MASKS, PagedCase, PagedInputs, heads

pytestmark = pytest.mark.sm90

PAGE_SIZES = (1, 4, 16, 128, 256)


def attend(
    backend: Backend, case: PagedCase, inputs: PagedInputs, **options: Any
) -> oracle.Results:
    kwargs: dict[str, Any] = {
        "cache_seqlens": inputs.seqlens_k,
        "block_table": inputs.block_table,
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "max_seqlen_q": inputs.max_seqlen_q,
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


# ---- FlashAttention's test matrix ----

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
def test_peer_matrix(backend: Backend, case: PagedCase) -> None:
    check_paged(backend, case)


@pytest.mark.parametrize(
    "case", peer_cases(((16, 20000),), 2, 200, batch=2, dtype=FAST_DTYPES), ids=str
)
def test_peer_matrix_long(backend: Backend, case: PagedCase) -> None:
    check_paged(backend, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    peer_cases(PEER, 50, 300, batch=5, dtype=DTYPES)
    + peer_cases(((16, 20000),), 16, 900, batch=5, dtype=FAST_DTYPES),
    ids=str,
)
def test_peer_matrix_whole(backend: Backend, case: PagedCase) -> None:
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


@pytest.mark.parametrize("shape", ["scalar", "expanded"])
def test_float8_scales_of_k_and_v_may_differ_in_shape(backend: Backend, shape: str) -> None:
    """Read, and appended to: the scale of v is as one of each head, contiguous."""
    case = PagedCase(
        seqlens_q=(3,), seqlens_k=(90,), num_heads_kv=2, dtype=backend.dtype, float8="per head"
    )
    inputs = cases.make_paged(case, backend.device)
    scale = torch.tensor(0.75, device=backend.device)
    inputs = replace(inputs, v_scale=scale if shape == "scalar" else scale.expand(2))
    same = replace(inputs, v_scale=torch.full((2,), 0.75, device=backend.device))
    actual, expected = (attend(backend, case, x) for x in (inputs, same))
    assert torch.equal(actual.out, expected.out) and torch.equal(actual.lse, expected.lse)
    new = {x: torch.randn(1, 3, 2, 64, device=backend.device).to(case.dtype) for x in ("k", "v")}
    new["v"][0, 0, 0, 0] = 1e4  # beyond 0.75 * 448: saturates
    caches, results = [], []
    for x in (inputs, same):
        x = replace(x, k_cache=x.k_cache.clone(), v_cache=x.v_cache.clone())
        results.append(attend(backend, case, x, cache_seqlens=inputs.seqlens_k - 3, **new))
        caches.append(x.v_cache.view(torch.uint8))
        first = (inputs.block_table[0, 87 // case.page_size], 87 % case.page_size)
        assert x.v_cache[first][0, 0].float() == 448
    assert torch.equal(caches[0], caches[1])
    assert not torch.equal(caches[0], inputs.v_cache.view(torch.uint8))
    assert torch.equal(results[0].out, results[1].out)
