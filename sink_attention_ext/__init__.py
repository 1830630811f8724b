"""Flash attention with learnable sinks: training, packed sequences, paged key-value caches."""

from sink_attention_ext import autograd as _autograd  # registers gradients with torch
from sink_attention_ext import reference
from sink_attention_ext.debug import set_debug_checks
from sink_attention_ext.interface import flash_attn_func, flash_attn_varlen_func
from sink_attention_ext.kvcache import flash_attn_with_kvcache, reshape_and_cache
from sink_attention_ext.merge import apply_sink, merge_attn_states
from sink_attention_ext.support import Support, supports

__version__ = "0.1.0"

__all__ = [
    "Support",
    "__version__",
    "apply_sink",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "merge_attn_states",
    "reference",
    "reshape_and_cache",
    "set_debug_checks",
    "supports",
]

del _autograd
