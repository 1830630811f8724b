"""What gradients owe beyond being close: repeatable bits, exact zeros, and identities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cases
import oracle
import pytest
import tolerance
import torch
from backends import Backend
from cases import FLOAT_DTYPES, HALF_DTYPES, LONG_EDGES, DenseCase, VarlenCase
from torch.nn.functional import pad

pytestmark = pytest.mark.sm90

Threads = Callable[[int], None]

CASE = DenseCase(
    seqlen_q=333,
    seqlen_k=700,
    batch=2,
    num_heads_q=6,
    num_heads_kv=2,
    head_dim=40,
    causal=True,
    window_size=(300, 0),
)
PACKED = VarlenCase(
    seqlens_q=(200, 0, 333, 1),
    seqlens_k=(90, 30, 700, 511),
    num_heads_q=6,
    num_heads_kv=2,
    head_dim=40,
    causal=True,
)


# CUDA kernels add to dq in any order unless they are asked.
SAME_BITS = {"deterministic": True}


def assert_same_bits(actual: oracle.Results, expected: oracle.Results) -> None:
    for name, tensor in expected.items().items():
        assert torch.equal(getattr(actual, name), tensor), name


@pytest.mark.slow_when_emulated
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_repeatable(backend: Backend, dtype: torch.dtype, deterministic: bool) -> None:
    """Two runs give the same bits; on the CPU without being asked to."""
    if not deterministic and backend.name != "cpu":
        pytest.skip("only promised with deterministic=True")
    options = {"deterministic": deterministic}
    dense, packed = replace(CASE, dtype=dtype), replace(PACKED, dtype=dtype)
    inputs = cases.make_dense(dense, backend.device)
    runs = [oracle.run(backend.flash_attn, inputs, dense.options() | options) for _ in range(3)]
    assert_same_bits(runs[1], runs[0])
    assert_same_bits(runs[2], runs[0])
    inputs = cases.make_varlen(packed, backend.device)
    runs = [
        oracle.run(backend.flash_attn_varlen, inputs, packed.options() | options) for _ in range(3)
    ]
    assert_same_bits(runs[1], runs[0])
    assert_same_bits(runs[2], runs[0])


@pytest.mark.slow_when_emulated
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_number_of_threads_does_not_matter(
    backend: Backend, set_num_threads: Threads, dtype: torch.dtype
) -> None:
    """Bit for bit, forward and backward, dense and packed; on the CPU without being asked to."""
    options = SAME_BITS if backend.name != "cpu" else {}
    dense, packed = replace(CASE, dtype=dtype), replace(PACKED, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        inputs = cases.make_dense(dense, backend.device)
        results.append(oracle.run(backend.flash_attn, inputs, dense.options() | options))
        inputs = cases.make_varlen(packed, backend.device)
        results.append(oracle.run(backend.flash_attn_varlen, inputs, packed.options() | options))
    for i in (2, 4):
        assert_same_bits(results[i], results[0])
        assert_same_bits(results[i + 1], results[1])


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_k", [1, 20, 63, 128, 200])
def test_rows_that_see_no_key(backend: Backend, seqlen_k: int, dtype: torch.dtype) -> None:
    """Causal with fewer keys than queries: exact zeros for those rows, the sink has their dlse."""
    case = DenseCase(
        seqlen_q=260, seqlen_k=seqlen_k, num_heads_q=4, head_dim=16, dtype=dtype, causal=True
    )
    case = backend.fitting(case)
    inputs = cases.make_dense(case, backend.device)
    results = oracle.run(backend.flash_attn, inputs, case.options())
    tolerance.check(results, oracle.expected(case))
    empty = slice(0, 260 - seqlen_k)
    assert not results.out[:, empty].any() and not results.dq[:, empty].any()
    sinks = inputs.s_aux.to(results.lse.dtype)[None, :, None]
    assert torch.equal(results.lse[:, :, empty], sinks.expand(1, 4, 260 - seqlen_k))

    dlse = inputs.dlse.clone()
    dlse[:, :, 260 - seqlen_k :] = 0
    only = replace(inputs, dout=torch.zeros_like(inputs.dout), dlse=dlse)
    results = oracle.run(backend.flash_attn, only, case.options())
    torch.testing.assert_close(results.ds_aux, dlse.sum((0, 2)).float())
    for gradient in (results.dq, results.dk, results.dv):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("seqlens", [(1, 1), (70, 300), (300, 70), (1025, 513)], ids=str)
def test_gradient_of_lse_is_the_softmax(
    backend: Backend, seqlens: tuple[int, int], dtype: torch.dtype
) -> None:
    """With dlse = 1 alone: ds_aux sums the sink's shares, and a constant added to all keys along q
    (which adds <q, c> to each score) leaves the keys' shares: sum_j dk[j] = sum_i (1 - share) q."""
    case = DenseCase(
        seqlen_q=seqlens[0],
        seqlen_k=seqlens[1],
        num_heads_q=4,
        num_heads_kv=2,
        head_dim=24,
        dtype=dtype,
        softmax_scale=0.2,
        causal=True,
    )
    case = backend.fitting(case)
    inputs = cases.make_dense(case, backend.device)
    ones = replace(inputs, dout=torch.zeros_like(inputs.dout), dlse=torch.ones_like(inputs.dlse))
    results = oracle.run(backend.flash_attn, ones, case.options())
    lse = results.lse.double()
    share = torch.exp(inputs.s_aux.double()[None, :, None] - lse)
    exact = dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(results.ds_aux.double(), share.sum((0, 2)), rtol=1e-4, atol=1e-4)
    keys = (1 - share)[..., None] * inputs.q.double().transpose(1, 2) * 0.2
    keys = keys.sum(2).unflatten(1, (2, 2)).sum(2)  # over rows, over the group
    eps = torch.finfo(dtype).eps
    bound = eps * 4 * results.dk.double().norm(dim=1) + 1e-4 if not exact else 1e-4
    assert ((results.dk.double().sum(1) - keys).abs() <= bound).all()


def test_one_row_leaves_the_others_alone(backend: Backend) -> None:
    """dout of one row: dq elsewhere is exactly zero, so are dk and dv of keys it does not see."""
    case = DenseCase(
        seqlen_q=300, seqlen_k=300, num_heads_kv=2, head_dim=16, dtype=backend.dtype, causal=True,
        window_size=(40, 0),
    )  # fmt: skip
    case = backend.fitting(case)
    inputs = cases.make_dense(case, backend.device)
    for row in (0, 63, 64, 150, 255, 256, 299):
        dout = torch.zeros_like(inputs.dout)
        dout[:, row, 1] = inputs.dout[:, row, 1]
        one = replace(inputs, dout=dout, dlse=torch.zeros_like(inputs.dlse))
        results = oracle.run(backend.flash_attn, one, case.options())
        rows = torch.zeros(300, 2, dtype=torch.bool)
        rows[row, 1] = True
        assert torch.equal(results.dq[0].cpu().any(-1), rows)
        keys = torch.zeros(300, 2, dtype=torch.bool)
        keys[max(0, row - 40) : row + 1, 1] = True
        assert torch.equal(results.dv[0].cpu().any(-1), keys)
        assert torch.equal(results.dk[0].cpu().any(-1), keys)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "names", [("q",), ("k",), ("v",), ("s_aux",), ("q", "v"), ("k", "s_aux")], ids=str
)
def test_gradients_of_some_inputs_only(backend: Backend, names: tuple[str, ...]) -> None:
    case = replace(CASE, seqlen_q=33, seqlen_k=40, dtype=backend.dtype)
    options = case.options() | SAME_BITS
    inputs = cases.make_dense(case, backend.device)
    whole = oracle.run(backend.flash_attn, inputs, options)
    tensors = {name: getattr(inputs, name).clone() for name in ("q", "k", "v", "s_aux")}
    for name in names:
        tensors[name].requires_grad_()
    out, lse = backend.flash_attn(**tensors, **options)
    grads = torch.autograd.grad(
        [out, lse], [tensors[name] for name in names], [inputs.dout, inputs.dlse]
    )
    for name, grad in zip(names, grads, strict=True):
        assert torch.equal(grad, getattr(whole, f"d{name}")), name


def test_backward_twice_and_in_another_order(backend: Backend) -> None:
    """A kept graph gives the same gradients again; two calls do not share what they saved."""
    case = replace(CASE, seqlen_q=50, seqlen_k=60, dtype=backend.dtype)
    options = case.options() | SAME_BITS
    made = [cases.make_dense(replace(case, seed=seed), backend.device) for seed in (1, 2)]
    alone = [oracle.run(backend.flash_attn, x, options) for x in made]
    leaves = [[t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.s_aux)] for x in made]
    results = [backend.flash_attn(*x[:3], s_aux=x[3], **options) for x in leaves]
    for i in (1, 0, 1):
        seeds = (made[i].dout, made[i].dlse)
        grads = torch.autograd.grad(results[i], leaves[i], seeds, retain_graph=True)
        for name, grad in zip(("dq", "dk", "dv", "ds_aux"), grads, strict=True):
            assert torch.equal(grad, getattr(alone[i], name)), name


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_gradient_with_strides(backend: Backend, dtype: torch.dtype) -> None:
    """dout and dlse as autograd may hand them over: expanded, transposed, with gaps."""
    case = DenseCase(
        seqlen_q=37, seqlen_k=45, batch=2, num_heads_q=4, head_dim=16, dtype=dtype, causal=True
    )
    case = backend.fitting(case)
    inputs = cases.make_dense(case, backend.device)
    shape, dlse = inputs.dout.shape, inputs.dlse
    one = torch.ones((), device=backend.device)
    variants = {
        "expanded": (one.to(dtype).expand(shape), one.expand(dlse.shape)),
        "one row": (inputs.dout[:1, :1].expand(shape), dlse[:, :, :1].expand(dlse.shape)),
        "transposed": (
            inputs.dout.transpose(1, 3).contiguous().transpose(1, 3),
            dlse.transpose(1, 2).contiguous().transpose(1, 2),
        ),
        "gaps": (cases.with_layout(inputs.dout, "padded"), cases.with_layout(dlse, "padded")),
        "aligned gaps": (pad(inputs.dout, (0, 8), value=cases.NAN)[..., : shape[-1]], dlse),
    }
    for name, (dout, strided_dlse) in variants.items():
        strided_dlse = strided_dlse.to(dlse.dtype)
        strided = replace(inputs, dout=dout, dlse=strided_dlse)
        plain = replace(inputs, dout=dout.contiguous(), dlse=strided_dlse.contiguous())
        actual = oracle.run(backend.flash_attn, strided, case.options() | SAME_BITS)
        if name == "gaps" and backend.is_hopper and dtype in HALF_DTYPES:  # not by its kernels
            tolerance.check(actual, oracle.expected(case))
            continue
        expected = oracle.run(backend.flash_attn, plain, case.options() | SAME_BITS)
        for field, tensor in expected.items().items():
            assert torch.equal(getattr(actual, field), tensor), (name, field)


@pytest.mark.slow_when_emulated
@pytest.mark.slow
@pytest.mark.parametrize("seqlen_k", LONG_EDGES)
@pytest.mark.parametrize("seqlen_q", LONG_EDGES)
def test_every_pair_of_edges(backend: Backend, seqlen_q: int, seqlen_k: int) -> None:
    """Causal: with few keys the first rows see nothing, for every pair of lengths."""
    case = DenseCase(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads_q=3,
        head_dim=12,
        dtype=backend.dtypes[(seqlen_q + seqlen_k) % len(backend.dtypes)],
        causal=True,
    )
    case = backend.fitting(case)
    results = oracle.run(backend.flash_attn, cases.make_dense(case, backend.device), case.options())
    tolerance.check(results, oracle.expected(case))
