"""What fake kernels (fakes.py) refuse: what csrc/torch/make_problem.cpp does, but for values in
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
        raise RuntimeError(message)


def check_rank(name: str, tensor: Tensor, rank: int, dims: str) -> None:
    if tensor.dim() != rank:
        raise RuntimeError(
            f"{name} must have {rank} dimensions {dims}, got shape {tuple(tensor.shape)}"
        )


def check_size(name: str, tensor: Tensor, dim: int, expected: Any, what: str) -> None:
    refuse_if(
        tensor.shape[dim] != expected,
        f"{name} must have {what} = {expected}, got shape {tuple(tensor.shape)}",
    )


def check_shape(name: str, tensor: Tensor, expected: Sequence[Any]) -> None:
    message = f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}"
    if tensor.dim() != len(expected):
        raise RuntimeError(message)
    for size, wanted in zip(tensor.shape, expected, strict=True):
        refuse_if(size != wanted, message)


def check_dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    if tensor.dtype != expected:
        raise RuntimeError(f"{name} must be {expected}, got {tensor.dtype}")


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise RuntimeError(
            f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}"
        )


def check_device(name: str, tensor: Tensor, first: Tensor) -> None:
    if tensor.device != first.device:
        raise RuntimeError(
            f"{name} must be on the device of the first argument, {first.device}, got "
            f"{tensor.device}"
        )


def check_last_stride(name: str, tensor: Tensor) -> None:
    is_read = not is_known(tensor.numel() == 0) and is_known(tensor.shape[-1] > 1)
    if is_read and is_known(tensor.stride(-1) != 1):
        raise RuntimeError(
            f"{name} must have stride 1 in its last dimension, got stride {tensor.stride(-1)}; "
            "call .contiguous() on it"
        )


def check_head_dim(name: str, tensor: Tensor) -> None:
    size = tensor.shape[-1]
    message = f"{name} must be in [1, {MAX_HEAD_DIM}], got {size}"
    refuse_if(size < 1, message)
    refuse_if(size > MAX_HEAD_DIM, message)


def check_vector(
    name: str, tensor: Tensor, length: Any, first: Tensor, dtype: torch.dtype = torch.int32
) -> None:
    check_dtype(name, tensor, dtype)
    check_shape(name, tensor, (length,))
    check_last_stride(name, tensor)
    check_device(name, tensor, first)


# ---- what several operators take ----


def check_qkv(
    q: Tensor, k: Tensor, v: Tensor, k_name: str = "k", v_name: str = "v"
) -> None:  # set_qkv
    for name, tensor in ((k_name, k), (v_name, v)):
        check_device(name, tensor, q)
    for name, tensor in (("q", q), (k_name, k), (v_name, v)):
        check_last_stride(name, tensor)
    for dim in range(k.dim() - 1):
        check_size(v_name, v, dim, k.shape[dim], f"{k_name}'s size of dimension {dim}")
    check_size(k_name, k, -1, q.shape[-1], "q's head_dim")
    check_head_dim("head_dim of q", q)
    check_head_dim("head_dim of v", v)
    num_heads_q, num_heads_kv = q.shape[-2], k.shape[-2]
    message = (
        f"num_heads of q must be a multiple of num_heads of {k_name}, got {num_heads_q} and "
        f"{num_heads_kv}"
    )
    refuse_if(num_heads_q < 1, message)
    refuse_if(num_heads_kv < 1, message)
    refuse_if(num_heads_q % num_heads_kv != 0, message)


def check_sinks(s_aux: Tensor | None, num_heads: Any, first: Tensor) -> None:
    if s_aux is None:
        return
    check_device("s_aux", s_aux, first)
    check_float("s_aux", s_aux)
    check_shape("s_aux", s_aux, (num_heads,))
    check_last_stride("s_aux", s_aux)


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
        f"{number_text(softmax_scale)}"
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
    is_known_scale = isinstance(softmax_scale, (int, float))
    wrong = wrong_softmax_scale(softmax_scale, q.dtype) if is_known_scale else None
    if wrong is None and isinstance(softcap, (int, float)):
        wrong = wrong_softcap(softcap, softmax_scale if is_known_scale else None, q.dtype)
    if wrong is not None:
        raise RuntimeError(wrong)
    for name, bound in (("window_left", window_left), ("window_right", window_right)):
        refuse_if(bound < -1, f"{name} must be >= -1 (-1: unbounded), got {bound}")
    refuse_if(num_sink_tokens < 0, f"num_sink_tokens must be >= 0, got {num_sink_tokens}")


def check_at_least_0(**values: Any) -> None:
    for name, value in values.items():
        refuse_if(value < 0, f"{name} must be >= 0, got {value}")


def check_dense(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, *mask: Any) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_rank(name, tensor, 4, "(batch, seqlen, num_heads, head_dim)")
        check_dtype(name, tensor, q.dtype)
    check_qkv(q, k, v)
    check_size("k", k, 0, q.shape[0], "q's batch size")
    check_sinks(s_aux, q.shape[2], q)
    check_mask(q, *mask)


def check_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    seqused_k: Tensor | None, s_aux: Tensor | None, max_seqlen_q: Any, max_seqlen_k: Any,
    *mask: Any,
) -> None:  # fmt: skip
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_rank(name, tensor, 3, "(total, num_heads, head_dim)")
        check_dtype(name, tensor, q.dtype)
    check_qkv(q, k, v)
    check_sinks(s_aux, q.shape[1], q)
    message = f"cu_seqlens_q must have shape (batch + 1,), got {tuple(cu_seqlens_q.shape)}"
    if cu_seqlens_q.dim() != 1:
        raise RuntimeError(message)
    entries = cu_seqlens_q.shape[0]
    refuse_if(entries < 1, message)
    check_vector("cu_seqlens_q", cu_seqlens_q, entries, q)
    check_vector("cu_seqlens_k", cu_seqlens_k, entries, q)
    if seqused_k is not None:
        check_vector("seqused_k", seqused_k, entries - 1, q)
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
    check_dtype("dout", dout, q.dtype)
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
            check_shape(name, descale, (batch, num_heads_kv))
