"""Kernels survive any cache lengths, block-table entries, slots and tree masks.

As in test_bad_lengths_varlen.py. Keys of a page that the cache does not have count as zeros.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from backends import EMULATED, Backend
from bad_lengths import MAX, MIN, bad_cumulative, bad_used, random_cumulative, untouched
from cases import int32
from torch import Tensor

from sink_attention_ext import ops, reference

pytestmark = pytest.mark.sm90

TRUE_USED = [30, 61, 17]
NUM_PAGES, COLUMNS = 12, 4
TABLE = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
BAD_PAGES = [-1, MIN, MAX, NUM_PAGES, NUM_PAGES + 1, 2**30, -(2**30)]
FLOAT8 = torch.float8_e4m3fn
Results = tuple[Tensor, Tensor]


class Cache:
    """Three sequences. Hopper loads pages of 16 by TMA, of 5 by cp.async. `scales`: "head" or
    "token", of 8-bit elements."""

    def __init__(
        self, backend: Backend, dtype: torch.dtype, page_size: int = 16, stored: Any = None,
        scales: str | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(3)
        self.dtype, self.page_size = dtype, page_size
        self.dim = 48 if dtype == torch.bfloat16 else 16
        shape = (NUM_PAGES, page_size, 2, self.dim)
        self.caches = [torch.randn(shape).to(stored or dtype) for _ in range(2)]
        if stored == torch.int8:
            self.caches = [torch.randint(-127, 128, shape).to(torch.int8) for _ in range(2)]
        sizes = {None: None, "head": (2,), "token": shape[:3]}[scales]
        self.scales = [None if sizes is None else torch.rand(sizes) / 64 for _ in range(2)]
        self.used = [min(n, COLUMNS * page_size) for n in TRUE_USED]
        self.s_aux = torch.randn(4)

    def attend(
        self, q: Tensor, used: list[int], table: list[list[int]] = TABLE,
        cu_seqlens_q: list[int] | None = None, longest: int = 64, num_splits: int = 0,
        tree: Tensor | None = None, window: int = -1, in_place: bool = False,
    ) -> Results:  # fmt: skip
        cu = None if cu_seqlens_q is None else int32(cu_seqlens_q)
        arguments = (
            q, *self.caches, int32(table), int32(used), cu, self.s_aux, *self.scales, longest,
            2**31 - 1, 0.2, True, window, 0, 0.0, num_splits, 3 if window >= 0 else 0, tree,
        )  # fmt: skip
        if not in_place:
            return ops.paged_attn(*arguments)
        out, lse = torch.zeros_like(q), torch.zeros(4, len(q))
        if cu is None:
            lse = torch.zeros(q.shape[0], 4, q.shape[1])
        ops.paged_attn_out(*arguments, out=out, lse=lse)
        return out, lse

    def queries(self, *rows: int) -> Tensor:
        torch.manual_seed(4)
        return torch.randn(*rows, 4, self.dim).to(self.dtype)


KINDS = {
    "float32": {"dtype": torch.float32},
    "float32, pages of 5": {"dtype": torch.float32, "page_size": 5},
    "float32, int8": {"dtype": torch.float32, "stored": torch.int8, "scales": "token"},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, pages of 5": {"dtype": torch.bfloat16, "page_size": 5},
    "bfloat16, float8": {"dtype": torch.bfloat16, "stored": FLOAT8, "scales": "head"},
    "bfloat16, int8 tokens": {"dtype": torch.bfloat16, "stored": torch.int8, "scales": "token"},
}


@pytest.fixture(params=KINDS)
def cache(request: pytest.FixtureRequest, backend: Backend) -> Cache:
    if backend.name not in EMULATED:
        pytest.skip("the CPU refuses such lengths, and a card would not tell of an access")
    if backend.is_hopper and KINDS[request.param]["dtype"] == torch.float32:
        pytest.skip("not Hopper's")
    return Cache(backend, **KINDS[request.param])


def assert_same(one: Results, other: Results, sequence: int) -> None:
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x[sequence], y[sequence])


SHAPES = [(1, 0), (1, 3), (1, 1), (4, 9), (20, 0)]  # of queries a sequence, and num_splits


def test_bad_cache_seqlens(cache: Cache) -> None:
    for rows, splits in SHAPES:
        q = cache.queries(3, rows)
        truth = cache.attend(q, cache.used, num_splits=splits)
        for bad in bad_used(cache.used):
            for in_place in (False, True):
                given = cache.attend(q, bad, num_splits=splits, in_place=in_place)
                for i in range(3):
                    if bad[i] == cache.used[i]:
                        assert_same(given, truth, i)
                    elif bad[i] < 0:  # no key
                        assert not given[0][i].any()


def test_bad_pages(cache: Cache) -> None:
    for rows, splits in SHAPES:
        q = cache.queries(3, rows)
        truth = cache.attend(q, cache.used, num_splits=splits)
        for page in BAD_PAGES:
            table = [list(row) for row in TABLE]
            table[1][1] = page
            given = cache.attend(q, cache.used, table, num_splits=splits)
            assert_same(given, truth, 0)
            assert_same(given, truth, 2)
            assert given[0].isfinite().all()
        all_bad = cache.attend(q, [MAX] * 3, [BAD_PAGES[:4]] * 3, num_splits=splits)
        assert not all_bad[0].any()


def test_keys_of_a_page_that_is_not_there_are_zeros(cache: Cache) -> None:
    q = cache.queries(3, 1)
    for page in (-1, NUM_PAGES):
        table = [list(row) for row in TABLE]
        table[1][1] = page
        out, lse = cache.attend(q, cache.used, table)
        k, v = (
            x.double() * (1 if s is None else s.double()[..., None])
            for x, s in zip(cache.caches, cache.scales, strict=True)
        )
        k, v = (
            torch.cat([x[4], torch.zeros_like(x[5]), x[6], x[7]])[None, : cache.used[1]]
            for x in (k, v)
        )
        expected = reference.attention(
            q[1:2].double(), k, v, s_aux=cache.s_aux.double(), softmax_scale=0.2
        )
        tolerance = 1e-5 if cache.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[1:2].double(), expected[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse[1:2].double(), expected[1], atol=tolerance, rtol=tolerance)


def test_bad_cu_seqlens_q(cache: Cache) -> None:
    for true, splits in (([0, 3, 5, 9], 0), ([0, 3, 5, 9], 5), ([0, 30, 41, 58], 1)):
        longest = max(b - a for a, b in zip(true, true[1:], strict=False))
        q = cache.queries(true[-1])
        truth = cache.attend(q, cache.used, TABLE, true, longest, splits)
        for bad in bad_cumulative(true):
            for bound in (longest, 1):
                out, lse = cache.attend(q, cache.used, TABLE, bad, bound, splits)
                if bound == 1:
                    continue
                for i in untouched(bad, true):
                    rows = slice(true[i], true[i + 1])
                    assert torch.equal(out[rows], truth[0][rows])
                    assert torch.equal(lse[:, rows], truth[1][:, rows])


def test_bad_tree_masks(cache: Cache) -> None:
    """Words of any bits, and packed drafts of a sequence that is longer than a word has bits."""
    rng = random.Random(5)
    words = [rng.getrandbits(64) - 2**63 for _ in range(70)] + [0, -1, 2**63 - 1, -(2**63)]
    tree = torch.tensor(words)
    for window in (-1, 4):
        for splits in (0, 1):
            q = cache.queries(3, 4)
            cache.attend(q, [MAX, 2, -1], tree=tree[:12].view(3, 4), num_splits=splits,
                         window=window)  # fmt: skip
            q = cache.queries(len(words))
            for bad in ([0, 3, 74, 74], [0, 74, 0, 74], [0, MAX, MIN, 5], [74, 3, 2, 1]):
                cache.attend(q, cache.used, TABLE, bad, 4, splits, tree, window)


def sweep(cache: Cache, seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        used = random_cumulative(cache.used, rng)
        table = [
            [rng.choice(BAD_PAGES) if rng.random() < 0.3 else page for page in row] for row in TABLE
        ]
        splits = rng.choice([0, 1, 2, 7])
        window = rng.choice([-1, 10])
        rows = rng.choice([1, 2, 11])
        cache.attend(cache.queries(3, rows), used, table, num_splits=splits, window=window)
        true = [0, 7, 9, 30]
        bad = random_cumulative(true, rng)
        q = cache.queries(30)
        cache.attend(q, used, table, bad, rng.choice([1, 4, 30]), splits, window=window)


def test_random_values(cache: Cache) -> None:
    sweep(cache, range(6))


@pytest.mark.slow
def test_many_random_values(cache: Cache) -> None:
    sweep(cache, range(6, 120))


@pytest.mark.not_on_sm90("writes are the same kernels on every card")
@pytest.mark.parametrize("stored", [torch.float32, torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("scales", ["head", "token"])
def test_bad_slots(backend: Backend, stored: torch.dtype, scales: str) -> None:
    if backend.name not in EMULATED:
        pytest.skip("the CPU refuses such slots, and a card would not tell of an access")
    torch.manual_seed(6)
    good = {1: 3, 5: 40, 6: 63}  # token: slot
    slots = [64, 3, -1, -(2**63), 2**63 - 1, 40, 63, 2**31, 2**40, -2, 65]
    k, v = torch.randn(2, len(slots), 2, 16)

    def write(mapping: list[int]) -> list[Tensor]:
        caches = [torch.zeros(4, 16, 2, 16).to(stored) for _ in range(2)]
        arguments = [k, v, *caches, torch.tensor(mapping)]
        if stored == torch.float32:
            ops.reshape_and_cache(*arguments, None, None)
            return caches
        if scales == "head":
            ops.reshape_and_cache(*arguments, torch.ones(2) / 32, torch.ones(2) / 32)
            return caches
        of_tokens = [torch.zeros(4, 16, 2) for _ in range(2)]
        ops.reshape_and_cache_token_scales(*arguments, *of_tokens)
        return caches + of_tokens

    only_good = [good.get(token, -1) for token in range(len(slots))]
    for given, expected in zip(write(slots), write(only_good), strict=True):
        assert expected.float().any()
        assert torch.equal(given.float(), expected.float())


def test_lengths_near_the_largest_int(backend: Backend) -> None:
    """Of a cache whose table has room for 2^31 keys, all of them in one place of memory."""
    if backend.name not in EMULATED:
        pytest.skip("the emulator tells of an access outside of the tensors")
    for dtype in backend.dtypes:
        dim = backend.fitting_dim(16)
        one = torch.randn(1, 1, 1, dim).to(dtype)
        cache = one.expand(1, 2**30, 1, dim)
        for rows, splits in ((1, 0), (1, 1), (1, 4), (30, 0)):
            q = torch.randn(1, rows, 2, dim).to(dtype)
            for length in (MAX, MAX - 63, MAX - 64, 2**31 - 1024):
                out, lse = ops.paged_attn(
                    q, cache, cache, int32([[0, 0]]), int32([length]), None, None, None, None,
                    q.shape[1], 2**31 - 1, 0.2, True, 100, 0, 0.0, splits, 0, None,
                )  # fmt: skip
                assert lse.isfinite().all()
                torch.testing.assert_close(out, one.expand_as(out), atol=1e-2, rtol=1e-2)


def test_more_keys_than_an_int_counts_are_refused(backend: Backend) -> None:
    if backend.name not in EMULATED:
        pytest.skip("the CPU counts further")
    dim = backend.fitting_dim(16)
    one = torch.randn(1, 1, 1, dim).to(backend.dtype)
    q = torch.randn(1, 5, 2, dim).to(backend.dtype)

    def attend(keys: int) -> Results:
        k = one.expand(1, keys, 1, dim)
        return ops.flash_attn_fwd(q, k, k, None, 0.2, True, 100, -1, 0.0, False, 0)

    out, _ = attend(2**31 - 1024)
    torch.testing.assert_close(out, one.expand_as(out), atol=1e-2, rtol=1e-2)
    with pytest.raises(RuntimeError, match="more rows or keys than one launch can take"):
        attend(2**31 - 1)
