"""Tensor-core kernels over many equal keys: P and sums are float32, exact at any length."""

from __future__ import annotations

import math

import pytest
import torch
from backends import EMULATED, Backend
from cases import int32

from sink_attention_ext import ops

pytestmark = pytest.mark.sm90


def attend_to_equal_keys(keys: int, value: float, splits: int, dtype: torch.dtype) -> None:
    """A page of a cache over and over; sinks that take a quarter."""
    page = 64
    k_cache = torch.zeros(1, page, 1, 40, dtype=dtype)
    v_cache = torch.full_like(k_cache, value)
    table = torch.zeros(1, keys // page, dtype=torch.int32)
    q = torch.ones(1, 1, 2, 40, dtype=dtype)
    s_aux = torch.full((2,), math.log(keys / 3))
    out, lse = ops.paged_attn(
        q, k_cache, v_cache, table, int32([keys]), None, s_aux, None, None, 1, keys, 0.2, True, -1,
        0, 0.0, splits, 0, None,
    )  # fmt: skip
    true = v_cache[0, 0, 0, 0].double() * 0.75
    assert ((out.double() - true).abs() / true).max() < 4e-3
    assert (lse - math.log(keys * 4 / 3)).abs().max() < 1e-5


@pytest.mark.parametrize("splits", [0, 2])
@pytest.mark.parametrize("value", [1.0, 1.33, 1.99])
def test_decode(backend: Backend, value: float, splits: int) -> None:
    if backend.name not in EMULATED:
        pytest.skip("of the CUDA kernels")
    for dtype in (torch.bfloat16, torch.float16):
        attend_to_equal_keys(2**16, value, splits, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("splits", [0, 1])
def test_a_million(backend: Backend, splits: int) -> None:
    if backend.name not in EMULATED:
        pytest.skip("of the CUDA kernels")
    attend_to_equal_keys(10**6 // 64 * 64, 1.33, splits, torch.bfloat16)
