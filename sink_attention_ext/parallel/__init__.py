"""Attention on several ranks, which share the heads (tensor parallel) or the sequence (context)."""

from sink_attention_ext.parallel.context import context_parallel_attn_func
from sink_attention_ext.parallel.layout import shard_sequence, unshard_sequence
from sink_attention_ext.parallel.tensor import GPT_OSS_TP_PLAN, shard_heads, shard_s_aux

__all__ = [
    "GPT_OSS_TP_PLAN",
    "context_parallel_attn_func",
    "shard_heads",
    "shard_s_aux",
    "shard_sequence",
    "unshard_sequence",
]
