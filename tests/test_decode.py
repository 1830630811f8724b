"""The decode kernels' tiles: few query rows over a cache, and splits of the keys.

Every head-dim bucket, element type and number of rows that they have tiles for; windows, sink
tokens and pages that end within a block of keys. On Hopper these are csrc/cuda/sm90/decode,
elsewhere sm80's decode and prefill tiles.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import cases
import emulated
import oracle
import pytest
import tolerance
import torch
from backends import BACKENDS, Backend
from cases import FLOAT8, FLOAT_DTYPES, HALF_DTYPES, PagedCase, heads
from quantised import INT8, check_read, expected, quantise_inputs, read_as
from test_paged import attend, check_paged

pytestmark = pytest.mark.sm90

# (head_dim, head_dim_v): each bucket, full and padded
DIMS = ((32, 16), (64, 64), (80, 48), (96, 96), (128, 128), (192, 128), (144, 160), (192, 192),
        (256, 256))  # fmt: skip
CACHES = ((None, ""), (FLOAT8, "head"), (FLOAT8, "token"), (INT8, "tensor"), (INT8, "token"))
# Up to 16 rows, and up to 64: 17 rows have one that is another warp's.
FEW_ROWS = ((1, heads(16, 1)), (3, heads(4, 2)), (2, heads(8, 1)))
MANY_ROWS = ((5, heads(8, 1)), (8, heads(8, 1)), (17, heads(2, 2)))
MASKS = (
    {"causal": True},
    {"causal": True, "window_size": (127, 0)},
    {"causal": True, "window_size": (40, 0), "num_sink_tokens": 4},
    {"window_size": (200, 7), "softcap": 15.0},
)


def decode_cases(
    rows: tuple[tuple[int, dict[str, int]], ...], seed: int
) -> list[tuple[PagedCase, torch.dtype | None, str]]:
    """Each pair of dims and cache once; the rest in turn."""
    drawn = []
    for i, dims in enumerate(DIMS):
        for j, (stored, kind) in enumerate(CACHES):
            n = i * len(CACHES) + j
            seqlen_q, head_counts = rows[(n + i) % len(rows)]
            fields: dict[str, Any] = dict(MASKS[(n // 2) % len(MASKS)]) | head_counts
            case = PagedCase(
                seqlens_q=(seqlen_q,) * 2,
                seqlens_k=((300, 129), (65, 320), (257, 0))[n % 3],
                head_dim=dims[0],
                head_dim_v=dims[1],
                dtype=HALF_DTYPES[(i + j) % 2],
                page_size=(16, 64, 128, 48, 1, 32)[n % 6],
                packed_q=n % 4 == 1 and stored is None,  # else in test_packed_queries
                heads_first=n % 5 == 2,
                num_splits=(0, 3, 40)[n % 3],
                sink=("normal", "mixed", "none")[n % 3],
                seed=seed + n,
                **fields,
            )
            drawn.append((case, stored, kind))
    return drawn


@pytest.mark.parametrize(
    ("case", "stored", "kind"), decode_cases(FEW_ROWS, 1) + decode_cases(MANY_ROWS, 101), ids=str
)
def test_decode(backend: Backend, case: PagedCase, stored: torch.dtype | None, kind: str) -> None:
    if stored is None:
        check_paged(backend, case)
    else:
        check_read(backend, case, kind, stored)


@pytest.mark.parametrize("stored", [None, FLOAT8, INT8], ids=str)
def test_packed_queries(backend: Backend, stored: torch.dtype | None) -> None:
    """Sequences of other lengths, and of none; max_seqlen_q says that all are short."""
    case = PagedCase(
        seqlens_q=(1, 0, 8, 3),
        seqlens_k=(200, 70, 90, 3),
        num_heads_q=6,
        num_heads_kv=2,
        dtype=torch.bfloat16,
        causal=True,
        packed_q=True,
        num_splits=2,
    )
    inputs = cases.make_paged(case, backend.device)
    if stored is None:
        wanted = oracle.expected_paged(case)
    else:
        inputs = quantise_inputs(case, inputs, "head", stored)
        wanted = expected(case, inputs, inputs.k, inputs.v)
    tolerance.check(attend(backend, case, inputs, max_seqlen_q=8), wanted)


PLAIN = [(dtype, None) for dtype in FLOAT_DTYPES]
STORED = [(torch.bfloat16, FLOAT8), (torch.bfloat16, INT8)]


@pytest.mark.parametrize(("dtype", "stored"), PLAIN + STORED, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 6])
@pytest.mark.parametrize("num_splits", [2, 3, 5, 8, 9, 33, 64])
def test_splits(
    backend: Backend, num_splits: int, seqlen_q: int, dtype: torch.dtype, stored: torch.dtype | None
) -> None:
    """The sink enters once whatever their number, and rows without a key stay empty.

    More of them than blocks of keys: some see none. Joined by one warp, and by four.
    """
    case = PagedCase(
        seqlens_q=(seqlen_q,) * 4,
        seqlens_k=(1500, 64, 3, 0),
        num_heads_q=8,
        head_dim=64 if dtype in HALF_DTYPES else 16,
        dtype=dtype,
        causal=True,
        sink="mixed",
        num_splits=num_splits,
    )
    if stored is None:
        check_paged(backend, case)
    else:
        check_read(backend, case, "token", stored)


@pytest.mark.parametrize("stored", [FLOAT8, INT8], ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_token_scales_of_many_sizes(
    backend: Backend, dtype: torch.dtype, stored: torch.dtype
) -> None:
    """Values whose scales grow and shrink along a sequence by powers of 10; q of all sizes."""
    case = PagedCase(seqlens_q=(2,), seqlens_k=(300,), num_heads_q=8, dtype=dtype, causal=True)
    plain = cases.make_paged(case, backend.device)
    sizes = 10.0 ** torch.tensor([-3.0, 1.0, -2.0, 2.0, 0.0])
    rows = torch.arange(300) // 60
    factor = sizes[rows].to(plain.v[0])[:, None, None]
    table = plain.block_table[0].cpu()
    v_cache = plain.v_cache.clone()
    for j in range(300):
        v_cache[table[j // 16], j % 16] *= factor[j].to(v_cache)
    q = plain.q.clone()
    q[:, 0] *= 1e-3
    q[:, 1] *= 8.0
    plain = replace(plain, q=q, v=[plain.v[0] * factor], v_cache=v_cache)
    inputs = quantise_inputs(case, plain, "token", stored)
    k, v = (read_as(backend, case, "token", stored, x) for x in (inputs.k, inputs.v))
    tolerance.check(attend(backend, case, inputs), expected(case, inputs, k, v))


@pytest.mark.skipif("emulated-sm90" not in BACKENDS, reason="make emulator")
@pytest.mark.parametrize("stored", [None, FLOAT8, INT8], ids=str)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("seqlen_q", [1, 7])
def test_order_of_warps_does_not_matter(
    seqlen_q: int, page_size: int, stored: torch.dtype | None
) -> None:
    """Hopper's kernels under other orders of warps and of arriving copies: the same bits."""
    case = PagedCase(
        seqlens_q=(seqlen_q,) * 2,
        seqlens_k=(330, 70),
        num_heads_q=8,
        page_size=page_size,
        dtype=torch.bfloat16,
        causal=True,
        window_size=(250, 0),
        num_sink_tokens=3,
        num_splits=2,
    )
    inputs = cases.make_paged(case, "cpu")
    if stored is not None:
        inputs = quantise_inputs(case, inputs, "token", stored)
    results = []
    for seed in range(1, 5):
        with emulated.emulated(seed=seed, arch=90):
            before = emulated.blocks_run()
            results.append(attend(BACKENDS["emulated-sm90"], case, inputs))
            blocks = Counter(emulated.blocks_run()) - before
        assert blocks["sm90"] == 2 * 2 * case.num_heads_kv and blocks["sm80"] == 0
    for result in results[1:]:
        assert torch.equal(result.out, results[0].out)
        assert torch.equal(result.lse, results[0].lse)
