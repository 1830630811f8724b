"""generate(): dynamic and static caches, padded or not, prompts around the window's length."""

import pytest
import torch
import torch._dynamo.testing
from tiny_models import WINDOW, both, gpt_oss, logits, max_diff, padding_mask, positions, tokens
from transformers import DynamicCache, StaticCache

NEW = 20


@pytest.fixture(scope="module")
def model():
    return gpt_oss()


def generate(model, ids, mask, **kwargs):
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )


def assert_same_generation(ours, expected):
    assert torch.equal(ours.sequences, expected.sequences)
    new = ours.sequences[:, -NEW:]
    assert new.unique().numel() > 5  # not the same token over and over
    for a, b in zip(ours.logits, expected.logits, strict=True):
        assert max_diff(a, b) < 5e-5


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seqlen", [9, 40])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_as_eager_does(model, cache, seqlen, padded):
    ids = tokens(3, seqlen)
    lengths = [seqlen, seqlen - 5, seqlen - 1] if padded else [seqlen] * 3
    mask = padding_mask(seqlen, lengths, "left")
    ours, eager = both(model, lambda m: generate(m, ids, mask, cache_implementation=cache))
    assert_same_generation(ours, eager)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_without_an_attention_mask(model, cache):
    ids = tokens(2, 40)
    ours, eager = both(model, lambda m: generate(m, ids, None, cache_implementation=cache))
    assert_same_generation(ours, eager)


@pytest.mark.parametrize("with_mask", [False, True])
def test_decode_on_a_static_cache_by_hand(model, with_mask):
    """No 2D mask at all: nothing but q_offset tells where the zeros of the cache begin."""
    ids = tokens(2, 40)

    def run(m):
        cache = StaticCache(config=m.config, max_cache_len=64)
        steps = []
        for start, stop in ((0, 30), (30, 31), (31, 38), (38, 39), (39, 40)):
            mask = torch.ones(2, stop, dtype=torch.long) if with_mask else None
            part = {"attention_mask": mask, "past_key_values": cache}
            steps.append(logits(m, ids[:, start:stop], **part))
        return torch.cat(steps, dim=1)

    ours, eager = both(model, run)
    assert max_diff(ours, eager) < 2e-5
    assert max_diff(ours, logits(model, ids)) < 2e-5


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_decode_behind_a_prompt_padded_on_the_right(model, cache):
    """The padding mask then has zeros between ones.

    generate() itself warns of such prompts: it would read the first new token off a row of padding,
    which in eager sees the prompt and here nothing.
    """
    ids = tokens(2, 40)
    prompt = padding_mask(30, [30, 23], "right")
    mask = torch.cat([prompt, torch.ones(2, 10, dtype=torch.long)], dim=1)

    def run(m):
        past = (
            cache(config=m.config, max_cache_len=64)
            if cache is StaticCache
            else cache(config=m.config)
        )
        steps = []
        for start, stop in ((0, 30), *((i, i + 1) for i in range(30, 40))):
            part = {"attention_mask": mask[:, :stop], "past_key_values": past}
            steps.append(logits(m, ids[:, start:stop], **part))
        return torch.cat(steps, dim=1)

    ours, eager = both(model, run)
    assert max_diff(ours[mask.bool()], eager[mask.bool()]) < 2e-5


def test_beam_search_and_sampling_with_several_sequences(model):
    ids = tokens(2, 12)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    ours, eager = both(model, lambda m: m.generate(ids, **options))
    assert torch.equal(ours, eager)


def test_chunked_prefill_inside_generate(model):
    ids = tokens(2, 40)
    mask = padding_mask(40, [40, 27], "left")
    ours, eager = both(model, lambda m: generate(m, ids, mask, prefill_chunk_size=11))
    assert_same_generation(ours, eager)


def test_a_conversation_continues_on_its_cache(model):
    """A second prompt on a full sliding cache: several rows, and more keys than the window."""
    first, second = tokens(1, 30), tokens(1, 25, seed=5)

    def run(m):
        cache = DynamicCache(config=m.config)
        options = {"max_new_tokens": 6, "do_sample": False, "past_key_values": cache}
        answer = m.generate(first, **options)
        return m.generate(torch.cat([answer, second], dim=1), **options)

    ours, eager = both(model, run)
    assert ours.shape == (1, 30 + 6 + 25 + 6) and torch.equal(ours, eager)


def test_sliding_layers_keep_a_bounded_cache(model):
    cache = DynamicCache(config=model.config)
    logits(model, tokens(1, 100), past_key_values=cache)
    kinds = model.config.layer_types
    kept = {kind: cache.layers[i].keys.shape[2] for i, kind in enumerate(kinds)}
    assert kept == {"sliding_attention": WINDOW - 1, "full_attention": 100}


def test_generate_under_autocast():
    """Decoding reads the cache in the cache's dtype; the tokens are those of a whole forward.

    Every expert takes part. Which ones would be chosen is a jump, on which the rounding of bfloat16
    decides where two are alike, and that differs from CPU to CPU.
    """
    model = gpt_oss(num_experts_per_tok=4)
    ids = tokens(2, 24)
    mask = padding_mask(24, [24, 15], "left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = generate(model, ids, mask)
    steps = torch.stack(ours.logits, dim=1)
    whole = torch.cat([mask, torch.ones(2, NEW - 1, dtype=torch.long)], dim=1)
    run = {"attention_mask": whole, "position_ids": positions(whole)}
    exact = logits(model, ours.sequences[:, :-1], **run)[:, -NEW:]
    assert steps.isfinite().all() and max_diff(steps, exact) < 0.02 * exact.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("side", [None, "left"])
def test_static_cache_compiled_by_inductor(model, side):
    ids = tokens(2, 9)
    mask = padding_mask(9, [9, 9 if side is None else 5], "left")
    expected = generate(model, ids, mask)
    torch._dynamo.reset()
    forward = model.forward
    try:
        model.forward = torch.compile(forward, fullgraph=True)
        ours = generate(model, ids, mask, cache_implementation="static")
    finally:
        model.forward = forward
        torch._dynamo.reset()
    assert_same_generation(ours, expected)


@pytest.mark.parametrize("side", [None, "left"])
def test_static_cache_compiled_in_full(model, side):
    """fullgraph, and no more graphs than steps differ in kind: prefill, and decode before and after
    the window is full."""
    ids = tokens(2, 9)
    mask = padding_mask(9, [9, 9 if side is None else 5], "left")
    expected = generate(model, ids, mask)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    forward = model.forward
    try:
        model.forward = torch.compile(forward, backend=counter, fullgraph=True)
        ours = generate(model, ids, mask, cache_implementation="static")
    finally:
        model.forward = forward
        torch._dynamo.reset()
    assert_same_generation(ours, expected)
    assert counter.frame_count <= 4
