"""Small random GPT-OSS models and how they are run with eager attention and with ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM

from sink_attention_ext.integrations.transformers import register

register()

WINDOW = 16
VOCAB = 97
OURS = "sink_attention"

Result = TypeVar("Result")


def gpt_oss(seed: int = 0, **overrides: object) -> GptOssForCausalLM:
    """4 layers, sliding (window 16) and full in turn, 8 query and 2 kv heads, sinks ~ N(0, 1.5)."""
    options: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    model = GptOssForCausalLM(GptOssConfig(**(options | overrides))).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(0.0, 1.5)
    model.set_attn_implementation(OURS)
    return model


def tokens(batch: int, seqlen: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, seqlen), generator=generator)


def padding_mask(seqlen: int, lengths: list[int], side: str) -> Tensor:
    """(batch, seqlen) of 0 and 1: row b has lengths[b] ones, the zeros on `side`."""
    column = torch.arange(seqlen)
    if side == "left":
        column = column.flip(0)
    return (column < torch.tensor(lengths)[:, None]).long()


def positions(attention_mask: Tensor) -> Tensor:
    """position_ids that count real tokens only, as generate() makes them."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def both(model: nn.Module, run: Callable[[nn.Module], Result]) -> tuple[Result, Result]:
    """run(model) with our attention and with transformers' eager code."""
    results = []
    for name in (OURS, "eager"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        results.append(run(model))
    model.set_attn_implementation(OURS)
    return results[0], results[1]


def max_diff(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def logits(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def gradients(model: nn.Module, ids: Tensor, **kwargs: object) -> dict[str, Tensor]:
    """The gradient of the language modelling loss with respect to every parameter."""
    labels = ids
    if isinstance(mask := kwargs.get("attention_mask"), Tensor) and mask.dim() == 2:
        labels = ids.masked_fill(mask == 0, -100)
    model.zero_grad()
    model(ids, labels=labels, use_cache=False, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    ours: dict[str, Tensor], expected: dict[str, Tensor], relative: float
) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert max_diff(ours[name], gradient) <= relative * scale + 1e-9, name
