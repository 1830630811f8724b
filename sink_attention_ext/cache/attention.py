"""What every function over a cache runs: one operator, called without autograd's rules where no
tensor needs them. The operators validate; checks.py words what torch refuses before they see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sink_attention_ext import checks, ops, torch_context_parallel
from sink_attention_ext.cache import checks as cache_checks
from sink_attention_ext.dispatch_rules import check_written, refuse_gradient, written_scales
from sink_attention_ext.reference import WindowSize

INT32_MAX = checks.INT32_MAX
WIDEST = 2**30  # as in checks.check_window

_functorch_is_active = torch._C._are_functorch_transforms_active
_increment_version = torch._C._increment_version
_BelowAutograd = torch._C._AutoDispatchBelowADInplaceOrView


def needs_rules(*tensors: Any) -> bool:
    """Whether autograd, or a transform of torch.func, has a say about a call in eager mode."""
    return (
        forward_ad._current_level >= 0
        or _functorch_is_active()
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))
    )


def attend(
    function: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    block_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | torch.SymInt | Tensor | None,
    max_seqlen_k: int | torch.SymInt | Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: WindowSize,
    softcap: float,
    s_aux: Tensor | None,
    return_lse: bool,
    num_splits: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    num_sink_tokens: int,
    tree_mask: Tensor | None,
    out: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn_with_kvcache, whose name in messages is `function`.

    Types are looked at where something has gone wrong, or a graph is traced.
    """
    kinds = (
        q, k_cache, v_cache, k, v, cache_seqlens, block_table, cu_seqlens_q, s_aux, k_scale,
        v_scale, tree_mask, out,
    )  # fmt: skip
    is_compiling = torch.compiler.is_compiling()
    if is_compiling:
        cache_checks.check_attend_kinds(*kinds)
    try:
        torch_context_parallel.refuse(function)
        left, right = checked_window(window_size, causal)
        if return_lse is not True and return_lse is not False:
            checks.check_bool("return_lse", return_lse)
        if type(num_splits) is not int or not -1 < num_splits < INT32_MAX:
            num_splits = checks.check_num_splits(num_splits)
        if type(num_sink_tokens) is not int or not -1 < num_sink_tokens < INT32_MAX:
            num_sink_tokens = checks.check_num_sink_tokens(num_sink_tokens)
        if (k is None) is not (v is None):
            refuse_one_of_two(k)
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** -0.5
        elif type(softmax_scale) is not float:
            softmax_scale = checks.check_softmax_scale(softmax_scale, q.shape[-1], q.dtype)
        if type(softcap) is not float:
            softcap = checks.check_softcap(softcap, q.dtype)
        if type(max_seqlen_q) is not int or not -1 < max_seqlen_q < INT32_MAX:
            max_seqlen_q = checked_max_seqlen_q(max_seqlen_q, q, cu_seqlens_q)
        if max_seqlen_k is None:
            max_seqlen_k = INT32_MAX
        elif type(max_seqlen_k) is not int or not -1 < max_seqlen_k < INT32_MAX:
            max_seqlen_k = checks.check_max_seqlen("max_seqlen_k", max_seqlen_k)
        if not isinstance(cache_seqlens, Tensor):
            cache_seqlens = lengths_of(
                cache_seqlens, q, k_cache, k, block_table, cu_seqlens_q, max_seqlen_k
            )
        if s_aux is not None:
            s_aux = checks.local_s_aux(s_aux)
            if not s_aux.is_contiguous():
                s_aux = s_aux.contiguous()
        if k_scale is not None and v_scale is not None:
            k_scale, v_scale = cache_checks.of_one_shape(k_scale, v_scale, k_cache)
        options = (
            cu_seqlens_q, s_aux, k_scale, v_scale, max_seqlen_q, max_seqlen_k, softmax_scale,
            causal, left, right, softcap, num_splits, num_sink_tokens, tree_mask,
        )  # fmt: skip

        if is_compiling or needs_rules(q, k_cache, v_cache, k, v, s_aux, k_scale, v_scale, out):
            refuse_gradient(function, q, k_cache, v_cache, k, v, s_aux, k_scale, v_scale, out)
            out, lse = run(q, k_cache, v_cache, k, v, cache_seqlens, block_table, options, out)
            return (out, lse) if return_lse else out

        # What the operators' kernels for autograd do, in fewer steps.
        written = []
        if k is not None:
            check_written("k_cache", k_cache)
            check_written("v_cache", v_cache)
            written += (k_cache, v_cache)
            if k_scale is not None:
                for scale in written_scales(k_scale, v_scale):
                    check_written("k_scale" if scale is k_scale else "v_scale", scale)
                    written.append(scale)
        if out is not None:
            check_written("out", out)
            written.append(out)
        with _BelowAutograd():
            if out is not None:
                out, lse = run(q, k_cache, v_cache, k, v, cache_seqlens, block_table, options, out)
            elif k is None:
                out, lse = ops.paged_attn_direct(
                    q, k_cache, v_cache, block_table, cache_seqlens, *options
                )
            else:
                out, lse = ops.append_and_attend_direct(
                    q, k_cache, v_cache, k, v, cache_seqlens, block_table, *options
                )
        if written:
            _increment_version(written)  # not where the operator has refused
        return (out, lse) if return_lse else out
    except Exception:
        if not is_compiling:
            cache_checks.check_attend_kinds(*kinds)
        raise


def run(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None,
    cache_seqlens: Tensor, block_table: Tensor | None, options: tuple[Any, ...],
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if out is None:
        if k is None:
            return ops.paged_attn(q, k_cache, v_cache, block_table, cache_seqlens, *options)
        return ops.append_and_attend(
            q, k_cache, v_cache, k, v, cache_seqlens, block_table, *options
        )
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    lse = q.new_empty(lse_shape, dtype=ops.lse_dtype(k_cache.dtype))
    if k is None:
        args: tuple[Any, ...] = (q, k_cache, v_cache, block_table, cache_seqlens, *options)
        ops.paged_attn_out(*args, out=out, lse=lse)
    else:
        args = (q, k_cache, v_cache, k, v, cache_seqlens, block_table, *options)
        ops.append_and_attend_out(*args, out=out, lse=lse)
    return out, lse


def checked_window(window_size: Any, causal: Any) -> tuple[int, int]:
    """checks.check_window and check_bool, with a short way for what is given nearly always."""
    if type(window_size) is tuple and len(window_size) == 2:
        left, right = window_size
        if type(left) is int and type(right) is int and -2 < left < WIDEST and -2 < right < WIDEST:
            if causal is True:
                return left, 0
            if causal is False:
                return left, right
    checks.check_bool("causal", causal)
    return checks.check_window(window_size, causal)


def refuse_one_of_two(k: Any) -> None:
    missing, given = ("k", "v") if k is None else ("v", "k")
    raise ValueError(
        f"{missing} must be given where {given} is: keys and values are appended together"
    )


def checked_max_seqlen_q(max_seqlen_q: Any, q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    """None is the length of q where that is the longest sequence's."""
    if max_seqlen_q is not None:
        return checks.check_max_seqlen("max_seqlen_q", max_seqlen_q)
    if cu_seqlens_q is not None and cu_seqlens_q.shape[0] > 2:
        raise ValueError(
            "max_seqlen_q must be given with cu_seqlens_q of several sequences: the longest one's "
            "queries (1 in decode), or more. The host cannot read it from cu_seqlens_q without "
            "waiting for the device, and with too large a bound decode kernels would not be "
            "chosen; got None"
        )
    return q.shape[-3]


def lengths_of(
    cache_seqlens: Any, q: Tensor, k_cache: Tensor, k: Tensor | None, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None, max_seqlen_k: int,
) -> Tensor:  # fmt: skip
    """cache_seqlens as a tensor: an int is every sequence's length, None all that there is."""
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    capacity = checks.within_int32(capacity)
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(
                "cache_seqlens must be given where k and v are to be appended; got None"
            )
        cache_seqlens = capacity
    elif not isinstance(cache_seqlens, (int, torch.SymInt)) or isinstance(cache_seqlens, bool):
        raise TypeError(
            f"cache_seqlens must be an int or an int32 tensor (batch,); got {cache_seqlens!r}"
        )
    if cache_seqlens < 0 or cache_seqlens > capacity:
        raise ValueError(
            f"cache_seqlens must be from 0 to {capacity}, the tokens that a sequence's cache can "
            f"hold; got {cache_seqlens}"
        )
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)


def write_tokens(
    function: str,
    is_compiling: bool,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """reshape_and_cache, by the operator that reads the scales or by the one that writes them."""
    op, scales = ops.reshape_and_cache_direct, []
    if is_compiling:
        op = ops.reshape_and_cache
    if k_scale is not None and v_scale is not None:
        k_scale, v_scale = cache_checks.of_one_shape(k_scale, v_scale, k_cache)
        scales = written_scales(k_scale, v_scale)
        if len(scales) == 2:
            op = ops.reshape_and_cache_token_scales
    in_order = torch.are_deterministic_algorithms_enabled()
    if is_compiling or needs_rules(k, v, k_cache, v_cache, k_scale, v_scale):
        refuse_gradient(function, k, v, k_cache, v_cache, k_scale, v_scale)
        op(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, in_order)
        return
    check_written("k_cache", k_cache)
    check_written("v_cache", v_cache)
    for scale in scales:
        check_written("k_scale" if scale is k_scale else "v_scale", scale)
    with _BelowAutograd():
        op(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, in_order)
    _increment_version([k_cache, v_cache, *scales])  # not where the operator has refused
