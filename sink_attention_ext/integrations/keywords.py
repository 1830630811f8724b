"""Which keywords reach an attention function from a model, and what becomes of each.

transformers hands what a model or its user adds to an attention function as **kwargs, and its own
functions ignore what they do not know. Here everything that may change attention is used or refused
by name, keywords that a later transformers adds included. So the harmless ones are listed.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import Tensor, nn

# Keywords that change nothing in an attention function, whatever their value. Read off every
# modeling file of transformers 5.17, 5.23 and 5.24: what arrives at a call of attention_interface
# through **kwargs, and no attention function of transformers reads.
HARMLESS = {
    # What the model is to return besides, or not to compute.
    *("use_cache", "output_hidden_states", "output_router_logits", "return_dict"),
    *("logits_to_keep", "num_logits_to_keep", "return_loss"),
    # For the loss, behind the layers.
    *("labels", "num_items_in_batch", "shift_labels", "ignore_index"),
    # Inputs of the model that have become hidden states, queries and keys before attention.
    *("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"),
    *("encoder_outputs", "hidden_states", "decoder_position_ids", "position_embeddings"),
    *("pixel_values", "pixel_values_videos", "input_features", "input_values"),
    *("image_sizes", "grid_thw", "image_grid_thw", "video_grid_thw", "spatial_shapes"),
    *("image_position_ids", "video_position_ids", "second_per_grid_ts"),
    # Of these the model makes its attention_mask, which does arrive.
    *("token_type_ids", "mm_token_type_ids", "decoder_attention_mask"),
    # Caches: the layer has written them, and key and value are what it has read.
    *("past_key_values", "cache", "cache_params", "cache_position"),
    # Sequences of a packed row, for layers that are no attention (Mamba's convolution). A collator
    # gives it beside position_ids or cu_seq_lens_q, which are what counts here.
    "seq_idx",
}  # fmt: skip

# What arrives besides where keys and values are in a paged cache that knows who sees what.
PAGED_HARMLESS = {
    "position_ids",  # rotary embeddings have been applied
    "deterministic",  # of the backward, which there is none of
    *("logits_indices", "logits_processor_args"),  # of continuous batching, behind the layers
}

# Known arguments of models' attention that the kernels do not have. Others are refused as unknown.
UNSUPPORTED = ("position_bias", "indices", "block_indices", "head_mask", "attention_bias")


def layer_name(module: nn.Module) -> str:
    return f"{type(module).__name__} {getattr(module, 'layer_idx', '')}".rstrip()


def check_keywords(
    module: nn.Module, kwargs: dict[str, Any], also_harmless: Container[str] = ()
) -> None:
    """Refuses keywords that may change attention; None is as good as absent.

    Raises:
        ValueError: output_attentions is set, or a keyword is neither None nor harmless.
    """
    for name, value in kwargs.items():
        if value is None or name in HARMLESS or name in also_harmless:
            continue
        if name == "output_attentions":
            if not value:
                continue
            raise ValueError(
                "sink_attention never forms the attention weights, so output_attentions=True has "
                "nothing to return: use attn_implementation='eager'"
            )
        if name in UNSUPPORTED:
            raise ValueError(
                f"sink_attention does not compute {name}, which {layer_name(module)} passes: use "
                "attn_implementation='eager'"
            )
        raise ValueError(
            f"sink_attention does not know {name}, which {layer_name(module)} passes, and it may "
            "change attention: use attn_implementation='eager', or, where it changes nothing, add "
            "the name to sink_attention_ext.integrations.keywords.HARMLESS"
        )


def choose_sinks(module: nn.Module, s_aux: Tensor | None, sinks: Tensor | None) -> Tensor | None:
    """The sinks, which some models pass as `sinks` instead of s_aux.

    Raises:
        ValueError: both are given, or `sinks` holds more than one number per head.
        TypeError: `sinks` is no tensor.
    """
    if sinks is None:
        return s_aux
    if s_aux is not None:
        raise ValueError(f"{layer_name(module)} passes s_aux and sinks: only one may be given")
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks must be a tensor; got {type(sinks).__name__}")
    if sinks.dim() != 1:
        raise ValueError(
            f"sink_attention has one sink per head, so sinks must be (num_heads,); "
            f"{layer_name(module)} passes {tuple(sinks.shape)} (sinks per token): use "
            "attn_implementation='eager'"
        )
    return sinks


def refuse_bidirectional(name: str, module: nn.Module, is_causal: bool | None) -> None:
    """For functions over a paged cache, whose rows see what is before them."""
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise ValueError(f"{name} is causal; {layer_name(module)} has is_causal=False")
