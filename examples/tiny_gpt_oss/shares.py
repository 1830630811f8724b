"""How much of each head's attention its sink takes: exp(s_aux - lse), averaged over rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sink_attention_ext import flash_attn_func
from sink_attention_ext.integrations.mask_function import sink_attention_mask


@torch.no_grad()
def sink_shares(model: nn.Module, ids: Tensor) -> Tensor:
    """(layers, heads), by an attention function of our own that keeps what return_lse gives."""
    shares: dict[int, Tensor] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        window = kwargs["sliding_window"]
        out, lse = flash_attn_func(
            *(t.transpose(1, 2) for t in (query, key, value)),
            softmax_scale=kwargs["scaling"],
            causal=True,
            window_size=(-1 if window is None else window - 1, 0),
            s_aux=kwargs["s_aux"],
            return_lse=True,
        )
        shares[module.layer_idx] = torch.exp(kwargs["s_aux"][None, :, None] - lse).mean((0, 2))
        return out, None

    name = model.config._attn_implementation
    AttentionInterface.register("sink_shares", attention)
    AttentionMaskInterface.register("sink_shares", sink_attention_mask)
    model.set_attn_implementation("sink_shares")
    model(ids, use_cache=False)
    model.set_attn_implementation(name)
    return torch.stack([shares[layer] for layer in sorted(shares)])
