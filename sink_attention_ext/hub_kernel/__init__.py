"""The folder that stands in for the hub's kernels-community/vllm-flash-attn3, on any device.

    folder=$(python -m sink_attention_ext kernel-path)
    export LOCAL_KERNELS="kernels-community/vllm-flash-attn3=$folder"

The `kernels` package loads it by its path, as a module named by the id in metadata.json, so imports
are absolute. The functions are in sink_attention_ext/integrations/flash_attention_3.py.
"""

from sink_attention_ext.integrations.flash_attention_3 import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
