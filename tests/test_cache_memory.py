"""Cache writes take exactly the tensors whose elements have distinct addresses.

A cache whose elements overlap, or that overlaps another argument, is refused. Every other layout is
taken.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sink_attention_ext import flash_attn_with_kvcache, ops, reshape_and_cache

PAGES, SIZE, HEADS, DIM = 3, 4, 2, 8
SHAPE = (PAGES, SIZE, HEADS, DIM)
SLOTS = torch.tensor([0, 5, 6, 11])
Caches = tuple[Tensor, Tensor]


def key_values() -> Caches:
    torch.manual_seed(0)
    return torch.randn(4, HEADS, DIM), torch.randn(4, HEADS, DIM)


def buffer(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def fused_heads() -> Caches:
    whole = buffer(PAGES, SIZE, 2 * HEADS, DIM)
    return whole[:, :, ::2], whole[:, :, 1::2]


def fused_rows() -> Caches:
    whole = buffer(PAGES, SIZE, HEADS, 2 * DIM)
    return whole[..., :DIM], whole[..., DIM:]


def shifted_rows() -> Caches:
    """One buffer of slots, of which keys have the even and values the odd ones."""
    whole = buffer(PAGES, 2 * SIZE, HEADS, DIM)
    return whole[:, ::2], whole[:, 1::2]


def pages_backwards_and_padded() -> Caches:
    """Strides that fall in another order than the dimensions, with gaps between rows."""
    whole = buffer(HEADS, 2, SIZE, PAGES, DIM + 3)[..., :DIM]
    return whole[:, 0].permute(2, 1, 0, 3), whole[:, 1].permute(2, 1, 0, 3)


VALID: dict[str, Callable[[], Caches]] = {
    "two tensors": lambda: (buffer(*SHAPE), buffer(*SHAPE)),
    "stacked": lambda: tuple(buffer(2, *SHAPE)),
    "beside each other in a page": lambda: tuple(buffer(PAGES, 2, *SHAPE[1:]).unbind(1)),
    "layers": lambda: tuple(buffer(5, 2, *SHAPE)[3]),
    "heads first": lambda: tuple(buffer(2, PAGES, HEADS, SIZE, DIM).transpose(2, 3)),
    "heads first, beside each other": lambda: tuple(
        buffer(PAGES, 2, HEADS, SIZE, DIM).transpose(2, 3).unbind(1)
    ),
    "heads interleaved": fused_heads,
    "one row": fused_rows,
    "slots interleaved": shifted_rows,
    "permuted, padded": pages_backwards_and_padded,
}


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", VALID)
def test_layouts_with_memory_of_their_own_are_written(layout: str) -> None:
    k_cache, v_cache = VALID[layout]()
    k, v = key_values()
    reshape_and_cache(k, v, k_cache, v_cache, SLOTS)
    assert torch.equal(k_cache.flatten(0, 1)[SLOTS], k)
    assert torch.equal(v_cache.flatten(0, 1)[SLOTS], v)
    assert k_cache.count_nonzero() == k.count_nonzero() == v_cache.count_nonzero()


def one() -> Tensor:
    return buffer(*SHAPE)


def shifted(by: int) -> Caches:
    whole = buffer(PAGES * SIZE * HEADS * DIM + by)
    strides = one().stride()
    return whole.as_strided(SHAPE, strides), whole.as_strided(SHAPE, strides, by)


def a_view_of_itself() -> Caches:
    cache = one()
    return cache, cache.view_as(cache)


def through_dlpack() -> Caches:
    cache = one()
    return cache, torch.from_dlpack(cache.detach())


def through_numpy() -> Caches:
    cache = one()
    return cache, torch.from_numpy(cache.numpy())


def a_slice_of_the_row() -> Caches:
    """As latent attention has it: values are the first part of the keys."""
    cache = one()
    return cache, cache[..., : DIM // 2]


def heads_that_overlap() -> Caches:
    whole = buffer(PAGES, SIZE, 2 * HEADS, DIM)
    return whole[:, :, :HEADS], whole[:, :, 1 : HEADS + 1]


def other_order() -> Caches:
    whole = buffer(PAGES, PAGES, SIZE, HEADS, DIM)
    return whole[:, 0], whole[2]


OVERLAPPING: dict[str, Callable[[], Caches]] = {
    "a view": a_view_of_itself,
    "dlpack": through_dlpack,
    "numpy": through_numpy,
    "shifted by an element": lambda: shifted(1),
    "shifted by all but an element": lambda: shifted(one().numel() - 1),
    "a slice of the row": a_slice_of_the_row,
    "heads": heads_that_overlap,
    "one page in common": other_order,
}
EXPANDED: dict[str, Callable[[], Tensor]] = {
    "page": lambda: buffer(1, *SHAPE[1:]).expand(SHAPE),
    "slot": lambda: buffer(PAGES, 1, HEADS, DIM).expand(SHAPE),
    "head": lambda: buffer(PAGES, SIZE, 1, DIM).expand(SHAPE),
    "rows that overlap": lambda: buffer(1000).as_strided(SHAPE, (64, 16, DIM - 1, 1)),
    "pages that overlap": lambda: buffer(1000).as_strided(SHAPE, (SIZE * 16 - 8, 16, 8, 1)),
    "strides without a common order": lambda: buffer(1000).as_strided(SHAPE, (45, 30, 20, 1)),
}


def check_refused(k_cache: Tensor, v_cache: Tensor, message: str) -> None:
    k, v = key_values()
    v = v[..., : v_cache.shape[-1]]
    lengths = torch.zeros(2, dtype=torch.int32)
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    q, new = torch.randn(2, 1, HEADS, DIM), (k[:2, None], v[:2, None])
    calls: tuple[tuple[type[Exception], Callable[[], object]], ...] = (
        (ValueError, lambda: reshape_and_cache(k, v, k_cache, v_cache, SLOTS)),
        (ValueError, lambda: ops.reshape_and_cache(k, v, k_cache, v_cache, SLOTS, None, None)),
        (ValueError, lambda: flash_attn_with_kvcache(q, k_cache, v_cache, *new, lengths, table)),
    )
    for error, call in calls:
        with pytest.raises(error, match=message):
            call()
        assert not k_cache.any() and not v_cache.any()


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", OVERLAPPING)
def test_caches_that_overlap_are_refused(layout: str) -> None:
    check_refused(*OVERLAPPING[layout](), "^v_cache must not share memory with k_cache: both are")
    if layout != "a slice of the row":
        k_cache, v_cache = OVERLAPPING[layout]()
        check_refused(v_cache, k_cache, "^v_cache must not share memory with k_cache: both are")


@pytest.mark.parametrize("layout", EXPANDED)
def test_a_cache_that_overlaps_itself_is_refused(layout: str) -> None:
    message = "^{} must have memory of its own for each element, since it is written; got strides"
    check_refused(EXPANDED[layout](), one(), message.format("k_cache"))
    check_refused(one(), EXPANDED[layout](), message.format("v_cache"))


def test_aliased_caches_may_be_read() -> None:
    """Latent attention's values are a slice of its keys: attention alone writes nothing."""
    torch.manual_seed(0)
    cache, q = torch.randn(SHAPE), torch.randn(2, 1, HEADS, DIM)
    table = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
    args = (None, None, torch.tensor([7, 3], dtype=torch.int32), table)
    actual = flash_attn_with_kvcache(q, cache, cache[..., :4], *args)
    assert torch.equal(actual, flash_attn_with_kvcache(q, cache, cache[..., :4].clone(), *args))
    expanded = cache[:1].expand(SHAPE)
    actual = flash_attn_with_kvcache(q, expanded, cache, *args)
    assert torch.equal(actual, flash_attn_with_kvcache(q, expanded.clone(), cache, *args))


@pytest.mark.sanitize
def test_values_that_are_the_first_columns_of_the_keys_are_written() -> None:
    """Latent attention (MLA): both writes store the same values in the same slots."""
    torch.manual_seed(0)
    cache, expected, k = torch.zeros(SHAPE), torch.zeros(SHAPE), torch.randn(4, HEADS, DIM)
    reshape_and_cache(k, k[..., :4], cache, cache[..., :4], SLOTS)
    expected.view(-1, HEADS, DIM)[SLOTS] = k
    assert torch.equal(cache, expected)
    q = torch.randn(2, 1, HEADS, DIM)
    new = torch.randn(2, 1, HEADS, DIM)
    lengths, table = torch.tensor([2, 3], dtype=torch.int32), torch.tensor([[1], [2]]).int()
    apart = cache.clone(), cache[..., :4].clone()
    out = flash_attn_with_kvcache(q, cache, cache[..., :4], new, new[..., :4], lengths, table)
    assert torch.equal(out, flash_attn_with_kvcache(q, *apart, new, new[..., :4], lengths, table))
    assert torch.equal(cache, apart[0])
    for v in (k[..., :4].clone(), k[..., 4:]):  # other numbers
        with pytest.raises(ValueError, match="v_cache must not share memory with k_cache"):
            reshape_and_cache(k, v, cache, cache[..., :4], SLOTS)
    assert torch.equal(cache, apart[0])


def test_a_layout_that_takes_long_to_look_through_is_refused() -> None:
    """Strides without a pattern: whether two such tensors meet is a search without end."""
    whole = torch.empty(40_000_000)
    shape = (51, 123, 25, 1)
    k_cache = whole.as_strided(shape, (82410, 58047, 66756, 1), 1650324)
    v_cache = whole.as_strided(shape, (94311, 131688, 8682, 1), 1170331)
    k = torch.zeros(1, 25, 1)
    start = time.thread_time()
    with pytest.raises(ValueError, match="must not share memory with .*contiguous"):
        reshape_and_cache(k, k.clone(), k_cache, v_cache, torch.tensor([0]))
    assert time.thread_time() - start < 30  # without a limit, other strides take minutes


@pytest.mark.sanitize
def test_new_tokens_inside_the_cache_are_refused() -> None:
    """Tokens that are moved on by one would be smeared, as by copy_ without its own check."""
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(SHAPE), torch.randn(SHAPE)
    before = k_cache.clone(), v_cache.clone()
    k, v = k_cache.flatten(0, 1)[:4], torch.randn(4, HEADS, DIM)
    slots = torch.arange(1, 5)
    words = v_cache.view(torch.int64).flatten()
    for new, name, other, place in (
        ((k, v), "k", "k_cache", slots),
        ((v, k), "v", "k_cache", slots),
        ((v, v_cache.flatten(0, 1)[8:]), "v", "v_cache", slots),
        ((v, v), "slot_mapping", "v_cache", words[:4]),
    ):
        message = f"^{name} must not share memory with {other}, which is written: pass {name}.clone"
        with pytest.raises(ValueError, match=message):
            reshape_and_cache(*new, k_cache, v_cache, place)
    q = torch.randn(4, 1, HEADS, DIM)
    table = torch.arange(4, dtype=torch.int32).remainder(PAGES)[:, None]
    with pytest.raises(ValueError, match="^k must not share memory with k_cache"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k[:, None], v[:, None], 0, table)
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache, before[1])
    reshape_and_cache(k.clone(), v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.flatten(0, 1)[slots], before[0].flatten(0, 1)[:4])


def test_what_attention_reads_after_the_write_is_not_in_the_cache() -> None:
    torch.manual_seed(0)
    batch = 2
    k_cache, v_cache = torch.zeros(SHAPE), torch.zeros(SHAPE)
    ints = k_cache.view(torch.int32).flatten()
    new = torch.randn(2, batch, 1, HEADS, DIM)
    valid = {
        "q": torch.randn(batch, 1, HEADS, DIM),
        "block_table": torch.tensor([[0], [1]], dtype=torch.int32),
        "cache_seqlens": torch.zeros(batch, dtype=torch.int32),
        "s_aux": torch.zeros(HEADS),
    }
    inside = {
        "q": v_cache[0, :batch, None],
        "block_table": ints[:2].view(2, 1),
        "cache_seqlens": ints[-2:],
        "s_aux": v_cache[0, 0, 0, :HEADS],
    }
    for name, tensor in inside.items():
        args = valid | {name: tensor}
        with pytest.raises(ValueError, match=f"^{name} must not share memory with [kv]_cache"):
            flash_attn_with_kvcache(args.pop("q"), k_cache, v_cache, *new, **args)
        assert not k_cache.any() and not v_cache.any()
    flash_attn_with_kvcache(valid.pop("q"), k_cache, v_cache, *new, **valid)
    assert torch.equal(k_cache[:2, 0], new[0, :, 0])


def test_scales_have_memory_of_their_own() -> None:
    k, v = key_values()

    def caches() -> Caches:
        return tuple(torch.zeros(2, *SHAPE, dtype=torch.int8))

    def refused(message: str, k_cache: Tensor, v_cache: Tensor, *scales: Tensor) -> None:
        before = [t.clone() for t in (k_cache, v_cache, *scales)]
        with pytest.raises(ValueError, match=message):
            reshape_and_cache(k, v, k_cache, v_cache, SLOTS, *scales)
        for tensor, old in zip((k_cache, v_cache, *scales), before, strict=True):
            assert torch.equal(tensor, old)

    scales = torch.ones(PAGES, SIZE, HEADS, 2)
    refused(
        "^v_scale must not share memory with k_scale: both are written",
        *caches(), scales[..., 0], scales[..., 0].view(PAGES, SIZE, HEADS),
    )  # fmt: skip
    between = scales.flatten()[1:25].view(PAGES, SIZE, HEADS)
    refused("^v_scale must not share memory", *caches(), scales[..., 0], between)
    refused("^k_scale must have memory of its own", *caches(), scales[:1, ..., 0].expand(3, 4, 2),
            scales[..., 1])  # fmt: skip
    k_cache, v_cache = caches()
    inside = v_cache.view(torch.float32).flatten()[: PAGES * SIZE * HEADS].view(PAGES, SIZE, HEADS)
    refused("^k_scale must not share memory with v_cache", k_cache, v_cache, inside, scales[..., 1])
    k_cache, v_cache = caches()
    v_cache.fill_(64)
    refused(
        "^k_scale must not share memory with v_cache, which is written",
        k_cache, v_cache, v_cache.view(torch.float32).flatten()[0], torch.tensor(1.0),
    )  # fmt: skip
    # A row of an 8-bit cache with its scale behind it.
    rows = torch.zeros(2, PAGES, SIZE, HEADS, DIM + 4, dtype=torch.int8)
    own = rows[..., DIM:].view(torch.float32)[..., 0]
    reshape_and_cache(k, v, rows[0, ..., :DIM], rows[1, ..., :DIM], SLOTS, *own)
    stored = rows[0, ..., :DIM].flatten(0, 1)[SLOTS] * own[0].flatten(0, 1)[SLOTS][..., None]
    torch.testing.assert_close(stored, k, atol=0.02, rtol=0)


def test_results_of_paged_attn_out_are_apart_from_its_operands() -> None:
    torch.manual_seed(0)
    cache, q = torch.randn(2, *SHAPE), torch.randn(2, 1, HEADS, DIM)
    table = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
    lengths = torch.tensor([7, 3], dtype=torch.int32)
    args = (q, *cache, table, lengths, *[None] * 4, 1, 8, 0.3, True, -1, -1, 0.0, 0, 0, None)
    out, lse = torch.empty_like(q), torch.empty(2, HEADS, 1)
    keys, values = cache.flatten(1)
    before = [t.clone() for t in (q, cache)]
    for results, message in (
        ((q, lse), "^out must not share memory with|^q must not share memory with out"),
        ((keys[: q.numel()].view_as(q), lse), "^k_cache must not share memory with out"),
        ((out, values[:4].view_as(lse)), "^v_cache must not share memory with lse"),
        ((out, out.view(-1)[:4].view_as(lse)), "^lse must not share memory with out"),
        ((out[:1].expand(2, -1, -1, -1), lse), "^out must have memory of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.paged_attn_out(*args, out=results[0], lse=results[1])
        assert torch.equal(q, before[0]) and torch.equal(cache, before[1])
    ops.paged_attn_out(*args, out=out, lse=lse)
    assert torch.equal(out, ops.paged_attn(*args)[0])


def places(tensor: Tensor) -> Tensor:
    """Of each element, in units of the storage's."""
    numbers = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    return numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten()


def overlapping(*caches: Tensor) -> bool:
    return bool((torch.cat([places(c) for c in caches]).bincount() > 1).any())


def drawn_cache(draw: random.Random, whole: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Of any strides and offset within `whole`; often of strides that nest."""
    strides = [1]
    span = shape[-1]
    for size in shape[-2::-1]:
        strides.append(draw.choice((span, span, span + draw.randrange(4), draw.randrange(30))))
        span = max(span, strides[-1] * size)
    order = [*draw.sample(range(1, 4), 3)]
    strides = [strides[i] for i in order] + [1]
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    offset = draw.randrange(max(1, min(whole.numel() - last, 40)))
    return whole.as_strided(shape, strides, offset)


@pytest.mark.parametrize("seed", range(4))
def test_overlap_is_decided_exactly(seed: int) -> None:
    """By the places of all elements, for 500 pairs of layouts in one buffer."""
    draw = random.Random(seed)
    refused = 0
    for _ in range(500):
        whole = torch.zeros(4000)
        shape = tuple(draw.randint(1, 4) for _ in range(4))
        k_cache, v_cache = (drawn_cache(draw, whole, shape) for _ in range(2))
        k, v = torch.ones(1, *shape[2:]), torch.ones(1, *shape[2:])
        overlaps = overlapping(k_cache, v_cache)
        slots = torch.tensor([shape[0] * shape[1] - 1])
        try:
            ops.reshape_and_cache(k, v, k_cache, v_cache, slots, None, None)
        except ValueError as error:
            assert overlaps, (shape, k_cache.stride(), v_cache.stride(), str(error))
            assert "memory" in str(error) and not whole.any()
            refused += 1
        else:
            assert not overlaps, (shape, k_cache.stride(), v_cache.stride())
    assert 100 < refused < 450


@pytest.mark.parametrize("strides", [(4099, 67, 19, 1), (4096, 64, 20, 1), (20, 20200, 5, 1)])
@pytest.mark.parametrize("gap", [1, 2, 3, 10, 19, 57, 58, 4098])
def test_large_caches_of_irregular_strides(strides: tuple[int, ...], gap: int) -> None:
    """The search goes by the strides and what divides them, not by elements."""
    whole, scale = torch.zeros(5_000_000, dtype=torch.int8), torch.ones(())
    shape = (1009, 61, 3, 2)
    k_cache, v_cache = (whole.as_strided(shape, strides, offset) for offset in (0, gap))
    new = torch.ones(1, 3, 2)
    args = (new, new, k_cache, v_cache, torch.tensor([0]), scale, scale)
    if overlapping(k_cache, v_cache):
        with pytest.raises(ValueError, match="must not share memory|must have memory of its own"):
            ops.reshape_and_cache(*args)
    else:
        ops.reshape_and_cache(*args)


@torch.compiler.config.patch(force_disable_caches=True)
def test_compiled_calls_are_checked_when_they_run() -> None:
    """Where Inductor hands over the caches themselves. Of views of one buffer it makes copies, and
    keeps that graph on the disk for other caches of these sizes."""
    torch._dynamo.reset()
    k, v = key_values()
    compiled = torch.compile(reshape_and_cache, fullgraph=True)
    apart = buffer(*SHAPE), buffer(*SHAPE)
    compiled(k, v, *apart, SLOTS)
    assert torch.equal(apart[1].flatten(0, 1)[SLOTS], v)
    cache = torch.zeros(PAGES, SIZE, HEADS, DIM)
    numpy_twin = torch.from_numpy(cache.numpy())  # no alias that the compiler knows of
    with pytest.raises(ValueError, match="v_cache must not share memory with k_cache"):
        compiled(k, v, cache, numpy_twin, SLOTS)
    torch._dynamo.reset()


def test_meta_tensors_that_are_one_are_refused() -> None:
    cache = torch.zeros(SHAPE, device="meta")
    k = torch.zeros(4, HEADS, DIM, device="meta")
    with pytest.raises(ValueError, match="v_cache must not share memory"):
        reshape_and_cache(k, k, cache, cache[:], SLOTS.to("meta"))
    reshape_and_cache(k, k, cache, torch.zeros_like(cache), SLOTS.to("meta"))
