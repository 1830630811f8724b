"""The ends of the ranges: nothing to attend to, NaN, infinities, huge and tiny values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from backends import Backend
from cases import FLOAT_DTYPES, HALF_DTYPES, INF, NAN, DenseCase, PagedCase
from torch.nn.functional import pad

pytestmark = [pytest.mark.sanitize, pytest.mark.sm90]


def check_dense(backend: Backend, case: DenseCase) -> oracle.Results:
    case = backend.fitting(case)
    actual = oracle.run(backend.flash_attn, cases.make_dense(case, backend.device), case.options())
    tolerance.check(actual, oracle.expected(case), case.softcap)
    return actual


# ---- nothing ----


@pytest.mark.parametrize("sink", ["none", "normal", "mixed"])
@pytest.mark.parametrize("seqlen_q", [1, 64, 128, 256])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_no_keys(backend: Backend, dtype: torch.dtype, seqlen_q: int, sink: str) -> None:
    case = DenseCase(
        seqlen_q=seqlen_q, seqlen_k=0, batch=2, num_heads_q=5, head_dim=16, dtype=dtype, sink=sink
    )
    results = check_dense(backend, case)
    assert not results.out.any() and not results.dq.any()


@pytest.mark.no_sm90_blocks("there are no rows")
@pytest.mark.parametrize(
    "shape", [(1, 0, 7), (2, 0, 0), (0, 5, 7), (0, 0, 0)], ids=["queries", "both", "batch", "all"]
)
@pytest.mark.parametrize("sink", ["none", "normal"])
def test_no_queries_or_no_batch(backend: Backend, sink: str, shape: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_k = shape
    case = DenseCase(
        batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads_kv=2, dtype=backend.dtype,
        sink=sink, causal=True,
    )  # fmt: skip
    results = check_dense(backend, case)
    assert results.ds_aux is None or not results.ds_aux.any()
    assert not results.dk.any() and not results.dv.any()


@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("packed_q", [False, True])
@pytest.mark.parametrize("sink", cases.SINKS)
@pytest.mark.parametrize(
    "mask", [{"causal": True}, {"causal": True, "window_size": (3, 0)}, {"window_size": (0, 2)}],
    ids=str,
)  # fmt: skip
def test_rows_without_keys_in_a_cache(
    backend: Backend, mask: dict[str, Any], sink: str, packed_q: bool, num_splits: int
) -> None:
    """More queries than keys: the first rows of each sequence see nothing, split or not."""
    case = PagedCase(
        seqlens_q=(9, 9, 9, 9),
        seqlens_k=(3, 0, 9, 600),
        num_heads_q=5,
        head_dim=8,
        dtype=backend.dtype,
        sink=sink,
        packed_q=packed_q,
        num_splits=num_splits,
        **mask,
    )
    case = backend.fitting(case)
    inputs = cases.make_paged(case, backend.device)
    out, lse = backend.flash_attn_with_kvcache(
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        cache_seqlens=inputs.seqlens_k,
        block_table=inputs.block_table,
        cu_seqlens_q=inputs.cu_seqlens_q,
        max_seqlen_q=9,
        s_aux=inputs.s_aux,
        num_splits=num_splits,
        **case.options(),
    )
    tolerance.check(oracle.Results(out, lse), oracle.expected_paged(case))
    first = out[9] if packed_q else out[1, 0]
    assert not first.any()


def test_a_cache_of_no_pages(backend: Backend) -> None:
    options = {"dtype": backend.dtype, "device": backend.device}
    q = torch.randn(2, 3, 4, 16, **options)
    caches = [torch.empty(0, 16, 2, 16, **options) for _ in range(2)]
    s_aux = torch.randn(4, device=backend.device)
    out, lse = backend.flash_attn_with_kvcache(
        q,
        *caches,
        cache_seqlens=cases.int32([0, 0], backend.device),
        block_table=torch.empty(2, 0, dtype=torch.int32, device=backend.device),
        s_aux=s_aux,
    )
    assert not out.any() and torch.equal(lse, s_aux[None, :, None].expand(2, 4, 3))


@pytest.mark.no_sm90_blocks("there are no rows")
@pytest.mark.parametrize("packed_q", [False, True])
def test_a_cache_for_no_sequence(backend: Backend, packed_q: bool) -> None:
    options = {"dtype": backend.dtype, "device": backend.device}
    caches = [torch.empty(3, 16, 2, 16, **options) for _ in range(2)]
    shape = (0, 4, 16) if packed_q else (0, 3, 4, 16)
    out, lse = backend.flash_attn_with_kvcache(
        torch.empty(shape, **options),
        *caches,
        cache_seqlens=cases.int32([], backend.device),
        block_table=torch.empty(0, 2, dtype=torch.int32, device=backend.device),
        cu_seqlens_q=cases.int32([0], backend.device) if packed_q else None,
    )
    assert out.shape == shape and lse.shape == ((4, 0) if packed_q else (0, 4, 3))


# ---- NaN and infinities ----


@pytest.mark.parametrize("where", ["q", "k", "v", "s_aux"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_nan_in_nan_out(backend: Backend, dtype: torch.dtype, where: str) -> None:
    """And in no row or head that does not see it."""
    case = DenseCase(seqlen_q=70, seqlen_k=70, num_heads_q=4, num_heads_kv=2, dtype=dtype)
    inputs = cases.make_dense(case, backend.device)
    clean, clean_lse = backend.flash_attn(inputs.q, inputs.k, inputs.v, s_aux=inputs.s_aux)
    is_nan = torch.zeros(1, 70, 4, dtype=torch.bool)
    if where == "q":
        inputs.q[0, 33, 1, 5] = NAN
        is_nan[0, 33, 1] = True
    elif where == "s_aux":
        inputs.s_aux[2] = NAN
        is_nan[:, :, 2] = True
    else:
        getattr(inputs, where)[0, 69, 1, 5] = NAN
        is_nan[:, :, 2:] = True
    out, lse = backend.flash_attn(inputs.q, inputs.k, inputs.v, s_aux=inputs.s_aux)
    lse = lse.transpose(1, 2)
    is_nan = is_nan.to(backend.device)
    if where == "v":  # of one column, and not of the softmax
        assert out[..., 5][is_nan].isnan().all()
        assert not lse.isnan().any()
    else:
        assert out[is_nan].isnan().all() and lse[is_nan].isnan().all()
    assert torch.equal(out[~is_nan], clean[~is_nan])
    assert torch.equal(lse[~is_nan], clean_lse.transpose(1, 2)[~is_nan])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_nan_in_keys_that_no_row_sees(backend: Backend, packed: bool, dtype: torch.dtype) -> None:
    """The window of a chunk's rows ends before them: as if they were not there."""
    case = DenseCase(
        seqlen_q=20, seqlen_k=300, num_heads_q=4, dtype=dtype, causal=True, window_size=(50, 0)
    )
    inputs = cases.make_dense(case, backend.device)
    expected = backend.flash_attn(
        inputs.q, inputs.k, inputs.v, s_aux=inputs.s_aux, **case.options()
    )
    inputs.k[:, :230] = NAN  # the first row stands at 280
    inputs.v[:, :230] = NAN
    if packed:
        cu_q, cu_k = (cases.int32([0, n], backend.device) for n in (20, 300))
        out, lse = backend.flash_attn_varlen(
            inputs.q[0], inputs.k[0], inputs.v[0], cu_q, cu_k, 20, 300, s_aux=inputs.s_aux,
            **case.options(),
        )  # fmt: skip
        out, lse = out[None], lse[None]
    else:
        out, lse = backend.flash_attn(
            inputs.q, inputs.k, inputs.v, s_aux=inputs.s_aux, **case.options()
        )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_no_sink_is_a_sink_of_minus_infinity(backend: Backend, dtype: torch.dtype) -> None:
    case = DenseCase(
        seqlen_q=90, seqlen_k=70, num_heads_q=4, head_dim=24, dtype=dtype, causal=True, sink="none"
    )
    case = backend.fitting(case)
    inputs = cases.make_dense(case, backend.device)
    without = oracle.run(backend.flash_attn, inputs, case.options())
    s_aux = torch.full((4,), -INF, device=backend.device)
    infinite = oracle.run(backend.flash_attn, replace(inputs, s_aux=s_aux), case.options())
    for name, tensor in without.items().items():
        assert torch.equal(tensor, getattr(infinite, name)), name
    assert not infinite.ds_aux.any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_sink_of_plus_infinity_takes_all(backend: Backend, dtype: torch.dtype) -> None:
    case = DenseCase(seqlen_q=30, seqlen_k=40, num_heads_q=4, dtype=dtype, sink="inf")
    results = check_dense(backend, case)
    assert not results.out.any() and (results.lse == INF).all()
    for gradient in (results.dq, results.dk, results.dv):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_a_half_sink_is_read_exactly(backend: Backend, dtype: torch.dtype) -> None:
    """Each of the format's finite numbers between -1e4 and 1e4, and both infinities, where there is
    no key: lse is the sink."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    sinks = bits.view(dtype)
    sinks = sinks[(sinks.float().abs() <= 1e4) | sinks.isinf()][::7]
    sinks = torch.cat([sinks, torch.tensor([INF, -INF], dtype=dtype)]).to(backend.device)
    options = {"dtype": backend.dtype, "device": backend.device}
    q = torch.zeros(1, 1, len(sinks), backend.fitting_dim(1), **options)
    kv = q[:, :0, :1]
    _, lse = backend.flash_attn(q, kv, kv, s_aux=sinks)
    assert torch.equal(lse.flatten(), sinks.float())


# ---- large and small ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1e-20, 1e-3, 30.0, 300.0])
def test_magnitude_of_scores(backend: Backend, factor: float, dtype: torch.dtype) -> None:
    """From all equal to one-hot (scores to 1e5); sinks of ordinary size beside them."""
    case = DenseCase(
        seqlen_q=65, seqlen_k=130, num_heads_q=4, head_dim=32, dtype=dtype, softmax_scale=factor
    )
    case = backend.fitting(case)
    results = oracle.run(backend.flash_attn, cases.make_dense(case, backend.device), case.options())
    expected = oracle.expected(case)
    if dtype == torch.float32:
        # The backward has P = exp(s - lse) from an lse that is rounded to float32; torch's softmax
        # need not round it.
        relative = torch.finfo(dtype).eps * float(expected.ref.lse.abs().max())
        noise = {name: relative * getattr(expected.ref, name).abs() for name in ("dq", "dk", "dv")}
        expected = replace(expected, noise=expected.noise | noise)
    tolerance.check(results, expected)
    for tensor in results.items().values():
        assert tensor.isfinite().all()


@pytest.mark.parametrize("exponent", [-30, -10, 0, 10, 15])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_magnitude_of_inputs(backend: Backend, dtype: torch.dtype, exponent: int) -> None:
    """q and k of any size that leaves their products finite: results are finite."""
    case = DenseCase(seqlen_q=40, seqlen_k=50, num_heads_q=4, head_dim=32, dtype=dtype, causal=True)
    case = backend.fitting(case)
    inputs = cases.make_dense(case, backend.device)
    inputs = replace(inputs, q=inputs.q * 10.0**exponent, k=inputs.k * 10.0**exponent)
    results = oracle.run(backend.flash_attn, inputs, case.options())
    for name, tensor in results.items().items():
        assert tensor.isfinite().all(), name
    assert results.out.abs().max() <= inputs.v.abs().max()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shift", [-2e4, -200.0, 200.0, 2e4])
def test_scores_and_sink_shifted_together(
    backend: Backend, shift: float, dtype: torch.dtype
) -> None:
    """softmax does not change, lse moves by the shift: the maximum is subtracted everywhere."""
    torch.manual_seed(3)
    q = torch.cat([torch.randn(1, 30, 2, 7), torch.ones(1, 30, 2, 1)], dim=-1).to(dtype)
    k = torch.cat([torch.randn(1, 300, 2, 7), torch.zeros(1, 300, 2, 1)], dim=-1).to(dtype)
    v = torch.randn(1, 300, 2, 16).to(dtype)
    q, k = (pad(x, (0, backend.fitting_dim(8) - 8)) for x in (q, k))
    s_aux = torch.tensor([0.5, -1.5])
    q, k, v, s_aux = (x.to(backend.device) for x in (q, k, v, s_aux))
    moved = k.clone()
    moved[..., 7] = shift
    exact = float(moved[0, 0, 0, 7])  # as the dtype has it
    still = backend.flash_attn(q, k, v, softmax_scale=1.0, s_aux=s_aux)
    out, lse = backend.flash_attn(q, moved, v, softmax_scale=1.0, s_aux=s_aux + exact)
    # A float32 score of size 2e4 is rounded to 1e-3.
    error = abs(exact) * (1e-15 if dtype == torch.float64 else 2e-7)
    atol = 20 * error + 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), still[0].float(), rtol=0, atol=atol)
    torch.testing.assert_close(lse, still[1] + exact, rtol=0, atol=20 * error + 1e-5)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_equal_scores_in_rising_and_falling_order(backend: Backend, dtype: torch.dtype) -> None:
    """The running maximum rises at every block, or never after the first."""
    k = torch.linspace(-60, 60, 1100).reshape(1, 1100, 1, 1).to(dtype).to(backend.device)
    v = torch.randn(1, 1100, 1, 8).to(dtype).to(backend.device)
    q = torch.ones(1, 3, 1, 1, dtype=dtype, device=backend.device)
    scores = k.double().flatten()
    q, k = (pad(x, (0, backend.fitting_dim(1) - 1)) for x in (q, k))
    s_aux = torch.tensor([55.0], device=backend.device)
    weights = torch.softmax(torch.cat([scores, s_aux.double()]), 0)[:-1]
    expected = weights @ v[0, :, 0].double()
    tolerances = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps * float(v.abs().max())}
    if dtype in (torch.float32, torch.float64):
        tolerances["atol"] *= 60  # of a score
    for order in (slice(None), torch.arange(1099, -1, -1)):
        out, _ = backend.flash_attn(q, k[:, order], v[:, order], softmax_scale=1.0, s_aux=s_aux)
        torch.testing.assert_close(out[0, :, 0].double(), expected.expand(3, 8), **tolerances)


def test_values_near_the_largest_float16(backend: Backend) -> None:
    """An average of numbers near 65504 neither overflows nor loses more than its rounding."""
    dim = backend.fitting_dim(16)
    q, k = (torch.randn(1, 50, 2, dim).half().to(backend.device) for _ in range(2))
    v = torch.full((1, 50, 2, 8), 65504.0, device=backend.device).half()
    out, _ = backend.flash_attn(q, k, v)
    assert ((out.float() - 65504).abs() <= 32).all()
