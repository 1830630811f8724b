"""Functions work on the device of their tensors, whatever the default device is.

The meta device stands for any other: what is made on it by mistake has no values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cache_model import CacheModel

from sink_attention_ext import (
    cascade_attn_with_kvcache,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attn_states,
    supports,
)
from sink_attention_ext.integrations import flash_attention_3
from sink_attention_ext.parallel import shard_sequence, unshard_sequence


def context() -> Any:
    return torch.device("meta")


@pytest.fixture
def default_is_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def used(model: CacheModel) -> None:
    """Every method; the model checks contents and bookkeeping."""
    a, b = model.allocate(), model.allocate()
    model.append([a, b], [9, 6])
    fork = model.fork(a)
    step = model.append([fork, b], [1, 2], pad_seqs_to=3, pad_tokens_to=5)
    q = torch.ones(5, 4, 8, device="cpu")
    assert step.attend(0, q).device.type == "cpu"
    model.truncate(b, 6)
    model.free(a)
    assert model.cache.can_append([fork, b], 3)
    copy.deepcopy(model.cache).append([fork], 3)
    with torch.device("cpu"):  # what the model itself makes
        model.check()


@pytest.mark.parametrize("used_under", [False, True])
@pytest.mark.parametrize("made_under", [False, True])
def test_paged_cache(made_under: bool, used_under: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("cpu"):
        model = CacheModel()
        sizes = dict(
            num_heads_kv=2, head_dim=8, head_dim_v=6, page_size=4, num_pages=64, max_num_seqs=6,
            max_seqlen=200, max_num_batched_tokens=48, dtype=torch.float32, device="cpu",
        )  # fmt: skip
    with torch.device("meta" if made_under else "cpu"):
        model.cache = type(model.cache)([(left, 0) for left in model.windows], **sizes)
    with torch.device("meta" if used_under else "cpu"):
        used(model)


def calls() -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8)
    caches = torch.zeros(2, 2, 6, 2, 8)
    pages = torch.randn(2, 5, 2, 2, 8)
    table = torch.tensor([[0, 1, 2], [0, 3, 4]], dtype=torch.int32)
    starts = torch.tensor([0, 3, 6], dtype=torch.int32)
    lengths = torch.tensor([6, 5], dtype=torch.int32)
    sinks = torch.zeros(4)
    flat = q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1)
    return {
        "dense": lambda: flash_attn_func(q, k, k, causal=True, s_aux=sinks),
        "varlen": lambda: flash_attn_varlen_func(*flat, starts, starts, 3, 3, s_aux=sinks),
        "int length": lambda: flash_attn_with_kvcache(q, *caches.clone(), k, k, 2, causal=True),
        "no length": lambda: flash_attn_with_kvcache(q, *caches + 1),
        "packed append": lambda: flash_attn_with_kvcache(
            flat[0], *pages.clone(), *flat[1:], lengths - 4, table, starts, 4, causal=True
        ),
        "cascade": lambda: cascade_attn_with_kvcache(q[:, :1], *pages, lengths, table, 2),
        "packed cascade": lambda: cascade_attn_with_kvcache(
            flat[0][:2], *pages, lengths, table, 2, starts // 3, 1, s_aux=sinks
        ),
        "merge": lambda: merge_attn_states([q, q], [q.new_zeros(2, 4, 3)] * 2, sinks)[0],
        "flash_attention_3": lambda: flash_attention_3.flash_attn_with_kvcache(
            q, *caches.clone(), k, k, cache_seqlens=2
        ),
        "shards": lambda: unshard_sequence([shard_sequence(q, 0, 1)]),
    }  # fmt: skip


@pytest.mark.usefixtures("default_is_meta")
def test_functions() -> None:
    with torch.device("cpu"):
        functions = calls()
        expected = {name: call() for name, call in functions.items()}
    for name, call in functions.items():
        assert torch.equal(call(), expected[name]), name
    assert supports(dtype=torch.float32, head_dim=64).kernel.startswith("cpu/")
