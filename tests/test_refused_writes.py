"""A call that writes in place and raises has written nothing.

Caches, scales, lengths and the pages of a PagedKVCache are bit for bit as before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sink_attention_ext import PagedKVCache, flash_attn_with_kvcache, ops, reshape_and_cache
from sink_attention_ext.integrations import flash_attention_3

BATCH, PAGES, SIZE, HEADS_Q, HEADS, DIM, WIDTH = 2, 4, 4, 4, 2, 8, 2
TOKENS = 3  # new ones, packed: 2 and 1


class Marked(Tensor):
    """A subclass that changes nothing."""


def marked(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Marked)


def parameter(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False)


NUMBERS: tuple[Any, ...] = (
    2**31, 2**62, 2**63, 2**64, 10**30, -1, -2, -(2**63), -(2**70), 0.5, float("nan"), float("inf"),
    True, None, "x", 1e60, -1e60, [1], 3 + 1j, torch.tensor(2), torch.tensor(1.5),
    torch.tensor([1, 2]), object(),
)  # fmt: skip
HUGE = 10**400  # more than a float holds


def changes_of(tensor: Tensor) -> list[Any]:
    """Other tensors in the place of this one, most of them wrong."""
    one_less = tensor.narrow(0, 0, tensor.shape[0] - 1) if tensor.dim() > 0 else tensor[None]
    changed = [
        None, 7, "x", one_less, tensor[None], tensor.double(), tensor.to(torch.int16),
        tensor.to("meta"), tensor.flatten()[:1].expand(tensor.shape), marked(tensor),
        tensor.tolist(), torch.full_like(tensor, -3), torch.full_like(tensor, 101),
        torch.stack([tensor, tensor], -1)[..., 0], torch.empty_like(tensor)[:0],
    ]  # fmt: skip
    if not tensor.is_floating_point():
        changed += [parameter(torch.full_like(tensor, -5)), parameter(torch.full_like(tensor, 99))]
        limits = torch.iinfo(tensor.dtype)
        changed += [torch.full_like(tensor, limit) for limit in (limits.min, limits.max)]
        changed += [marked(torch.full_like(tensor, limits.max))]
    elif tensor.dtype in (torch.float32, torch.float64):
        changed += [parameter(tensor), tensor.clone().requires_grad_(), tensor.to_sparse()]
        changed += [torch.full_like(tensor, x) for x in (0.0, float("nan"), float("inf"), 1e-44)]
    if tensor.dtype == torch.float32 and tensor.dim() in (1, 2, 4):
        changed += [tensor.to_mkldnn()]
    return changed


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().clone().contiguous().view(torch.uint8) for n, t in tensors.items()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], after[name]) for name in before)


def arguments(kind: str, dtype: torch.dtype, draw: random.Random) -> dict[str, Any]:
    """Valid ones of flash_attn_with_kvcache: an append to sequences of 3 and 1 tokens."""
    caches = torch.randn(2, PAGES, SIZE, HEADS, DIM)
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    is_dense = kind == "dense"
    packed = kind == "packed"
    rows = (TOKENS,) if packed else (BATCH, 2)
    args: dict[str, Any] = {
        "q": torch.randn(*rows, HEADS_Q, DIM),
        "k_cache": caches[0, :BATCH] if is_dense else caches[0],
        "v_cache": caches[1, :BATCH] if is_dense else caches[1],
        "k": torch.randn(*rows, HEADS, DIM),
        "v": torch.randn(*rows, HEADS, DIM),
        "cache_seqlens": torch.tensor([2, 1], dtype=torch.int32),
        "softmax_scale": 0.3,
        "causal": True,
        "window_size": (5, 0),
        "softcap": 0.0,
        "s_aux": torch.randn(HEADS_Q),
        "num_splits": 0,
        "num_sink_tokens": 1,
        "max_seqlen_q": 2,
        "return_lse": True,
    }
    if not is_dense:
        args["block_table"] = table
    if packed:
        args["cu_seqlens_q"] = torch.tensor([0, 2, 3], dtype=torch.int32)
        args["tree_mask"] = torch.tensor([1, 3, 1])
    elif draw.random() < 0.5:
        args["tree_mask"] = torch.tensor([[1, 3], [1, 2]])
    if dtype != torch.float32:
        args["k_cache"], args["v_cache"] = args["k_cache"].to(dtype), args["v_cache"].to(dtype)
        shape = args["k_cache"].shape[:3] if draw.random() < 0.5 else (HEADS,)
        args["k_scale"], args["v_scale"] = (torch.full(shape, 0.05) for _ in range(2))
    return args


def broken(args: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """One or two of the arguments exchanged."""
    cache, args = args["k_cache"], dict(args)
    for name in draw.sample(sorted(args), draw.choice((1, 1, 1, 2))):
        value = args[name]
        choices = changes_of(value) if isinstance(value, Tensor) else [*NUMBERS, (1, 2, 3)]
        if name in ("k", "v", "q", "s_aux") and value is not None:
            choices.append(cache.flatten()[: value.numel()].view(value.shape))
        args[name] = draw.choice(choices)
    return args


def reshape_arguments(args: dict[str, Any]) -> dict[str, Any]:
    named = {n: args[n] for n in ("k_cache", "v_cache", "k_scale", "v_scale") if n in args}
    if "cu_seqlens_q" not in args:
        args = args | {n: args[n].flatten(0, 1)[:TOKENS] for n in ("k", "v")}
    return named | {"k": args["k"], "v": args["v"], "slot_mapping": torch.tensor([1, 6, -1])}


def raw_reshape(args: dict[str, Any]) -> None:
    scale = args.get("k_scale")
    is_written = isinstance(scale, Tensor) and scale.dim() == 3
    op = ops.reshape_and_cache_token_scales if is_written else ops.reshape_and_cache
    op(**{"k_scale": None, "v_scale": None} | args)


def fa3_arguments(args: dict[str, Any]) -> dict[str, Any]:
    args = dict(args, return_softmax_lse=args["return_lse"])
    for name in ("return_lse", "num_sink_tokens", "tree_mask"):
        args.pop(name, None)
    if "block_table" in args:
        args["page_table"] = args.pop("block_table")
    if "cu_seqlens_q" in args:
        args["cu_seqlens_k_new"] = args["cu_seqlens_q"].clone()
    return args


ENTRIES: dict[str, tuple[Callable[..., Any], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "flash_attn_with_kvcache": (lambda args: flash_attn_with_kvcache(**args), lambda args: args),
    "reshape_and_cache": (lambda args: reshape_and_cache(**args), reshape_arguments),
    "raw operators": (raw_reshape, reshape_arguments),
    "flash_attention_3": (
        lambda args: flash_attention_3.flash_attn_with_kvcache(**args),
        fa3_arguments,
    ),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_function_that_raises_has_not_written(entry: str, dtype: torch.dtype) -> None:
    call, arguments_of = ENTRIES[entry]
    if entry == "flash_attention_3" and dtype != torch.float32:
        pytest.skip("takes no quantised cache")
    draw = random.Random(f"{entry} {dtype}")
    torch.manual_seed(0)
    raised = 0
    for number in range(400):
        valid = arguments_of(arguments(draw.choice(("paged", "dense", "packed")), dtype, draw))
        tensors = {name: value for name, value in valid.items() if isinstance(value, Tensor)}
        args = broken(valid, draw) if number >= 5 else dict(valid)
        before = bits(tensors)
        try:
            call(args)
        except Exception as error:
            raised += 1
            assert same(before, bits(tensors)), (number, type(error), str(error)[:300])
            if entry != "raw operators":
                assert number >= 5 and isinstance(error, (TypeError, ValueError, RuntimeError))
        else:
            written = {"k_cache", "v_cache", *(n for n in tensors if n.endswith("_scale"))}
            unwritten = {n: t for n, t in tensors.items() if n not in written}
            assert same(bits(unwritten), {n: before[n] for n in unwritten}), number
    assert raised > 150


def snapshot(cache: PagedKVCache) -> Any:
    tables = [
        (t._pages, t._num_dropped, t.pool._references, t.pool._free, t.table.tolist())
        for t in cache._tables
    ]
    sequences = {i: (s.row, s.length) for i, s in cache._sequences.items()}
    return repr((tables, sequences, cache._free_rows))


def memory(cache: PagedKVCache) -> dict[str, Tensor]:
    tensors = {}
    for group, storage in enumerate(cache._storage):
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            if getattr(storage, name) is not None:
                tensors[f"{name} {group}"] = getattr(storage, name)
    return tensors


@pytest.mark.sanitize
@pytest.mark.parametrize("options", [
    {"dtype": torch.float32},
    {"dtype": torch.int8, "per_token_head_scales": True},
    {"dtype": torch.float8_e4m3fn, "k_scale": torch.tensor(0.05), "v_scale": torch.tensor(0.05)},
], ids=["float32", "int8", "float8"])  # fmt: skip
def test_a_paged_cache_that_raises_has_not_changed(options: dict[str, Any]) -> None:
    draw = random.Random(str(options["dtype"]))
    torch.manual_seed(0)
    cache = PagedKVCache(
        [(-1, 0), (3, 0)], num_heads_kv=HEADS, head_dim=DIM, page_size=SIZE, num_pages=8,
        max_num_seqs=3, max_seqlen=14, max_num_batched_tokens=TOKENS + 2, **options,
    )  # fmt: skip
    for tensor in memory(cache).values():
        tensor.zero_()
    ids = [cache.allocate(), cache.allocate()]
    cache.append(ids, [2, 3])
    fork = cache.fork(ids[1])
    step = cache.append([ids[0], fork], [2, 1])
    bad_ids = [-1, 10**30, None, 1.0, True, "a", [ids[0]], torch.tensor(1)]
    raised = 0
    for number in range(400):
        before, was = snapshot(cache), bits(memory(cache))
        attend_args = {
            "layer": draw.randrange(2), "q": torch.randn(TOKENS, HEADS_Q, DIM),
            "k": torch.randn(TOKENS, HEADS, DIM), "v": torch.randn(TOKENS, HEADS, DIM),
            "softmax_scale": 0.3, "softcap": 0.0, "s_aux": torch.randn(HEADS_Q), "num_splits": 0,
            "return_lse": False, "tree_mask": torch.tensor([1, 3, 1]), "k_cache": cache.k_cache(0),
        }  # fmt: skip
        args = broken(attend_args, draw)
        del args["k_cache"]
        bad = draw.choice(bad_ids)
        counts = draw.choice([HUGE, -1, [1], [1, -1], [9, 9], 2.0, None, "ab", [2, "b"], [1, HUGE]])
        calls: tuple[Callable[[], Any], ...] = (
            lambda args=args: step.attend(**args),
            lambda args=args: step.write(args["layer"], args["k"], args["v"]),
            lambda bad=bad: cache.free(bad),
            lambda bad=bad: cache.fork(bad),
            lambda bad=bad: cache.truncate(bad, 1),
            lambda: cache.truncate(ids[0], draw.choice([5, -1, 10**30, 1.5, None, True])),
            lambda counts=counts: cache.append([ids[0], fork], counts),
            lambda bad=bad: cache.append([ids[0], bad], 1),
            lambda: cache.append([ids[0]], 1, pad_seqs_to=draw.choice([0, 9, HUGE, "x", 1.5])),
            lambda: cache.append([ids[0]], 1, pad_tokens_to=draw.choice([0, 99, HUGE, "x", 1.5])),
            lambda: cache.append(ids, [11, 0]),
            lambda: cache.allocate(),
        )
        which = draw.choice((0, 0, 0, 1, *range(2, len(calls))))
        try:
            calls[which]()
        except Exception as error:
            raised += 1
            assert isinstance(error, (TypeError, ValueError, RuntimeError)), error
            assert snapshot(cache) == before, (which, str(error))
            assert same(was, bits(memory(cache))), (which, number, str(error)[:300])
        else:
            assert which in (0, 1)
            assert snapshot(cache) == before
    assert raised > 200


@pytest.mark.parametrize("name", ["cache_seqlens", "block_table", "cu_seqlens_q", "tree_mask"])
@pytest.mark.parametrize("kind", [marked, parameter])
def test_values_of_subclasses_are_read(name: str, kind: Callable[[Tensor], Tensor]) -> None:
    args = arguments("packed", torch.float32, random.Random(0))
    before = bits({n: args[n] for n in ("k_cache", "v_cache")})
    bad = {
        "cache_seqlens": [7, 1], "block_table": [[2, 0], [9, 1]], "cu_seqlens_q": [0, 2, 1],
        "tree_mask": [1, 3, 2],
    }  # fmt: skip
    wrong = kind(torch.tensor(bad[name], dtype=args[name].dtype))
    with pytest.raises(ValueError, match=name):
        flash_attn_with_kvcache(**args | {name: wrong})
    assert same(before, bits({n: args[n] for n in ("k_cache", "v_cache")}))
    right = flash_attn_with_kvcache(**args)
    again = arguments("packed", torch.float32, random.Random(0))
    same_values = {n: again[n].copy_(args[n]) for n in ("k_cache", "v_cache")}
    actual = flash_attn_with_kvcache(**args | same_values | {name: kind(args[name])})
    assert torch.equal(right[0], actual[0])


@pytest.mark.parametrize("append", [True, False])
def test_huge_counts_are_as_good_as_the_most(append: bool) -> None:
    args = arguments("packed", torch.float32, random.Random(0))
    args.pop("tree_mask")  # of 64 tokens at most
    if not append:
        del args["k"], args["v"]
    expected = flash_attn_with_kvcache(**args | {"num_sink_tokens": 99, "num_splits": 8})
    for huge in (2**31, 2**63, 10**400):
        counts = dict.fromkeys(("num_sink_tokens", "num_splits", "max_seqlen_q"), huge)
        torch.testing.assert_close(flash_attn_with_kvcache(**args | counts), expected)
        wide = args | {"num_sink_tokens": 0, "window_size": (huge, 0)}
        torch.testing.assert_close(flash_attn_with_kvcache(**wide), expected)


@pytest.mark.sanitize
def test_lengths_near_the_largest_int32() -> None:
    """length + new does not fit into an int32."""
    for kind in ("paged", "dense", "packed"):
        args = arguments(kind, torch.float32, random.Random(1))
        before = bits({n: args[n] for n in ("k_cache", "v_cache")})
        for length in (2**31 - 1, 2**31 - 2, 9):
            lengths = torch.tensor([1, length], dtype=torch.int32)
            with pytest.raises(ValueError, match=rf"cache_seqlens\[1\] must be from 0.*{length}"):
                flash_attn_with_kvcache(**args | {"cache_seqlens": lengths})
        for length in (2**31 - 1, 2**31, 2**63, 2**70):
            with pytest.raises(ValueError, match="cache_seqlens"):
                flash_attn_with_kvcache(**args | {"cache_seqlens": length})
        assert same(before, bits({n: args[n] for n in ("k_cache", "v_cache")}))
