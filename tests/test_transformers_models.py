"""Models other than GPT-OSS: with sinks and without, encoders, encoder-decoders, softcap, MLA."""

import pytest
import torch
import transformers
from tiny_models import both, logits, max_diff, padding_mask, positions, tokens
from torch import nn

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 2}

# config class, model class, options beside SMALL
DECODERS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 32,
            "sliding_window": 16,
            "attn_logit_softcapping": 0.5,
            "query_pre_attn_scalar": 4,
            "attention_dropout": 0.0,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 8,
            "v_head_dim": 20,
            "first_k_dense_replace": 2,
        },
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"attn_pdrop": 0.0}),
    "granitemoe_swa": (
        "GraniteMoeSWAConfig",
        "GraniteMoeSWAForCausalLM",
        MOE | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def build(name, seed=0):
    config_name, model_name, options = DECODERS[name]
    config_class = getattr(transformers, config_name)
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config_class(**(SMALL | options))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_(0.0, 1.5)
    model.set_attn_implementation("sink_attention")
    return model


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name):
    """Prefill, padded batches, packed rows where the model takes them, and generation."""
    model = build(name)
    ids = tokens(2, 40)
    ours, eager = both(model, lambda m: logits(m, ids))
    scale = eager.abs().max().item()
    assert max_diff(ours, eager) < 1e-5 * scale

    for side in ("left", "right"):
        mask = padding_mask(40, [40, 27], side)
        run = {"attention_mask": mask, "position_ids": positions(mask)}
        ours, eager = both(model, lambda m, run=run: logits(m, ids, **run))
        assert max_diff(ours[mask.bool()], eager[mask.bool()]) < 1e-5 * scale

    mask = padding_mask(40, [40, 27], "left")
    for cache in ("dynamic", "static") if model._can_compile_fullgraph else ("dynamic",):
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        options["cache_implementation"] = cache
        ours, eager = both(model, lambda m, options=options: m.generate(ids, **options))
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granitemoe_swa", "deepseek_v3"])
def test_gradients(name):
    model = build(name)
    ids = tokens(2, 40)

    def run(m):
        m.zero_grad()
        m(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

    ours, eager = both(model, run)
    assert ours.keys() == eager.keys()
    for parameter, gradient in eager.items():
        # next to a gradient of zero only its rounding can be compared
        allowed = 2e-4 * gradient.abs().max().item() + 1e-7
        assert max_diff(ours[parameter], gradient) <= allowed, parameter
    if name == "granitemoe_swa":
        sinks = [gradient for parameter, gradient in ours.items() if parameter.endswith("sinks")]
        assert len(sinks) == 2 and all(gradient.abs().min() > 0 for gradient in sinks)


def test_softcap_changes_the_result():
    model = build("gemma2")
    ids = tokens(1, 20)
    softcapped = logits(model, ids)
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    assert max_diff(softcapped, logits(model, ids)) > 1e-3


def test_packed_rows_of_a_model_that_tells_its_masks():
    """Llama hands position_ids to the mask function, so transformers' eager is an oracle here."""
    model = build("llama")
    ids = tokens(2, 30)
    position_ids = torch.stack(
        [torch.arange(30) % 10, torch.cat([torch.arange(3), torch.arange(27)])]
    )
    run = {"position_ids": position_ids, "use_cache": False}
    ours, eager = both(model, lambda m: logits(m, ids, **run))
    assert max_diff(ours, eager) < 1e-5 * eager.abs().max()


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "gemma2", "deepseek_v3")]


@pytest.mark.parametrize("name", ["llama", "gpt2", *SLOW])
def test_a_decoder_compiled_in_full(name):
    """Under torch.compile transformers packs by position_ids whether they restart or not."""
    model = build(name)
    ids = tokens(2, 24)
    mask = padding_mask(24, [24, 15], "left")
    expected = logits(model, ids)
    masked = logits(model, ids, attention_mask=mask)
    with torch.no_grad():
        ours = compiled(lambda x: model(x, use_cache=False).logits)(ids)
        assert max_diff(ours, expected) < 1e-5 * expected.abs().max()
        ours = compiled(lambda x: model(x, attention_mask=mask, use_cache=False).logits)(ids)
        assert max_diff(ours, masked) < 1e-5 * expected.abs().max()
        restarts = (torch.arange(24) % 12).expand(2, -1)
        with pytest.raises(RuntimeError, match="need cu_seq_lens_q"):
            compiled(lambda x: model(x, position_ids=restarts, use_cache=False).logits)(ids)
    torch._dynamo.reset()


def test_compiled_images_are_refused():
    """Gemma 3 lets the tokens of an image see each other."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**(SMALL | {"head_dim": 16, "sliding_window": 16}))
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.set_attn_implementation("sink_attention")
    blocks = torch.full((1, 24), -1)
    causal, embeddings = transformers.masking_utils.create_causal_mask, torch.zeros(1, 24, 64)

    def forward(blocks):
        mask = causal(config, embeddings, None, None, block_sequence_ids=blocks)
        layer = model.model.layers[1].self_attn
        q, k, v = (torch.ones(1, heads, 24, 16) for heads in (4, 2, 2))
        return transformers.AttentionInterface()["sink_attention"](layer, q, k, v, mask)[0]

    with torch.no_grad():
        assert compiled(forward)(blocks).isfinite().all()
        blocks[0, 3:7] = 0
        with pytest.raises(RuntimeError, match="lets rows see later keys"):
            compiled(forward)(blocks)
    torch._dynamo.reset()


@pytest.mark.parametrize("window", [8, 200])
def test_decoder_made_an_encoder_with_windows_to_both_sides(window):
    """Gemma 3 with use_bidirectional_attention (EmbeddingGemma): an or_mask_function of its own."""
    torch.manual_seed(0)
    options = {"head_dim": 16, "sliding_window": window, "use_bidirectional_attention": True}
    options |= {"num_hidden_layers": 4, "attention_dropout": 0.0, "initializer_range": 0.2}
    options["layer_types"] = ["sliding_attention", "full_attention"] * 2
    model = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**(SMALL | options))).eval()
    model.set_attn_implementation("sink_attention")
    ids = tokens(3, 40)

    def hidden(m, **given):
        return m(ids, **given).last_hidden_state

    packed = torch.cat([torch.arange(n) for n in (14, 3, 23)]).expand(3, -1)
    right, left = (padding_mask(40, [40, 27, 3], side) for side in ("right", "left"))
    everything = torch.ones_like(right)
    for rows, given in (
        (everything, {}),
        (right, {"attention_mask": right}),
        (left, {"attention_mask": left, "position_ids": positions(left)}),
        (everything, {"position_ids": packed, "use_cache": False}),
    ):
        results = []
        for name in ("sink_attention", "eager"):
            model.set_attn_implementation(name)
            out = hidden(model, **given)[rows.bool()]
            weight = model.layers[0].self_attn.q_proj.weight
            results.append((out, *torch.autograd.grad(out[:, ::2].square().mean(), weight)))
        for ours, eager in zip(*results, strict=True):
            assert max_diff(ours, eager) < 2e-5 * eager.abs().max()


def test_encoder_with_bidirectional_windows():
    torch.manual_seed(0)
    options = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "eos_token_id")}
    config = transformers.ModernBertConfig(
        **(options | {"num_hidden_layers": 4, "cls_token_id": 1, "sep_token_id": 2}),
        eos_token_id=2,
        local_attention=8,
        global_attn_every_n_layers=2,
    )
    model = transformers.ModernBertModel(config).eval()
    ids = tokens(2, 30)
    mask = padding_mask(30, [30, 19], "right")
    for given in (None, mask):
        with torch.no_grad():
            ours, eager = both(model, lambda m, g=given: m(ids, attention_mask=g).last_hidden_state)
        rows = mask.bool() if given is not None else torch.ones_like(mask).bool()
        assert max_diff(ours[rows], eager[rows]) < 1e-5 * eager.abs().max()


def test_encoder_decoder_with_cross_attention():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=97,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        forced_eos_token_id=None,
        init_std=0.2,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    ids = tokens(2, 20)
    mask = padding_mask(20, [20, 13], "right")
    run = {"attention_mask": mask, "decoder_input_ids": tokens(2, 7)}
    ours, eager = both(model, lambda m: logits(m, ids, **run))
    assert max_diff(ours, eager) < 1e-5 * eager.abs().max()
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    ours, eager = both(model, lambda m: m.generate(ids, **options))
    assert torch.equal(ours, eager)


def test_vision_encoder_without_masks():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=0.0,
    )
    model = transformers.ViTModel(config).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours, eager = both(model, lambda m: m(images).last_hidden_state)
    assert max_diff(ours, eager) < 1e-5 * eager.abs().max()


def test_a_model_with_a_position_bias_is_refused():
    torch.manual_seed(0)
    config = transformers.MT5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    model = transformers.MT5EncoderModel(config).eval()
    model.set_attn_implementation("sink_attention")
    with pytest.raises(ValueError, match="does not compute position_bias"):
        model(tokens(1, 8))


def test_attention_dropout_is_refused_in_training_only():
    model = build("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    assert logits(model, tokens(1, 8)).isfinite().all()
    model.train()
    with pytest.raises(ValueError, match="LlamaAttention 0 asks for 0.1"):
        model(tokens(1, 8))


def test_output_attentions_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens(1, 8), output_attentions=True)


def test_sinks_of_another_length_are_refused():
    model = build("granitemoe_swa")
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match="s_aux has 5 logits, q has 4 heads in Granite.* 0 on"):
        logits(model, tokens(1, 8))
