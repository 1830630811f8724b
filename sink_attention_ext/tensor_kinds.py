"""Kinds of tensors that no kernel reads: refused by name, before torch says which kernel lacks."""

from __future__ import annotations

import torch
from torch import Tensor

STRIDED = torch.strided  # a look-up less in each call


def check_kind(name: str, tensor: Tensor) -> None:
    """A strided tensor: neither nested nor sparse nor in mkldnn's layout. (Quantised ones are
    refused by their dtype; torch negates those with a negative bit on the way to the operator.)"""
    if tensor.layout is STRIDED and not tensor.is_nested:
        return
    if tensor.is_nested:
        raise TypeError(
            f"{name} must be a plain tensor; got a nested one: pack the sequences into one tensor "
            "for flash_attn_varlen_func (of a jagged tensor .values(), and .offsets() as int32), "
            "or pad them"
        )
    raise TypeError(
        f"{name} must be a dense tensor of layout torch.strided; got {tensor.layout}: pass "
        f"{name}.to_dense()"
    )


def check_written_kind(name: str, tensor: Tensor) -> None:
    """The same for a tensor that is written in place, whose bits must be its values. Dynamo cannot
    trace the question; the operator asks it again while the graph is traced."""
    if not torch.compiler.is_compiling() and (tensor.is_neg() or tensor.is_conj()):
        raise TypeError(
            f"{name} is written in place and must not have a negative or conjugate bit; got a lazy "
            f"view (torch._neg_view, .conj().imag): pass {name}.resolve_neg() and keep that"
        )
