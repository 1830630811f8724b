"""Ops captured in CUDA graphs, and replayed with other inputs, lengths and block tables.

A replay must be the same bits as a call on the same inputs: nothing may have been decided by values
that the device's memory held at capture. That the calls themselves are right, other tests say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from backends import BACKENDS, Backend
from graphs import Results, captured
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU and a build for it"),
]

NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM = 16, 2, 64
DTYPES = (torch.bfloat16, torch.float32)
MASKS = (
    {"causal": True},
    {"causal": True, "window_size": (100, 0)},
    {"causal": True, "window_size": (100, 0), "num_sink_tokens": 4},
)


@pytest.fixture
def backend() -> Iterator[Backend]:
    with BACKENDS["cuda"].use():
        yield BACKENDS["cuda"]


def check_replays(
    call: Callable[[], Results], inputs: dict[str, Tensor], others: list[dict[str, Tensor]]
) -> None:
    """Captures with `inputs`, then puts each of the others in their place and replays."""
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}  # autograd watches no copy
    replay = captured(call)
    seen = []
    for other in (*others, {name: tensor.clone() for name, tensor in inputs.items()}):
        for name, tensor in other.items():
            inputs[name].copy_(tensor)
        seen.append(replay())
        for name, tensor in other.items():
            inputs[name].copy_(tensor)  # what the op writes, as it was
        for result, expected in zip(seen[-1], call(), strict=True):
            assert torch.equal(result.nan_to_num(), expected.nan_to_num())
            assert torch.equal(result.isnan(), expected.isnan())
    assert not torch.equal(seen[0][0], seen[1][0]), "the inputs did not matter"


def normal(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).to(device, dtype)


def dense_inputs(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "q": normal(device, dtype, 2, 150, NUM_HEADS_Q, HEAD_DIM),
        "k": normal(device, dtype, 2, 200, NUM_HEADS_KV, HEAD_DIM),
        "v": normal(device, dtype, 2, 200, NUM_HEADS_KV, HEAD_DIM),
        "s_aux": normal(device, torch.float32, NUM_HEADS_Q),
    }


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(backend: Backend, dtype: torch.dtype, mask: dict) -> None:
    inputs = dense_inputs(backend.device, dtype)
    others = [dense_inputs(backend.device, dtype) for _ in range(2)]
    check_replays(lambda: backend.flash_attn(**inputs, **mask), inputs, others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(backend: Backend, dtype: torch.dtype) -> None:
    def with_dout() -> dict[str, Tensor]:
        dout = normal(backend.device, dtype, 2, 150, NUM_HEADS_Q, HEAD_DIM)
        return dense_inputs(backend.device, dtype) | {"dout": dout}

    inputs = with_dout()
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "s_aux")]

    def call() -> Results:
        out, lse = backend.flash_attn(*leaves[:3], s_aux=leaves[3], causal=True, deterministic=True)
        gradients = torch.autograd.grad((out, lse), leaves, (inputs["dout"], torch.ones_like(lse)))
        return (out.detach(), *gradients)

    check_replays(call, inputs, [with_dout()])


def packed_lengths(device: str, *lengths: int) -> Tensor:
    ends = torch.tensor((0, *lengths)).cumsum(0)
    return ends.to(device, torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_of_other_lengths(backend: Backend, dtype: torch.dtype) -> None:
    device = backend.device
    q = normal(device, dtype, 300, NUM_HEADS_Q, HEAD_DIM)
    k, v = (normal(device, dtype, 300, NUM_HEADS_KV, HEAD_DIM) for _ in range(2))
    s_aux = normal(device, torch.float32, NUM_HEADS_Q)
    inputs = {"cu_seqlens": packed_lengths(device, 200, 90, 10)}
    others = [{"cu_seqlens": packed_lengths(device, *n)} for n in ((10, 90, 200), (0, 150, 150))]

    def call() -> Results:
        cu_seqlens = inputs["cu_seqlens"]
        return backend.flash_attn_varlen(
            q, k, v, cu_seqlens, cu_seqlens, 200, 200, causal=True, s_aux=s_aux
        )

    check_replays(call, inputs, others)


PAGE_SIZE, PAGES_OF_A_SEQUENCE, BATCH = 16, 64, 3


def decode_state(device: str, lengths: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(BATCH * PAGES_OF_A_SEQUENCE, generator=generator)
    return {
        "block_table": pages.view(BATCH, -1).to(device, torch.int32),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=device),
    }


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("num_splits", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_with_other_lengths_and_tables(
    backend: Backend, dtype: torch.dtype, num_splits: int, mask: dict, appends: bool
) -> None:
    device = backend.device
    shape = (BATCH * PAGES_OF_A_SEQUENCE, PAGE_SIZE, NUM_HEADS_KV, HEAD_DIM)
    q = normal(device, dtype, BATCH, 1, NUM_HEADS_Q, HEAD_DIM)
    new = [normal(device, dtype, BATCH, 1, NUM_HEADS_KV, HEAD_DIM) for _ in range(2)]
    s_aux = normal(device, dtype, NUM_HEADS_Q)
    caches = {name: normal(device, dtype, *shape) for name in ("k_cache", "v_cache")}
    inputs = decode_state(device, (5, 400, 1), 0) | caches
    kept = {name: cache.clone() for name, cache in caches.items()}
    others = [
        decode_state(device, (1000, 2, 333), 1) | kept,
        decode_state(device, (0, 1023, 17), 2) | kept,
    ]

    def call() -> Results:
        k, v = new if appends else (None, None)
        out, lse = backend.flash_attn_with_kvcache(
            q,
            inputs["k_cache"],
            inputs["v_cache"],
            k,
            v,
            inputs["cache_seqlens"],
            inputs["block_table"],
            s_aux=s_aux,
            num_splits=num_splits,
            **mask,
        )
        return out, lse, inputs["k_cache"], inputs["v_cache"]

    check_replays(call, inputs, others)
