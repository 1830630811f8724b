"""Which tests of the matrix run on which emulated backend.

emulated-sm90 runs only tests whose calls reach sm90's kernels; others would test sm80's again. Such
a test fails if no thread block of sm90's ran (conftest.py). Markers say which tests those are:

    sm90                  the file's calls reach sm90's kernels, as far as their parameters allow
    not_on_sm90(reason)   but not this test's
    slow_when_emulated    more than two seconds in the emulator, and its parameters don't show it
"""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from backends import BACKENDS, EMULATED

# What one emulated test may multiply in the products of its forward (the backward takes 2.5 times
# as much), and what it may where it is marked slow. The emulator does about 1e9 multiplications a
# second in the tensor cores, and a tenth of that in plain float32 and float64.
EMULATED_PRODUCTS = 1.5e7
EMULATED_PRODUCTS_SLOW = 4e8
# Rows that are not in aligned parts of 16 bytes. Some are in test_head_dims, beside others.
UNALIGNED = ("padded", "unaligned")


def _reaches_hopper(item: pytest.Item, params: dict[str, Any], case: Any) -> bool:
    """By its markers, and by its parameters where they show the call. `case` fits the backend."""
    if not item.get_closest_marker("sm90") or item.get_closest_marker("not_on_sm90"):
        return False
    if not isinstance(case, cases.AttentionCase):
        is_aligned = params.get("head_dim", 64) % 8 == 0 and params.get("layout") not in UNALIGNED
        return is_aligned and params.get("dtype", torch.bfloat16) in cases.HALF_DTYPES
    if item.get_closest_marker("no_sm90_blocks"):
        return case.dtype in cases.HALF_DTYPES
    if getattr(case, "layout", None) in UNALIGNED:
        return False
    return BACKENDS["emulated-sm90"].hopper_takes(case, params.get("stored"))


def _products(case: cases.AttentionCase) -> float:
    """Multiplications of Q K^T and P V, weighted by their time, as if all queries saw all keys."""
    if isinstance(case, cases.DenseCase):
        pairs = case.batch * case.seqlen_q * case.seqlen_k
    else:
        pairs = sum(q * k for q, k in zip(case.seqlens_q, case.seqlens_k, strict=True))
    weight = 1 if case.dtype in cases.HALF_DTYPES else 10
    return weight * pairs * case.num_heads_q * (case.head_dim + case.dim_v)


def select(items: list[pytest.Item]) -> set[pytest.Item]:
    """Marks as slow what takes the emulator long. Returns what is left out: what would take it
    minutes, and what shows nothing on its Hopper card."""
    left_out = set()
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("backend") not in EMULATED:
            continue
        case = params.get("case")
        if isinstance(case, cases.AttentionCase):
            case = BACKENDS[params["backend"]].fitting(case, params.get("stored"))
        if params["backend"] == "emulated-sm90" and not _reaches_hopper(item, params, case):
            left_out.add(item)
            continue
        products = _products(case) if isinstance(case, cases.AttentionCase) else 0
        if products > EMULATED_PRODUCTS_SLOW:
            left_out.add(item)
        elif products > EMULATED_PRODUCTS or item.get_closest_marker("slow_when_emulated"):
            item.add_marker(pytest.mark.slow)
    return left_out


def marks_without_effect(items: list[pytest.Item], left_out: set[pytest.Item]) -> list[str]:
    """Of a whole collection: files marked sm90 of which nothing runs on emulated-sm90, and tests
    marked slow_when_emulated that no emulated backend runs."""
    marked: dict[str, bool] = {}
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        runs = item not in left_out
        if item.get_closest_marker("sm90"):
            name = f"sm90 of {item.path.name}"
            marked[name] = marked.get(name, False) or (runs and backend == "emulated-sm90")
        if item.get_closest_marker("slow_when_emulated"):
            name = f"slow_when_emulated of {item.path.name}::{item.originalname}"
            marked[name] = marked.get(name, False) or (runs and backend in EMULATED)
    return [name for name, has_effect in marked.items() if not has_effect]
