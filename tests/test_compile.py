"""torch.compile(fullgraph=True, dynamic=True) and torch.export of everything public."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from sink_attention_ext import (
    apply_sink,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attn_states,
    reshape_and_cache,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    """The function, compiled at its first call; a second compilation is an error."""
    call = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    is_compiled = False

    def run(*args: Any) -> Any:
        nonlocal is_compiled
        with torch.compiler.set_stance("fail_on_recompile" if is_compiled else "default"):
            is_compiled = True
            return call(*args)

    return run


def test_a_recompilation_is_noticed() -> None:
    call = compiled(lambda x: x.sin())
    call(torch.randn(3, 4))
    call(torch.randn(4, 5))
    with pytest.raises(RuntimeError, match="recompile"):
        call(torch.randn(3))


def assert_close(actual: object, expected: object, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# No size of a first call equals another one: dynamo guesses that equal sizes stay equal.
HEADS_Q, HEADS_KV, HEAD_DIM = 10, 5, 8
NUM_PAGES, PAGE_SIZE = 12, 6


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def qkv(batch: int, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, seqlen_q, HEADS_Q, HEAD_DIM),
        torch.randn(batch, seqlen_k, HEADS_KV, HEAD_DIM),
        torch.randn(batch, seqlen_k, HEADS_KV, HEAD_DIM),
    )


# ---- training ----


class Attention(nn.Module):
    """A projection, attention with sinks and a window, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = (HEADS_Q, HEADS_KV, HEADS_KV)
        self.qkv = nn.Linear(24, sum(self.heads) * HEAD_DIM)
        self.sinks = nn.Parameter(torch.randn(HEADS_Q))
        self.project = nn.Linear(HEADS_Q * HEAD_DIM, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, HEAD_DIM)).split(self.heads, dim=-2)
        out, lse = flash_attn_func(
            q, k, v, causal=True, window_size=(3, 0), s_aux=self.sinks, return_lse=True
        )
        return self.project(out.flatten(-2)) + lse.mean(dim=1).unsqueeze(-1)


def step(model: nn.Module, call: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    """The loss and every parameter's gradient."""
    model.zero_grad()
    loss = call(*args).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_step(backend: str) -> None:
    """One compilation serves every batch size and length."""
    model = Attention()
    call = compiled(model, backend)
    for batch, seqlen in ((2, 9), (3, 5), (2, 10), (5, 33)):
        x = torch.randn(batch, seqlen, 24)
        assert_close(step(model, call, x), step(model, model, x))


def test_training_step_under_autocast() -> None:
    model = Attention()

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    call = compiled(forward)
    for seqlen in (9, 5):
        x = torch.randn(2, seqlen, 24)
        assert_close(step(model, call, x), step(model, forward, x), 1e-2)


def test_varlen_training_step() -> None:
    """Other totals, other numbers of sequences and other longest lengths: still one compilation."""
    sinks = nn.ParameterList([nn.Parameter(torch.randn(HEADS_Q))])

    def forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, n: int) -> Tensor:
        return flash_attn_varlen_func(
            q * 2, k, v, cu_q, cu_k, n, n, causal=True, softcap=3.0, s_aux=sinks[0]
        )

    call = compiled(forward)
    for lengths in ([3, 9], [4, 2, 7], [5, 5, 1, 4]):
        ends = int32(0, *torch.tensor(lengths).cumsum(0).tolist())
        q, k, v = (tensor[0] for tensor in qkv(1, sum(lengths), sum(lengths)))
        arguments = (q, k, v, ends, ends, max(lengths))
        assert_close(step(sinks, call, *arguments), step(sinks, forward, *arguments))


def test_merge_and_apply_sink() -> None:
    sinks = nn.ParameterList([nn.Parameter(torch.randn(HEADS_Q))])

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [flash_attn_func(q, k * i, v, return_lse=True) for i in (1, 2)]
        merged = merge_attn_states([p[0] for p in parts], [p[1] for p in parts], sinks[0])
        applied = apply_sink(*parts[0], sinks[0])
        return merged[0] + applied[0] + (merged[1] + applied[1]).transpose(1, 2).unsqueeze(-1)

    call = compiled(forward)
    for arguments in (qkv(2, 7, 9), qkv(3, 4, 5)):
        assert_close(step(sinks, call, *arguments), step(sinks, forward, *arguments))


# ---- serving ----


def paged_cache(num_pages: int = NUM_PAGES, page_size: int = PAGE_SIZE) -> tuple[Tensor, Tensor]:
    shape = (num_pages, page_size, HEADS_KV, HEAD_DIM)
    return torch.randn(shape), torch.randn(shape)


SINKS = torch.linspace(-1, 1, HEADS_Q)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Appends and attends."""
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens, block_table,
        causal=True, window_size=(9, 0), s_aux=SINKS, return_lse=True,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_decode_step_over_a_paged_cache(backend: str) -> None:
    call = compiled(decode, backend)
    block_table = int32([3, 1, 7, 9], [0, 2, 5, 11], [4, 6, 8, 10])
    caches = paged_cache()
    expected_caches = tuple(cache.clone() for cache in caches)
    with torch.no_grad():
        for lengths in ([0, 5, 12], [1, 6, 13], [2, 7, 14]):
            new = qkv(3, 1, 1)
            actual = call(*new, *caches, int32(*lengths), block_table)
            assert_close(actual, decode(*new, *expected_caches, int32(*lengths), block_table))
            assert_close(caches, expected_caches, 0.0)


@pytest.mark.parametrize("dense", [True, False])
def test_chunked_prefill_of_any_length(dense: bool) -> None:
    call = compiled(decode)
    caches = paged_cache(3, 24) if dense else paged_cache()
    block_table = None if dense else int32([3, 1, 7, 9], [0, 2, 5, 11], [4, 6, 8, 10])
    expected_caches = tuple(cache.clone() for cache in caches)
    with torch.no_grad():
        for chunk, lengths in ((7, [0, 4, 1]), (5, [7, 11, 8]), (2, [12, 16, 13])):
            new = qkv(3, chunk, chunk)
            actual = call(*new, *caches, int32(*lengths), block_table)
            assert_close(actual, decode(*new, *expected_caches, int32(*lengths), block_table))
            assert_close(caches, expected_caches, 0.0)


def test_decode_step_with_a_length_for_all() -> None:
    """cache_seqlens as an int that grows."""
    call = compiled(decode)
    caches = paged_cache(3, 24)
    expected_caches = tuple(cache.clone() for cache in caches)
    with torch.no_grad():
        for length in (13, 14, 15):
            new = qkv(3, 1, 1)
            actual = call(*new, *caches, length, None)
            assert_close(actual, decode(*new, *expected_caches, length, None))
            assert_close(caches, expected_caches, 0.0)


def decode_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
) -> Tensor:
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens, block_table, cu_seqlens_q, max_seqlen_q,
        causal=True, s_aux=SINKS,
    )  # fmt: skip


def test_packed_decode_and_prefill_together() -> None:
    call = compiled(decode_packed)
    caches = paged_cache()
    expected_caches = tuple(cache.clone() for cache in caches)
    block_table = int32([3, 1, 7, 9], [0, 2, 5, 11], [4, 6, 8, 10])
    with torch.no_grad():
        for lengths in ([1, 7, 2], [3, 0, 5], [2, 2, 2]):
            ends = int32(0, *torch.tensor(lengths).cumsum(0).tolist())
            new = tuple(tensor[0] for tensor in qkv(1, sum(lengths) + 1, sum(lengths) + 1))
            tables = (int32(5, 0, 9), block_table, ends, max(lengths))
            assert_close(
                call(*new, *caches, *tables), decode_packed(*new, *expected_caches, *tables)
            )
            assert_close(caches, expected_caches, 0.0)


def test_compiled_reshape_and_cache_into_a_view() -> None:
    """The cache is half of one tensor, heads first."""

    def write(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
        reshape_and_cache(k, v, cache[0].transpose(1, 2), cache[1].transpose(1, 2), slots)

    call = compiled(write)
    cache = torch.zeros(2, 9, HEADS_KV, PAGE_SIZE, HEAD_DIM)
    expected = cache.clone()
    for slots in ([3, 9, 20], [50, -1], [7, 6, 5, 4]):
        new = torch.randn(2, len(slots), HEADS_KV, HEAD_DIM)
        call(new[0], new[1], cache, torch.tensor(slots))
        write(new[0], new[1], expected, torch.tensor(slots))
        assert_close(cache, expected, 0.0)


@pytest.mark.parametrize(
    ("lengths", "table", "message"),
    [
        ([2, 24], [[0, 1, 2, 3], [4, 5, 6, 7]], r"cache_seqlens\[1\].*fit into the 24"),
        ([2, -1], [[0, 1, 2, 3], [4, 5, 6, 7]], r"cache_seqlens\[1\].*got -1"),
        ([2, 3], [[0, 1, 2, 3], [-1, 5, 6, 7]], r"block_table\[1, 0\].*got -1"),
        ([2, 3], [[12, 1, 2, 3], [4, 5, 6, 7]], r"block_table\[0, 0\].*got 12"),
    ],
)
def test_compiled_append_refuses_bad_values_before_it_writes(
    lengths: list[int], table: list[list[int]], message: str
) -> None:
    call = compiled(decode)
    caches = paged_cache()
    before = tuple(cache.clone() for cache in caches)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(*qkv(2, 1, 1), *caches, int32(*lengths), int32(*table))
    assert_close(caches, before, 0.0)


def test_shape_errors_reach_the_user_while_compiling() -> None:
    call = compiled(lambda q, k, v: flash_attn_func(q, k, v, s_aux=torch.zeros(3)))
    with pytest.raises(Exception, match=r"s_aux must have shape \(num_heads_q,\)"):
        call(*qkv(2, 3, 3))


# ---- export ----


class Call(nn.Module):
    """A module around a function, with sinks."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.sinks = nn.Parameter(SINKS.clone(), requires_grad=False)
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(self.sinks, *args)


def call_dense(sinks: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True, s_aux=sinks)


def call_varlen(sinks: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    return flash_attn_varlen_func(q, k, v, ends, ends, q.shape[0], k.shape[0], s_aux=sinks)


def call_merge(sinks: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    return apply_sink(*merge_attn_states([out, out], [lse, lse], sinks), sinks)


def call_cache(sinks: Tensor, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
    k_cache, v_cache, cache_seqlens, block_table = tables
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens, block_table, causal=True, s_aux=sinks
    )


def call_packed_cache(sinks: Tensor, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
    k_cache, v_cache, cache_seqlens, block_table, ends = tables
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens, block_table, ends, q.shape[0], causal=True,
        s_aux=sinks,
    )  # fmt: skip


def packed(total: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (tensor[0] for tensor in qkv(1, total, total))
    return q, k, v


TABLE = int32([3, 1, 7, 9], [0, 2, 5, 11])
SEQLEN, TOTAL = Dim("seqlen", max=64), Dim("total", max=64)
EXPORTS = {
    "dense": (call_dense, lambda n: qkv(2, n, n), {1: SEQLEN}, 3),
    "varlen": (call_varlen, lambda n: (*packed(n), int32(0, 3, n)), {0: TOTAL}, 3),
    "merge": (call_merge, lambda n: qkv(2, n, n), {1: SEQLEN}, 3),
    "cache": (
        call_cache, lambda n: (*qkv(2, n, n), *paged_cache(), int32(3, 1), TABLE), {1: SEQLEN}, 3,
    ),
    "packed_cache": (
        call_packed_cache,
        lambda n: (*packed(n), *paged_cache(), int32(3, 1), TABLE, int32(0, 2, n)), {0: TOTAL}, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTS)
def test_export(name: str, strict: bool) -> None:
    """Exported at one length, run at another; the program's caches change as in eager mode."""
    function, make_arguments, dynamic, num_dynamic = EXPORTS[name]
    module, example = Call(function), make_arguments(6)
    dims = [dynamic] * num_dynamic + [None] * (len(example) - num_dynamic)
    program = export(module, example, dynamic_shapes=(tuple(dims),), strict=strict)
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(op.startswith("sink_attention_ext.") for op in ops)

    arguments = make_arguments(9)
    copies = tuple(tensor.clone() for tensor in arguments)
    with torch.no_grad():
        assert_close(program.module()(*arguments), module(*copies))
    assert_close(arguments, copies, 0.0)
