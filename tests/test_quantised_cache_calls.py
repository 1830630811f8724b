"""Caches of 8-bit elements: what is refused, autocast, and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from quantised import INT8, STORED
from test_cache_writes import assert_same_bytes
from torch import Tensor

from sink_attention_ext import flash_attn_with_kvcache, ops, reshape_and_cache

# ---- refusals: before anything is written ----


def arguments(stored: torch.dtype = INT8) -> dict[str, Any]:
    return {
        "k": torch.randn(3, 2, 8),
        "v": torch.randn(3, 2, 6),
        "k_cache": torch.zeros(6, 4, 2, 8).to(stored),
        "v_cache": torch.zeros(6, 4, 2, 6).to(stored),
        "slot_mapping": torch.tensor([3, -1, 23]),
        "k_scale": torch.ones(6, 4, 2),
        "v_scale": torch.ones(6, 4, 2),
    }


META = torch.device("meta")
REFUSED: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"k_scale": None}, ValueError, ["k_scale must be given", "int8"]),
    ({"v_scale": None}, ValueError, ["v_scale must be given", "int8"]),
    ({"v_scale": 0.5}, TypeError, ["v_scale must be a torch.Tensor", "float"]),
    ({"k_scale": torch.ones(6, 4, 2).half()}, TypeError, ["k_scale", "float32", "float16"]),
    ({"k_scale": torch.ones(6, 2, 4)}, ValueError, ["k_scale must", "(6, 4, 2)", "(6, 2, 4)"]),
    ({"v_scale": torch.ones(6, 4)}, ValueError, ["v_scale", "one kind", "(6, 4)"]),
    ({"v_scale": torch.ones(6, 4, 2, 1)}, ValueError, ["v_scale", "one kind", "(6, 4, 2, 1)"]),
    ({"v_scale": torch.ones(3)}, ValueError, ["v_scale", "one kind", "(3,)"]),
    ({"v_scale": torch.ones(2)}, ValueError, ["k_scale and v_scale", "one kind", "(2,)"]),
    ({"k_scale": torch.ones(())}, ValueError, ["k_scale and v_scale", "one kind", "()"]),
    ({"v_scale": torch.ones(6, 4, 2, device=META)}, ValueError, ["v_scale", "cpu", "meta"]),
    (
        {"k_scale": torch.ones(6, 1, 2).expand(6, 4, 2)},
        ValueError,
        ["k_scale must have memory of its own", "(2, 0, 1)"],
    ),
    ({"k_cache": torch.zeros(6, 4, 2, 8)}, TypeError, ["v_cache", "float32", "int8"]),
    (
        {"k_cache": torch.zeros(6, 4, 2, 8, dtype=torch.uint8)},
        TypeError,
        ["k_cache", "or int8", "uint8"],
    ),
    ({"k": torch.ones(3, 2, 8, dtype=INT8)}, TypeError, ["k must have dtype", "int8"]),
    (
        {"k_cache": torch.zeros(6, 4, 2, 8), "v_cache": torch.zeros(6, 4, 2, 6)},
        ValueError,
        ["k_scale must be None", "float32", "float8_e4m3fn and int8"],
    ),
]


@pytest.mark.parametrize(("change", "error", "parts"), REFUSED, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("function", [reshape_and_cache, flash_attn_with_kvcache])
def test_refusals(
    function: Any, change: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    given = arguments() | change
    if function is flash_attn_with_kvcache:
        del given["slot_mapping"]
        given["k"], given["v"] = given["k"][:, None], given["v"][:, None]
        given |= {
            "q": torch.randn(3, 1, 4, 8),
            "cache_seqlens": torch.zeros(3, dtype=torch.int32),
            "block_table": torch.arange(3, dtype=torch.int32)[:, None],
        }
    names = ("k_cache", "v_cache", "k_scale", "v_scale")
    tensors = {n: given[n] for n in names if isinstance(given[n], Tensor) and not given[n].is_meta}
    before = {name: x.clone() for name, x in tensors.items()}
    with pytest.raises(error) as info:
        function(**given)
    for part in parts:
        assert part in str(info.value), f"{part!r} is not in: {info.value}"
    for name, x in tensors.items():
        assert_same_bytes(x, before[name])


def test_a_slot_out_of_range_writes_nothing(backend: Backend) -> None:
    given = {name: x.to(backend.device) for name, x in arguments().items()}
    given["slot_mapping"][2] = 24
    if backend.name != "cpu":
        pytest.skip("values on a device are not read: such a token is left out")
    with pytest.raises(ValueError, match=r"slot_mapping\[2\] must be .*; got 24"):
        backend.reshape_and_cache(**given)
    assert (given["k_cache"] == 0).all() and (given["k_scale"] == 1).all()


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        ("reshape_and_cache", (6, 4, 2), "reshape_and_cache.token_scales writes them"),
        ("reshape_and_cache_token_scales", (2,), "k_scale must have shape .*num_pages"),
    ],
)
def test_the_operators_refuse_each_other_s_scales(
    op: str, shape: tuple[int, ...], message: str
) -> None:
    given = arguments()
    given["k_scale"] = given["v_scale"] = torch.ones(shape)
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*given.values())


def test_autocast_casts_what_is_new_and_leaves_the_cache() -> None:
    given = arguments()
    wanted = arguments() | {"k": given["k"].bfloat16(), "v": given["v"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        reshape_and_cache(**given)
    reshape_and_cache(**wanted)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        assert_same_bytes(given[name], wanted[name])


# ---- torch.compile ----


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_compiled_without_a_break(stored: torch.dtype) -> None:
    """The write changes caches and scales in place, and what reads them comes after it."""

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *cache: Tensor) -> Tensor:
        k_cache, v_cache, k_scale, v_scale = cache
        out = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, lengths, causal=True, k_scale=k_scale, v_scale=v_scale
        )
        return out + k_scale.nan_to_num().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given = arguments(stored)
    cache = [given[name] for name in ("k_cache", "v_cache", "k_scale", "v_scale")]
    compiled_cache = [x.clone() for x in cache]
    for length in range(3):
        q, k, v = torch.randn(6, 1, 4, 8), torch.randn(6, 1, 2, 8), torch.randn(6, 1, 2, 6)
        lengths = torch.full((6,), length, dtype=torch.int32)
        torch.testing.assert_close(
            compiled(q, k, v, lengths, *compiled_cache), step(q, k, v, lengths, *cache)
        )
    for eager, x in zip(cache, compiled_cache, strict=True):
        assert_same_bytes(x, eager)
