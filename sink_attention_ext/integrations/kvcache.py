"""Models of transformers over a PagedKVCache: the forward pass of a server of one's own.

    from sink_attention_ext.integrations.kvcache import NAME, make_kv_cache, register

    register()
    model.set_attn_implementation(NAME)
    cache = make_kv_cache(model, num_pages=1024, max_num_seqs=64, max_seqlen=4096,
                          max_num_batched_tokens=512)
    step = cache.append([a, b], [5, 1])  # 5 tokens of one sequence's prompt, one of another
    logits = model(tokens[None], position_ids=step.positions[None], use_cache=False,
                   cache_step=step).logits[0]

The tokens of all sequences are packed in one row, without padding between them; cache_step says
which is whose. Nothing in the pass depends on values that the host reads, so it can be
compiled whole (``torch.compile(fullgraph=True)``) and captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sink_attention_ext.cache.paged_cache import PagedKVCache
from sink_attention_ext.cache.step import CacheStep
from sink_attention_ext.integrations.keywords import (
    PAGED_HARMLESS,
    check_keywords,
    choose_sinks,
    refuse_bidirectional,
)
from sink_attention_ext.integrations.transformers import kernel_options, to_compute_dtype

NAME = "sink_attention_kvcache"


def register() -> None:
    """Makes attn_implementation="sink_attention_kvcache" known to transformers; any number of
    times."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, kvcache_sink_attention)
    AttentionMaskInterface.register(NAME, kvcache_mask)


def make_kv_cache(model: nn.Module, **options: Any) -> PagedKVCache:
    """A PagedKVCache for a model's layers: windows, heads, dtype and device are the model's.

    Args:
        model: a causal language model of transformers whose layers are full or sliding
            (config.layer_types), all with the same key-value heads.
        options: PagedKVCache's other arguments (num_pages or memory_budget, max_num_seqs,
            max_seqlen, max_num_batched_tokens, ...); they also override what the model says, but
            for window_sizes. Under tensor parallelism num_heads_kv is this rank's.

    Raises:
        ValueError: a layer is of another kind.
    """
    config = model.config.get_text_config()
    num_layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    default = "full_attention" if window is None else "sliding_attention"
    layer_types = getattr(config, "layer_types", None) or [default] * num_layers
    window_sizes = []
    for layer, layer_type in enumerate(layer_types):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"layer {layer} must be full_attention or sliding_attention; got {layer_type}"
            )
        is_full = layer_type == "full_attention"
        window_sizes.append((-1, 0) if is_full else (window - 1, 0))
    head_dim = getattr(config, "head_dim", None)
    model_options = {
        "num_heads_kv": config.num_key_value_heads,
        "head_dim": head_dim or config.hidden_size // config.num_attention_heads,
        "dtype": model.dtype,
        "device": model.device,
    }
    return PagedKVCache(window_sizes, **model_options | options)


def kvcache_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """The mask function of NAME: cache_step is the mask, and padding has no place in a packed row.

    Raises:
        ValueError: an attention_mask was passed to the model.
    """
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask must be None for {NAME}: rows are packed, without padding, and "
            f"cache_step says whose they are; got a mask of shape {tuple(attention_mask.shape)}"
        )


def kvcache_sink_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    is_causal: bool | None = None,
    cache_step: CacheStep | None = None,
    num_splits: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What an attention layer calls. Keys and values go into the cache before they are attended to.

    Args:
        query: (batch, num_heads_q, length, head_dim), of step.num_tokens = batch * length tokens:
            (1, ..., num_tokens, ...) when packed, (num_seqs, ..., 1, ...) in decode.
        key, value: (batch, num_heads_kv, length, head_dim), of the same tokens.
        cache_step: what PagedKVCache.append returned, handed to the model as a keyword.
        num_splits: as in flash_attn_with_kvcache, a keyword of the model too.

    Returns:
        (batch, length, num_heads_q, head_dim_v), and None in place of P, which never exists.

    Raises:
        ValueError: cache_step is missing, the cache's window of this layer is not the model's, or
            an option or shape does not fit.
        RuntimeError: the step has ended.
    """
    if not isinstance(cache_step, CacheStep):
        raise ValueError(
            f"{NAME} needs cache_step, what PagedKVCache.append returned: "
            f"model(..., use_cache=False, cache_step=step); got {cache_step!r}"
        )
    if attention_mask is not None:
        raise ValueError(f"attention_mask must be None for {NAME}; got {type(attention_mask)}")
    layer = module.layer_idx
    window_left = cache_step.window_size(layer)[0]
    if window_left != (-1 if sliding_window is None else sliding_window - 1):
        raise ValueError(
            f"the cache must have the window of layer {layer}, whose sliding_window is "
            f"{sliding_window}; its window_left is {window_left}"
        )
    check_keywords(module, kwargs, PAGED_HARMLESS)
    refuse_bidirectional(NAME, module, is_causal)
    s_aux = choose_sinks(module, s_aux, sinks)
    options = kernel_options(module, query, dropout, scaling, softcap, s_aux)
    batch, _, length, _ = query.shape
    q, k, v = (
        tensor.transpose(1, 2).flatten(0, 1)
        for tensor in to_compute_dtype(module, query, key, value)
    )
    out = cache_step.attend(layer, q, k, v, num_splits=num_splits, **options)
    return out.unflatten(0, (batch, length)), None
