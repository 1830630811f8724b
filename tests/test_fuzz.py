"""Random cases by hypothesis, which then shrinks what fails to its smallest form.

The same examples every time (derandomize): a failure here is a failure everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from backends import BACKENDS, Backend
from cases import FLOAT_DTYPES, LAYOUTS, LONG_EDGES, SINKS, DenseCase, PagedCase, VarlenCase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_merge import MergeCase, check_merge
from test_paged import check_paged

pytestmark = pytest.mark.sm90

FEW, MANY = 120, 3000
Dtypes = tuple[torch.dtype, ...]


def bounded(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


lengths = st.one_of(st.integers(0, 40), st.sampled_from((0, *LONG_EDGES)))
short_lengths = st.one_of(st.integers(0, 20), st.sampled_from((31, 32, 33, 65, 128, 257)))
bounds = st.one_of(st.sampled_from((-1, 0, None)), st.integers(0, 300))
head_dims = st.one_of(st.integers(1, 256), st.sampled_from((8, 16, 32, 64)))


@st.composite
def options(draw: st.DrawFn, dtypes: Dtypes) -> dict[str, Any]:
    num_heads_kv = draw(st.integers(1, 4))
    return {
        "num_heads_kv": num_heads_kv,
        "num_heads_q": num_heads_kv * draw(st.integers(1, 9 if num_heads_kv == 1 else 3)),
        "head_dim": draw(head_dims),
        "head_dim_v": draw(st.one_of(st.none(), head_dims)),
        "dtype": draw(st.sampled_from(dtypes)),
        "softmax_scale": draw(st.sampled_from((None, None, 1.0, 0.1, -0.2))),
        "causal": draw(st.booleans()),
        "window_size": (draw(bounds), draw(bounds)),
        "softcap": draw(st.sampled_from((0.0, 0.0, 1.0, 20.0))),
        "sink": draw(st.sampled_from(sorted(SINKS))),
        "sink_dtype": draw(st.sampled_from(FLOAT_DTYPES)),
        "seed": draw(st.integers(0, 2**20)),
    }


@st.composite
def dense_cases(draw: st.DrawFn, dtypes: Dtypes) -> DenseCase:
    return DenseCase(
        seqlen_q=draw(lengths),
        seqlen_k=draw(lengths),
        batch=draw(st.integers(0, 3)),
        layout=draw(st.sampled_from(LAYOUTS)),
        **draw(options(dtypes)),
    )


@st.composite
def varlen_cases(draw: st.DrawFn, dtypes: Dtypes) -> VarlenCase:
    sequence = st.tuples(short_lengths, short_lengths, st.integers(0, 9))
    sequences = draw(st.lists(sequence, max_size=6))
    return VarlenCase(
        seqlens_q=tuple(q for q, _, _ in sequences),
        seqlens_k=tuple(k for _, k, _ in sequences),
        unused_k=draw(st.sampled_from((None, tuple(unused for _, _, unused in sequences)))),
        extra_rows=draw(st.integers(0, 4)),
        layout=draw(st.sampled_from(LAYOUTS)),
        **draw(options(dtypes)),
    )


@st.composite
def paged_cases(draw: st.DrawFn, dtypes: Dtypes) -> PagedCase:
    packed_q = draw(st.booleans())
    seqlens_k = draw(st.lists(lengths, min_size=1, max_size=4))
    seqlen_q = draw(short_lengths)
    seqlens_q = [draw(short_lengths) if packed_q else seqlen_q for _ in seqlens_k]
    return PagedCase(
        seqlens_q=tuple(seqlens_q),
        seqlens_k=tuple(seqlens_k),
        page_size=draw(st.sampled_from((1, 2, 4, 7, 16, 32, 64, 128, 256))),
        packed_q=packed_q,
        heads_first=draw(st.booleans()),
        float8=draw(st.sampled_from((None, None, None, "scalar", "one", "per head"))),
        num_splits=draw(st.integers(0, 8)),
        **draw(options(dtypes)),
    )


@st.composite
def merge_cases(draw: st.DrawFn, dtypes: Dtypes) -> MergeCase:
    return MergeCase(
        rows=tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=2))),
        num_heads=draw(st.integers(1, 9)),
        head_dim=draw(st.integers(1, 300)),
        num_parts=draw(st.integers(1, 6)),
        dtype=draw(st.sampled_from(dtypes)),
        sink=draw(st.sampled_from(sorted(SINKS))),
        sink_dtype=draw(st.sampled_from(FLOAT_DTYPES)),
        seed=draw(st.integers(0, 2**20)),
    )


def check_dense(backend: Backend, case: DenseCase) -> None:
    case = backend.fitting(case)
    actual = oracle.run(backend.flash_attn, cases.make_dense(case, backend.device), case.options())
    tolerance.check(actual, oracle.expected(case), case.softcap)


def check_varlen(backend: Backend, case: VarlenCase) -> None:
    case = backend.fitting(case)
    inputs = cases.make_varlen(case, backend.device)
    actual = oracle.run(backend.flash_attn_varlen, inputs, case.options())
    tolerance.check(actual, oracle.expected(case), case.softcap)


FUZZED: dict[str, tuple[Callable[[Dtypes], st.SearchStrategy], Callable[..., None]]] = {
    "dense": (dense_cases, check_dense),
    "varlen": (varlen_cases, check_varlen),
    "paged": (paged_cases, check_paged),
    "merge": (merge_cases, check_merge),
}
KINDS = [
    *("dense", "varlen", "paged"),
    pytest.param("merge", marks=pytest.mark.not_on_sm90("Hopper has no kernels of its own for it")),
]


def fuzz(backend: Backend, kind: str, examples: int) -> None:
    strategy, check = FUZZED[kind]

    @bounded(examples)
    @given(strategy(backend.dtypes))
    def run(case: Any) -> None:
        check(backend, case)

    run()


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(backend: Backend, kind: str) -> None:
    fuzz(backend, kind, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fuzz_many(backend: Backend, kind: str) -> None:
    fuzz(backend, kind, MANY)


def test_fuzz_finds_and_shrinks_a_fault() -> None:
    """The first head's sink read in bfloat16: found, and shrunk to two rows and keys or fewer."""
    backend = next(iter(BACKENDS.values()))

    def faulty(*args: Any, s_aux: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if s_aux is not None:
            s_aux = torch.cat([s_aux[:1].bfloat16().to(s_aux.dtype), s_aux[1:]])
        return backend.flash_attn(*args, s_aux=s_aux, **kwargs)

    smallest: list[DenseCase] = []

    @bounded(200)
    @given(dense_cases(FLOAT_DTYPES))
    def run(case: DenseCase) -> None:
        inputs = cases.make_dense(case, backend.device)
        actual = oracle.run(faulty, inputs, case.options())
        try:
            tolerance.check(actual, oracle.expected(case), case.softcap)
        except AssertionError:
            smallest.append(case)
            raise

    with pytest.raises(AssertionError):
        run()
    assert smallest[-1].seqlen_q <= 2 and smallest[-1].seqlen_k <= 2
