"""tree_mask: draft tokens in a tree, each of which sees the context and its ancestors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from backends import BACKENDS, Backend
from cases import FLOAT_DTYPES, NAN, PagedCase, PagedInputs, heads, int32
from torch import Tensor

from sink_attention_ext import flash_attn_with_kvcache, ops, reference

pytestmark = [pytest.mark.sanitize, pytest.mark.sm90]

Tree = list[int]  # each token's parent, -1 for a child of the last token of the context


def random_tree(size: int, seed: int) -> Tree:
    rng = cases.generator(seed)
    return [int(torch.randint(max(-1, i - 6), i, (), generator=rng)) for i in range(size)]


def path(tree: Tree, token: int) -> list[int]:
    """The ancestors of a token, and itself."""
    return [*(path(tree, tree[token]) if tree[token] >= 0 else []), token]


def words(tree: Tree) -> list[int]:
    """The tree mask: int64, so that bit 63 is -2**63."""
    sums = [sum(1 << token for token in path(tree, i)) for i in range(len(tree))]
    return [word - 2**64 if word >= 2**63 else word for word in sums]


def as_tensor(rows: list[Any], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


def chain(size: int) -> Tree:
    return list(range(-1, size - 1))


def attend(
    backend: Backend, case: PagedCase, inputs: PagedInputs, tree_mask: Tensor | None, **more: Any
) -> oracle.Results:
    options = case.options() | more
    return oracle.Results(
        *backend.flash_attn_with_kvcache(
            inputs.q, inputs.k_cache, inputs.v_cache, cache_seqlens=inputs.seqlens_k,
            block_table=inputs.block_table, cu_seqlens_q=inputs.cu_seqlens_q, s_aux=inputs.s_aux,
            k_scale=inputs.k_scale, v_scale=inputs.v_scale, num_splits=case.num_splits,
            max_seqlen_q=max(case.seqlens_q), tree_mask=tree_mask, **options,
        )
    )  # fmt: skip


def masks(case: PagedCase, trees: list[Tree], device: str) -> Tensor:
    rows = as_tensor([word for tree in trees for word in words(tree)], device)
    return rows if case.packed_q else rows.view(len(trees), -1)


def expected(case: PagedCase, inputs: PagedInputs, trees: list[Tree]) -> oracle.Expected:
    starts = cases.ends(case.seqlens_q)
    rows = inputs.q if case.packed_q else inputs.q.flatten(0, 1)

    def compute(dtype: torch.dtype) -> oracle.Results:
        outs, lses = [], []
        for b, tree in enumerate(trees):
            k, v = inputs.k[b].to(dtype), inputs.v[b].to(dtype)
            if case.float8:
                k = k * inputs.k_scale.to(dtype).reshape(-1, 1)
                v = v * inputs.v_scale.to(dtype).reshape(-1, 1)
            s_aux = inputs.s_aux
            if s_aux is not None and dtype == torch.float64:
                s_aux = s_aux.double()
            out, lse = reference.attention(
                rows[None, starts[b] : starts[b + 1]].to(dtype), k[None], v[None], s_aux=s_aux,
                tree_mask=as_tensor([words(tree)], rows.device), **case.options(),
            )  # fmt: skip
            outs.append(out[0])
            lses.append(lse[0])
        return oracle.joined(case, outs, lses)

    return oracle.Expected(compute(torch.float64), compute(case.dtype), {})


SEQLENS = (
    {"seqlens_q": (20, 20), "seqlens_k": (300, 20)},
    {"seqlens_q": (3, 3), "seqlens_k": (700, 45)},
    {"seqlens_q": (1, 1), "seqlens_k": (65, 1)},
    {"seqlens_q": (64, 64), "seqlens_k": (200, 90)},
    {"seqlens_q": (64, 64), "seqlens_k": (64, 128)},
    {"seqlens_q": (13, 0, 2, 17), "seqlens_k": (140, 9, 40, 30), "packed_q": True},
    {"seqlens_q": (8, 64), "seqlens_k": (270, 66), "packed_q": True},
)
FIELDS: dict[str, Any] = {
    "lengths": SEQLENS,
    "mask": (
        {"causal": True},
        {"causal": True, "window_size": (0, 0)},
        {"window_size": (4, 0)},
        {"causal": True, "window_size": (60, 0)},
        {"causal": True, "window_size": (2, 0), "num_sink_tokens": 3},
        {"causal": True, "window_size": (30, 0), "num_sink_tokens": 50},
    ),
    "heads": (heads(2, 2), heads(4, 2), heads(8, 1)),
    "head_dim": (16, 64, 24),
    "dtype": FLOAT_DTYPES,
    "softcap": (0.0, 0.0, 15.0),
    "sink": ("normal", "none", "mixed"),
    "page_size": (1, 4, 16),
    "num_splits": (0, 1, 3),
}
DRAWN = cases.draw(42, 7, **FIELDS)
CASES = [PagedCase(**cases.merged(fields), tree=True, seed=i) for i, fields in enumerate(DRAWN)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_random_trees(backend: Backend, case: PagedCase) -> None:
    case = backend.fitting(case)
    inputs = cases.make_paged(case, backend.device)
    trees = [random_tree(n, case.seed + b) for b, n in enumerate(case.seqlens_q)]
    actual = attend(backend, case, inputs, masks(case, trees, backend.device))
    tolerance.check(actual, expected(case, inputs, trees), case.softcap)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no CPU kernels in this build")
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_every_instruction_set(set_instruction_set: Callable[[str], None], case: PagedCase) -> None:
    for name in ops.cpu_instruction_sets().split(","):
        set_instruction_set(name)
        test_random_trees(BACKENDS["cpu"], case)


@pytest.mark.not_on_sm90("it forces sm80's kernels")
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_a_chain_is_plain_causal(backend: Backend, case: PagedCase) -> None:
    """Bit for bit: the word 2**(i + 1) - 1 says what causal says. By kernels that take both:
    Hopper's prefill takes no tree."""
    case = replace(case, num_splits=1)
    inputs = cases.make_paged(case, backend.device)
    trees = [chain(n) for n in case.seqlens_q]
    with ops.forced_cuda_kernels("sm80"):
        actual = attend(backend, case, inputs, masks(case, trees, backend.device))
        plain = attend(backend, case, inputs, None)
    assert torch.equal(actual.out, plain.out) and torch.equal(actual.lse, plain.lse)


@pytest.mark.parametrize("num_splits", [0, 3])
def test_a_chain_is_plain_causal_in_splits(backend: Backend, num_splits: int) -> None:
    case = PagedCase(
        seqlens_q=(4, 4), seqlens_k=(600, 333), num_heads_q=4, causal=True, num_splits=num_splits,
        window_size=(50, 0), num_sink_tokens=3, dtype=torch.bfloat16,
    )  # fmt: skip
    inputs = cases.make_paged(case, backend.device)
    actual = attend(backend, case, inputs, masks(case, [chain(4)] * 2, backend.device))
    plain = attend(backend, case, inputs, None)
    assert torch.equal(actual.out, plain.out) and torch.equal(actual.lse, plain.lse)


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"window_size": (3, 0)},
        {"window_size": (30, 0)},
        {"window_size": (2, 0), "num_sink_tokens": 4},
        {"window_size": (1, 0), "num_sink_tokens": 42},  # draft tokens are sink tokens, by depth
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_path_alone(backend: Backend, dtype: torch.dtype, mask: dict[str, Any]) -> None:
    """A token sees what it would see if its path followed the context, one token after another."""
    context, tree = 40, random_tree(18, 3)
    case = PagedCase(
        seqlens_q=(18,), seqlens_k=(context + 18,), num_heads_q=4, num_heads_kv=2, head_dim=16,
        dtype=dtype, causal=True, **mask,
    )  # fmt: skip
    inputs = cases.make_paged(case, backend.device)
    actual = attend(backend, case, inputs, masks(case, [tree], backend.device))
    for token in range(18):
        tokens = path(tree, token)
        keys = [*range(context), *(context + d for d in tokens)]
        k, v = inputs.k[0][None, keys], inputs.v[0][None, keys]
        q = inputs.q[:, tokens]
        out, lse = backend.flash_attn(q, k, v, s_aux=inputs.s_aux, **case.options())
        eps = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(actual.out[:, token], out[:, -1], rtol=eps, atol=eps)
        torch.testing.assert_close(actual.lse[..., token], lse[..., -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seqlen_q", [63, 64])
def test_each_key_is_seen_or_not(backend: Backend, seqlen_q: int) -> None:
    """With v the identity, out shows which keys count. The last of 64 has the sign bit."""
    tree = random_tree(seqlen_q, 5)
    for window, num_sink_tokens in ((-1, 0), (6, 0), (6, 3), (2, 25)):
        q = torch.zeros(1, seqlen_q, 1, 16, dtype=backend.dtype, device=backend.device)
        k, v = torch.zeros(1, 90, 1, 16), torch.eye(90, 96)[None, :, None]
        out, _ = backend.flash_attn_with_kvcache(
            q, k.to(q), v.to(q), causal=True, window_size=(window, 0),
            num_sink_tokens=num_sink_tokens, tree_mask=as_tensor([words(tree)], q.device),
        )  # fmt: skip
        visible = torch.zeros(seqlen_q, 90, dtype=torch.bool)
        context = 90 - seqlen_q
        for i in range(seqlen_q):
            keys = [*range(context), *(context + d for d in path(tree, i))]
            for position, key in enumerate(keys):
                in_window = window < 0 or position >= len(keys) - 1 - window
                visible[i, key] = in_window or position < num_sink_tokens
        assert torch.equal(out[0, :, 0, :90].cpu() > 0, visible)
        assert not out[..., 90:].any()


def test_rows_that_nobody_reads_and_pages_out_of_sight(backend: Backend) -> None:
    """Packed rows in no sequence; pages between sink tokens and window; NaN beyond the sequence."""
    case = PagedCase(
        seqlens_q=(5, 9), seqlens_k=(90, 60), packed_q=True, num_heads_q=4, page_size=4,
        head_dim=16, dtype=backend.dtype, causal=True, window_size=(7, 0), num_sink_tokens=3,
    )  # fmt: skip
    inputs = cases.make_paged(case, backend.device)
    trees = [random_tree(n, n) for n in case.seqlens_q]
    more = replace(inputs, q=torch.cat([inputs.q, torch.full_like(inputs.q[:2], NAN)]))
    more.block_table[0, 1:19] = -1  # the first tokens of the trees stand at 85 and 51
    more.block_table[1, 1:11] = 2**31 - 1
    tree_mask = masks(case, trees, backend.device)
    tree_mask = torch.cat([tree_mask, tree_mask.new_zeros(2)])
    actual = attend(backend, case, more, tree_mask)
    assert not actual.out[14:].any() and (actual.lse[:, 14:] == -torch.inf).all()
    actual = oracle.Results(actual.out[:14], actual.lse[:, :14])
    tolerance.check(actual, expected(case, inputs, trees))


def test_appended_drafts(backend: Backend) -> None:
    """New keys are those of the draft tokens."""
    tree = random_tree(6, 1)
    k, v = torch.randn(2, 40, 2, 16), torch.randn(2, 40, 2, 16)
    q = torch.randn(2, 6, 4, 16)
    caches = [torch.full((2, 50, 2, 16), NAN) for _ in range(2)]
    for cache, new in zip(caches, (k, v), strict=True):
        cache[:, :34] = new[:, :34]
    tree_mask = torch.tensor([words(tree)] * 2)
    tensors = [x.to(backend.device, backend.dtype) for x in (q, *caches, k[:, 34:], v[:, 34:])]
    options = {"causal": True, "window_size": (3, 0)}
    out, _ = backend.flash_attn_with_kvcache(
        *tensors, 34, tree_mask=tree_mask.to(backend.device), **options
    )
    q, k, v = (x.to(backend.dtype).double() for x in (q, k, v))
    ref, _ = reference.attention(q, k, v, tree_mask=tree_mask, **options)
    torch.testing.assert_close(out.cpu().double(), ref, **tolerance.short_rows(out.dtype))


def test_compiled() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, tree_mask: Tensor) -> Tensor:
        return flash_attn_with_kvcache(q, k, v, causal=True, tree_mask=tree_mask)

    q, k, v = (torch.randn(1, n, 2, 8) for n in (6, 20, 20))
    tree_mask = torch.tensor([words(random_tree(6, 2))])
    call = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(q, k, v, tree_mask), step(q, k, v, tree_mask))


# ---- refusals ----


def refused(error: type[Exception], match: str, **change: Any) -> None:
    """The call with `change`, appending, raises and leaves the caches as they were."""
    q, new = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8)
    caches = [torch.zeros(2, 80, 2, 8) for _ in range(2)]
    arguments: dict[str, Any] = {
        "k": new, "v": new, "cache_seqlens": 5, "causal": True,
        "tree_mask": torch.tensor([[1, 3, 5]] * 2),
    }  # fmt: skip
    arguments |= change
    with pytest.raises(error, match=match):
        flash_attn_with_kvcache(arguments.pop("q", q), *caches, **arguments)
    assert not caches[0].any() and not caches[1].any()


def test_refusals() -> None:
    refused(TypeError, "tree_mask must have dtype torch.int64", tree_mask=torch.ones(2, 3).int())
    refused(TypeError, "tree_mask must be a torch.Tensor", tree_mask=[[1, 3, 5]] * 2)
    refused(ValueError, "tree_mask must have 2 dimensions", tree_mask=torch.tensor([1, 3, 5]))
    refused(ValueError, "tree_mask must have shape .2, 3.", tree_mask=torch.ones(2, 4).long())
    refused(ValueError, "tree_mask needs causal", causal=False)
    refused(ValueError, "tree_mask needs causal", causal=False, window_size=(5, 1))
    long = {"q": torch.randn(2, 65, 4, 8), "tree_mask": torch.ones(2, 65).long()}
    refused(ValueError, "seqlen_q of q must be at most 64 with tree_mask.*got 65", **long)
    for i, word in ((0, 2), (0, 3), (1, 1), (2, 8), (2, 12), (2, -1), (1, -(2**63) | 2)):
        tree_mask = torch.tensor([[1, 3, 5]] * 2)
        tree_mask[1, i] = word
        match = rf"tree_mask must have bit {i} set.*of draft token {i} of sequence 1; got {word}$"
        refused(ValueError, match, tree_mask=tree_mask)
        packed = {
            "q": torch.randn(6, 4, 8), "k": torch.randn(6, 2, 8), "v": torch.randn(6, 2, 8),
            "cu_seqlens_q": int32([0, 3, 6]), "max_seqlen_q": 3, "tree_mask": tree_mask.flatten(),
        }  # fmt: skip
        refused(ValueError, match, **packed)


def test_the_operator_refuses_too() -> None:
    """Without keys to append the operator itself looks at the words; row 63 has the sign bit."""
    q, cache = torch.randn(1, 64, 1, 8), torch.randn(1, 70, 1, 8)
    good = torch.tensor([words(chain(64))])
    flash_attn_with_kvcache(q, cache, cache, causal=True, tree_mask=good)
    for i, word in ((63, 2**63 - 1), (62, -1), (0, 0)):
        bad = good.clone()
        bad[0, i] = word
        with pytest.raises(ValueError, match=f"tree_mask must have bit {i} set.*got {word}"):
            flash_attn_with_kvcache(q, cache, cache, causal=True, tree_mask=bad)
    table, used = int32([[0]]), int32([70])
    options = [None, None, None, None, 64, 70, 1.0, False, -1, 5, 0.0, 0, 0, good]
    with pytest.raises(ValueError, match="tree_mask needs causal.*got window_right 5"):
        ops.paged_attn(q, cache, cache, table, used, *options)
    options[7:10] = [True, -1, 0]
    options[4] = 65
    long = torch.randn(1, 65, 1, 8)
    with pytest.raises(ValueError, match="tree_mask must have shape"):
        ops.paged_attn(long, cache, cache, table, used, *options)
    options[-1] = torch.ones(1, 65).long()
    with pytest.raises(ValueError, match="seqlen_q of q must be at most 64.*got 65"):
        ops.paged_attn(long, cache, cache, table, used, *options)
