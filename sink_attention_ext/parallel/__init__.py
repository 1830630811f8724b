"""Attention on several ranks, which share the heads (tensor parallel) or the sequence (context)."""

from sink_attention_ext.parallel.tensor import GPT_OSS_TP_PLAN, shard_heads, shard_s_aux

__all__ = ["GPT_OSS_TP_PLAN", "shard_heads", "shard_s_aux"]
