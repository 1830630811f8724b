"""float32 results over many keys and many rows: the error of a sum does not grow with its length.

Two kinds of input: normal numbers, with values and dout around 1, and equal keys and rows, whose
roundings all point the same way. The bounds are those of SDPA at any length: a sum of 64 terms,
then one of such sums. Before sums were taken in pieces, `out` was off by 2e-4 over 16,384 equal
keys.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import BACKENDS
from cases import generator, int32
from torch import Tensor

from sink_attention_ext import (
    flash_attn_func,
    flash_attn_with_kvcache,
    merge_attn_states,
    ops,
)

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="no CPU kernels in this build")
NAMES = ops.cpu_instruction_sets().split(",") if "cpu" in BACKENDS else []
DIM = 64
KINDS = ("normal", "equal")
LENGTHS = (1000, 16384, 65536)

instruction_sets = pytest.mark.parametrize("name", NAMES)
kinds = pytest.mark.parametrize("kind", KINDS)
SetInstructionSet = Callable[[str], None]


def rows_of(kind: str, count: int, around: float, seed: int) -> Tensor:
    """(1, count, 1, DIM)"""
    rng = generator(seed)
    if kind == "equal":
        row = around + 0.1 * torch.randn(1, 1, 1, DIM, generator=rng)
        return row.expand(1, count, 1, DIM).contiguous()
    return around + torch.randn(1, count, 1, DIM, generator=rng)


def exact(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, dout: Tensor | None = None
) -> dict[str, Tensor]:
    """float64: out, lse and, given dout, dq, dk, dv and ds_aux."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", *leaves[:2]) * DIM**-0.5
    if s_aux is not None:
        leaves.append(s_aux.detach().double().requires_grad_())
        sinks = leaves[3].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    out = torch.einsum("bhij,bjhd->bihd", weights, leaves[2])
    results = {"out": out.detach(), "lse": scores.logsumexp(-1).detach()}
    if dout is not None:
        gradients = torch.autograd.grad(out, leaves, dout.double())
        results |= dict(zip(("dq", "dk", "dv", "ds_aux"), gradients, strict=False))
    return results


def error(actual: Tensor, expected: Tensor) -> float:
    """Over the largest number."""
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@instruction_sets
@kinds
@pytest.mark.sanitize
@pytest.mark.parametrize("sink", [None, 0.5, 20.0])
def test_forward(
    set_instruction_set: SetInstructionSet, sink: float | None, kind: str, name: str
) -> None:
    set_instruction_set(name)
    s_aux = None if sink is None else torch.tensor([sink])
    for keys in LENGTHS:
        q = rows_of("normal", 9, 0, 1)
        k, v = rows_of(kind, keys, 0, 2), rows_of(kind, keys, 1, 3)
        expected = exact(q, k, v, s_aux)
        out, lse = flash_attn_func(q, k, v, s_aux=s_aux, return_lse=True)
        assert error(out, expected["out"]) < 2e-6, keys
        assert error(lse, expected["lse"]) < 5e-7, keys


@instruction_sets
@kinds
@pytest.mark.sanitize
@pytest.mark.parametrize("num_splits", [1, 0, 64])
def test_decode(
    set_instruction_set: SetInstructionSet, num_splits: int, kind: str, name: str
) -> None:
    """One row, of keys read in place."""
    set_instruction_set(name)
    for keys in LENGTHS:
        q = rows_of("normal", 1, 0, 1)
        k, v = rows_of(kind, keys, 0, 2), rows_of(kind, keys, 1, 3)
        expected = exact(q, k, v, None)
        out, lse = flash_attn_with_kvcache(
            q, k, v, cache_seqlens=int32([keys]), num_splits=num_splits, return_lse=True
        )
        assert error(out, expected["out"]) < 2e-6, keys
        assert error(lse, expected["lse"]) < 5e-7, keys


@instruction_sets
@pytest.mark.sanitize
def test_queries_gradient_over_many_keys(set_instruction_set: SetInstructionSet, name: str) -> None:
    """dq is a sum of equal terms: two kinds of keys, opposite to each other in k and in v."""
    set_instruction_set(name)
    for keys in LENGTHS:
        sign = torch.where(torch.arange(keys) % 2 == 0, 1.0, -1.0).view(1, -1, 1, 1)
        q = rows_of("normal", 3, 0, 1) / 100
        k, v = sign * rows_of("equal", keys, 1, 2), sign * rows_of("equal", keys, 1, 3)
        dout = rows_of("equal", 3, 1, 4)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        dq = torch.autograd.grad(flash_attn_func(*leaves), q, dout)[0]
        assert error(dq, exact(q, k, v, None, dout)["dq"]) < 3e-6, keys


@instruction_sets
@kinds
@pytest.mark.sanitize
def test_keys_gradients_over_many_rows(
    set_instruction_set: SetInstructionSet, kind: str, name: str
) -> None:
    """dk, dv and ds_aux, the sink's being as large as a key's."""
    set_instruction_set(name)
    for rows in LENGTHS[:2]:
        q, dout = rows_of(kind, rows, 1, 1), rows_of(kind, rows, 1, 4)
        k, v = rows_of("normal", 5, 0, 2), rows_of("normal", 5, 1, 3)
        s_aux = torch.tensor([0.5])
        leaves = [x.requires_grad_() for x in (q, k, v, s_aux)]
        gradients = torch.autograd.grad(flash_attn_func(*leaves[:3], s_aux=s_aux), leaves, dout)
        expected = exact(q, k, v, s_aux, dout)
        for field, actual in zip(("dq", "dk", "dv", "ds_aux"), gradients, strict=True):
            assert error(actual, expected[field]) < 3e-6, (field, rows)


@instruction_sets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_over_a_million_equal_keys(
    set_instruction_set: SetInstructionSet, dtype: torch.dtype, name: str
) -> None:
    set_instruction_set(name)
    keys = 2**20
    q = rows_of("normal", 1, 0, 1)[..., :16].to(dtype)
    k, v = (rows_of("equal", 1, x, 2)[..., :16].to(dtype) for x in (0, 1))
    out, lse = flash_attn_func(
        q, k.expand(1, keys, 1, 16), v.expand(1, keys, 1, 16), return_lse=True
    )
    assert error(out, v.double()) < torch.finfo(dtype).eps / 2
    score = (q.double() * k.double()).sum() / 4
    assert abs(float(lse) - float(score) - 20 * torch.tensor(2.0).log()) < 2e-6


@instruction_sets
def test_lse_of_bfloat16_has_no_bias(set_instruction_set: SetInstructionSet, name: str) -> None:
    """Means over many rows: of one key, whose weight is 1, and of 64."""
    set_instruction_set(name)
    for keys in (1, 64):
        q, k, v = (rows_of("normal", n, 0, n).bfloat16() for n in (4000, keys, keys))
        _, lse = flash_attn_func(q, k, v, return_lse=True)
        bias = float((lse.double() - exact(q, k, v, None)["lse"]).mean())
        assert abs(bias) < (2e-8 if keys == 1 else 2e-7), keys


@instruction_sets
@pytest.mark.sanitize
def test_merge_of_many_parts(set_instruction_set: SetInstructionSet, name: str) -> None:
    set_instruction_set(name)
    out, lse = rows_of("equal", 2, 1, 1), torch.zeros(1, 1, 2)
    for count in (3, 64, 65, 4096):
        merged, merged_lse = merge_attn_states([out] * count, [lse] * count)
        assert error(merged, out.double()) < 2e-6, count
        assert abs(float(merged_lse[0, 0, 0]) - torch.tensor(count).log()) < 1e-6


def test_gradient_of_a_merges_sink_over_many_rows() -> None:
    rows = 2**18
    out = rows_of("equal", rows, 1, 1)[..., :8]
    s_aux = torch.tensor([0.3], requires_grad=True)
    lse = torch.full((1, 1, rows), 0.1)
    merged, _ = merge_attn_states([out], [lse], s_aux)
    (ds_aux,) = torch.autograd.grad(merged.sum(), s_aux)
    share = torch.sigmoid(torch.tensor(0.1).double() - torch.tensor(0.3).double())
    expected = -share * (1 - share) * out[0, 0, 0].double().sum() * rows
    assert abs(float(ds_aux / expected) - 1) < 2e-6
