"""The backends that the grid runs on, and seeds.

Tests take `backend` and call the library through it, so that the same grid runs over every backend
that this machine has: the CPU, the CUDA kernels in the emulator (`make emulator`), and a GPU
where both the build and the machine have one. How many tests ran on each is printed at the end.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

# Read when torch is loaded. Threads that spin while they wait for each other take the core that the
# awaited one needs: beside other programs the many small tensors here took ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import cases
import emulated
import pytest
import torch

import sink_attention_ext
from sink_attention_ext import ops, support

CaseT = TypeVar("CaseT", bound=cases.AttentionCase)
EMULATED = {"emulated-sm80": 80, "emulated-sm90": 90}  # the device's compute capability
# A family of kernels forced for all tests on a GPU, and the error of what it does not take.
FORCED = os.environ.get("SINK_ATTENTION_CUDA_KERNELS")
NOT_TAKEN = "but they do not take this"


@dataclass(frozen=True)
class Backend:
    """The public functions on one device; attention always returns (out, lse)."""

    name: str
    device: str
    use: Callable[[], contextlib.AbstractContextManager]  # while a test runs on it
    flash_attn: Callable[..., Any]
    flash_attn_varlen: Callable[..., Any]
    flash_attn_with_kvcache: Callable[..., Any]
    reshape_and_cache: Callable[..., Any]
    merge_attn_states: Callable[..., Any]

    @property
    def arch(self) -> int:
        """10 * major + minor of the compute capability that kernels are chosen by; 0 on the CPU."""
        return EMULATED.get(self.name) or (support.cuda_arch() if self.device == "cuda" else 0)

    @property
    def is_hopper(self) -> bool:
        """Whether Hopper's kernels run what they take, on an emulated card or a real one. They take
        no float32 or float64, and few of the small head_dims that keep tests quick; so a test of
        other things asks the properties and methods below for dtypes and head_dims."""
        return self.arch == 90 and FORCED != "sm80"

    @property
    def dtype(self) -> torch.dtype:
        """Of tests for which one is enough."""
        return torch.bfloat16 if self.is_hopper else torch.float32

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of tests that go through all of them."""
        return cases.HALF_DTYPES if self.is_hopper else cases.FLOAT_DTYPES

    def hopper_takes(self, case: cases.AttentionCase, stored: torch.dtype | None = None) -> bool:
        """Whether Hopper's kernels run a case of aligned rows, over a cache of `stored` where that
        is not the case's own dtype."""
        is_paged = isinstance(case, cases.PagedCase)
        if isinstance(case, cases.DenseCase):
            longest = case.seqlen_q
        elif is_paged and case.packed_q and not case.tree:  # max_seqlen_q is not given
            longest = sum(case.seqlens_q)
        else:
            longest = max(case.seqlens_q, default=0)
        if stored is None:
            stored = cases.FLOAT8 if is_paged and case.float8 else case.dtype
        try:
            chosen = support.cuda_kernel(
                longest, arch=self.arch, dtype=case.dtype, kv_dtype=stored,
                head_dim=case.head_dim, head_dim_v=case.dim_v, num_heads_q=case.num_heads_q,
                num_heads_kv=case.num_heads_kv, paged=is_paged,
                tree_mask=bool(is_paged and case.tree),
                num_splits=case.num_splits if is_paged else 0,
            )  # fmt: skip
        except RuntimeError as error:  # of a family that is forced
            if NOT_TAKEN in str(error):
                return False
            raise
        return chosen.startswith("sm90::")

    def fitting(self, case: CaseT, stored: torch.dtype | None = None) -> CaseT:
        """The case; on Hopper with head_dims that its kernels take. `stored` as above."""
        if not self.is_hopper or case.dtype not in cases.HALF_DTYPES:
            return case
        if self.hopper_takes(case, stored):
            return case
        is_narrow = stored is not None or getattr(case, "float8", None) is not None
        part = 16 if is_narrow else 8  # numbers in 16 bytes
        dims = [-(-dim // part) * part for dim in (case.head_dim, case.dim_v)]
        if max(dims) <= 32:
            dims = [dim + 32 for dim in dims]
        return replace(case, head_dim=dims[0], head_dim_v=dims[1])

    def fitting_dim(self, head_dim: int) -> int:
        """The same for a test that has no case."""
        return self.fitting(
            cases.DenseCase(seqlen_q=1, seqlen_k=1, head_dim=head_dim, dtype=self.dtype)
        ).head_dim


def _backend(name: str, device: str, use: Callable = contextlib.nullcontext) -> Backend:
    return Backend(
        name,
        device,
        use,
        functools.partial(sink_attention_ext.flash_attn_func, return_lse=True),
        functools.partial(sink_attention_ext.flash_attn_varlen_func, return_lse=True),
        functools.partial(sink_attention_ext.flash_attn_with_kvcache, return_lse=True),
        sink_attention_ext.reshape_and_cache,
        sink_attention_ext.merge_attn_states,
    )


def _available_backends() -> dict[str, Backend]:
    backends = {}
    if "cpu" in ops.BACKENDS:
        backends["cpu"] = _backend("cpu", "cpu")
    if emulated.load():
        for name, arch in EMULATED.items():
            use = functools.partial(emulated.emulated, arch=arch)
            backends[name] = _backend(name, "cpu", use)
    if "cuda" in ops.BACKENDS and torch.cuda.is_available():
        backends["cuda"] = _backend("cuda", "cuda")
    return backends


BACKENDS = _available_backends()


# ---- which of the grid's tests run on which backend ----

# What one emulated test may multiply in the products of its forward (the backward takes 2.5 times
# as much), and what it may where it is marked slow. The emulator does about 1e9 multiplications a
# second in the tensor cores, and a tenth of that in plain float32 and float64.
EMULATED_PRODUCTS = 1.5e7
EMULATED_PRODUCTS_SLOW = 4e8
# Tests whose cases are not in their parameters, and that take the emulator more than two seconds.
SLOW_WHEN_EMULATED = {
    "test_windows",
    "test_visible_keys_exactly",
    "test_batch_invariance_of_long_sequences",
    "test_every_pair_of_edges",
    "test_repeatable",
    "test_number_of_threads_does_not_matter",
    "test_append_of_the_peer_grid",
}


# What emulated-sm90 runs besides: on it, as on a card, whatever Hopper's kernels do not take is
# computed by the others, which emulated-sm80 has tested. So only files whose calls reach them, and
# of these the tests that `_reaches_hopper`. One that then runs none of their thread blocks fails.
HOPPER_FILES = {
    "test_bad_lengths_paged.py",
    "test_bad_lengths_varlen.py",
    "test_batch_invariance.py",
    "test_decode.py",
    "test_dense.py",
    "test_edges.py",
    "test_equal_keys.py",
    "test_fp8_forward.py",
    "test_fuzz.py",
    "test_gradients.py",
    "test_huge_arguments.py",
    "test_paged.py",
    "test_paged_cache.py",
    "test_paged_calls.py",
    "test_quantised_cache.py",
    "test_sink_tokens.py",
    "test_speculative_decoding.py",
    "test_threads.py",
    "test_tree_mask.py",
    "test_varlen.py",
}
# Rows that are not in aligned parts of 16 bytes. Some are in test_head_dims, beside others.
UNALIGNED = ("padded", "unaligned")


def _reaches_hopper(item: pytest.Item, params: dict[str, Any], case: Any) -> bool:
    """By its file, its marks, and by what its parameters say, if anything, of what it calls. `case`
    is one that fits."""
    if item.path.name not in HOPPER_FILES or item.get_closest_marker("not_on_sm90"):
        return False
    if not isinstance(case, cases.AttentionCase):
        in_chunks = params.get("head_dim", 64) % 8 == 0 and params.get("layout") not in UNALIGNED
        return in_chunks and params.get("dtype", torch.bfloat16) in cases.HALF_DTYPES
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


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes the emulator long is slow there; what would take it minutes is left out."""
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
        elif products > EMULATED_PRODUCTS or item.originalname in SLOW_WHEN_EMULATED:
            item.add_marker(pytest.mark.slow)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


# ---- what a test on a GPU must have run ----

NO_BLOCKS = """no thread block of sm90's kernels ran: they do not take what the test calls.
Use backend.fitting, .fitting_dim and .dtype, or mark it: not_on_sm90(reason) leaves it out there,
no_sm90_blocks(reason) lets it pass."""


def _must_reach_hopper(item: pytest.Function) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return (
        params.get("backend") == "emulated-sm90"
        and BACKENDS["emulated-sm90"].is_hopper
        and item.get_closest_marker("no_sm90_blocks") is None
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A test of what the forced kernels do not take is skipped: it is one of the others'. One on
    the emulated Hopper card that ran none of Hopper's kernels has shown nothing."""
    before = emulated.blocks_run() if _must_reach_hopper(pyfuncitem) else None
    try:
        result = yield
    except RuntimeError as error:
        if FORCED and NOT_TAKEN in str(error):
            pytest.skip(f"{FORCED} is forced, and has no kernels for this")
        raise
    if before is not None and not (emulated.blocks_run() - before)["sm90"]:
        pytest.fail(NO_BLOCKS, pytrace=False)
    return result


_ran: Counter[str] = Counter()  # passed tests on each backend
_blocks: Counter[str] = Counter()  # the emulator's thread blocks of each family of kernels


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called where results are collected, also when other processes run the tests."""
    if report.when == "teardown" and report.passed:
        properties = dict(report.user_properties)
        _ran.update([properties["backend"]] if "backend" in properties else [])
        _blocks.update(properties.get("thread blocks", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _ran:
        parts = [f"{count} on {name}" for name, count in sorted(_ran.items())]
        terminalreporter.write_line(f"tests of the grid: {', '.join(parts)}")
    if _blocks:
        counts = ", ".join(f"{_blocks[family]} ({family})" for family in emulated.FAMILIES)
        terminalreporter.write_line(
            f"thread blocks run by the emulator: {counts}, {_blocks['common']} (others)"
        )


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = BACKENDS[request.param]
    is_emulated = backend.name in EMULATED
    before = emulated.blocks_run() if is_emulated else Counter()
    with backend.use():
        yield backend
    request.node.user_properties.append(("backend", backend.name))
    if is_emulated:
        blocks = emulated.blocks_run() - before
        request.node.user_properties.append(("thread blocks", dict(blocks)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def set_instruction_set() -> Iterator[Callable[[str], None]]:
    """ops.set_cpu_instruction_set for the length of a test."""
    before = ops.cpu_instruction_set()
    yield ops.set_cpu_instruction_set
    ops.set_cpu_instruction_set(before)
