"""Compiled operators that write to views of one buffer write there, whatever its size is.

Inductor takes a symbolic storage offset of a written view for 0 (pytorch/pytorch#198068).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sink_attention_ext import flash_attn_with_kvcache, ops, reshape_and_cache

HEADS, DIM = 2, 16
SIZES = ((6, 4, 3), (7, 8, 5), (9, 8, 5))  # pages, page size, tokens of call after call

Layout = tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[int, int], tuple[int, ...]]]
LAYOUTS: dict[str, Layout] = {
    "keys then values": (lambda both: (both[0], both[1]), lambda n, p: (2, n, p, HEADS, DIM)),
    "a layer of many": (lambda all: (all[2, 0], all[2, 1]), lambda n, p: (3, 2, n, p, HEADS, DIM)),
    "heads first": (
        lambda both: (both[0].transpose(1, 2), both[1].transpose(1, 2)),
        lambda n, p: (2, n, HEADS, p, DIM),
    ),
    "side by side": (
        lambda both: (both[..., :DIM], both[..., DIM:]),
        lambda n, p: (n, p, HEADS, 2 * DIM),
    ),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def write(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    reshape_and_cache(k, v, k_cache, v_cache, slots)


def append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    table = torch.arange(k_cache.shape[0], dtype=torch.int32)[None]
    flash_attn_with_kvcache(
        k[None], k_cache, v_cache, k[None], v[None], cache_seqlens=0, block_table=table
    )


def write_to(layout: str, function: Callable[..., None]) -> Callable[..., None]:
    views, _ = LAYOUTS[layout]

    def step(both: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
        function(*views(both), k, v, slots)

    return step


def check_writes(layout: str, step: Callable[..., None], call: Callable[..., Any]) -> None:
    for pages, page_size, tokens in SIZES:
        both = torch.zeros(LAYOUTS[layout][1](pages, page_size))
        expected = both.clone()
        new = torch.randn(tokens, HEADS, DIM), torch.randn(tokens, HEADS, DIM)
        slots = torch.arange(tokens) + 1 if "write" in step.__qualname__ else torch.arange(tokens)
        call(both, *new, slots)
        step(expected, *new, slots)
        assert expected.any()
        assert torch.equal(both, expected)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("function", [write, append])
@pytest.mark.parametrize("layout", ["keys then values", "a layer of many"])
def test_caches_of_one_buffer(
    layout: str, function: Callable[..., None], dynamic: bool | None
) -> None:
    step = write_to(layout, function)
    check_writes(layout, step, torch.compile(step, dynamic=dynamic, fullgraph=True))


@pytest.mark.parametrize("layout", ["heads first", "side by side"])
def test_caches_of_one_buffer_in_other_layouts(layout: str) -> None:
    step = write_to(layout, write)
    check_writes(layout, step, torch.compile(step, dynamic=True, fullgraph=True))


def test_scales_of_one_buffer() -> None:
    """What reshape_and_cache.token_scales writes, all four of one size after the other."""

    def step(both: Tensor, scales: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
        reshape_and_cache(k, v, both[0], both[1], slots, scales[0], scales[1])

    call = torch.compile(step, dynamic=True, fullgraph=True)
    for pages, page_size, tokens in SIZES:
        both = torch.zeros(2, pages, page_size, HEADS, DIM, dtype=torch.int8)
        scales = torch.ones(2, pages, page_size, HEADS)
        expected = both.clone(), scales.clone()
        new = torch.randn(tokens, HEADS, DIM), torch.randn(tokens, HEADS, DIM)
        call(both, scales, *new, torch.arange(tokens))
        step(*expected, *new, torch.arange(tokens))
        assert torch.equal(both, expected[0])
        assert torch.equal(scales, expected[1])
        assert (scales[1] != 1).any()


def test_results_of_one_buffer() -> None:
    """out and lse of paged_attn.out, views whose offsets move with the batch."""

    def step(outs: Tensor, lses: Tensor, q: Tensor, caches: Tensor, tables: Tensor) -> None:
        lengths = torch.full_like(tables[:, 0], 5)
        ops.paged_attn_out(
            q, caches[0], caches[1], tables, lengths, None, None, None, None, 1, 8, 0.3, True, -1,
            -1, 0.0, 0, 0, None, out=outs[1], lse=lses[1],
        )  # fmt: skip

    call = torch.compile(step, dynamic=True, fullgraph=True)
    for batch in (2, 3, 5):
        outs, lses = torch.zeros(2, batch, 1, 4, DIM), torch.zeros(2, batch, 4, 1)
        expected = outs.clone(), lses.clone()
        q, caches = torch.randn(batch, 1, 4, DIM), torch.randn(2, 9, 4, HEADS, DIM)
        tables = torch.arange(batch, dtype=torch.int32)[:, None] + torch.arange(2).int()
        call(outs, lses, q, caches, tables)
        step(*expected, q, caches, tables)
        assert not outs[0].any()
        assert outs[1].any()
        torch.testing.assert_close((outs, lses), expected)


def test_sizes_that_stay_make_no_guard_of_offsets_known() -> None:
    """A cache that is no view of another tensor stays dynamic: one compilation for all sizes."""
    compilations = itertools.count()

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        next(compilations)
        return graph.forward

    def step(k_cache: Tensor, v_cache: Tensor, k: Tensor, slots: Tensor) -> None:
        reshape_and_cache(k, k, k_cache, v_cache, slots)

    call = torch.compile(step, backend=backend, dynamic=True, fullgraph=True)
    for pages, page_size, tokens in ((6, 4, 3), (7, 8, 5), (9, 10, 7)):
        caches = [torch.zeros(pages, page_size, HEADS, DIM) for _ in range(2)]
        call(*caches, torch.ones(tokens, HEADS, DIM), torch.arange(tokens))
        assert all(cache.sum() == tokens * HEADS * DIM for cache in caches)
    assert next(compilations) == 1


def test_exported_with_aot_inductor(tmp_path: Path) -> None:
    """Of a fixed cache, half of a buffer, whatever the number of tokens."""

    class Write(torch.nn.Module):
        def forward(self, both: Tensor, k: Tensor, slots: Tensor) -> Tensor:
            reshape_and_cache(k, k, both[0], both[1], slots)
            return both.sum()

    def arguments(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        both = torch.zeros(2, 6, 4, HEADS, DIM)
        return both, torch.randn(tokens, HEADS, DIM), torch.arange(tokens)

    tokens = torch.export.Dim("tokens", min=2, max=20)
    program = torch.export.export(
        Write(), arguments(3), dynamic_shapes=({}, {0: tokens}, {0: tokens})
    )
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "write.pt2")
    )
    call = torch._inductor.aoti_load_package(package)
    for count in (3, 5):
        both, k, slots = arguments(count)
        call(both, k, slots)
        for cache in both:
            assert torch.equal(cache.flatten(0, 1)[:count], k)
            assert not cache.flatten(0, 1)[count:].any()
