"""transformers' eager GPT-OSS code is the oracle: logits, and the gradient of every parameter."""

import pytest
import torch
from tiny_models import (
    WINDOW,
    assert_same_gradients,
    both,
    gpt_oss,
    gradients,
    logits,
    max_diff,
    padding_mask,
    positions,
    tokens,
)
from transformers import DynamicCache, StaticCache

SHORT, LONG = 9, 40  # shorter and longer than the window of 16
TOLERANCE = 2e-5  # of logits of about 1, float32


@pytest.fixture(scope="module")
def model():
    return gpt_oss()


@pytest.mark.parametrize("seqlen", [1, SHORT, WINDOW, WINDOW + 1, LONG])
def test_logits_of_a_prefill(model, seqlen):
    ids = tokens(2, seqlen)
    ours, eager = both(model, lambda m: logits(m, ids))
    assert max_diff(ours, eager) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seqlen", [SHORT, LONG])
def test_logits_of_a_padded_batch(model, seqlen, side):
    ids = tokens(4, seqlen)
    mask = padding_mask(seqlen, [seqlen, seqlen - 5, 1, seqlen - 1], side)
    run = {"attention_mask": mask, "position_ids": positions(mask)}
    ours, eager = both(model, lambda m: logits(m, ids, **run))
    assert ours.isfinite().all()
    assert max_diff(ours[mask.bool()], eager[mask.bool()]) < TOLERANCE


def test_padding_does_not_reach_real_tokens(model):
    ids = tokens(2, LONG)
    for side in ("left", "right"):
        mask = padding_mask(LONG, [LONG - 13, LONG - 1], side)
        run = {"attention_mask": mask, "position_ids": positions(mask)}
        other = torch.where(mask == 1, ids, tokens(2, LONG, seed=9))
        a, b = logits(model, ids, **run), logits(model, other, **run)
        assert max_diff(a[mask.bool()], b[mask.bool()]) < 1e-5  # experts group tokens otherwise


def test_a_fully_padded_sequence_stays_finite(model):
    mask = padding_mask(LONG, [0, LONG], "left")
    ids = tokens(2, LONG)
    assert logits(model, ids, attention_mask=mask).isfinite().all()
    for gradient in gradients(model, ids, attention_mask=mask).values():
        assert gradient.isfinite().all()


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_gradient_of_every_parameter(model, side):
    ids = tokens(3, LONG)
    run = {}
    if side is not None:
        mask = padding_mask(LONG, [LONG, LONG - 13, LONG - 1], side)
        run = {"attention_mask": mask, "position_ids": positions(mask)}
    ours, eager = both(model, lambda m: gradients(m, ids, **run))
    names = {name for name, _ in model.named_parameters()}
    assert set(ours) == names
    sinks = [name for name in names if name.endswith("sinks")]
    assert len(sinks) == 4 and all(ours[name].abs().min() > 0 for name in sinks)
    assert_same_gradients(ours, eager, relative=1e-4)


def test_bfloat16_is_as_close_to_float32_as_eager_is():
    model = gpt_oss(num_local_experts=2)  # both experts always: rounding cannot change the routing
    ids = tokens(2, LONG)
    mask = padding_mask(LONG, [LONG, LONG - 13], "left")
    run = {"attention_mask": mask, "position_ids": positions(mask)}
    model.set_attn_implementation("eager")
    exact, exact_gradients = logits(model, ids, **run), gradients(model, ids, **run)
    model.to(torch.bfloat16)
    ours, eager = both(model, lambda m: logits(m, ids, **run))
    rows = mask.bool()
    assert ours.dtype == torch.bfloat16
    assert max_diff(ours[rows], exact[rows]) <= 2 * max_diff(eager[rows], exact[rows])
    ours, eager = both(model, lambda m: gradients(m, ids, **run))
    for name, gradient in exact_gradients.items():
        assert ours[name].dtype == torch.bfloat16
        allowed = 2 * max_diff(eager[name], gradient) + 0.01 * gradient.abs().max().item()
        assert max_diff(ours[name], gradient) <= allowed, name


def test_autocast_computes_in_bfloat16_with_float32_sinks(model):
    ids = tokens(2, LONG)

    def run(m):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return logits(m, ids), gradients(m, ids)

    (ours, our_gradients), (eager, _) = both(model, run)
    exact = logits(model, ids)
    assert max_diff(ours, exact) <= 2 * max_diff(eager, exact) + 0.02
    sinks = [g for name, g in our_gradients.items() if name.endswith("sinks")]
    assert all(g.dtype == torch.float32 and g.abs().min() > 0 for g in sinks)


def test_float32_activations_on_half_precision_weights():
    """PEFT keeps norms in float32, so that q, k and v arrive wider than the weights."""
    model = gpt_oss(num_hidden_layers=2).to(torch.bfloat16)
    seen = []

    def upcast(module, args, kwargs):
        kwargs["hidden_states"] = kwargs["hidden_states"].float()

    def project(module, args):
        return (args[0].to(module.weight.dtype),)

    for layer in model.model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.register_forward_pre_hook(project)
            linear.register_forward_hook(lambda _, args, out: out.float())
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        attention.register_forward_pre_hook(upcast, with_kwargs=True)
    logits(model, tokens(1, SHORT))
    assert seen == [torch.bfloat16] * 2


def test_frozen_sinks_as_in_lora(model):
    ids = tokens(2, LONG)
    expected = gradients(model, ids)
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("sinks"))
        ours = gradients(model, ids)
    finally:
        model.requires_grad_(True)
    assert not any(name.endswith("sinks") for name in ours)
    for name, gradient in ours.items():
        assert max_diff(gradient, expected[name]) <= 1e-6 * expected[name].abs().max(), name


@pytest.mark.parametrize("cache", ["dynamic", "bare", "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_chunked_prefill(model, cache, side):
    """Chunks of 18, 17, 1 and 4 tokens against the whole prompt at once, by eager."""
    ids = tokens(2, LONG)
    mask = padding_mask(LONG, [LONG, LONG - (13 if side else 0)], side or "left")
    position_ids = positions(mask)
    model.set_attn_implementation("eager")
    whole = logits(model, ids, attention_mask=mask, position_ids=position_ids)
    model.set_attn_implementation("sink_attention")
    if cache == "static":
        past = StaticCache(config=model.config, max_cache_len=LONG + 7)
    else:
        past = DynamicCache(config=model.config) if cache == "dynamic" else DynamicCache()
    start, parts = 0, []
    for length in (18, 17, 1, 4):
        chunk = slice(start, start + length)
        part = logits(
            model,
            ids[:, chunk],
            attention_mask=None if side is None else mask[:, : start + length],
            position_ids=position_ids[:, chunk],
            past_key_values=past,
        )
        parts.append(part)
        start += length
    ours = torch.cat(parts, dim=1)
    assert max_diff(ours[mask.bool()], whole[mask.bool()]) < TOLERANCE


def test_s_aux_reaches_the_kernel_unchanged_and_is_needed(model):
    ids = tokens(1, LONG)
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    before = logits(model, ids)
    with torch.no_grad():
        sinks[1][3] += 1.0
    after = logits(model, ids)
    with torch.no_grad():
        sinks[1][3] -= 1.0
    assert max_diff(before, after) > 1e-4
