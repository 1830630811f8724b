"""Writes to caches are counted as torch counts in-place operations, under inference mode too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sink_attention_ext import (
    PagedKVCache,
    flash_attn_func,
    flash_attn_with_kvcache,
    ops,
    reshape_and_cache,
)

X, SLOT = torch.ones(1, 1, 8), torch.tensor([2])
ONE = torch.tensor(1.0)


def by_reshape(k_cache: Tensor, v_cache: Tensor) -> None:
    reshape_and_cache(X, X, k_cache, v_cache, SLOT)


def by_operator(k_cache: Tensor, v_cache: Tensor) -> None:
    ops.reshape_and_cache(k=X, v=X, k_cache=k_cache, v_cache=v_cache, slot_mapping=SLOT,
                          k_scale=None, v_scale=None)  # fmt: skip


def by_append(k_cache: Tensor, v_cache: Tensor) -> None:
    flash_attn_with_kvcache(X[None], k_cache, v_cache, X[None], X[None], cache_seqlens=2)


WRITES = (by_reshape, by_operator, by_append)
MODES = (torch.no_grad, torch.inference_mode, torch.enable_grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_counted_once(write: Callable[..., None], mode: Callable) -> None:
    k_cache, v_cache = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    with mode():
        write(k_cache, v_cache)
    assert (k_cache._version, v_cache._version) == (1, 1)
    assert torch.equal(k_cache[0, 2], X[0]) and torch.equal(v_cache[0, 2], X[0])


@pytest.mark.parametrize("mode", MODES)
def test_writes_of_scales_and_results_are_counted_once(mode: Callable) -> None:
    caches = torch.zeros(1, 4, 1, 8, dtype=torch.int8), torch.zeros(1, 4, 1, 8, dtype=torch.int8)
    scales = torch.ones(1, 4, 1), torch.ones(1, 4, 1)
    out, lse = torch.empty(1, 1, 1, 8), torch.empty(1, 1, 1)
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    with mode():
        reshape_and_cache(X, X, *caches, SLOT, *scales)
        ops.paged_attn_out(
            X[None], *caches, table, length, None, None, *scales, 1, 4, 0.3, True, -1, -1, 0.0, 0,
            0, None, out=out, lse=lse,
        )  # fmt: skip
    assert [t._version for t in (*caches, *scales, out, lse)] == [1] * 6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", WRITES)
def test_an_earlier_backward_notices(write: Callable[..., None], mode: Callable) -> None:
    q, k, v = (torch.randn(1, 4, 1, 8) for _ in range(3))
    loss = flash_attn_func(q.requires_grad_(), k, v).sum()
    with torch.no_grad(), mode():
        q = q.detach()
        write(k, v)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("write", WRITES)
def test_tensors_of_inference_mode(write: Callable[..., None]) -> None:
    """Written inside of it; outside it is an error, as it is for torch's own in-place operators."""
    with torch.inference_mode():
        k_cache, v_cache = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
        write(k_cache, v_cache)
        assert torch.equal(k_cache[0, 2], X[0])
        k_cache.zero_()
        v_cache.zero_()
    plain = torch.zeros(1, 4, 1, 8)
    for caches, name in (((k_cache, v_cache), "k_cache"), ((plain, v_cache), "v_cache")):
        message = f"^{name} must not be a tensor that was made in inference mode"
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            write(*caches)
        assert not caches[0].any() and not caches[1].any()
    assert plain._version == 0
    with torch.inference_mode():
        write(plain, v_cache)
    assert plain._version == 1 and torch.equal(plain, v_cache)


def test_a_cache_is_used_in_and_out_of_inference_mode() -> None:
    with torch.inference_mode():
        cache = PagedKVCache(
            [(-1, 0)], num_heads_kv=1, head_dim=8, num_pages=4, page_size=4, max_num_seqs=2,
            max_seqlen=8, max_num_batched_tokens=8, dtype=torch.float32,
        )  # fmt: skip
        seq = cache.allocate()
    x, outs = torch.randn(4, 1, 1, 8), []
    for i, mode in enumerate((torch.inference_mode, torch.no_grad) * 2):
        with mode():
            outs.append(cache.append([seq], 1).attend(0, x[i], x[i], x[i]))
    expected = flash_attn_func(x[:, 0][None], x[:, 0][None], x[:, 0][None], causal=True)
    torch.testing.assert_close(torch.cat(outs), expected[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_writes_are_counted(mode: Callable) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(by_reshape, backend="aot_eager", fullgraph=True)
    k_cache, v_cache = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    with mode():
        compiled(k_cache, v_cache)
    assert k_cache._version > 0 and v_cache._version > 0
    assert torch.equal(k_cache[0, 2], X[0])
    torch._dynamo.reset()
