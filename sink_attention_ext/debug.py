"""set_debug_checks: the values of CUDA tensors checked as those of CPU tensors are."""

from __future__ import annotations

from sink_attention_ext import checks, ops


def set_debug_checks(on: bool) -> None:
    """Whether calls on CUDA tensors check the values in cu_seqlens, seqused_k and cache_seqlens,
    block_table, tree_mask, slot_mapping, k_scale and v_scale before any kernel uses them. Off at
    first.

    On the CPU they always are. On CUDA the host has to wait for the device to see them, at every
    call, so this is for finding an error. While it is off, such values on CUDA are the caller's to
    keep right: slots out of range are skipped, other values out of range read memory that is not
    theirs.

    For the whole process, all threads and devices.

    Args:
        on: True or False.

    Raises:
        TypeError: ``on`` is neither.

    While it is on, calls on CUDA tensors raise what they raise on CPU tensors, a RuntimeError or
    ValueError that names the argument, the entry and its value; the caches have not been written.
    A call that is being captured in a CUDA graph raises a RuntimeError, since nothing can be waited
    for there: turn this off before the capture. Replays are not checked.

    Example::

        set_debug_checks(True)
        model.generate(...)  # the call that passes a wrong length now says so
        set_debug_checks(False)
    """
    ops.set_debug_checks(checks.check_bool("on", on))
