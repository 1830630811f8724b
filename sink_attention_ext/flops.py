"""How many floating-point operations attention takes, for torch.utils.flop_counter.FlopCounterMode.

Torch's convention for flash attention: 2 products of matrices forward and 5 backward, a
multiplication and an addition for each pair of a query and a key; causal attention counts as if
every row saw every key, as it does for scaled_dot_product_attention. A sliding window is counted as
it is computed, by the pairs that are visible, its causal side included, and so are the keys of
``num_sink_tokens``. Packed sequences and caches count by their lengths where those can be read, and
by the longest that is allowed otherwise, under FakeTensorMode.

Importing this registers the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from sink_attention_ext import ops


class Window(NamedTuple):
    left: int
    right: int
    num_sink_tokens: int


def _window(causal: bool, left: int, right: int, num_sink_tokens: int) -> Window:
    return Window(left, 0 if causal else right, num_sink_tokens)


def _sum_of_clamped(count: int, first: int, largest: int) -> int:
    """The sum of `count` integers from first on, each clamped to 0 ... largest."""

    def below(end: int) -> int:  # the same sum over 0 ... end - 1
        if end <= 0:
            return 0
        rising = min(end, largest + 1)
        return rising * (rising - 1) // 2 + (end - rising) * largest

    return below(first + count) - below(first)


def num_pairs(seqlen_q: int, seqlen_k: int, window: Window) -> int:
    """Pairs of a query and a key that count in one sequence and head."""
    if not all(isinstance(size, int) for size in (seqlen_q, seqlen_k, *window)):
        return seqlen_q * seqlen_k  # symbolic sizes: a comparison would add a guard
    first = seqlen_k - seqlen_q  # the position of row 0
    masks_left = 0 <= window.left < seqlen_k - 1  # some key left of the last row's window
    if not masks_left and window.right <= 0:  # no mask, or causal
        return seqlen_q * seqlen_k
    pairs = seqlen_q * seqlen_k
    if window.right >= 0:
        pairs = _sum_of_clamped(seqlen_q, first + window.right + 1, seqlen_k)
    if masks_left:
        sink_tokens = min(window.num_sink_tokens, seqlen_k)
        pairs -= _sum_of_clamped(seqlen_q, first - window.left, seqlen_k)
        pairs += _sum_of_clamped(seqlen_q, first - window.left, sink_tokens)
    return pairs


def _can_be_read(lengths: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return not isinstance(lengths, (FakeTensor, FunctionalTensor)) and not lengths.is_meta


def _lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    if _can_be_read(cu_seqlens):
        return cu_seqlens.diff().tolist()
    return [longest] * (cu_seqlens.shape[0] - 1)


def _used(seqused_k: Tensor | None, lengths: list[int]) -> list[int]:
    return seqused_k.tolist() if seqused_k is not None and _can_be_read(seqused_k) else lengths


def _count(
    q: Tensor, v: Tensor, seqlens_q: Sequence[int], seqlens_k: Sequence[int], window: Window,
    backward: bool = False,
) -> int:  # fmt: skip
    pairs = sum(num_pairs(*each, window) for each in zip(seqlens_q, seqlens_k, strict=True))
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    # Forward q k and p v; backward q k again, dout v, and the gradients of v, q and k.
    products = 3 * head_dim + 2 * head_dim_v if backward else head_dim + head_dim_v
    return 2 * pairs * q.shape[-2] * products


def _dense(q: Tensor, k: Tensor, v: Tensor, window: Window, backward: bool = False) -> int:
    batch = q.shape[0]
    return batch * _count(q, v, [q.shape[1]], [k.shape[1]], window, backward)


def _varlen(
    q: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, window: Window, backward: bool = False,
) -> int:  # fmt: skip
    seqlens_k = _used(seqused_k, _lengths(cu_seqlens_k, max_seqlen_k))
    return _count(q, v, _lengths(cu_seqlens_q, max_seqlen_q), seqlens_k, window, backward)


# ---- the operators: what follows the tensors is in the order of their schemas ----


def _flash_attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Any, scale: Any, causal: bool, left: int, right: int,
    softcap: Any, deterministic: bool, num_sink_tokens: int, **kwargs: Any,
) -> int:  # fmt: skip
    return _dense(q, k, v, _window(causal, left, right, num_sink_tokens))


def _flash_attn_bwd(
    dout: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, s_aux: Any,
    scale: Any, causal: bool, left: int, right: int, softcap: Any, deterministic: bool,
    num_sink_tokens: int, **kwargs: Any,
) -> int:  # fmt: skip
    return _dense(q, k, v, _window(causal, left, right, num_sink_tokens), backward=True)


def _flash_attn_varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    seqused_k: Tensor | None, s_aux: Any, max_seqlen_q: int, max_seqlen_k: int, scale: Any,
    causal: bool, left: int, right: int, softcap: Any, deterministic: bool, num_sink_tokens: int,
    **kwargs: Any,
) -> int:  # fmt: skip
    window = _window(causal, left, right, num_sink_tokens)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k)
    return _varlen(q, v, *lengths, window)


def _flash_attn_varlen_bwd(
    dout: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, s_aux: Any,
    max_seqlen_q: int, max_seqlen_k: int, scale: Any, causal: bool, left: int, right: int,
    softcap: Any, deterministic: bool, num_sink_tokens: int, **kwargs: Any,
) -> int:  # fmt: skip
    window = _window(causal, left, right, num_sink_tokens)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k)
    return _varlen(q, v, *lengths, window, backward=True)


def _flash_attn_fp8_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Any, k_descale: Any, v_descale: Any, s_aux: Any,
    scale: Any, causal: bool, left: int, right: int, softcap: Any, num_sink_tokens: int,
    **kwargs: Any,
) -> int:  # fmt: skip
    return _dense(q, k, v, _window(causal, left, right, num_sink_tokens))


def _flash_attn_fp8_varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Any, k_descale: Any, v_descale: Any,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, s_aux: Any,
    max_seqlen_q: int, max_seqlen_k: int, scale: Any, causal: bool, left: int, right: int,
    softcap: Any, num_sink_tokens: int, **kwargs: Any,
) -> int:  # fmt: skip
    window = _window(causal, left, right, num_sink_tokens)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k)
    return _varlen(q, v, *lengths, window)


def _over_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, num_new: int | list[int],
    block_table: Tensor | None, cu_seqlens_q: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    window: Window,
) -> int:  # fmt: skip
    """lengths: of the keys that are there before num_new (of each sequence, or of all) come."""
    batch = lengths.shape[0]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if isinstance(capacity, int) and isinstance(max_seqlen_k, int):
        capacity = min(capacity, max_seqlen_k)
    if cu_seqlens_q is None:
        seqlens_q = [q.shape[1]] * batch
    else:
        seqlens_q = _lengths(cu_seqlens_q, max_seqlen_q)
    seqlens_k = [capacity] * batch
    if _can_be_read(lengths):
        new = [num_new] * batch if isinstance(num_new, int) else num_new
        seqlens_k = [old + count for old, count in zip(lengths.tolist(), new, strict=True)]
    return _count(q, v_cache, seqlens_q, seqlens_k, window)


def _paged_attn(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None,
    cache_seqlens: Tensor, cu_seqlens_q: Tensor | None, s_aux: Any, k_scale: Any, v_scale: Any,
    max_seqlen_q: int, max_seqlen_k: int, scale: Any, causal: bool, left: int, right: int,
    softcap: Any, num_splits: int, num_sink_tokens: int, tree_mask: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _over_cache(
        q, k_cache, v_cache, cache_seqlens, 0, block_table, cu_seqlens_q, max_seqlen_q,
        max_seqlen_k, _window(causal, left, right, num_sink_tokens),
    )  # fmt: skip


def _append_and_attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, cu_seqlens_q: Tensor | None, s_aux: Any, k_scale: Any,
    v_scale: Any, max_seqlen_q: int, max_seqlen_k: int, scale: Any, causal: bool, left: int,
    right: int, softcap: Any, num_splits: int, num_sink_tokens: int, tree_mask: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    num_new = k.shape[1] if cu_seqlens_q is None else _lengths(cu_seqlens_q, max_seqlen_q)
    return _over_cache(
        q, k_cache, v_cache, cache_seqlens, num_new, block_table, cu_seqlens_q, max_seqlen_q,
        max_seqlen_k, _window(causal, left, right, num_sink_tokens),
    )  # fmt: skip


FORMULAS = {
    "flash_attn_fwd": _flash_attn_fwd,
    "flash_attn_bwd": _flash_attn_bwd,
    "flash_attn_varlen_fwd": _flash_attn_varlen_fwd,
    "flash_attn_varlen_bwd": _flash_attn_varlen_bwd,
    "flash_attn_fp8_fwd": _flash_attn_fp8_fwd,
    "flash_attn_fp8_varlen_fwd": _flash_attn_fp8_varlen_fwd,
    "append_and_attend": _append_and_attend,
    "paged_attn": _paged_attn,  # paged_attn.out too: formulas are for all overloads
}

if ops.LIBRARY_PATH is not None:
    for _name, _formula in FORMULAS.items():
        _packet = getattr(torch.ops.sink_attention_ext, _name)
        if _packet not in flop_registry:
            register_flop_formula(_packet, get_raw=True)(_formula)
