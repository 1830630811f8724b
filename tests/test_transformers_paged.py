"""Continuous batching: generate_batch through our paged operator, on transformers 5.17."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_models import gpt_oss, max_diff, tokens
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from sink_attention_ext import flash_attn_varlen_func
from sink_attention_ext.integrations import paged

LENGTHS = (37, 9, 23, 1, 60, 5)  # the window is 16, a chunk at most 32
GREEDY = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)


def prompts(lengths=LENGTHS):
    return [tokens(1, n, seed=n)[0].tolist() for n in lengths]


def serve(model, name, given, **config):
    """Greedy tokens of generate_batch, in the order of the prompts."""
    model.set_attn_implementation(name)
    options = {"block_size": 8, "num_blocks": 96, "max_batch_tokens": 32} | config
    results = model.generate_batch(
        inputs=given,
        generation_config=GREEDY,
        continuous_batching_config=ContinuousBatchingConfig(**options),
    )
    model.set_attn_implementation("eager")
    outputs = list(results.values())
    assert [o.error for o in outputs] == [None] * len(given)
    by_prompt = {tuple(o.prompt_ids): o.generated_tokens for o in outputs}
    return [by_prompt[tuple(p)] for p in given]


def one_by_one(model, given):
    model.set_attn_implementation("eager")
    return [model.generate(torch.tensor([p]), GREEDY)[0, len(p) :].tolist() for p in given]


@pytest.fixture(scope="module")
def model():
    return gpt_oss()


@pytest.mark.parametrize("name", ["paged|sink_attention", "sink_attention"])
def test_same_tokens_as_one_prompt_at_a_time(model, name):
    given = prompts()
    expected = one_by_one(model, given)
    assert len({token for answer in expected for token in answer}) > 15
    assert serve(model, name, given) == expected


@pytest.mark.parametrize("config", [{"block_size": 4}, {"max_batch_tokens": 7}, {"block_size": 32}])
def test_other_blocks_and_chunks(model, config):
    given = prompts((37, 9, 23))
    assert serve(model, "paged|sink_attention", given, **config) == one_by_one(model, given)


def test_requests_that_wait_for_blocks(model):
    """A cache for about two requests: the others wait, or lose their blocks and restart."""
    given = prompts((37, 30, 23, 33))
    served = serve(model, "paged|sink_attention", given, num_blocks=24)
    assert served == one_by_one(model, given)


def test_bfloat16_serves_finite_logits():
    model = gpt_oss().to(torch.bfloat16)
    assert all(len(answer) == 24 for answer in serve(model, "paged|sink_attention", prompts()))


def test_decode_reads_the_cache_in_place(model, monkeypatch):
    """With one new token per request nothing is gathered, in sliding layers neither."""
    calls = []

    def record(name):
        original = getattr(paged, name)

        def wrapper(q, *args, **kwargs):
            calls.append((name, kwargs.get("max_seqlen_q"), q.shape[0]))
            return original(q, *args, **kwargs)

        monkeypatch.setattr(paged, name, wrapper)

    for name in ("flash_attn_with_kvcache", "flash_attn_varlen_func", "_gather"):
        record(name)
    serve(model, "paged|sink_attention", prompts((9, 5)))
    layers = model.config.num_hidden_layers
    prefill, decode = calls[:layers], calls[layers:]
    assert {name for name, *_ in prefill} == {"flash_attn_varlen_func"}
    assert {call for call in decode} == {("flash_attn_with_kvcache", 1, 2)}
    assert len(decode) == layers * (GREEDY.max_new_tokens - 1)


def test_shared_prefixes_of_a_model_without_sinks():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    prefix = tokens(1, 24, seed=3)[0].tolist()
    given = [prefix + prompt for prompt in prompts((5, 9, 13))]
    expected = one_by_one(model, given)
    served = serve(model, "paged|sink_attention", given, allow_block_sharing=True)
    assert served == expected


# ---- the attention function alone, against transformers' own cache update ----


class Cache(SimpleNamespace):
    update = PagedAttentionCache.update


def batch_of_requests(window, requests, slots=256):
    """A cache in which request r holds its past at random slots; the kwargs of a layer's call."""
    generator = torch.Generator().manual_seed(0)
    cache = Cache(
        layer_index_to_group_indices={0: (0, 0)},
        sliding_windows={0: window or 1},
        sentinel_index=slots + 1,
        key_cache=[torch.randn(slots + 8, 2, 16, generator=generator)],
        value_cache=[torch.randn(slots + 8, 2, 16, generator=generator)],
    )
    cache.key_cache[0][slots:] = 0
    cache.value_cache[0][slots:] = 0
    write_trash = slots + 4
    free = torch.randperm(slots, generator=generator).tolist()
    read, write, cu_q, cu_k = [], [], [0], [0]
    for past, new in requests:
        ring = [free.pop() for _ in range(window or past + new)]
        size = len(ring)
        old = min(past, window - 1) if window else past
        read += [ring[i % size] for i in range(past - old, past)]
        slots_of_new = [ring[i % size] for i in range(past, past + new)]
        if window:
            dropped = max(new - window, 0)
            read += [cache.sentinel_index] * new
            slots_of_new = [write_trash] * dropped + slots_of_new[dropped:]
        else:
            read += slots_of_new
        write += slots_of_new
        cu_q.append(cu_q[-1] + new)
        cu_k.append(cu_k[-1] + old + new)
    lengths = torch.tensor(cu_k).diff()
    return cache, {
        "cu_seq_lens_q": torch.tensor(cu_q, dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor(cu_k, dtype=torch.int32),
        "max_seqlen_q": max(new for _, new in requests),
        "max_seqlen_k": int(lengths.max()),
        "read_index": [torch.tensor(read)],
        "write_index": [torch.tensor(write)],
    }


REQUESTS = {
    "decode": [(1, 1), (7, 1), (8, 1), (50, 1)],
    "chunks": [(0, 5), (3, 20), (50, 9), (7, 1)],
    "padded": [(9, 1), (20, 1), (0, 0), (0, 0)],  # empty requests, as in a captured graph
}


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("name", REQUESTS)
def test_one_layer_against_transformers_cache_update(name, window):
    cache, kwargs = batch_of_requests(window, REQUESTS[name])
    total = int(kwargs["cu_seq_lens_q"][-1])
    q, k, v = (torch.randn(1, heads, total, 16) for heads in (6, 2, 2))
    sinks = torch.randn(6)

    theirs = Cache(**vars(cache))
    theirs.key_cache = [cache.key_cache[0].clone()]
    theirs.value_cache = [cache.value_cache[0].clone()]
    indices = {name: kwargs[name] for name in ("read_index", "write_index")}
    keys, values = theirs.update(k, v, layer_idx=0, **indices)
    lengths = [kwargs[f"{key}_{side}"] for key in ("cu_seq_lens", "max_seqlen") for side in "qk"]
    expected = flash_attn_varlen_func(
        q[0].transpose(0, 1),
        keys,
        values,
        *lengths,
        causal=True,
        window_size=(window - 1 if window else -1, 0),
        s_aux=sinks,
    )

    module = SimpleNamespace(layer_idx=0, modules=lambda: iter(()))
    ours, _ = paged.paged_sink_attention(module, q, k, v, cache=cache, s_aux=sinks, **kwargs)
    assert max_diff(ours, expected) < 1e-6
    kept = [
        i for i in range(256)
    ]  # beside the trash, where the order of writes is nobody's business
    assert torch.equal(cache.key_cache[0][kept], theirs.key_cache[0][kept])
    assert torch.equal(cache.value_cache[0][kept], theirs.value_cache[0][kept])


def test_a_forward_without_a_paged_cache_is_refused(model):
    model.set_attn_implementation("paged|sink_attention")
    with pytest.raises(ValueError, match="is for generate_batch"):
        model(tokens(1, 8))


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("name", ["decode", "chunks"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"scaling": 1e39},
        {"softcap": -1.0},
        {"s_aux": torch.zeros(5)},
        {"max_seqlen_q": 1.5},
        {"max_seqlen_k": -(2**70)},
        {"cu_seq_lens_q": torch.tensor([0, 1], dtype=torch.int64)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_refused_layer_has_written_nothing(window, name, wrong):
    cache, kwargs = batch_of_requests(window, REQUESTS[name])
    total = int(kwargs["cu_seq_lens_q"][-1])
    q, k, v = (torch.randn(1, heads, total, 16) for heads in (6, 2, 2))
    before = cache.key_cache[0].clone(), cache.value_cache[0].clone()
    module = SimpleNamespace(layer_idx=0, modules=lambda: iter(()))
    argument = {"scaling": "softmax_scale"}
    with pytest.raises((TypeError, ValueError), match=argument.get(*list(wrong) * 2)):
        paged.paged_sink_attention(module, q, k, v, cache=cache, **kwargs | wrong)
    assert torch.equal(before[0], cache.key_cache[0])
    assert torch.equal(before[1], cache.value_cache[0])
