"""Packed sequences of different lengths, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import cases
import oracle
import pytest
import tolerance
import torch
from backends import Backend
from cases import FLOAT_DTYPES, LAYOUTS, LONG_EDGES, MASKS, VarlenCase, heads, int32

pytestmark = pytest.mark.sm90

Threads = Callable[[int], None]


def check_varlen(backend: Backend, case: VarlenCase) -> oracle.Results:
    case = backend.fitting(case)
    inputs = cases.make_varlen(case, backend.device)
    actual = oracle.run(backend.flash_attn_varlen, inputs, case.options())
    tolerance.check(actual, oracle.expected(case), case.softcap)
    return actual


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_lse_gradient_with_empty_sequences(backend: Backend, dtype: torch.dtype) -> None:
    """FlashAttention's case: no keys for some queries, no queries for some keys."""
    case = VarlenCase(
        seqlens_q=(5, 3, 0), seqlens_k=(2, 0, 1), num_heads_kv=2, dtype=dtype, causal=True
    )
    results = check_varlen(backend, case)
    assert not results.dk[2:].any() and not results.dv[2:].any()  # of a key that no query sees
    assert not results.dq[5:].any() and not results.out[5:].any()


def drawn_cases(count: int, seed: int, lengths: tuple[int, ...], batch: int) -> list[VarlenCase]:
    drawn = cases.draw(
        count,
        seed,
        heads=(heads(2, 2), heads(4, 2), heads(3, 1), heads(8, 1)),
        head_dim=(16, 24, 64, 80, 7),
        head_dim_v=(None, None, 32, 5),
        dtype=FLOAT_DTYPES,
        mask=MASKS,
        softcap=(0.0, 0.0, 0.0, 15.0),
        sink=("normal", "none", "4randn", "mixed"),
        sink_dtype=(torch.float32, torch.bfloat16),
        layout=LAYOUTS,
        extra_rows=(0, 3),
        with_unused=(False, True),
    )
    result = []
    for i, fields in enumerate(drawn):
        picked = cases.draw(batch, seed + i, q=lengths, k=lengths, unused=(0, 1, 17, 40))
        unused_k = tuple(p["unused"] for p in picked) if fields.pop("with_unused") else None
        result.append(
            VarlenCase(
                seqlens_q=tuple(p["q"] for p in picked),
                seqlens_k=tuple(p["k"] for p in picked),
                unused_k=unused_k,
                seed=seed + i,
                **cases.merged(fields),
            )
        )
    return result


def sampled(count: int, seed: int) -> tuple[int, ...]:
    """Lengths of which a batch draws a few, so that all come in turn."""
    order = torch.randperm(len(LONG_EDGES) + 2, generator=cases.generator(seed)).tolist()
    lengths = (0, 0, *LONG_EDGES)
    return tuple(lengths[i] for i in order[:count])


MIXES = [case for i in range(20) for case in drawn_cases(3, 1000 + 10 * i, sampled(5, i), 5)]


@pytest.mark.parametrize("case", MIXES, ids=str)
def test_mixed_lengths(backend: Backend, case: VarlenCase) -> None:
    check_varlen(backend, case)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "case", drawn_cases(32, 3000, (0, 1, 2, 9, 16, 33, 65, 130), batch=6), ids=str
)
def test_short_lengths(backend: Backend, case: VarlenCase) -> None:
    check_varlen(backend, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [case for i in range(60) for case in drawn_cases(8, 5000 + 10 * i, sampled(7, 100 + i), 7)],
    ids=str,
)
def test_mixed_lengths_many(backend: Backend, case: VarlenCase) -> None:
    check_varlen(backend, case)


@pytest.mark.parametrize("mask", [{"causal": True}, {"window_size": (100, 30)}], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_each_sequence_as_if_alone(
    backend: Backend, set_num_threads: Threads, dtype: torch.dtype, mask: dict
) -> None:
    """Packed with others, packed alone and dense: the same bits, gradients too."""
    set_num_threads(1)  # no choice to split the keys of one sequence
    seqlens_q, seqlens_k = (70, 0, 129, 1, 260), (300, 20, 129, 77, 5)
    case = VarlenCase(
        seqlens_q=seqlens_q, seqlens_k=seqlens_k, num_heads_q=4, head_dim=20, dtype=dtype, **mask
    )
    case = backend.fitting(case)
    options = case.options() | {"deterministic": True}
    inputs = cases.make_varlen(case, backend.device)
    packed = oracle.run(backend.flash_attn_varlen, inputs, options)
    ends_q, ends_k = cases.ends(seqlens_q), cases.ends(seqlens_k)
    for b, (seqlen_q, seqlen_k) in enumerate(zip(seqlens_q, seqlens_k, strict=True)):
        rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        own = [inputs.q[rows], inputs.k[keys], inputs.v[keys], inputs.dout[rows]]
        dlse = inputs.dlse[:, rows]
        cu_seqlens = [int32([0, n], backend.device) for n in (seqlen_q, seqlen_k)]
        lengths = (*cu_seqlens, seqlen_q, seqlen_k)
        alone = cases.Inputs(*own[:3], inputs.s_aux, own[3], dlse, lengths)
        dense = cases.Inputs(*(x[None] for x in own[:3]), inputs.s_aux, own[3][None], dlse[None])
        alone = oracle.run(backend.flash_attn_varlen, alone, options)
        dense = oracle.run(backend.flash_attn, dense, options)
        for name, rows_of in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
            whole = getattr(packed, name)[rows_of]
            assert torch.equal(whole, getattr(alone, name)), (name, b)
            assert torch.equal(whole, getattr(dense, name)[0]), (name, b)
        assert torch.equal(packed.lse[:, rows], alone.lse)
        assert torch.equal(packed.lse[:, rows], dense.lse[0])
        assert torch.equal(alone.ds_aux, dense.ds_aux)


@pytest.mark.slow_when_emulated
def test_batch_invariance_of_long_sequences(backend: Backend) -> None:
    lengths = (4224, 1024, 2048)
    ends = cases.ends(lengths)
    q, k, v = (torch.randn(ends[-1], h, 64, device=backend.device).bfloat16() for h in (4, 2, 2))
    s_aux = torch.randn(4, device=backend.device)
    cu = int32(ends, backend.device)
    together = backend.flash_attn_varlen(
        q, k, v, cu, cu, max(lengths), max(lengths), causal=True, s_aux=s_aux
    )
    for start, end in zip(ends, ends[1:], strict=False):
        own = [x[None, start:end] for x in (q, k, v)]
        out, lse = backend.flash_attn(*own, causal=True, s_aux=s_aux)
        assert torch.equal(together[0][start:end], out[0])
        assert torch.equal(together[1][:, start:end], lse[0])


def test_nan_in_one_sequence_stays_there(backend: Backend) -> None:
    case = VarlenCase(
        seqlens_q=(40, 33, 40), seqlens_k=(50, 35, 50), head_dim=16, dtype=backend.dtype,
        causal=True,
    )  # fmt: skip
    case = backend.fitting(case)
    options = case.options() | {"deterministic": True}
    clean = cases.make_varlen(case, backend.device)
    poisoned = cases.make_varlen(case, backend.device)
    for tensor, (start, end) in (
        (poisoned.q, (40, 73)), (poisoned.k, (50, 85)), (poisoned.v, (50, 85)),
        (poisoned.dout, (40, 73)), (poisoned.dlse.T, (40, 73)),
    ):  # fmt: skip
        tensor[start:end] = cases.NAN
    expected = oracle.run(backend.flash_attn_varlen, clean, options)
    actual = oracle.run(backend.flash_attn_varlen, poisoned, options)
    others_q = [*range(40), *range(73, 113)]
    others_k = [*range(50), *range(85, 135)]
    for name, index in (("out", others_q), ("dq", others_q), ("dk", others_k), ("dv", others_k)):
        assert torch.equal(getattr(actual, name)[index], getattr(expected, name)[index]), name
    assert torch.equal(actual.lse[:, others_q], expected.lse[:, others_q])
    assert actual.out[40:73].isnan().all() and actual.lse[:, 40:73].isnan().all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rows_in_no_sequence(backend: Backend, dtype: torch.dtype) -> None:
    """NaN there, and in keys beyond seqused_k (cases.py), changes nothing; they get 0 and -inf."""
    case = VarlenCase(
        seqlens_q=(9, 20),
        seqlens_k=(30, 11),
        unused_k=(5, 0),
        extra_rows=7,
        num_heads_q=4,
        head_dim=16,
        dtype=dtype,
    )
    results = check_varlen(backend, case)
    assert not results.out[29:].any() and not results.dq[29:].any()
    assert (results.lse[:, 29:] == -cases.INF).all()
    for dkv in (results.dk, results.dv):
        assert not dkv[30:35].any() and not dkv[46:].any()


def test_maxima_may_be_larger_than_needed(backend: Backend) -> None:
    case = VarlenCase(
        seqlens_q=(9, 200), seqlens_k=(300, 11), num_heads_q=4, dtype=backend.dtype, causal=True
    )
    options = case.options() | {"deterministic": True}
    inputs = cases.make_varlen(case, backend.device)
    exact = oracle.run(backend.flash_attn_varlen, inputs, options)
    loose = cases.Inputs(
        inputs.q, inputs.k, inputs.v, inputs.s_aux, inputs.dout, inputs.dlse,
        (*inputs.lengths[:2], 5000, 7000),
    )  # fmt: skip
    actual = oracle.run(backend.flash_attn_varlen, loose, options)
    tolerance.check(actual, oracle.expected(case))
    for name, tensor in actual.items().items():
        assert torch.equal(tensor, getattr(exact, name)), name


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "mask", [{"causal": True}, {"window_size": (40, 0), "num_sink_tokens": 3}], ids=str
)
def test_lengths_far_apart(backend: Backend, mask: dict, head_dim: int) -> None:
    """Hopper's blocks of threads skip the many tiles without rows 32 at a time; and in a few, rows
    see no key."""
    case = VarlenCase(
        seqlens_q=(1, *(0,) * 40, 300, 0, 0, 5, 200), seqlens_k=(9, *(3,) * 40, 300, 7, 0, 0, 260),
        num_heads_q=8, num_heads_kv=2, head_dim=head_dim, dtype=torch.bfloat16, **mask,
    )  # fmt: skip
    inputs = cases.make_varlen(case, backend.device)
    actual = oracle.run(backend.flash_attn_varlen, inputs, case.options(), gradients=False)
    tolerance.check(actual, oracle.expected(case, gradients=False))


@pytest.mark.sanitize
@pytest.mark.no_sm90_blocks("there are no rows")
@pytest.mark.parametrize("seqlens_q", [(), (0,), (0, 0)], ids=str)
@pytest.mark.parametrize("seqlen_k", [0, 12])
def test_nothing_to_ask(backend: Backend, seqlens_q: tuple[int, ...], seqlen_k: int) -> None:
    for extra_rows in (0, 2):
        case = VarlenCase(
            seqlens_q=seqlens_q, seqlens_k=(seqlen_k,) * len(seqlens_q), extra_rows=extra_rows,
            dtype=backend.dtype,
        )  # fmt: skip
        check_varlen(backend, case)
