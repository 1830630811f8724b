"""Kernels survive any cu_seqlens and seqused_k: on CUDA nothing checks them before the kernels.

No access lies outside the tensors (the emulator would stop it), and every call ends. A sequence
with valid lengths that shares no row with another has the same bits as beside good lengths.
"""

from __future__ import annotations

import random

import pytest
import torch
from backends import EMULATED, Backend
from bad_lengths import bad_cumulative, bad_used, random_cumulative, untouched
from cases import int32
from torch import Tensor

from sink_attention_ext import ops

pytestmark = pytest.mark.sm90

TRUE_Q = [0, 40, 73, 82]
TRUE_K = [0, 70, 120, 200]
TRUE_USED = [70, 50, 80]
DTYPES = [torch.float32, torch.bfloat16]
Results = tuple[Tensor, ...]


class Inputs:
    def __init__(self, dtype: torch.dtype, heads: tuple[int, int] = (4, 2), dim: int = 40) -> None:
        torch.manual_seed(1)
        heads_q, heads_kv = heads
        self.q, self.dout = (torch.randn(TRUE_Q[-1], heads_q, dim).to(dtype) for _ in range(2))
        self.k, self.v = (torch.randn(TRUE_K[-1], heads_kv, dim).to(dtype) for _ in range(2))
        self.s_aux = torch.randn(heads_q)
        self.out, self.lse = self.forward(TRUE_Q, TRUE_K, None)

    def lengths(self, cu_q: list[int], cu_k: list[int], used: list[int] | None) -> Results:
        return int32(cu_q), int32(cu_k), None if used is None else int32(used)

    def forward(
        self, cu_q: list[int], cu_k: list[int], used: list[int] | None, longest: int = 80
    ) -> Results:
        return ops.flash_attn_varlen_fwd(
            self.q, self.k, self.v, *self.lengths(cu_q, cu_k, used), self.s_aux, longest, longest,
            0.2, True, 50, 0, 0.0, False, 3,
        )  # fmt: skip

    def backward(
        self, cu_q: list[int], cu_k: list[int], used: list[int] | None, longest: int = 80,
        deterministic: bool = True,
    ) -> Results:  # fmt: skip
        """Of the results that good lengths gave: lengths may have changed since."""
        return ops.flash_attn_varlen_bwd(
            self.dout, None, self.q, self.k, self.v, self.out, self.lse,
            *self.lengths(cu_q, cu_k, used), self.s_aux, longest, longest, 0.2, True, 50, 0, 0.0,
            deterministic, 3,
        )  # fmt: skip


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def skip_elsewhere(backend: Backend) -> None:
    if backend.name not in EMULATED:
        pytest.skip("the CPU refuses such lengths, and a card would not tell of an access")


def check(
    inputs: Inputs, cu_q: list[int], cu_k: list[int], used: list[int] | None = None
) -> set[int]:
    """Runs all, compares what must be right, and returns those sequences."""
    truth = inputs.backward(TRUE_Q, TRUE_K, None)
    out, lse = inputs.forward(cu_q, cu_k, used)
    dq, dk, dv, _ = inputs.backward(cu_q, cu_k, used)
    inputs.backward(cu_q, cu_k, used, deterministic=False)
    has_keys = {
        i
        for i in range(3)
        if cu_k[i : i + 2] == TRUE_K[i : i + 2] and (used is None or used[i] == TRUE_USED[i])
    }
    right = set(untouched(cu_q, TRUE_Q)) & has_keys
    for i in right:
        rows = slice(TRUE_Q[i], TRUE_Q[i + 1])
        keys = slice(TRUE_K[i], TRUE_K[i + 1])
        assert torch.equal(out[rows], inputs.out[rows])
        assert torch.equal(lse[:, rows], inputs.lse[:, rows])
        assert torch.equal(dq[rows], truth[0][rows])
        if i in untouched(cu_k, TRUE_K):
            assert torch.equal(dk[keys], truth[1][keys])
            assert torch.equal(dv[keys], truth[2][keys])
    return right


def test_bad_cu_seqlens_q(backend: Backend, dtype: torch.dtype) -> None:
    skip_elsewhere(backend)
    inputs = Inputs(dtype)
    right = [check(inputs, bad, TRUE_K) for bad in bad_cumulative(TRUE_Q)]
    assert {0, 1, 2} == set().union(*right)  # each was right beside some bad one


def test_bad_cu_seqlens_k(backend: Backend, dtype: torch.dtype) -> None:
    skip_elsewhere(backend)
    inputs = Inputs(dtype)
    for bad in bad_cumulative(TRUE_K):
        check(inputs, TRUE_Q, bad)
    for bad_q, bad_k in zip(bad_cumulative(TRUE_Q), bad_cumulative(TRUE_K)[::-1], strict=True):
        check(inputs, bad_q, bad_k)


def test_bad_seqused_k(backend: Backend, dtype: torch.dtype) -> None:
    """More than the sequence's keys are never used: the next sequence's gradients stay right."""
    skip_elsewhere(backend)
    inputs = Inputs(dtype)
    for bad in bad_used(TRUE_USED):
        check(inputs, TRUE_Q, TRUE_K, bad)
        check(inputs, TRUE_Q[::-1], bad_cumulative(TRUE_K)[0], bad)


def test_max_seqlen_below_the_lengths(backend: Backend, dtype: torch.dtype) -> None:
    skip_elsewhere(backend)
    inputs = Inputs(dtype)
    for longest in (0, 1, 39, 79):
        for cu_q in (TRUE_Q, [0, 82, 0, 82], [0, 40, 5000, -1]):
            inputs.forward(cu_q, TRUE_K, None, longest)
            for deterministic in (False, True):
                inputs.backward(cu_q, TRUE_K, None, longest, deterministic)


def test_groups_that_tiles_do_not_hold_whole(backend: Backend) -> None:
    """Hopper's backward then leaves rows of a tile out, or copies without boxes."""
    skip_elsewhere(backend)
    for heads in ((3, 1), (24, 1)):
        inputs = Inputs(torch.bfloat16, heads)
        for bad in ([0, 40, 73, 5000], [0, 82, 0, 82], [73, 82, 0, 40], [0, 40, -5, -7]):
            check(inputs, bad, TRUE_K)
            check(inputs, bad, [0, 70, 120, 5000])


def sweep(backend: Backend, dtype: torch.dtype, seeds: range) -> None:
    skip_elsewhere(backend)
    inputs = Inputs(dtype)
    for seed in seeds:
        rng = random.Random(seed)
        cu_q, cu_k = (random_cumulative(true, rng) for true in (TRUE_Q, TRUE_K))
        used = random_cumulative(TRUE_USED, rng) if rng.random() < 0.5 else None
        check(inputs, cu_q if seed % 3 else TRUE_Q, cu_k if seed % 4 else TRUE_K, used)


def test_random_lengths(backend: Backend, dtype: torch.dtype) -> None:
    sweep(backend, dtype, range(10))


@pytest.mark.slow
def test_many_random_lengths(backend: Backend, dtype: torch.dtype) -> None:
    sweep(backend, dtype, range(10, 200))


def test_float8(backend: Backend) -> None:
    skip_elsewhere(backend)
    if not backend.is_hopper:
        pytest.skip("there are no kernels for float8 q, k and v elsewhere")
    torch.manual_seed(2)
    q, k, v = (
        torch.randn(rows, heads, 64).to(torch.float8_e4m3fn)
        for rows, heads in ((TRUE_Q[-1], 4), (TRUE_K[-1], 2), (TRUE_K[-1], 2))
    )
    descale = torch.rand(3, 2) + 0.5

    def run(cu_q: list[int], cu_k: list[int], used: list[int] | None = None) -> Results:
        lengths = int32(cu_q), int32(cu_k), None if used is None else int32(used)
        return ops.lookup("flash_attn_fp8_native")(
            q, k, v, descale, descale, descale, *lengths, torch.zeros(4), 80, 80, 0.2, True, 50, 0,
            0.0, 3,
        )  # fmt: skip

    truth = run(TRUE_Q, TRUE_K)
    for bad in bad_cumulative(TRUE_Q):
        out, lse = run(bad, TRUE_K)
        for i in untouched(bad, TRUE_Q):
            rows = slice(TRUE_Q[i], TRUE_Q[i + 1])
            assert torch.equal(out[rows], truth[0][rows])
            assert torch.equal(lse[:, rows], truth[1][:, rows])
    for bad in bad_cumulative(TRUE_K):
        run(TRUE_Q, bad)
    for bad in bad_used(TRUE_USED):
        run(TRUE_Q, TRUE_K, bad)
