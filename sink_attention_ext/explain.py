"""What was wrong with a call that failed, where torch refuses it before an operator runs.

The operators check values, shapes, dtypes, devices and strides (csrc/torch). An argument of a kind
that never comes to them makes torch raise an error of its own, about schemas and dispatch keys. The
functions of this package then ask here, on their way out: a call that succeeds pays nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sink_attention_ext import checks
from sink_attention_ext.fake_checks import (
    FLOAT8,
    FLOAT_DTYPES,
    number_text,
    wrong_softcap,
    wrong_softmax_scale,
)

Layouts = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
DENSE: Layouts = (
    ("batch", "seqlen_q", "num_heads_q", "head_dim"),
    ("batch", "seqlen_k", "num_heads_kv", "head_dim"),
    ("batch", "seqlen_k", "num_heads_kv", "head_dim_v"),
)
PACKED: Layouts = (
    ("total_q", "num_heads_q", "head_dim"),
    ("total_k", "num_heads_kv", "head_dim"),
    ("total_k", "num_heads_kv", "head_dim_v"),
)


def tensor(
    name: str, value: Any, layout: Sequence[str], dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
) -> None:
    """Raises if `value` is no plain tensor, or a quantised one."""
    checks.check_kind_of(name, value, layout)
    if value.is_quantized:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {names}; got {value.dtype}")


def optional_tensor(
    name: str, value: Any, layout: Sequence[str], dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be None or a torch.Tensor {checks.dim_names(layout)}; got "
            f"{type(value).__name__}"
        )
    tensor(name, value, layout, dtypes)


def integers(named: Sequence[tuple[str, Any]]) -> None:
    """Raises if one is beyond int64, which operators take."""
    for name, value in named:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} must be within int64; got {number_text(value)}")


def factors(softmax_scale: Any, softcap: Any, dtype: torch.dtype) -> None:
    """Raises if one is an integer beyond float64, which operators take."""
    if isinstance(softmax_scale, int):
        wrong = wrong_softmax_scale(softmax_scale, dtype)
        if wrong is not None:
            raise ValueError(wrong)
    if isinstance(softcap, int):
        wrong = wrong_softcap(softcap, None, dtype)
        if wrong is not None:
            raise ValueError(wrong)


def attention(
    qkv: tuple[Any, Any, Any],
    layouts: Layouts,
    s_aux: Any,
    descales: tuple[Any, Any, Any],
    softmax_scale: Any,
    softcap: Any,
    counts: Sequence[tuple[str, Any]],
    lengths: tuple[Any, Any, Any] | None = None,
) -> None:
    """Raises a TypeError or ValueError about one of the arguments, if it is of a wrong kind."""
    for name, value, layout in zip(("q", "k", "v"), qkv, layouts, strict=True):
        tensor(name, value, layout, (*FLOAT_DTYPES, FLOAT8))
    checks.check_backend("q", qkv[0])
    if lengths is not None:
        for name, value in zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=False):
            tensor(name, value, ("batch + 1",), (torch.int32,))
        optional_tensor("seqused_k", lengths[2], ("batch",), (torch.int32,))
    optional_tensor("s_aux", s_aux, ("num_heads_q",))
    names = ("q_descale", "k_descale", "v_descale")
    for name, value in zip(names, descales, strict=True):
        optional_tensor(name, value, ("batch", "num_heads_kv"), (torch.float32,))
    factors(softmax_scale, softcap, qkv[0].dtype)
    integers(counts)
