"""Dense attention, forward and backward, against float64.

The cases are FlashAttention's test matrix and the edges of the kernels' tiles.
"""

from __future__ import annotations

import cases
import oracle
import pytest
import tolerance
import torch
from backends import Backend
from cases import EDGES, FLOAT_DTYPES, HALF_DTYPES, LAYOUTS, LONG_EDGES, MASKS, DenseCase, heads

pytestmark = pytest.mark.sm90

# (seqlen_q, seqlen_k) of FlashAttention 4's test_flash_attn_output.
SMALL = (
    (1, 1), (3, 3), (64, 32), (64, 128), (64, 1), (128, 128), (128, 192), (256, 256), (255, 256),
    (239, 1), (799, 3), (113, 203), (113, 128), (128, 217), (113, 211), (108, 256), (256, 512),
    (384, 256), (640, 128), (512, 256),
)  # fmt: skip
MEDIUM = ((1024, 1024), (1023, 1024), (1024, 1023), (2048, 2048))
LARGE = ((4096, 4096), (4224, 4224))

PEER_MASKS = (
    {},
    {"causal": True},
    {"window_size": (50, -1)},
    {"window_size": (-1, 31)},
    {"window_size": (20, 90)},
    {"causal": True, "window_size": (127, 0)},
)
PEER_FIELDS = {
    "head_dims": [
        {"head_dim": d, "head_dim_v": d_v}
        for d, d_v in ((64, None), (96, None), (128, None), (192, 128), (256, None), (128, 64))
    ],
    "mask": PEER_MASKS,
    "softcap": (0.0, 0.0, 15.0),
    "sink": ("normal", "none", "normal", "4randn", "15rand"),
    "sink_dtype": (torch.float32, torch.bfloat16, torch.float16),
}


def check_dense(backend: Backend, case: DenseCase) -> None:
    case = backend.fitting(case)
    actual = oracle.run(backend.flash_attn, cases.make_dense(case, backend.device), case.options())
    tolerance.check(actual, oracle.expected(case), case.softcap)


def peer_cases(
    seqlens: tuple[tuple[int, int], ...], repeats: int, seed: int, batch: int, **fields: tuple
) -> list[DenseCase]:
    """Every pair of lengths `repeats` times, each time with other options."""
    drawn = cases.draw(len(seqlens) * repeats, seed, **PEER_FIELDS, **fields)
    return [
        DenseCase(seqlen_q=q, seqlen_k=k, batch=batch, seed=seed + i, **cases.merged(drawn[i]))
        for i, (q, k) in enumerate(seqlens * repeats)
    ]


SIX_HEADS = (heads(6, 6), heads(6, 3), heads(6, 1))
TWO_HEADS = (heads(2, 2), heads(2, 1))
DTYPES = (torch.bfloat16, torch.float16, torch.bfloat16, torch.float32)
FAST_DTYPES = (torch.bfloat16, torch.float32)  # torch's float16 products on a CPU are slow


@pytest.mark.parametrize(
    "case", peer_cases(SMALL, 3, 100, batch=2, heads=SIX_HEADS, dtype=DTYPES), ids=str
)
def test_peer_matrix_small(backend: Backend, case: DenseCase) -> None:
    check_dense(backend, case)


@pytest.mark.parametrize(
    "case", peer_cases(MEDIUM, 2, 200, batch=1, heads=TWO_HEADS, dtype=FAST_DTYPES), ids=str
)
def test_peer_matrix_medium(backend: Backend, case: DenseCase) -> None:
    check_dense(backend, case)


@pytest.mark.parametrize(
    "case", peer_cases(LARGE, 1, 300, batch=1, heads=(heads(1, 1),), dtype=FAST_DTYPES), ids=str
)
def test_peer_matrix_large(backend: Backend, case: DenseCase) -> None:
    check_dense(backend, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    peer_cases(SMALL, 12, 400, batch=9, heads=SIX_HEADS, dtype=DTYPES)
    + peer_cases(MEDIUM, 6, 500, batch=2, heads=SIX_HEADS, dtype=FAST_DTYPES)
    + peer_cases(LARGE, 4, 600, batch=1, heads=(heads(6, 1), heads(2, 2)), dtype=FAST_DTYPES),
    ids=str,
)
def test_peer_matrix_whole(backend: Backend, case: DenseCase) -> None:
    check_dense(backend, case)


# ---- where tiles, strips, panels and blocks end ----


def edge_cases(count: int, seed: int) -> list[DenseCase]:
    drawn = cases.draw(
        count,
        seed,
        seqlen_q=LONG_EDGES,
        seqlen_k=LONG_EDGES,
        heads=(heads(1, 1), heads(4, 2), heads(3, 1), heads(5, 1), heads(8, 1), heads(7, 7)),
        head_dim=(4, 8, 16, 20, 33),
        head_dim_v=(None, 5, 16, 40),
        dtype=FLOAT_DTYPES,
        mask=MASKS,
        softcap=(0.0, 0.0, 0.0, 7.0),
        sink=("normal", "none", "normal"),
        layout=LAYOUTS,
    )
    return [DenseCase(seed=seed + i, **cases.merged(fields)) for i, fields in enumerate(drawn)]


@pytest.mark.parametrize("case", edge_cases(120, 1000), ids=str)
def test_lengths_around_tiles(backend: Backend, case: DenseCase) -> None:
    check_dense(backend, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", edge_cases(1500, 2000), ids=str)
def test_lengths_around_tiles_many(backend: Backend, case: DenseCase) -> None:
    check_dense(backend, case)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", edge_cases(48, 3000), ids=str)
def test_lengths_around_tiles_few(backend: Backend, case: DenseCase) -> None:
    check_dense(backend, case)


WINDOWS = (-1, 0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 255, 256, 257, 600)


@pytest.mark.slow_when_emulated
@pytest.mark.parametrize("window_left", WINDOWS)
@pytest.mark.parametrize("seqlens", [(190, 300), (300, 190)], ids=str)
def test_windows(backend: Backend, seqlens: tuple[int, int], window_left: int) -> None:
    """Every pair of bounds, in turn over the dtypes, with rows at whose edge no key is left."""
    for i, window_right in enumerate(WINDOWS):
        case = DenseCase(
            seqlen_q=seqlens[0],
            seqlen_k=seqlens[1],
            num_heads_q=3,
            head_dim=8,
            dtype=backend.dtypes[(i + window_left) % len(backend.dtypes)],
            window_size=(window_left, window_right),
            sink=("normal", "none")[i % 2],
            seed=i,
        )
        check_dense(backend, case)


HEAD_DIMS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 63, 64, 65, 72, 80, 95, 96,
             112, 127, 128, 129, 160, 191, 192, 193, 224, 240, 255, 256)  # fmt: skip


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(backend: Backend, head_dim: int, dtype: torch.dtype) -> None:
    """Each head_dim as it is for q and v, with a smaller, and with a larger head_dim_v."""
    other = HEAD_DIMS[(HEAD_DIMS.index(head_dim) * 11 + 5) % len(HEAD_DIMS)]
    for i, (d, d_v) in enumerate(((head_dim, head_dim), (head_dim, other), (other, head_dim))):
        case = DenseCase(
            seqlen_q=21 + i,
            seqlen_k=45 - i,
            num_heads_q=4,
            num_heads_kv=2,
            head_dim=d,
            head_dim_v=d_v,
            dtype=dtype,
            causal=True,
            layout=LAYOUTS[(head_dim + i) % len(LAYOUTS)],
            seed=head_dim,
        )
        check_dense(backend, case)


# ---- heads, sinks, scales, layouts ----


@pytest.mark.parametrize("num_heads_kv", [1, 2, 0], ids=["mqa", "gqa", "mha"])
@pytest.mark.parametrize("num_heads_q", [2, 4, 6, 8, 10, 14, 16, 32, 40, 64, 96, 128])
def test_head_counts(backend: Backend, num_heads_q: int, num_heads_kv: int) -> None:
    case = DenseCase(
        seqlen_q=19,
        seqlen_k=37,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv or num_heads_q,
        head_dim=16,
        dtype=HALF_DTYPES[num_heads_q // 2 % 2],
        causal=True,
        batch=2,
    )
    check_dense(backend, case)


GQA = ((1, 1), (2, 5), (3, 3), (1, 32), (5, 7), (8, 1), (1, 16), (12, 4), (8, 2), (8, 8))


@pytest.mark.parametrize("seqlen_q", [1, 16, 32, 128])
@pytest.mark.parametrize(("num_heads_kv", "ratio"), GQA)
def test_gqa_ratios(backend: Backend, num_heads_kv: int, ratio: int, seqlen_q: int) -> None:
    case = DenseCase(
        seqlen_q=seqlen_q,
        seqlen_k=160,
        num_heads_q=num_heads_kv * ratio,
        num_heads_kv=num_heads_kv,
        head_dim=32,
        dtype=torch.bfloat16,
        causal=True,
        seed=ratio,
    )
    check_dense(backend, case)


@pytest.mark.parametrize("sink_dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_sink_dtypes(backend: Backend, dtype: torch.dtype, sink_dtype: torch.dtype) -> None:
    """The gradient comes in the sink's dtype, whatever q has (tolerance.check looks)."""
    case = DenseCase(
        seqlen_q=128,
        seqlen_k=128,
        batch=9 if dtype == torch.bfloat16 else 2,
        num_heads_q=6,
        num_heads_kv=3,
        dtype=dtype,
        sink_dtype=sink_dtype,
    )
    check_dense(backend, case)


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (9, 4)}], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("sink", cases.SINKS)
def test_sinks(backend: Backend, sink: str, dtype: torch.dtype, mask: dict) -> None:
    """Sinks from far below to far above every logit; 40 rows before the first key sees light."""
    case = DenseCase(
        seqlen_q=140, seqlen_k=100, num_heads_q=10, head_dim=16, dtype=dtype, sink=sink, **mask
    )
    check_dense(backend, case)


@pytest.mark.parametrize("softcap", [0.0, 0.5, 15.0, 50.0])
@pytest.mark.parametrize("softmax_scale", [0.05, 1.0, 2.5, -0.3])
def test_scales(backend: Backend, softmax_scale: float, softcap: float) -> None:
    for dtype in backend.dtypes:
        case = DenseCase(
            seqlen_q=33,
            seqlen_k=70,
            head_dim=20,
            dtype=dtype,
            causal=True,
            softmax_scale=softmax_scale,
            softcap=softcap,
        )
        check_dense(backend, case)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [16, 19, 64])
def test_layouts(backend: Backend, layout: str, head_dim: int, dtype: torch.dtype) -> None:
    case = DenseCase(
        seqlen_q=50,
        seqlen_k=50,
        batch=3,
        num_heads_q=4,
        num_heads_kv=2,
        head_dim=head_dim,
        dtype=dtype,
        causal=True,
        layout=layout,
    )
    check_dense(backend, case)


def test_slices_of_one_tensor(backend: Backend) -> None:
    """q, k and v as a fused projection leaves them: (batch, seqlen, 3 heads, dim)."""
    case = DenseCase(
        seqlen_q=70, seqlen_k=70, batch=2, num_heads_kv=2, dtype=backend.dtype, causal=True
    )
    made = cases.make_dense(case, backend.device)
    fused = torch.cat([made.q, made.k, made.v], dim=2)
    q, k, v = fused.split(2, dim=2)
    sliced = cases.Inputs(q, k, v, made.s_aux, made.dout, made.dlse)
    actual = oracle.run(backend.flash_attn, sliced, case.options())
    tolerance.check(actual, oracle.expected(case))


@pytest.mark.parametrize("bound", [2**20, 2**31 - 1, 2**31, 2**40])
def test_huge_windows_are_no_windows(backend: Backend, bound: int) -> None:
    case = DenseCase(seqlen_q=40, seqlen_k=55, dtype=backend.dtype)
    inputs = cases.make_dense(case, backend.device)
    actual = oracle.run(backend.flash_attn, inputs, {"window_size": (bound, bound)})
    tolerance.check(actual, oracle.expected(case))


# ---- exactly which keys are seen ----


@pytest.mark.slow_when_emulated
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("seqlens", [(1, 256), (65, 200), (200, 65), (256, 256)], ids=str)
def test_visible_keys_exactly(
    backend: Backend, seqlens: tuple[int, int], mask: dict, dtype: torch.dtype
) -> None:
    """With equal scores and v the unit matrix out[i] is 1/n on the n keys that i sees, 0 elsewhere;
    with dout the unit matrix, dv is the transpose. No rounding can hide a wrong key."""
    seqlen_q, seqlen_k = seqlens
    case = DenseCase(seqlen_q=seqlen_q, seqlen_k=seqlen_k, **mask)
    visible = cases.is_visible_literally(case)
    q = torch.zeros(1, seqlen_q, 2, 8, dtype=dtype, device=backend.device)
    k = torch.randn(1, seqlen_k, 1, 8, device=backend.device).to(dtype)
    v = torch.eye(seqlen_k, 256, dtype=dtype, device=backend.device)[None, :, None]
    v.requires_grad_()
    out, lse = backend.flash_attn(q, k, v, **case.options())
    count = visible.sum(1)
    for head in range(2):
        seen = out[0, :, head, :seqlen_k].cpu()
        assert torch.equal(seen != 0, visible)
        assert not out[0, :, head, seqlen_k:].any()
        keys = lse[0, head].cpu().double().exp()  # no sink: as many as there are
        torch.testing.assert_close(keys, count.double(), rtol=1e-5, atol=0)
    dout = torch.zeros_like(out)
    dout[0, :, 1] = torch.eye(seqlen_q, 256, dtype=dtype, device=backend.device)
    (dv,) = torch.autograd.grad(out, v, dout)
    assert torch.equal(dv[0, :, 0, :seqlen_q].cpu() != 0, visible.T)
    assert not dv[0, :, 0, seqlen_q:].any()


def test_edges_cover_what_they_should() -> None:
    """The matrix's lengths straddle every tile size from 8 to 512."""
    for size in (8, 16, 32, 64, 128, 256, 512):
        assert {size - 1, size, size + 1} <= set(LONG_EDGES)
    assert set(EDGES) <= set(LONG_EDGES)
