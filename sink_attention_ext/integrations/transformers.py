"""Our attention in HuggingFace transformers, by name.

    from sink_attention_ext.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="sink_attention")

works for every model that asks transformers' AttentionInterface, with a sink (``s_aux``) where
the model passes one: padded batches, sliding windows, dynamic and static caches, packed
sequences, training, torch.compile. For continuous batching (``model.generate_batch``,
transformers 5.17; later ones take no such name) the name is "paged|sink_attention".

A mask or an option that the kernels do not compute is a ValueError that names it, and so is a
keyword that is not known to be harmless (sink_attention_ext/integrations/keywords.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sink_attention_ext import checks
from sink_attention_ext.integrations.keywords import check_keywords, choose_sinks, layer_name
from sink_attention_ext.integrations.mask_function import mask_of_pattern, sink_attention_mask
from sink_attention_ext.integrations.mask_object import AttentionMask
from sink_attention_ext.integrations.mask_pattern import pattern_of_mask
from sink_attention_ext.integrations.masks import UnpaddedMask, is_tracing
from sink_attention_ext.integrations.packing import split_by_lengths, split_by_positions

# transformers reads meaning into names: with "flash", "sdpa", "flex_attention" or "/" inside, this
# one would be replaced by, or checked as, another implementation.
NAME = "sink_attention"
PAGED_NAME = f"paged|{NAME}"


def register() -> None:
    """Makes attn_implementation="sink_attention" known to transformers.

    Any number of times, before or after models are imported; it only has to come before a model is
    told to use the name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from sink_attention_ext.integrations.paged import paged_sink_attention

    AttentionInterface.register(NAME, sink_attention)
    AttentionInterface.register(PAGED_NAME, paged_sink_attention)
    AttentionMaskInterface.register(NAME, sink_attention_mask)


def sink_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    deterministic: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What an attention layer of transformers calls.

    Args:
        module: the layer.
        query: (batch, num_heads_q, q_length, head_dim).
        key, value: (batch, num_heads_kv, kv_length, head_dim), from the cache where there is one.
        attention_mask: what sink_attention_mask returned; None for a layer without masks; or a
            (batch or 1, heads or 1, q_length, kv_length) tensor of the user, which is inspected.
        s_aux: (num_heads_q,) sinks of this rank, any float dtype (never cast), DTensor or not.
        sinks: another name of s_aux. Only one may be given.
        position_ids: (batch or 1, q_length). Where they restart within a row, another sequence
            begins; padding beside it is none of it.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences
            (transformers' FlashAttentionKwargs), whether or not position_ids restart. The
            maxima may be missing.
        kwargs: see sink_attention_ext.integrations.keywords.

    Returns:
        (batch, q_length, num_heads_q, head_dim_v), and None in place of P, which never exists.

    Raises:
        TypeError, ValueError: a mask or option that the kernels do not compute, or a keyword that
            is not known to be harmless.
    """
    check_keywords(module, kwargs)
    s_aux = choose_sinks(module, s_aux, sinks)
    options = kernel_options(module, query, dropout, scaling, softcap, s_aux)
    query, key, value = to_compute_dtype(module, query, key, value)
    if isinstance(attention_mask, Tensor):
        mask = _mask_of_tensor(attention_mask, query)
    elif attention_mask is None:
        mask = _mask_of_layer(module, query, key, is_causal, sliding_window)
    elif isinstance(attention_mask, AttentionMask):
        mask = attention_mask
        _check_window(mask, sliding_window)
    else:
        raise ValueError(
            f"attention_mask of type {type(attention_mask).__name__} is not known to sink_attention"
        )
    mask.check(query, key, module)
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if any(length is not None for length in lengths):
        mask = split_by_lengths(mask, query.shape[0], position_ids, *lengths)
    elif mask.causal:
        mask = split_by_positions(mask, position_ids, query.shape[0])
    return mask.attend(query, key, value, bool(deterministic), options), None


def kernel_options(
    module: nn.Module,
    query: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> dict[str, Any]:
    """softmax_scale, softcap and s_aux for the kernels; refuses what they do not have."""
    if dropout != 0.0:
        raise ValueError(
            f"sink_attention has no attention dropout; {layer_name(module)} asks for {dropout}: "
            "set config.attention_dropout = 0.0"
        )
    if s_aux is not None:
        s_aux = checks.local_s_aux(s_aux)  # query holds this rank's heads: take its sinks
        if s_aux.numel() != query.shape[1]:
            raise ValueError(
                f"s_aux has {s_aux.numel()} logits, q has {query.shape[1]} heads in "
                f"{layer_name(module)} on "
                "this rank: under tensor parallelism shard the sinks with the heads "
                "(sink_attention_ext.parallel.GPT_OSS_TP_PLAN)"
            )
    return {"softmax_scale": scaling, "softcap": softcap or 0.0, "s_aux": s_aux}


def to_compute_dtype(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Casts back to the weights' half precision what a float32 norm (PEFT) has upcast.

    As transformers' flash attention does. Under autocast the operators cast by themselves, but for
    those over caches, which take keys and values of one dtype.
    """
    if query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):
        if key.dtype == value.dtype == query.dtype:
            return query, key, value
        dtype = torch.get_autocast_dtype(query.device.type)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    if query.dtype != torch.float32:
        return query, key, value
    config = getattr(module, "config", None)
    if hasattr(config, "_is_quantized"):
        dtype = config.dtype
    else:
        linear = next((m for m in module.modules() if isinstance(m, nn.Linear)), None)
        dtype = query.dtype if linear is None else linear.weight.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _mask_of_tensor(mask: Tensor, query: Tensor) -> AttentionMask:
    """The mask of a tensor that the user has passed, or that a model has made for itself."""
    if mask.dim() != 4:
        raise ValueError(
            "attention_mask must reach sink_attention through transformers' mask functions, or "
            f"have 4 dimensions; got shape {tuple(mask.shape)}"
        )
    if is_tracing():
        raise ValueError("sink_attention cannot inspect a 4D attention_mask under torch.compile")
    rule = pattern_of_mask(mask, query.shape[0])
    return mask_of_pattern(rule, mask.shape[2], mask.shape[3])


def _mask_of_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
) -> AttentionMask:
    """The mask of a layer that got none: what the layer says of itself."""
    q_length, kv_length = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if causal and q_length != kv_length:
        raise ValueError(
            f"attention_mask is None, but causal attention of {q_length} queries over {kv_length} "
            "keys needs one to know their positions"
        )
    window = -1 if sliding_window is None else sliding_window - 1
    return UnpaddedMask(
        q_length, kv_length, causal, (window, 0 if causal else window), key_end=kv_length
    )


def _check_window(mask: AttentionMask, sliding_window: int | None) -> None:
    """The layer's window and its mask's are the same, or there are too few keys to tell."""
    if sliding_window is None or not mask.causal or mask.window_size[0] == sliding_window - 1:
        return
    if mask.window_size[0] == -1 and mask.kv_length <= sliding_window:
        return
    raise ValueError(
        f"the layer's sliding_window is {sliding_window}, but its attention_mask was made with "
        f"window_size {mask.window_size}"
    )
