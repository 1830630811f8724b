"""Whether torch's own context parallelism is on, which these functions must not run under unseen.

It cuts a sequence into shards and replaces scaled_dot_product_attention alone by a ring over the
ranks: any other attention would take a rank's shard for the whole sequence, without a word.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F

_NEW_HOME = "torch.distributed.tensor.experimental._context_parallel._attention"
_OLD_HOME = "torch.distributed.tensor.experimental._attention"  # before torch 2.10


def _is_patched() -> bool:
    """By ``context_parallel(mesh, buffers=...)``."""
    home = getattr(F.scaled_dot_product_attention, "__module__", None) or ""
    return home.startswith("torch.distributed.tensor.experimental")


def _is_dispatched() -> bool:
    """By that too, and by _enable_context_parallel_dispatcher() for wrapped modules: DTensors of
    scaled_dot_product_attention go to the ring."""
    for home in (_NEW_HOME, _OLD_HOME):
        dtensor: Any = getattr(sys.modules.get(home), "DTensor", None)
        handlers = getattr(getattr(dtensor, "_op_dispatcher", None), "_custom_op_handlers", {})
        if torch.ops.aten._scaled_dot_product_flash_attention.default in handlers:
            return True
    return False


def is_on(modules: dict[str, Any] = sys.modules) -> bool:
    if _NEW_HOME not in modules and _OLD_HOME not in modules:
        return False
    return _is_patched() or _is_dispatched()


# What torch.compiler.assume_constant_result does, which is slow to import.
is_on._dynamo_marked_constant = True


def refuse(function: str) -> None:
    """Raises a RuntimeError while it is on.

    That scaled_dot_product_attention is looked at here, too, gives torch.compile a guard: what it
    compiled before the function was replaced is compiled again.
    """
    if is_on() or F.scaled_dot_product_attention is None:
        raise RuntimeError(
            f"{function} would attend to this rank's shard alone under torch's context_parallel, "
            "which replaces scaled_dot_product_attention only: call "
            "sink_attention_ext.parallel.context_parallel_attn_func instead, or this function "
            "outside of that context"
        )
