"""Cascade attention: a shared prefix attended to once equals plain attention of each sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import pytest
import tolerance
import torch
from backends import Backend
from cases import PagedCase, PagedInputs, heads, int32
from oracle import Expected, Results

from sink_attention_ext import cascade_attn_with_kvcache, reference

PAGE_SIZE = 4
PREFIX = 24  # six pages


def make(case: PagedCase, prefix: int, device: str) -> PagedInputs:
    """Sequences whose first `prefix` keys lie in the pages of the first one."""
    inputs = cases.make_paged(case, device)
    table = inputs.block_table.clone()
    table[:, : prefix // case.page_size] = table[:1, : prefix // case.page_size]
    return replace(inputs, block_table=table)


def expected(case: PagedCase, inputs: PagedInputs) -> Expected:
    def compute(dtype: torch.dtype) -> Results:
        s_aux = inputs.s_aux
        if dtype == torch.float64 and s_aux is not None:
            s_aux = s_aux.double()
        k_cache, v_cache = inputs.k_cache.cpu(), inputs.v_cache.cpu()
        if case.float8 is None:
            k_cache, v_cache = k_cache.to(dtype), v_cache.to(dtype)
        out, lse = reference.paged_attention(
            inputs.q.cpu().to(dtype),
            k_cache,
            v_cache,
            inputs.block_table.cpu(),
            inputs.seqlens_k.cpu(),
            None if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.cpu(),
            s_aux=None if s_aux is None else s_aux.cpu(),
            k_scale=None if inputs.k_scale is None else inputs.k_scale.cpu(),
            v_scale=None if inputs.v_scale is None else inputs.v_scale.cpu(),
            **case.options(),
        )
        return Results(out, lse)

    return Expected(compute(torch.float64), compute(case.dtype), {})


def attend(case: PagedCase, inputs: PagedInputs, prefix: int, **options: Any) -> Results:
    kwargs: dict[str, Any] = {
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "max_seqlen_q": inputs.max_seqlen_q,
        "s_aux": inputs.s_aux,
        "k_scale": inputs.k_scale,
        "v_scale": inputs.v_scale,
        "num_splits": case.num_splits,
        "return_lse": True,
    }
    return Results(
        *cascade_attn_with_kvcache(
            inputs.q,
            inputs.k_cache,
            inputs.v_cache,
            inputs.seqlens_k,
            inputs.block_table,
            prefix,
            **kwargs | case.options() | options,
        )
    )


FIELDS = {
    "heads": (heads(8, 2), heads(6, 6), heads(8, 1)),
    "head_dim": (64, 32, 80),
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16),
    "sink": ("normal", "none", "mixed"),
    "softcap": (0.0, 0.0, 15.0),
    "num_splits": (0, 1, 3),
    "float8": (None, None, "per head", "scalar"),
    "mask": (
        {"causal": True},
        {},
        {"causal": True, "window_size": (9, 0)},
        {"causal": True, "window_size": (9, 0), "num_sink_tokens": 3},
    ),
    "lengths": (
        {"seqlens_q": (1, 1, 1, 1), "seqlens_k": (25, 40, 60, 26)},
        {"seqlens_q": (3, 3, 3), "seqlens_k": (27, 51, 64)},
        {"seqlens_q": (5, 1, 0, 9), "seqlens_k": (29, 64, 24, 33), "packed_q": True},
        {"seqlens_q": (24, 24), "seqlens_k": (48, 70)},
        {"seqlens_q": (2,), "seqlens_k": (50,)},
    ),
}


def draw_cases(count: int, seed: int) -> list[PagedCase]:
    return [
        PagedCase(page_size=PAGE_SIZE, seed=seed + i, **cases.merged(fields))
        for i, fields in enumerate(cases.draw(count, seed, **FIELDS))
    ]


@pytest.mark.parametrize("case", draw_cases(36, 1), ids=str)
def test_equals_plain_attention(backend: Backend, case: PagedCase) -> None:
    inputs = make(case, PREFIX, backend.device)
    tolerance.check(attend(case, inputs, PREFIX), expected(case, inputs), case.softcap)


CASE = PagedCase(
    seqlens_q=(1, 1, 1), seqlens_k=(30, 24 + 1, 64), page_size=PAGE_SIZE, causal=True, **heads(8, 2)
)


def test_without_a_prefix_it_is_the_plain_call(backend: Backend) -> None:
    inputs = make(CASE, 0, backend.device)
    out, lse = backend.flash_attn_with_kvcache(
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        cache_seqlens=inputs.seqlens_k,
        block_table=inputs.block_table,
        s_aux=inputs.s_aux,
        causal=True,
    )
    result = attend(CASE, inputs, 0)
    assert torch.equal(result.out, out)
    assert torch.equal(result.lse, lse)


def test_a_tree_of_drafts_on_a_shared_prefix(backend: Backend) -> None:
    case = replace(CASE, seqlens_q=(4, 4, 4), seqlens_k=(32, 28, 64))
    inputs = make(case, PREFIX, backend.device)
    words = torch.tensor([0b1, 0b11, 0b101, 0b1011], device=backend.device)
    tree_mask = words.expand(3, -1).contiguous()
    out, lse = backend.flash_attn_with_kvcache(
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        cache_seqlens=inputs.seqlens_k,
        block_table=inputs.block_table,
        s_aux=inputs.s_aux,
        causal=True,
        tree_mask=tree_mask,
    )
    result = attend(case, inputs, PREFIX, tree_mask=tree_mask)
    torch.testing.assert_close(result.out, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.lse, lse, rtol=1e-5, atol=1e-5)
    assert not torch.equal(attend(case, inputs, PREFIX).out, result.out)


def test_no_queries(backend: Backend) -> None:
    inputs = make(CASE, PREFIX, backend.device)
    result = attend(CASE, replace(inputs, q=inputs.q[:, :0]), PREFIX)
    assert result.out.shape == (3, 0, 8, 64)
    assert result.lse.shape == (3, 8, 0)


def test_gradients_are_refused_with_and_without_a_prefix() -> None:
    inputs = make(CASE, PREFIX, "cpu")
    for prefix in (PREFIX, 0):
        with pytest.raises(RuntimeError, match="cascade_attn_with_kvcache is not differentiable"):
            attend(CASE, replace(inputs, s_aux=torch.zeros(8, requires_grad=True)), prefix)


def test_rows_in_no_sequence(backend: Backend) -> None:
    case = replace(CASE, packed_q=True)
    inputs = make(case, PREFIX, backend.device)
    q = torch.cat([inputs.q, torch.full_like(inputs.q[:2], cases.NAN)])
    result = attend(case, replace(inputs, q=q), PREFIX)
    whole = attend(case, inputs, PREFIX)
    assert torch.equal(result.out[:3], whole.out)
    assert torch.equal(result.lse[:, :3], whole.lse)
    assert (result.out[3:] == 0).all()
    assert (result.lse[:, 3:] == -torch.inf).all()


def test_prefix_pages_are_those_of_the_first_row(backend: Backend) -> None:
    """Under torch.compile, as on a GPU, no values are looked at: others' entries are unread."""
    inputs = make(CASE, PREFIX, backend.device)
    table = inputs.block_table.clone()
    table[1:, : PREFIX // PAGE_SIZE] = -7
    whole = attend(CASE, inputs, PREFIX)

    def call(block_table: torch.Tensor) -> Results:
        return attend(CASE, replace(inputs, block_table=block_table), PREFIX)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(table)
    assert torch.equal(compiled.out, whole.out)
    assert torch.equal(compiled.lse, whole.lse)


def refusal(inputs: PagedInputs, prefix: Any = PREFIX, **changes: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        attend(CASE, replace(inputs, **changes), prefix)
    return str(error.value)


def test_refusals() -> None:
    inputs = make(CASE, PREFIX, "cpu")
    assert refusal(inputs, 25).startswith(
        "common_prefix_len must be a multiple of page_size = 4 from 0 to 72"
    )
    assert "got -4" in refusal(inputs, -4)
    assert "got 400" in refusal(inputs, 400)
    assert refusal(inputs, True).startswith("common_prefix_len must be an int; got True")
    assert refusal(inputs, 24.0).startswith("common_prefix_len must be an int; got 24.0")
    short = int32((30, 24, 64), "cpu")
    assert refusal(inputs, seqlens_k=short) == (
        "cache_seqlens[1] must be from 25 (common_prefix_len and its 1 queries) to 72; got 24"
    )
    table = inputs.block_table.clone()
    table[2, 3] = 0 if table[0, 3] != 0 else 1
    message = refusal(inputs, block_table=table)
    assert message.startswith("block_table must begin with the same 6 pages in every row; got")
    assert "block_table[2, 3]" in message
    assert refusal(inputs, seqlens_k=short[:2]).startswith("cache_seqlens must have batch = 3")
    assert refusal(inputs, s_aux=torch.zeros(3)).startswith("s_aux must")
