"""softmax_scale and softcap that float32 cannot compute with are refused, everywhere alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_samples import SAMPLES
from torch import Tensor

from sink_attention_ext import (
    PagedKVCache,
    cascade_attn_with_kvcache,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

HUGE = (10**400, -(10**400), 10**5000, 2**2000)
TOO_SMALL = (1e-50, -1e-50, 1e-46, 1e-40, 5e-324, 2.0**-127)
TOO_LARGE = (1e50, -1e50, 3.4e38, 1e39, 2.0**101, *HUGE)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attend_in_a_cache(dtype: torch.dtype, **options: Any) -> Tensor:
    cache = PagedKVCache(
        [(-1, 0)], num_heads_kv=2, head_dim=8, num_pages=4, max_num_seqs=2, max_seqlen=16,
        max_num_batched_tokens=8, dtype=dtype,
    )  # fmt: skip
    for pages in (cache.k_cache(0), cache.v_cache(0)):
        pages.zero_()
    step = cache.append([cache.allocate()], [3])
    x = torch.ones(3, 2, 8, dtype=dtype)
    try:
        return step.attend(0, x, x, x, **options)
    except ValueError:
        assert not cache.k_cache(0).any() and not cache.v_cache(0).any(), "it wrote"
        raise


def append(dtype: torch.dtype, **options: Any) -> Tensor:
    caches = torch.zeros(2, 1, 8, 2, 8, dtype=dtype)
    x = torch.ones(1, 3, 2, 8, dtype=dtype)
    try:
        return flash_attn_with_kvcache(x, *caches, x, x, cache_seqlens=2, **options)
    except ValueError:
        assert not caches.any(), "it wrote"
        raise


def rows(dtype: torch.dtype, *shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape, 2, 8, dtype=torch.float64).to(dtype)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "dense": lambda dtype, **x: flash_attn_func(*[rows(dtype, 1, 5)] * 3, causal=True, **x),
    "varlen": lambda dtype, **x: flash_attn_varlen_func(
        *[rows(dtype, 5)] * 3, *[int32(0, 2, 5)] * 2, 3, 3, causal=True, **x
    ),
    "append": append,
    "attend": attend_in_a_cache,
    "cascade": lambda dtype, **x: cascade_attn_with_kvcache(
        rows(dtype, 1, 1), *[rows(dtype, 2, 4)] * 2, int32(6), int32([0, 1]), 4, **x
    ),
}
NARROW = (torch.float32, torch.bfloat16, torch.float16)
every_function = pytest.mark.parametrize("name", FUNCTIONS)


@every_function
@pytest.mark.parametrize("dtype", NARROW)
def test_refused_beyond_the_range(name: str, dtype: torch.dtype) -> None:
    for value in (*TOO_SMALL, *TOO_LARGE, 0, 0.0, torch.inf, -torch.inf, torch.nan):
        with pytest.raises(ValueError, match=r"softmax_scale must be finite and not 0.*2\*\*-126"):
            FUNCTIONS[name](dtype, softmax_scale=value)
    for value in (*TOO_SMALL, *TOO_LARGE, -1.0, -1, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="softcap must be finite and at least 0"):
            FUNCTIONS[name](dtype, softcap=value)
    with pytest.raises(ValueError, match="softmax_scale / softcap must have a magnitude"):
        FUNCTIONS[name](dtype, softmax_scale=1e25, softcap=1e-25)


@every_function
def test_float64_has_its_own_range(name: str) -> None:
    for options in ({"softmax_scale": 1e-50}, {"softmax_scale": -1e50}, {"softcap": 1e-50},
                    {"softcap": 1e50}, {"softmax_scale": 1e-300}):  # fmt: skip
        assert FUNCTIONS[name](torch.float64, **options).isfinite().all()
    for options in ({"softmax_scale": 1e-310}, {"softmax_scale": HUGE[0]}, {"softcap": 5e-324}):
        with pytest.raises(ValueError, match=r"2\*\*-1022 to 2\*\*1000"):
            FUNCTIONS[name](torch.float64, **options)


@every_function
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    "options",
    [{"softmax_scale": s} for s in (2.0**-126, -(2.0**-126), 1e-30, 1e30, -1e30, 2.0**100, 1)]
    + [{"softcap": s} for s in (2.0**-126, 1e-30, 1e30, 2.0**100, 5, 0, 0.0)]
    + [{"softmax_scale": 1e25, "softcap": 1e24}, {"softmax_scale": 1e-30, "softcap": 1e30}],
)
def test_right_up_to_the_ends_of_the_range(
    name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Finite, and for float32 what float64 says, but where scores decide by their last bits."""
    out = FUNCTIONS[name](dtype, **options)
    assert out.isfinite().all()
    if dtype == torch.float32 and abs(options.get("softmax_scale", 1)) <= 1:
        exact = FUNCTIONS[name](torch.float64, **options)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


OPERATORS = [name for name, (op, _) in SAMPLES.items() if "softmax_scale" in str(op._schema)]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_refuse_the_same(name: str) -> None:
    op, sample = SAMPLES[name]
    names = [argument.name for argument in op._schema.arguments]
    place = {name: names.index(name) for name in ("softmax_scale", "softcap")}
    for dtype in (torch.float32, torch.float64):
        args, kwargs = sample(dtype, False)
        if "float8" in name and dtype == torch.float64:
            continue
        beyond = {torch.float32: (1e-50, 1e50, torch.nan), torch.float64: (1e-310, torch.inf)}
        for value in (0.0, *beyond[dtype]):
            for argument, at in place.items():
                if argument == "softcap" and value == 0:
                    continue
                changed = [*args[:at], value, *args[at + 1 :]]
                with pytest.raises(ValueError, match=f"{argument} must be finite"):
                    op(*changed, **kwargs)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("first", [0.5, 0.0])
def test_compiled_calls_refuse_what_eager_ones_do(first: float, dynamic: bool | None) -> None:
    """Of a number that is a constant of the graph, and of one that may be a symbol by then."""
    torch._dynamo.reset()
    call = torch.compile(
        lambda q, scale: flash_attn_func(q, q, q, softmax_scale=scale),
        backend="aot_eager", dynamic=dynamic,
    )  # fmt: skip
    q = torch.randn(1, 5, 2, 8)
    for scale in (first, 0.25, 0.75, 0.0, 1e-50, torch.nan):
        if 2.0**-126 <= scale <= 2.0**100:
            expected = flash_attn_func(q, q, q, softmax_scale=scale)
            torch.testing.assert_close(call(q, scale), expected)
            continue
        with pytest.raises(Exception, match="softmax_scale must be finite and not 0"):
            call(q, scale)
