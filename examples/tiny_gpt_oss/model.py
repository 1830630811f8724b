"""A GPT-OSS of a few million parameters: alternating sliding and full layers, learnable sinks."""

from __future__ import annotations

import torch
from transformers import GptOssConfig, GptOssForCausalLM

from sink_attention_ext.integrations.transformers import register
from tiny_gpt_oss.text import BOS, EOS, VOCAB

OURS = "sink_attention"
WINDOW = 64


def build(attention: str = OURS, seed: int = 0) -> GptOssForCausalLM:
    register()  # makes the name "sink_attention" known to transformers
    torch.manual_seed(seed)
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=192,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=WINDOW,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=BOS,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config._attn_implementation = attention
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.sinks)
    return model


def sinks(model: GptOssForCausalLM) -> torch.Tensor:
    """(layers, heads)."""
    return torch.stack([layer.self_attn.sinks.detach() for layer in model.model.layers])
