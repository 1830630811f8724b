"""A whole GPT-OSS model over a PagedKVCache: packed prefill in chunks, decode, compiled decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from backends import BACKENDS
from graphs import captured
from tiny_models import gpt_oss, logits, max_diff, tokens
from torch import Tensor
from transformers import GptOssForCausalLM, MistralConfig, MistralForCausalLM

from sink_attention_ext import PagedKVCache
from sink_attention_ext.integrations.kvcache import NAME, make_kv_cache, register

register()
needs_gpu = pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU and a build for it")

SIZES = {
    "num_pages": 64,
    "page_size": 4,
    "max_num_seqs": 4,
    "max_seqlen": 160,
    "max_num_batched_tokens": 40,
}


@pytest.fixture
def model() -> Iterator[GptOssForCausalLM]:
    model = gpt_oss()
    yield model
    torch._dynamo.reset()


def forward(
    model: GptOssForCausalLM, cache: PagedKVCache, sequences: dict[int, Tensor]
) -> dict[int, Tensor]:
    """Appends tokens to sequences; the logits of each of them, (its new tokens, vocabulary)."""
    counts = [len(new) for new in sequences.values()]
    step = cache.append(list(sequences), counts)
    with torch.no_grad():
        packed = model(
            torch.cat(list(sequences.values()))[None],
            position_ids=step.positions[None],
            use_cache=False,
            cache_step=step,
            num_splits=1,
        ).logits[0]
    return dict(zip(sequences, packed.split(counts), strict=True))


def test_chunks_and_decode_of_several_sequences_in_one_pass(model: GptOssForCausalLM) -> None:
    lengths = (70, 25, 9)
    texts = [tokens(1, n, seed=n)[0] for n in lengths]
    expected = [logits(model, text[None])[0] for text in texts]
    model.set_attn_implementation(NAME)
    cache = make_kv_cache(model, **SIZES)
    ids = [cache.allocate() for _ in texts]
    chunks = [(30, 4, 0), (1, 1, 5), (32, 1, 1), (7, 19, 3)]  # of each sequence, pass by pass
    results: dict[int, list[Tensor]] = {seq_id: [] for seq_id in ids}
    starts = [0, 0, 0]
    for counts in chunks:
        new = {}
        for i, count in enumerate(counts):
            if count > 0:
                new[ids[i]] = texts[i][starts[i] : starts[i] + count]
                starts[i] += count
        for seq_id, rows in forward(model, cache, new).items():
            results[seq_id].append(rows)
    assert starts == list(lengths)
    for seq_id, rows in zip(ids, expected, strict=True):
        assert max_diff(torch.cat(results[seq_id]), rows) < 2e-5


LOG_PROB_BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # README.md states them


@pytest.mark.parametrize("dtype", LOG_PROB_BOUND, ids=str)
def test_log_probabilities_of_decode_are_those_of_prefill(
    model: GptOssForCausalLM, dtype: torch.dtype
) -> None:
    """What a trainer computes of a rollout in one pass is what the server that made it computed."""
    model = model.to(dtype)
    text = tokens(1, 60)[0]
    prefill = logits(model, text[None])[0].float().log_softmax(-1)
    model.set_attn_implementation(NAME)
    cache = make_kv_cache(model, **SIZES)
    seq_id = cache.allocate()
    steps = [forward(model, cache, {seq_id: token[None]})[seq_id] for token in text]
    decode = torch.cat(steps).float().log_softmax(-1)
    chosen = text[1:, None]
    difference = max_diff(decode[:-1].gather(1, chosen), prefill[:-1].gather(1, chosen))
    assert difference <= LOG_PROB_BOUND[dtype]


Decode = Callable[[Tensor, Tensor, object], Tensor]


def decode_of(model: GptOssForCausalLM) -> Decode:
    def decode(token: Tensor, positions: Tensor, cache_step: object) -> Tensor:
        return model(token, position_ids=positions, use_cache=False, cache_step=cache_step).logits[
            :, -1
        ]

    return decode


def test_compiled_decode_over_growing_lengths_compiles_once() -> None:
    """100 steps of a whole model, far beyond the window of 16; pages come and go."""
    model = gpt_oss(num_hidden_layers=2)
    expected = logits(model, tokens(3, 103))
    model.set_attn_implementation(NAME)
    cache = make_kv_cache(model, **SIZES | {"num_pages": 96})
    ids, texts = texts_after_prompts(model, cache, "cpu")

    torch._dynamo.reset()
    decode = torch.compile(decode_of(model), mode="reduce-overhead", fullgraph=True)
    worst = 0.0
    for i in range(100):
        step = cache.append(ids, [1, 1, 1])
        stance = "fail_on_recompile" if i > 0 else "default"
        with torch.no_grad(), torch.compiler.set_stance(stance):
            result = decode(texts[:, 3 + i, None], step.positions[:, None], step)
        worst = max(worst, max_diff(result, expected[:, 3 + i]))
    assert worst < 2e-5
    torch._dynamo.reset()


def texts_after_prompts(
    model: GptOssForCausalLM, cache: PagedKVCache, device: str
) -> tuple[list[int], Tensor]:
    """Three sequences with prompts of 3 tokens, and their texts of 103."""
    texts = tokens(3, 103).to(device)
    ids = [cache.allocate() for _ in texts]
    for seq_id, text in zip(ids, texts, strict=True):
        forward(model, cache, {seq_id: text[:3]})
    return ids, texts


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])],
)
def test_decode_replayed_over_growing_lengths(device: str) -> None:
    """One captured pass of a whole model serves every length; each replay equals a fresh pass.

    Without a GPU "captured" is the same call again with the first step's object and buffers: what a
    replay reads must be where the first pass has read it.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = gpt_oss(num_hidden_layers=2).to(device, dtype)
    model.set_experts_implementation("batched_mm")  # no host reads what the router chose
    model.set_attn_implementation(NAME)
    cache = make_kv_cache(model, **SIZES | {"num_pages": 96})
    ids, texts = texts_after_prompts(model, cache, device)
    decode = decode_of(model)
    token = texts[:, 3:4].clone()
    first = cache.append(ids, [1, 1, 1])

    def call() -> tuple[Tensor]:
        with torch.no_grad():
            return (decode(token, first.positions[:, None], first),)

    call()  # the first step's tokens are written, as those of every step must be
    replay = captured(call) if device == "cuda" else call
    for i in range(1, 100):
        token.copy_(texts[:, 3 + i : 4 + i])
        step = cache.append(ids, [1, 1, 1])
        with torch.no_grad():
            fresh = decode(token, step.positions[:, None], step)
        cache._current_step = first._token  # a graph does not ask which step it is
        (replayed,) = replay()
        cache._current_step = step._token
        assert torch.equal(replayed, fresh), i


def test_a_step_of_the_wrong_kind_is_refused(model: GptOssForCausalLM) -> None:
    model.set_attn_implementation(NAME)
    text = tokens(1, 6)
    with pytest.raises(ValueError, match="needs cache_step"):
        model(text, use_cache=False)
    cache = make_kv_cache(model, **SIZES)
    step = cache.append([cache.allocate()], [6])
    with pytest.raises(ValueError, match="attention_mask must be None"):
        mask = torch.ones(1, 6, dtype=torch.long)
        model(text, attention_mask=mask, use_cache=False, cache_step=step)
    with pytest.raises(ValueError, match="num_tokens = 6"):
        model(text[:, :5], use_cache=False, cache_step=step)
    other = PagedKVCache([(-1, 0)] * 4, num_heads_kv=2, head_dim=64, dtype=torch.float32, **SIZES)
    step = other.append([other.allocate()], [6])
    with pytest.raises(ValueError, match="sliding_window is 16; its window_left is -1"):
        model(text, use_cache=False, cache_step=step)


def test_a_model_whose_layers_are_all_windowed() -> None:
    config = MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    text = tokens(1, 30)
    model.set_attn_implementation("eager")
    expected = logits(model, text)[0]
    model.set_attn_implementation(NAME)
    cache = make_kv_cache(model, **SIZES)
    assert [left for left, _ in cache.window_sizes] == [7, 7]
    seq_id = cache.allocate()
    parts = [forward(model, cache, {seq_id: text[0, i : i + 10]})[seq_id] for i in (0, 10, 20)]
    assert max_diff(torch.cat(parts), expected) < 2e-5


def test_what_the_cache_takes_from_the_model() -> None:
    model = gpt_oss().to(torch.bfloat16)
    cache = make_kv_cache(model, **SIZES)
    assert cache.window_sizes[0][0] == 15
    assert cache.window_sizes[1][0] == -1
    assert cache.k_cache(0).dtype == torch.bfloat16
    assert cache.k_cache(3).shape[2:] == (2, 64)
    model.config.layer_types[2] = "chunked_attention"
    with pytest.raises(ValueError, match="layer 2 must be full_attention or sliding_attention"):
        make_kv_cache(model, **SIZES)
