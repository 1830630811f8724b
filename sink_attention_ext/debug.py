"""set_debug_checks: the values of CUDA tensors checked as those of CPU tensors are."""

from __future__ import annotations

from sink_attention_ext import checks, ops


def set_debug_checks(on: bool) -> None:
    """Whether calls on CUDA tensors check the values in cu_seqlens, seqused_k and cache_seqlens,
    block_table, tree_mask, slot_mapping, k_scale and v_scale before any kernel uses them. Off at
    first.

    On the CPU they always are. On CUDA the host has to wait for the device to see them, at every
    call, so this is for finding an error. While it is off, such values on CUDA are the caller's to
    keep right. Whatever they are, no kernel reads or writes outside of the tensors that it is
    given: a sequence is cut where its rows, its keys or its row of the block table end, keys of a
    page that the cache does not have count as zeros, and tokens with a slot out of range are
    skipped. Such a sequence's results are wrong, and those of others that it overlaps.

    For the whole process, all threads and devices.

    Args:
        on: True or False.

    Raises:
        TypeError: ``on`` is neither.

    While it is on, calls on CUDA tensors raise what they raise on CPU tensors, a
    ValueError that names the argument, the entry and its value; the caches have not been written.
    A call that is being captured in a CUDA graph raises a RuntimeError, since nothing can be waited
    for there: turn this off before the capture. Replays are not checked.

    Example::

        set_debug_checks(True)
        model.generate(...)  # the call that passes a wrong length now says so
        set_debug_checks(False)
    """
    ops.set_debug_checks(checks.check_bool("on", on))
