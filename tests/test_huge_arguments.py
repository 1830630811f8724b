"""Windows, lengths and split counts far beyond any sequence: as if they were just large enough."""

from __future__ import annotations

import pytest
import tolerance
import torch
from backends import Backend
from cases import int32

from sink_attention_ext import ops

pytestmark = [pytest.mark.sanitize, pytest.mark.sm90]

HUGE = (2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1)


@pytest.mark.parametrize("bound", HUGE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_windows_forward_and_backward(backend: Backend, side: str, bound: int) -> None:
    dim = backend.fitting_dim(16)
    q, k, v = (torch.randn(1, n, h, dim).to(backend.dtype) for n, h in ((9, 4), (14, 2), (14, 2)))
    s_aux = torch.randn(4)
    results = []
    for size in (bound, -1):
        window = (size, 3) if side == "left" else (3, size)
        leaves = [x.to(backend.device).requires_grad_() for x in (q, k, v, s_aux)]
        out, lse = backend.flash_attn(
            *leaves[:3], window_size=window, s_aux=leaves[3], deterministic=True
        )
        results.append((out, lse, *torch.autograd.grad(out.sum() + lse.sum(), leaves)))
    for huge, unbounded in zip(*results, strict=True):
        assert torch.equal(huge, unbounded)


@pytest.mark.parametrize("bound", HUGE)
def test_bounds_on_lengths(backend: Backend, bound: int) -> None:
    """max_seqlen far above all rows, as a caller may set it for all batches at once."""
    dim = backend.fitting_dim(16)
    q, k, v = (torch.randn(n, h, dim).to(backend.dtype) for n, h in ((9, 4), (14, 2), (14, 2)))
    ends_q, ends_k = (int32(ends, backend.device) for ends in ([0, 2, 9], [0, 5, 14]))
    results = []
    for max_seqlen in (bound, 9):
        leaves = [x.to(backend.device).requires_grad_() for x in (q, k, v)]
        out, lse = backend.flash_attn_varlen(
            *leaves, ends_q, ends_k, max_seqlen, max_seqlen, causal=True, deterministic=True
        )
        results.append((out, lse, *torch.autograd.grad(out.sum() + lse.sum(), leaves)))
    for huge, exact in zip(*results, strict=True):
        assert torch.equal(huge, exact)


@pytest.mark.parametrize("bound", HUGE)
def test_the_operators_themselves(bound: int) -> None:
    q, k, v = (torch.randn(1, n, 2, 16) for n in (9, 14, 14))
    expected = ops.flash_attn_fwd(q, k, v, None, 0.25, False, -1, -1, 0.0, False, 0)
    huge = ops.flash_attn_fwd(q, k, v, None, 0.25, False, bound, bound, 0.0, False, 0)
    assert torch.equal(huge[0], expected[0])
    for window in ((bound, bound), (-1, -1)):
        arguments = (torch.ones_like(q), None, q, k, v, *expected, None, 0.25, False, *window)
        gradients = ops.flash_attn_bwd(*arguments, 0.0, False, 0)
        assert all(x.isfinite().all() for x in gradients)
        if window == (bound, bound):
            first = gradients
    for one, other in zip(first, gradients, strict=True):
        assert torch.equal(one, other)


def test_a_refused_append_has_written_nothing_whatever_the_window(backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("values are looked at on the CPU only")
    k_cache, v_cache = torch.zeros(2, 4, 8, 2, 16)
    q, k, v = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 16)
    table = int32([[-7, 1]])
    for window in (4, *HUGE):
        with pytest.raises(ValueError, match=r"block_table\[0, 0\] must be in \[0, "):
            backend.flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, int32([11]), table, causal=True, window_size=(window, 0)
            )
    assert not k_cache.any()
    assert not v_cache.any()


@pytest.mark.parametrize("num_splits", [65, 2**31, 2**40, 2**63 - 1])
def test_more_splits_than_make_sense(backend: Backend, num_splits: int) -> None:
    q, cache = torch.randn(2, 1, 4, 16), torch.randn(2, 2, 40, 2, 16)
    tensors = [x.to(backend.device, backend.dtype) for x in (q, *cache)]
    out, lse = backend.flash_attn_with_kvcache(*tensors, num_splits=num_splits)
    once = backend.flash_attn_with_kvcache(*tensors, num_splits=1)
    torch.testing.assert_close(out, once[0], **tolerance.short_rows(backend.dtype))
    torch.testing.assert_close(lse, once[1], rtol=1e-5, atol=1e-6)


def test_a_tree_of_more_drafts_than_keys(backend: Backend) -> None:
    """Drafts 0 and 1 have no key; draft 3 stands behind draft 2, which its window leaves out."""
    q, cache = torch.randn(1, 4, 2, 16), torch.randn(2, 1, 2, 2, 16)
    words = torch.tensor([[0b1, 0b10, 0b100, 0b1100]])
    q, cache = q.to(backend.dtype), cache.to(backend.dtype)
    tensors = [x.to(backend.device) for x in (q, *cache)]
    out, lse = backend.flash_attn_with_kvcache(
        *tensors, causal=True, window_size=(0, 0), tree_mask=words.to(backend.device),
    )  # fmt: skip
    logits = (q[0, 3].float() * cache[0][0, 1].float()).sum(-1) / 4
    torch.testing.assert_close(lse[0, :, 3].cpu(), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[0, 3].cpu(), cache[1][0, 1], rtol=1e-5, atol=1e-5)
    assert (lse[0, :, :2] == -torch.inf).all()
