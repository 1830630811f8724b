"""Scales of a quantised cache must divide and multiply finite values: others are refused."""

from __future__ import annotations

import emulated
import pytest
import torch
from backends import BACKENDS
from torch import Tensor

from sink_attention_ext import (
    PagedKVCache,
    flash_attn_with_kvcache,
    ops,
    reshape_and_cache,
    set_debug_checks,
)

BAD = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-44, -1e-39, 2e38, -3.4e38)
DTYPES = (torch.int8, torch.float8_e4m3fn)
HEADS = 2
SLOTS, TABLE = torch.arange(4), torch.zeros(1, 1, dtype=torch.int32)
LENGTH = torch.tensor([4], dtype=torch.int32)


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 1, HEADS, 8), torch.randn(4, HEADS, 8), torch.randn(4, HEADS, 8)


def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("hd,jhd->hj", q[0, 0].double(), k.double()).mul(8**-0.5).softmax(-1)
    return torch.einsum("hj,jhd->hd", weights, v.double())


def caches(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k_cache, v_cache = (torch.ones(1, 4, HEADS, 8).to(dtype) for _ in range(2))
    return k_cache, v_cache


def scale_of(value: float, per_head: bool) -> Tensor:
    return torch.tensor([0.03, value]) if per_head else torch.tensor(value)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_refused(dtype: torch.dtype, value: float, per_head: bool) -> None:
    q, k, v = tokens()
    k_cache, v_cache = caches(dtype)
    bad, good = scale_of(value, per_head), scale_of(0.03, per_head)
    for name, scales in (("k_scale", (bad, good)), ("v_scale", (good, bad))):
        message = rf"^{name}\[{int(per_head)}\] must be finite, of a magnitude from"
        with pytest.raises(ValueError, match=message):
            reshape_and_cache(k, v, k_cache, v_cache, SLOTS, *scales)
        with pytest.raises(ValueError, match=message):
            flash_attn_with_kvcache(
                q, k_cache, v_cache, k[None, :1], v[None, :1], 0, TABLE,
                k_scale=scales[0], v_scale=scales[1],
            )  # fmt: skip
        with pytest.raises(ValueError, match=message):
            flash_attn_with_kvcache(
                q, k_cache, v_cache, cache_seqlens=LENGTH, k_scale=scales[0], v_scale=scales[1]
            )
        with pytest.raises(ValueError, match=message):
            ops.reshape_and_cache(k, v, k_cache, v_cache, SLOTS, *scales)
        with pytest.raises(ValueError, match=message):
            ops.paged_attn(
                q, k_cache, v_cache, TABLE, LENGTH, None, None, *scales, 1, 4, 0.3, False, -1, -1,
                0.0, 0, 0, None,
            )  # fmt: skip
        with pytest.raises(ValueError, match=name):
            PagedKVCache(
                [(-1, 0)], num_heads_kv=HEADS, head_dim=8, num_pages=1, max_num_seqs=1,
                max_seqlen=4, max_num_batched_tokens=4, dtype=dtype, k_scale=scales[0],
                v_scale=scales[1],
            )  # fmt: skip
    assert bool((k_cache.float() == 1).all() and (v_cache.float() == 1).all())


@pytest.mark.parametrize("value", [1 / 32, -1 / 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_can_scale_is_taken(dtype: torch.dtype, value: float) -> None:
    """A negative one, too: the sign goes into what is stored and out again."""
    q, k, v = tokens()
    k_cache, v_cache = caches(dtype)
    for per_head in (False, True):
        scale = scale_of(value, per_head)
        reshape_and_cache(k, v, k_cache, v_cache, SLOTS, scale, scale)
        out = flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=LENGTH, k_scale=scale, v_scale=scale
        )
        assert (out[0, 0].double() - expected(q, k, v)).abs().max() < 0.15


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_and_largest_scales_give_finite_numbers(dtype: torch.dtype) -> None:
    q, k, v = tokens()
    for exponent in (-126, 126):
        k_cache, v_cache = caches(dtype)
        scale = torch.tensor(2.0**exponent)
        k, v = torch.sign(k) * 2.0**exponent, torch.sign(v) * 2.0**exponent
        reshape_and_cache(k, v, k_cache, v_cache, SLOTS, scale, scale)
        assert torch.equal(k_cache[0].float(), torch.sign(k))
        assert torch.equal(v_cache[0].float() * scale, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_tokens_are_never_bad(dtype: torch.dtype) -> None:
    """Computed from rows of nothing, denormals and infinities; unused slots may hold anything."""
    q, k, v = tokens()
    rows = torch.tensor([0.0, 1e-44, -1e-38, 3e38])[:, None, None]
    k = torch.ones_like(k) * rows
    k_cache, v_cache = caches(dtype)
    k_scale, v_scale = torch.full((2, 1, 4, HEADS), float("nan"))
    reshape_and_cache(k[:3], v[:3], k_cache, v_cache, SLOTS[:3], k_scale, v_scale)
    assert k_scale[0, :3].isfinite().all() and (k_scale[0, :3] > 0).all()
    stored = k_cache[0, :3].float() * k_scale[0, :3, :, None]
    torch.testing.assert_close(stored, k[:3], rtol=0.01, atol=1e-38)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=3, k_scale=k_scale, v_scale=v_scale
    )
    torch.testing.assert_close(out[0, 0], v[:3].mean(0), atol=0.15, rtol=0)
    reshape_and_cache(k[3:], v[3:], k_cache, v_cache, SLOTS[3:], k_scale, v_scale)
    stored = k_cache[0, 3].float() * k_scale[0, 3, :, None]
    torch.testing.assert_close(stored, k[3], rtol=0.01, atol=0)


@pytest.mark.skipif("emulated-sm80" not in BACKENDS, reason="make emulator")
def test_on_a_device_under_debug_checks() -> None:
    """There nobody looks at scales unless asked to; the kernels then run as before."""
    q, k, v = tokens()
    k_cache, v_cache = caches(torch.int8)
    good, bad = torch.tensor([0.03, 0.03]), torch.tensor([0.03, float("nan")])
    with emulated.emulated():
        set_debug_checks(True)
        try:
            with pytest.raises(ValueError, match=r"^v_scale\[1\] must be finite"):
                ops.reshape_and_cache(k, v, k_cache, v_cache, SLOTS, good, bad)
            assert (k_cache == 1).all() and (v_cache == 1).all()
            ops.reshape_and_cache(k, v, k_cache, v_cache, SLOTS, good, good)
            args = (None, None, good, bad, 1, 4, 0.3, False, -1, -1, 0.0, 0, 0, None)
            with pytest.raises(ValueError, match=r"^v_scale\[1\] must be finite"):
                ops.paged_attn(q.bfloat16(), k_cache, v_cache, TABLE, LENGTH, *args)
        finally:
            set_debug_checks(False)
        ops.reshape_and_cache(k, v, k_cache, v_cache, SLOTS, good, bad)


def test_compiled_calls_are_refused_when_they_run() -> None:
    q, k, v = tokens()
    compiled = torch.compile(reshape_and_cache, backend="aot_eager", fullgraph=True)
    k_cache, v_cache = caches(torch.int8)
    good = torch.tensor(0.03)
    with pytest.raises(ValueError, match=r"^k_scale\[0\] must be finite"):
        compiled(k, v, k_cache, v_cache, SLOTS, torch.tensor(0.0), good)
    compiled(k, v, k_cache, v_cache, SLOTS, good, good)
    assert not (k_cache == 1).all()
    torch._dynamo.reset()
