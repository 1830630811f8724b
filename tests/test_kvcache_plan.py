"""plan_kvcache: one plan for the layers of a step; flash_attn_with_kvcache's bounds and `out`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sink_attention_ext import PagedKVCache, flash_attn_with_kvcache, ops, plan_kvcache, reference

HEADS_Q, HEADS, DIM, PAGES, SIZE = 4, 2, 8, 6, 4
TABLE = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)


def caches() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(PAGES, SIZE, HEADS, DIM), torch.randn(PAGES, SIZE, HEADS, DIM)


def tokens(*rows: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return (
        torch.randn(*rows, HEADS_Q, DIM),
        torch.randn(*rows, HEADS, DIM),
        torch.randn(*rows, HEADS, DIM),
    )


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def expected(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], **options: Any) -> Tensor:
    """In float64, of dense queries after an append to the caches of caches()."""
    rows = []
    for b, length in enumerate(lengths):
        old = [reference.gather_pages(cache, TABLE[b], length) for cache in caches()]
        keys, values = (
            torch.cat([cached, new[b]])[None].double()
            for cached, new in zip(old, (k, v), strict=True)
        )
        rows.append(reference.attention(q[b : b + 1].double(), keys, values, **options)[0])
    return torch.cat(rows)


@pytest.mark.parametrize("max_seqlen_k", [None, 6])
def test_layers_of_one_plan(max_seqlen_k: int | None) -> None:
    lengths = [5, 2]
    plan = plan_kvcache(int32(*lengths), TABLE, caches()[0], max_seqlen_k=max_seqlen_k)
    q, k, v = tokens(2, 1)
    for options in ({"causal": True}, {"causal": True, "window_size": (3, 0)}):
        out = flash_attn_with_kvcache(q, *caches(), k, v, plan=plan, **options)
        true = expected(q, k, v, lengths, **options)
        torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-5)


def test_attention_alone_and_packed() -> None:
    q, _, _ = tokens(3)
    starts = int32(0, 2, 3)
    plan = plan_kvcache(
        int32(5, 2), TABLE, caches()[0], appends=False, cu_seqlens_q=starts, max_seqlen_q=2
    )
    actual = flash_attn_with_kvcache(q, *caches(), plan=plan, causal=True)
    without = flash_attn_with_kvcache(
        q, *caches(), cache_seqlens=int32(5, 2), block_table=TABLE, cu_seqlens_q=starts,
        max_seqlen_q=2, causal=True,
    )  # fmt: skip
    assert torch.equal(actual, without)


def test_a_replay_reads_what_update_has_put_into_the_same_memory() -> None:
    lengths, table = int32(5, 2), TABLE.clone()
    plan = plan_kvcache(lengths, table, caches()[0], max_seqlen_k=8)
    pointers = plan.cache_seqlens.data_ptr(), plan.block_table.data_ptr()
    q, k, v = tokens(2, 1)
    for step in ([5, 2], [6, 3], [0, 7]):
        plan.update(cache_seqlens=int32(*step))
        cache = caches()
        out = flash_attn_with_kvcache(q, *cache, k, v, plan=plan, causal=True)
        true = expected(q, k, v, step, causal=True)
        torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-5)
        assert (plan.cache_seqlens.data_ptr(), plan.block_table.data_ptr()) == pointers
    assert lengths.tolist() == [0, 7]
    lengths.copy_(int32(1, 1))  # the caller's own way
    out = flash_attn_with_kvcache(q, *caches(), k, v, plan=plan, causal=True)
    true = expected(q, k, v, [1, 1], causal=True)
    torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-5)


def test_what_plan_refuses() -> None:
    k_cache, _ = caches()
    lengths = int32(5, 2)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"cache_seqlens\[0\]", {"cache_seqlens": int32(9, 2)}),
        (ValueError, r"cache_seqlens\[1\]", {"cache_seqlens": int32(5, -1)}),
        (ValueError, r"cache_seqlens\[0\]", {"max_seqlen_k": 4}),
        (TypeError, "cache_seqlens must have dtype torch.int32", {"cache_seqlens": lengths.long()}),
        (TypeError, "cache_seqlens must be a torch.Tensor", {"cache_seqlens": 5}),
        (ValueError, "block_table must have batch = 2", {"block_table": TABLE[:1]}),
        (TypeError, "block_table", {"block_table": TABLE.float()}),
        (ValueError, "max_seqlen_q must be given", {"cu_seqlens_q": int32(0, 1, 2)}),
        (ValueError, "max_seqlen_q", {"cu_seqlens_q": int32(0, 3, 4), "max_seqlen_q": 2}),
        (ValueError, "num_splits", {"num_splits": -1}),
        (TypeError, "appends", {"appends": 1}),
    ]
    for error, message, changes in wrong:
        args: dict[str, Any] = {"cache_seqlens": lengths, "block_table": TABLE, "k_cache": k_cache}
        with pytest.raises(error, match=message):
            plan_kvcache(**args | changes)


def test_a_plan_of_other_shapes_is_refused_and_nothing_written() -> None:
    q, k, v = tokens(2, 1)
    plan = plan_kvcache(int32(5, 2), TABLE, caches()[0], max_seqlen_k=6)
    cache = caches()
    before = [tensor.clone() for tensor in cache]
    wider = [tensor.view(PAGES // 2, 2 * SIZE, HEADS, DIM) for tensor in cache]
    longer = tokens(2, 2)
    more = tokens(3, 1)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("page_size", (q, *wider, k, v), {}),
        ("max_seqlen_q must be at least seqlen_q = 2", (longer[0], *cache, *longer[1:]), {}),
        ("batch", (more[0], *cache, *more[1:]), {}),
        ("k and v must be given", (q, *cache), {}),
        ("block_table must not be given", (q, *cache, k, v), {"block_table": TABLE}),
        ("num_splits must not be given", (q, *cache, k, v), {"num_splits": 2}),
    ]
    for message, args, options in calls:
        with pytest.raises(ValueError, match=message):
            flash_attn_with_kvcache(*args, plan=plan, causal=True, **options)
    with pytest.raises(TypeError, match="plan must be what plan_kvcache returned"):
        flash_attn_with_kvcache(q, *cache, k, v, plan="plan")
    plan.cache_seqlens.fill_(6)  # stale: the longest may have 6 keys after the append
    with pytest.raises(ValueError, match="max_seqlen_k must be at least"):
        flash_attn_with_kvcache(q, *cache, k, v, plan=plan, causal=True)
    for wrong in (int32(7, 1), int32(-1, 1), int32(1), torch.tensor([1, 1])):
        with pytest.raises((TypeError, ValueError), match="cache_seqlens"):
            plan.update(cache_seqlens=wrong)
    with pytest.raises(ValueError, match="tree_mask must be None"):
        plan.update(tree_mask=torch.ones(2, 1).long())
    assert plan.cache_seqlens.tolist() == [6, 6]
    assert all(map(torch.equal, cache, before))


def test_max_seqlen_k_bounds_the_sequences() -> None:
    q, k, v = tokens(2, 1)
    args = (q, *caches(), k, v, int32(5, 2), TABLE)
    assert torch.equal(
        flash_attn_with_kvcache(*args, max_seqlen_k=6, causal=True),
        flash_attn_with_kvcache(*args, causal=True),
    )
    before = [tensor.clone() for tensor in args[1:3]]
    with pytest.raises(
        ValueError, match="max_seqlen_k must be at least.*got 5 but sequence 0 has 6"
    ):
        flash_attn_with_kvcache(*args, max_seqlen_k=5, causal=True)
    with pytest.raises(ValueError, match="cache_seqlens"):
        flash_attn_with_kvcache(
            q, *caches(), cache_seqlens=int32(5, 2), block_table=TABLE, max_seqlen_k=4
        )
    assert all(map(torch.equal, args[1:3], before))


@pytest.mark.parametrize("appends", [False, True])
def test_out(appends: bool) -> None:
    """The result is where it was asked for, counted as a change; lse is new."""
    q, k, v = tokens(2, 1)
    new = (k, v) if appends else (None, None)
    place = torch.zeros(2, 1, HEADS_Q + 1, DIM)
    out = place[:, :, :HEADS_Q]
    options: dict[str, Any] = {"causal": True, "return_lse": True}
    right = flash_attn_with_kvcache(q, *caches(), *new, int32(5, 2), TABLE, **options)
    given = flash_attn_with_kvcache(q, *caches(), *new, int32(5, 2), TABLE, out=out, **options)
    assert given[0] is out
    assert out._version == 1
    assert all(map(torch.equal, given, right))
    assert not place[:, :, HEADS_Q].any()
    cache = caches()
    before = [tensor.clone() for tensor in cache]
    for wrong in (out[:1], out.double(), q, cache[0].flatten()[: out.numel()].view(out.shape), 3):
        with pytest.raises((TypeError, ValueError), match="out"):
            flash_attn_with_kvcache(q, *cache, *new, int32(5, 2), TABLE, out=wrong, **options)
    assert all(map(torch.equal, cache, before))


def test_several_packed_sequences_need_max_seqlen_q() -> None:
    """Without it the host would take all rows for one sequence's, and choose no decode kernel."""
    q, k, v = tokens(2)
    args = (q, *caches(), k, v, int32(5, 2), TABLE, int32(0, 1, 2))
    with pytest.raises(ValueError, match="max_seqlen_q must be given with cu_seqlens_q"):
        flash_attn_with_kvcache(*args, causal=True)
    flash_attn_with_kvcache(*args, 1, causal=True)
    one = flash_attn_with_kvcache(q, *caches(), k, v, int32(5), TABLE[:1], int32(0, 2), causal=True)
    assert one.shape == (2, HEADS_Q, DIM)


def test_compiled_with_a_plan() -> None:
    torch._dynamo.reset()
    q, k, v = tokens(2, 1)
    plan = plan_kvcache(int32(5, 2), TABLE, caches()[0])

    def step(k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, plan=plan, causal=True)

    eager, compiled = caches(), caches()
    right = step(*eager)
    actual = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    assert torch.equal(actual, right)
    assert all(map(torch.equal, eager, compiled))


def test_a_compiled_append_that_is_refused_has_not_written() -> None:
    torch._dynamo.reset()
    q, k, v = tokens(2, 1)
    compiled = torch.compile(flash_attn_with_kvcache, backend="aot_eager", fullgraph=True)
    for changes in ({"cache_seqlens": int32(8, 2)}, {"block_table": int32([3, 9], [0, 2])}):
        cache = caches()
        before = [tensor.clone() for tensor in cache]
        args = {"cache_seqlens": int32(5, 2), "block_table": TABLE} | changes
        with pytest.raises(ValueError, match=next(iter(changes))):
            compiled(q, *cache, k, v, causal=True, **args)
        assert all(map(torch.equal, cache, before))


def test_a_layer_of_a_paged_cache_is_one_operator() -> None:
    cache = PagedKVCache(
        [(-1, 0), (3, 0)], num_heads_kv=HEADS, head_dim=DIM, page_size=SIZE, num_pages=8,
        max_num_seqs=2, max_seqlen=16, max_num_batched_tokens=8, dtype=torch.float32,
    )  # fmt: skip
    ids = [cache.allocate(), cache.allocate()]
    called: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            called.append(func.name())
            return func(*args, **kwargs or {})

    for counts in ([3, 2], 1):
        step = cache.append(ids, counts)
        q, k, v = tokens(step.num_tokens)
        for layer in range(2):
            step.attend(layer, q, k, v)  # makes the plan of the layer's group
            called.clear()
            with Count():
                step.attend(layer, q, k, v)
            assert called == [f"{ops.NAMESPACE}::append_and_attend"]
