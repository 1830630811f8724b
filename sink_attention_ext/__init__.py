"""Flash attention with learnable sinks: training, packed sequences, paged key-value caches."""

import importlib as _importlib
import warnings as _warnings
from types import ModuleType as _ModuleType

from sink_attention_ext import dispatch_rules as _dispatch_rules  # registers gradients with torch
from sink_attention_ext import flops as _flops  # registers formulas with torch
from sink_attention_ext import parallel, reference
from sink_attention_ext.cache.functions import flash_attn_with_kvcache, reshape_and_cache
from sink_attention_ext.cache.page_pool import OutOfPages
from sink_attention_ext.cache.paged_cache import PagedKVCache
from sink_attention_ext.cache.plan import KVCachePlan, plan_kvcache
from sink_attention_ext.cache.step import CacheStep
from sink_attention_ext.cascade import cascade_attn_with_kvcache
from sink_attention_ext.debug import set_debug_checks
from sink_attention_ext.interface import flash_attn_func, flash_attn_varlen_func
from sink_attention_ext.merge import apply_sink, merge_attn_states
from sink_attention_ext.support import Support, supports

__version__ = "0.1.0"

__all__ = [
    "CacheStep",
    "KVCachePlan",
    "OutOfPages",
    "PagedKVCache",
    "Support",
    "__version__",
    "apply_sink",
    "cascade_attn_with_kvcache",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "merge_attn_states",
    "parallel",
    "plan_kvcache",
    "reference",
    "reshape_and_cache",
    "set_debug_checks",
    "supports",
]

del _dispatch_rules, _flops

_MOVED = {  # modules that code of 2026-11 imports from here
    "autograd": "dispatch_rules",
    "float8": "fp8",
    "kvcache": "cache.functions",
    "cache_attention": "cache.attention",
    "cache_arguments": "cache.arguments",
    "cache_checks": "cache.checks",
    "cache_step": "cache.step",
    "journal": "cache.journal",
    "page_pool": "cache.page_pool",
    "page_storage": "cache.page_storage",
    "page_tables": "cache.page_tables",
    "paged_cache": "cache.paged_cache",
    "sequence_ids": "cache.sequence_ids",
}


def __getattr__(name: str) -> _ModuleType:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    target = f"{__name__}.{_MOVED[name]}"
    _warnings.warn(f"{__name__}.{name} is {target} now", DeprecationWarning, stacklevel=2)
    return _importlib.import_module(target)
