"""What fake kernels (fakes.py) refuse: what csrc/torch/make_params.cpp does, but for values in
tensors.

A call with one meta tensor among real ones comes to the fake kernel, and must not pass for one that
has computed something. Sizes that torch.compile traces as symbols are refused where they are known
to be wrong; comparing them otherwise would make a guard, and the real kernel looks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = torch.float8_e4m3fn
QUANTISED_DTYPES = (FLOAT8, torch.int8)  # of caches, with scales
MAX_HEAD_DIM = 256
MAX_DRAFT_TOKENS = 64  # of a sequence with a tree mask: a bit each


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the log-sum-exp of inputs of `dtype` is returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- one check each ----


def is_known(condition: Any) -> bool:
    """Whether a comparison holds; of symbols, whether it is known to."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(condition)


def refuse_if(wrong: Any, message: str) -> None:
    if is_known(wrong):
        raise ValueError(message)


def check_defined(name: str, tensor: Any, dims: str = "") -> None:
    if tensor is None:
        raise TypeError(f"{name} must be a torch.Tensor{' ' if dims else ''}{dims}; got None")


def check_rank(name: str, tensor: Tensor, rank: int, dims: str) -> None:
    check_defined(name, tensor, dims)
    if tensor.dim() != rank:
        raise ValueError(
            f"{name} must have {rank} dimension{'' if rank == 1 else 's'} {dims}; got shape "
            f"{tuple(tensor.shape)}"
        )


def check_size(name: str, tensor: Tensor, dim: int, expected: Any, what: str) -> None:
    refuse_if(
        tensor.shape[dim] != expected,
        f"{name} must have {what} = {expected}; got shape {tuple(tensor.shape)}",
    )


def check_like(
    name: str, tensor: Tensor, dim: int, dim_name: str, expected: Any, like: str
) -> None:
    """The same of a size that comes from the argument `like`."""
    refuse_if(
        tensor.shape[dim] != expected,
        f"{name} must have {dim_name} = {expected} (as {like} has); got shape "
        f"{tuple(tensor.shape)}",
    )


def check_shape(name: str, tensor: Tensor, expected: Sequence[Any], dims: str = "") -> None:
    check_defined(name, tensor, dims)
    message = (
        f"{name} must have shape {dims}{' = ' if dims else ''}{tuple(expected)}; got "
        f"{tuple(tensor.shape)}"
    )
    if tensor.dim() != len(expected):
        raise ValueError(message)
    for size, wanted in zip(tensor.shape, expected, strict=True):
        refuse_if(size != wanted, message)


def check_dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    check_defined(name, tensor)
    if tensor.dtype != expected:
        raise TypeError(f"{name} must have dtype {expected}; got {tensor.dtype}")


def check_same_dtype(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    check_defined(name, tensor)
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{name} must have the dtype of {like_name}, {like.dtype}; got {tensor.dtype}: cast it"
        )


def check_float(name: str, tensor: Tensor) -> None:
    check_defined(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must have dtype float64, float32, float16 or bfloat16; got {tensor.dtype}"
        )


def check_device(name: str, tensor: Tensor, first: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(
            f"{name} must be on {first.device} like the other tensors; got {tensor.device}"
        )


def check_last_stride(name: str, tensor: Tensor) -> None:
    is_read = not is_known(tensor.numel() == 0) and is_known(tensor.shape[-1] > 1)
    if is_read and is_known(tensor.stride(-1) != 1):
        raise ValueError(
            f"{name} must have stride 1 in its last dimension; got strides "
            f"{tuple(tensor.stride())}: pass {name}.contiguous()"
        )


def check_head_dim(name: str, tensor: Tensor, dim_name: str = "head_dim") -> None:
    size = tensor.shape[-1]
    message = (
        f"{name} must have {dim_name} from 1 to {MAX_HEAD_DIM}; got {size} (shape "
        f"{tuple(tensor.shape)})"
    )
    refuse_if(size < 1, message)
    refuse_if(size > MAX_HEAD_DIM, message)


def check_vector(
    name: str, tensor: Tensor, length: Any, first: Tensor, dtype: torch.dtype = torch.int32,
    length_name: str = "batch", like: str = "q",
) -> None:  # fmt: skip
    check_dtype(name, tensor, dtype)
    check_rank(name, tensor, 1, f"({length_name},)")
    check_like(name, tensor, 0, length_name, length, like)
    check_last_stride(name, tensor)
    check_device(name, tensor, first)


# ---- what several operators take ----


def check_qkv(
    q: Tensor, k: Tensor, v: Tensor, k_name: str = "k", v_name: str = "v",
    dims: Sequence[str] = ("num_pages", "page_size"),
) -> None:  # fmt: skip
    """As set_qkv (csrc/torch/make_params.cpp). dims: of k and v, before the heads."""
    for name, tensor in ((k_name, k), (v_name, v)):
        check_device(name, tensor, q)
    num_heads_q, num_heads_kv = q.shape[-2], k.shape[-2]
    shape = tuple(q.shape)
    refuse_if(num_heads_q < 1, f"q must have num_heads_q of at least 1; got shape {shape}")
    message = (
        f"{k_name} must have num_heads_kv that divides num_heads_q = {num_heads_q}; got "
        f"{num_heads_kv} (shape {tuple(k.shape)})"
    )
    refuse_if(num_heads_kv < 1, message)
    if not is_known(num_heads_kv < 1):
        refuse_if(num_heads_q % num_heads_kv != 0, message)
    check_like(v_name, v, -2, "num_heads_kv", num_heads_kv, k_name)
    check_head_dim("q", q, "head_dim")
    check_head_dim(v_name, v, "head_dim_v")
    check_like(k_name, k, -1, "head_dim", q.shape[-1], "q")
    for name, tensor in (("q", q), (k_name, k), (v_name, v)):
        check_last_stride(name, tensor)
    for dim, dim_name in enumerate(dims):
        check_like(v_name, v, dim, dim_name, k.shape[dim], k_name)


def check_sinks(s_aux: Tensor | None, num_heads: Any, first: Tensor) -> None:
    if s_aux is None:
        return
    check_float("s_aux", s_aux)
    check_device("s_aux", s_aux, first)
    message = (
        f"s_aux must have shape (num_heads_q,) = ({num_heads},), one sink per query head; got "
        f"shape {tuple(s_aux.shape)}{_unsharded_sinks(s_aux, num_heads)}"
    )
    if s_aux.dim() != 1:
        raise ValueError(message)
    refuse_if(s_aux.shape[0] != num_heads, message)
    check_last_stride("s_aux", s_aux)


def _unsharded_sinks(s_aux: Tensor, num_heads: Any) -> str:
    """What to do about sinks of all heads beside one tensor parallel rank's share of the heads."""
    if s_aux.dim() != 1 or not isinstance(s_aux.shape[0], int) or not isinstance(num_heads, int):
        return ""
    num_sinks = s_aux.shape[0]
    if num_heads == 0 or num_sinks <= num_heads or num_sinks % num_heads != 0:
        return ""
    return (
        f". s_aux has {num_sinks} logits, q has {num_heads} heads: under tensor parallelism shard "
        "the sinks with the heads (GPT_OSS_TP_PLAN or shard_s_aux of sink_attention_ext.parallel)"
    )


class FactorRange(NamedTuple):
    least: float  # the smallest normal number
    largest: float  # more than 20 powers of two below infinity: products with scores are finite
    largest_ratio: float  # a normal number; beyond, tanh has its ends
    text: str

    def holds(self, value: float) -> bool:
        return self.least <= abs(value) <= self.largest  # of any int, where float() overflows


def factor_range(dtype: torch.dtype) -> FactorRange:
    """Of what scores are multiplied with, which is computed in float32, in float64 for float64."""
    if dtype == torch.float64:
        text = "2**-1022 to 2**1000 (float64)"
        return FactorRange(2.0**-1022, 2.0**1000, 2.0**1022, text)
    return FactorRange(2.0**-126, 2.0**100, 2.0**126, "2**-126 to 2**100 (float32)")


def wrong_softmax_scale(softmax_scale: Any, dtype: torch.dtype) -> str | None:
    """What is wrong with it, or None."""
    kept = factor_range(dtype)
    if kept.holds(softmax_scale):
        return None
    return (
        f"softmax_scale must be finite and not 0, its magnitude from {kept.text}; got "
        f"{number_text(softmax_scale)} (the argument after v is softmax_scale, not FlashAttention "
        "2's dropout_p)"
    )


def wrong_softcap(softcap: Any, softmax_scale: Any, dtype: torch.dtype) -> str | None:
    """The same; of a softmax_scale that is right, or None where it is not known."""
    kept = factor_range(dtype)
    if softcap == 0:
        return None
    if not (softcap > 0 and kept.holds(softcap)):
        return (
            f"softcap must be finite and at least 0, 0.0 (none) or {kept.text}; got "
            f"{number_text(softcap)}"
        )
    if softmax_scale is None or abs(softmax_scale) <= kept.largest_ratio * softcap:
        return None
    return (
        f"softmax_scale / softcap must have a magnitude of at most {kept.largest_ratio:.6g}; got "
        f"{softmax_scale} / {softcap}"
    )


def number_text(value: Any) -> str:
    """A number for a message; Python refuses to write out integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return str(value)


def check_mask(
    q: Tensor, softmax_scale: Any, causal: bool, window_left: Any, window_right: Any, softcap: Any,
    num_sink_tokens: Any,
) -> None:  # fmt: skip
    if softmax_scale is None and isinstance(q.shape[-1], int):
        softmax_scale = q.shape[-1] ** -0.5
    is_known_scale = isinstance(softmax_scale, (int, float))
    wrong = wrong_softmax_scale(softmax_scale, q.dtype) if is_known_scale else None
    if wrong is None and isinstance(softcap, (int, float)):
        wrong = wrong_softcap(softcap, softmax_scale if is_known_scale else None, q.dtype)
    if wrong is not None:
        raise ValueError(wrong)
    for name, bound in (("window_left", window_left), ("window_right", window_right)):
        refuse_if(
            bound < -1,
            "window_size must hold numbers of tokens from 0, or -1 for unbounded; got "
            f"{name} = {bound}",
        )
    refuse_if(
        num_sink_tokens < 0,
        "num_sink_tokens must be at least 0, the first tokens that stay visible beside a sliding "
        f"window; got {num_sink_tokens}",
    )


def check_at_least_0(**values: Any) -> None:
    for name, value in values.items():
        refuse_if(value < 0, f"{name} must be at least 0; got {value}")


def check_dense(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, *mask: Any) -> None:
    """q, whose dtype is right, with what goes with it."""
    check_rank("q", q, 4, "(batch, seqlen_q, num_heads_q, head_dim)")
    check_rank("k", k, 4, "(batch, seqlen_k, num_heads_kv, head_dim)")
    check_rank("v", v, 4, "(batch, seqlen_k, num_heads_kv, head_dim_v)")
    check_same_dtype("k", k, "q", q)
    check_same_dtype("v", v, "q", q)
    check_like("k", k, 0, "batch", q.shape[0], "q")
    check_qkv(q, k, v, dims=("batch", "seqlen_k"))
    check_sinks(s_aux, q.shape[2], q)
    check_mask(q, *mask)


def check_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    seqused_k: Tensor | None, s_aux: Tensor | None, max_seqlen_q: Any, max_seqlen_k: Any,
    *mask: Any,
) -> None:  # fmt: skip
    check_rank("q", q, 3, "(total_q, num_heads_q, head_dim)")
    check_rank("k", k, 3, "(total_k, num_heads_kv, head_dim)")
    check_rank("v", v, 3, "(total_k, num_heads_kv, head_dim_v)")
    check_same_dtype("k", k, "q", q)
    check_same_dtype("v", v, "q", q)
    check_qkv(q, k, v, dims=("total_k",))
    check_sinks(s_aux, q.shape[1], q)
    check_rank("cu_seqlens_q", cu_seqlens_q, 1, "(batch + 1,)")
    entries = cu_seqlens_q.shape[0]
    refuse_if(entries < 1, "cu_seqlens_q must have batch + 1 entries, at least 1; got shape (0,)")
    check_vector("cu_seqlens_q", cu_seqlens_q, entries, q, length_name="batch + 1")
    check_vector(
        "cu_seqlens_k", cu_seqlens_k, entries, q, length_name="batch + 1", like="cu_seqlens_q"
    )
    if seqused_k is not None:
        check_vector("seqused_k", seqused_k, entries - 1, q, like="cu_seqlens_q")
    check_at_least_0(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    check_mask(q, *mask)


def check_results(q: Tensor, head_dim_v: Any, out: Tensor, lse: Tensor) -> None:
    check_dtype("out", out, q.dtype)
    check_dtype("lse", lse, lse_dtype(q.dtype))
    check_device("out", out, q)
    check_device("lse", lse, q)
    check_shape("out", out, (*q.shape[:-1], head_dim_v))
    check_shape("lse", lse, (*q.shape[:-3], q.shape[-2], q.shape[-3]))


def check_gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> None:
    check_results(q, v.shape[-1], out, lse)
    check_same_dtype("dout", dout, "q", q)
    check_device("dout", dout, q)
    check_shape("dout", dout, out.shape)
    if dlse is not None:
        check_dtype("dlse", dlse, lse.dtype)
        check_device("dlse", dlse, q)
        check_shape("dlse", dlse, lse.shape)


def check_descales(q: Tensor, batch: Any, num_heads_kv: Any, *descales: Tensor | None) -> None:
    for name, descale in zip(("q_descale", "k_descale", "v_descale"), descales, strict=True):
        if descale is not None:
            check_device(name, descale, q)
            check_dtype(name, descale, torch.float32)
            check_shape(name, descale, (batch, num_heads_kv), "(batch, num_heads_kv)")
