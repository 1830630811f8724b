"""Attention through a PagedKVCache: steps, sharing, windows, first tokens kept, long sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cache_model
import pytest
import tolerance
import torch
from backends import BACKENDS, EMULATED, Backend
from cache_model import (
    HEAD_DIM,
    HEAD_DIM_V,
    NUM_HEADS_KV,
    NUM_HEADS_Q,
    SIZES,
    CacheModel,
    make_cache,
)
from cases import FLOAT8
from torch import Tensor

from sink_attention_ext import CacheStep, PagedKVCache

pytestmark = pytest.mark.sm90


def fitting(backend: Backend) -> dict[str, Any]:
    """Options of a model whose steps Hopper's kernels take: rows of 16 bytes."""
    options = {"dtype": backend.dtype, "device": backend.device}
    return options | ({"head_dim_v": HEAD_DIM} if backend.is_hopper else {})


def check_attention(
    backend: Backend, model: CacheModel, seqs: list[int], counts: list[int], **padding: int
) -> None:
    """Appends, attends in every layer, and compares with attention to the whole histories."""
    step = model.append(seqs, counts, write=False, **padding)
    total = sum(counts)
    q = torch.randn(step.num_tokens, NUM_HEADS_Q, HEAD_DIM).to(model.k.dtype)
    s_aux = torch.randn(NUM_HEADS_Q)
    for layer in range(len(model.windows)):
        k, v = model.new_kv(layer, seqs, counts, step.num_tokens)
        out, lse = step.attend(
            layer, q.to(backend.device), k, v, s_aux=s_aux.to(backend.device), return_lse=True
        )
        expected, expected_lse = model.expected(layer, q, seqs, counts, s_aux)
        torch.testing.assert_close(
            out[:total].cpu().double(), expected, **tolerance.short_rows(q.dtype)
        )
        torch.testing.assert_close(
            lse[:, :total].cpu().double(), expected_lse, rtol=1e-5, atol=1e-5
        )
        assert not out[total:].any()


# ---- attention through the cache ----


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_chunked_prefill_mixed_with_decode(backend: Backend, page_size: int) -> None:
    """Chunks shorter and longer than the window, beside sequences that decode."""
    model = CacheModel(
        (-1, 9, 0), page_size=page_size, num_pages=200, max_seqlen=100, **fitting(backend)
    )
    a, b = model.allocate(), model.allocate()
    check_attention(backend, model, [a, b], [30, 1])
    check_attention(backend, model, [b, a], [1, 40])
    c = model.allocate()
    check_attention(backend, model, [a, c, b], [1, 7, 1])
    model.free(a)
    check_attention(backend, model, [c, b], [25, 0])
    check_attention(backend, model, [c, b], [1, 1])
    model.check()


def test_forks_write_into_copies(backend: Backend) -> None:
    """A shared prefix that ends inside a page; then each writes, and sees what is its own."""
    model = CacheModel((-1, 6), **fitting(backend))
    root = model.allocate()
    check_attention(backend, model, [root], [10])
    forks = [model.fork(root), model.fork(root)]
    assert model.cache.stats()[-1].num_used_pages == 3
    check_attention(backend, model, [root, *forks], [1, 2, 5])
    assert model.cache.stats()[-1].num_shared_pages == 2  # the third has three copies
    model.check()
    model.free(root)
    check_attention(backend, model, forks, [4, 1])
    model.check()


def test_rejected_drafts_are_taken_back(backend: Backend) -> None:
    """Speculative decoding: five tokens in, some out, again and again."""
    model = CacheModel((-1, 6), **fitting(backend))
    seq = model.allocate()
    check_attention(backend, model, [seq], [13])
    for accepted in (0, 3, 5, 1, 4, 2):
        before = len(model.tokens[seq])
        check_attention(backend, model, [seq], [5])
        model.truncate(seq, before + accepted)
        model.check()


def test_padding_for_graphs(backend: Backend) -> None:
    """Padded sequences are empty, padded tokens are written nowhere and give 0."""
    model = CacheModel(**fitting(backend))
    a, b = model.allocate(), model.allocate()
    check_attention(backend, model, [a, b], [3, 2], pad_seqs_to=4, pad_tokens_to=9)
    check_attention(backend, model, [b], [1], pad_seqs_to=4, pad_tokens_to=4)
    model.check()


def captured(call: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """`call` in a CUDA graph; on other devices a call again is what comes nearest."""
    if device != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def test_a_captured_step_is_replayed_after_later_appends(backend: Backend) -> None:
    """The first step's tensors, and nothing else, tell a replay of later lengths and tables."""
    model = CacheModel((-1, 6), **fitting(backend))
    a, b = model.allocate(), model.allocate()
    model.append([a], [11])
    first = model.append([a, b], [1, 1], pad_seqs_to=3, pad_tokens_to=3)
    q = torch.zeros(3, NUM_HEADS_Q, HEAD_DIM, dtype=backend.dtype, device=backend.device)
    layers = range(2)
    new_kv = [[x.clone() for x in model.new_kv(layer, [a, b], [1, 1], 3)] for layer in layers]

    def forward() -> Tensor:
        outs = []
        for layer in layers:
            caches = model.cache.k_cache(layer), model.cache.v_cache(layer)
            backend.reshape_and_cache(*new_kv[layer], *caches, first.slot_mapping(layer))
            out, _ = backend.flash_attn_with_kvcache(q, *caches, **first.attn_kwargs(layer))
            outs.append(out)
        return torch.stack(outs)

    replay = captured(forward, backend.device)
    for seqs in ([a, b], [b], [b, a], [a, b]):
        counts = [1] * len(seqs)
        step = model.append(seqs, counts, write=False, pad_seqs_to=3, pad_tokens_to=3)
        assert step.positions.data_ptr() == first.positions.data_ptr()
        for layer in layers:
            for static, new in zip(
                new_kv[layer], model.new_kv(layer, seqs, counts, 3), strict=True
            ):
                static.copy_(new)
        q.normal_()
        result = replay()
        for layer in layers:
            expected, _ = model.expected(layer, q, seqs, counts, None)
            actual = result[layer, : len(seqs)].cpu().double()
            torch.testing.assert_close(actual, expected, **tolerance.short_rows(q.dtype))
        model.check()


@pytest.mark.parametrize("device", [b.device for b in BACKENDS.values() if b.name not in EMULATED])
def test_one_graph_of_torch_compile_for_all_steps(device: str) -> None:
    """Lengths, tables and dropped pages change; what was compiled stays."""
    model = CacheModel((-1, 6), device=device)
    seqs = [model.allocate(), model.allocate()]
    layers = range(2)

    def forward(q: Tensor, new_kv: list[tuple[Tensor, Tensor]], step: CacheStep) -> list[Tensor]:
        return [step.attend(layer, q, *new_kv[layer]) for layer in layers]

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    model.append(seqs, [9, 2])
    for turn in range(20):
        step = model.append(seqs, [1, 1], write=False)
        q = torch.randn(2, NUM_HEADS_Q, HEAD_DIM).to(device)
        new_kv = [model.new_kv(layer, seqs, [1, 1]) for layer in layers]
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=turn > 0):
            outs = compiled(q, new_kv, step)
        for layer in layers:
            expected, _ = model.expected(layer, q, seqs, [1, 1], None)
            torch.testing.assert_close(outs[layer].cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.not_on_sm90("it takes no rows of 8 bytes")
def test_float8_caches(backend: Backend) -> None:
    """One scale for all layers, or one a layer; forks copy float8 pages too."""
    scales = [torch.tensor(0.5), torch.tensor([0.25, 2.0])]
    scales = [scale.to(backend.device) for scale in scales]
    model = CacheModel((-1, 6), device=backend.device)
    model.cache = PagedKVCache(
        [(-1, 0), (6, 0)],
        **SIZES | {"head_dim_v": HEAD_DIM_V, "num_pages": 16, "dtype": FLOAT8},
        device=backend.device,
        k_scale=scales,
        v_scale=scales[0],
    )
    for layer, k_scale in enumerate(scales):  # numbers that the caches hold exactly
        for bank, scale in ((model.k, k_scale), (model.v, scales[0])):
            scale = scale.reshape(-1, 1)
            bank[layer] = (bank[layer] / scale).to(FLOAT8).float() * scale
    seq = model.allocate()
    check_attention(backend, model, [seq], [10])
    fork = model.fork(seq)
    check_attention(backend, model, [fork, seq], [3, 1])


@pytest.mark.not_on_sm90("it takes no rows of 8 bytes")
@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8], ids=str)
def test_scales_of_each_token_and_head(backend: Backend, dtype: torch.dtype) -> None:
    """They go where the tokens go, into copied pages too: a fork and a whole prefill agree."""
    cache = make_cache(num_pages=20, dtype=dtype, device=backend.device, per_token_head_scales=True)
    k, v = (torch.randn(13, NUM_HEADS_KV, HEAD_DIM, device=backend.device) for _ in range(2))
    k *= torch.logspace(-2, 0, 13, device=backend.device)[:, None, None]  # each its own scale
    q = torch.randn(13, NUM_HEADS_Q, HEAD_DIM, device=backend.device)
    root = cache.allocate()
    step = cache.append([root], 10)
    for layer in range(2):
        step.write(layer, k[:10], v[:10])
    fork = cache.fork(root)
    step = cache.append([root], 3)  # the page that both hold is copied for it
    for layer in range(2):
        step.write(layer, 100 * k[10:], 100 * v[10:])
    step = cache.append([fork], 3)
    forked = [step.attend(layer, q[10:], k[10:], v[10:]) for layer in range(2)]
    whole = cache.allocate()
    step = cache.append([whole], 13)
    for layer, left in enumerate((-1, 5)):
        out = step.attend(layer, q, k, v)[10:]
        torch.testing.assert_close(forked[layer], out, rtol=1e-5, atol=1e-5)
        seen = cache_model.is_visible(13, 13, left, 0)
        expected, _ = cache_model.masked_attention(q.cpu(), k.cpu(), v.cpu(), seen)
        torch.testing.assert_close(out.cpu().double(), expected[10:], rtol=0.1, atol=0.1)


# ---- the first tokens kept beside the window (num_sink_tokens) ----


def check_sink_tokens(backend: Backend, page_size: int, num_sink_tokens: int, left: int) -> None:
    model = CacheModel(
        (left, -1, left),
        page_size=page_size,
        num_sink_tokens=num_sink_tokens,
        num_pages=200,
        max_seqlen=120,
        **fitting(backend),
    )
    a, b = model.allocate(), model.allocate()
    check_attention(backend, model, [a, b], [2, 40])
    for counts in ([1, 1], [20, 1], [1, 5], [1, 1], [28, 20], [1, 1]):
        check_attention(backend, model, [a, b], counts)
        model.check()
    fork = model.fork(a)
    model.truncate(a, len(model.tokens[a]) - 1)
    check_attention(backend, model, [fork, a], [3, 1])
    model.check()
    size = -(-num_sink_tokens // page_size) + -(-(left + 3) // page_size) + 1
    assert len(model.cache._tables[0].pages(model.cache._sequences[fork].row)) <= size


SINK_TOKENS = [(4, 4, 7), (4, 1, 0), (3, 5, 4), (1, 2, 6), (16, 3, 20), (5, 30, 3)]


@pytest.mark.parametrize(("page_size", "num_sink_tokens", "left"), SINK_TOKENS)
def test_sink_tokens(backend: Backend, page_size: int, num_sink_tokens: int, left: int) -> None:
    check_sink_tokens(backend, page_size, num_sink_tokens, left)


# ---- long sequences ----


def check_long_decode(num_tokens: int, page_size: int, window_left: int, sampled: int) -> None:
    """Token by token: pages stay few, and sampled outputs are those of the full history."""
    model = CacheModel(
        (window_left,),
        num_tokens=num_tokens,
        page_size=page_size,
        num_pages=-(-(window_left + 1) // page_size) + 1,  # no more than it may ever use
        max_num_seqs=1,
        max_seqlen=num_tokens,
        max_num_batched_tokens=1,
    )
    cache, seq = model.cache, model.allocate()
    q = torch.randn(NUM_HEADS_Q, HEAD_DIM)[None]
    s_aux = torch.randn(NUM_HEADS_Q)
    taken = cache.memory_bytes()
    for token in range(num_tokens):
        step = cache.append([seq])
        step.write(0, model.k[0, token : token + 1], model.v[0, token : token + 1])
        if token % (num_tokens // sampled) == 0 or token > num_tokens - 3:
            out = step.attend(0, q, s_aux=s_aux)
            k, v = model.k[0, : token + 1], model.v[0, : token + 1]
            seen = cache_model.is_visible(1, token + 1, window_left, 0)
            expected, _ = cache_model.masked_attention(q, k, v, seen, s_aux)
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert cache.memory_bytes() == taken
    assert cache.seqlen(seq) == num_tokens


def test_long_decode() -> None:
    check_long_decode(5_000, 16, 127, sampled=100)


@pytest.mark.slow
def test_very_long_decode() -> None:
    check_long_decode(200_000, 16, 127, sampled=200)
