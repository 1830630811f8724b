"""Gradients: gradcheck in float64, what autograd passes on, autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sink_attention_ext import (
    apply_sink,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attn_states,
    ops,
    reference,
)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def qkvs(
    seqlen_q: int = 5,
    seqlen_k: int = 7,
    heads: tuple[int, int] = (4, 2),
    head_dims: tuple[int, int] = (3, 2),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (batch of 2) and sinks, all leaves."""
    torch.manual_seed(0)
    return (
        randn(2, seqlen_q, heads[0], head_dims[0], dtype=dtype),
        randn(2, seqlen_k, heads[1], head_dims[0], dtype=dtype),
        randn(2, seqlen_k, heads[1], head_dims[1], dtype=dtype),
        randn(heads[0], dtype=torch.promote_types(dtype, torch.float32)),
    )


def grads(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def assert_close(actual: object, expected: object, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- gradcheck ----

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "causal_window": {"causal": True, "window_size": (1, -1)},
    "softcap": {"softcap": 1.5, "causal": True},
    "scale": {"softmax_scale": 0.3},
}


HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}
CASES = [("mha", "causal_window"), ("mqa", "causal_window"), *(("gqa", name) for name in OPTIONS)]


@pytest.mark.parametrize(("heads", "option"), CASES)
def test_gradcheck_dense(heads: str, option: str) -> None:
    """q, k, v and s_aux, through out and lse."""
    inputs = qkvs(3, 5, HEADS[heads])
    assert gradcheck(
        lambda q, k, v, s: flash_attn_func(q, k, v, s_aux=s, return_lse=True, **OPTIONS[option]),
        inputs,
    )


def test_gradcheck_without_sink() -> None:
    q, k, v, _ = qkvs()
    assert gradcheck(lambda q, k, v: flash_attn_func(q, k, v, return_lse=True), (q, k, v))


def test_gradcheck_rows_without_a_key() -> None:
    """seqlen_k < seqlen_q and causal: the first rows see only the sink; lse is s_aux there."""
    inputs = qkvs(seqlen_q=5, seqlen_k=2)
    assert gradcheck(
        lambda q, k, v, s: flash_attn_func(q, k, v, causal=True, s_aux=s, return_lse=True), inputs
    )


@pytest.mark.parametrize("option", ["plain", "causal_window", "softcap"])
def test_gradcheck_varlen(option: str) -> None:
    """Empty queries, empty keys, unused keys, and rows of q in no sequence."""
    torch.manual_seed(0)
    inputs = (randn(8, 4, 3), randn(9, 2, 3), randn(9, 2, 2), randn(4))
    cu_seqlens_q = torch.tensor([0, 3, 3, 5, 7], dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 4, 6, 6, 9], dtype=torch.int32)
    seqused_k = torch.tensor([3, 2, 0, 3], dtype=torch.int32)

    def attend(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, 3, 4, s_aux=s_aux, return_lse=True,
            seqused_k=seqused_k, **OPTIONS[option],
        )  # fmt: skip
        assert torch.equal(out[7:], torch.zeros_like(out[7:]))
        assert (lse[:, 7:] == -torch.inf).all()
        return out, lse[:, :7]

    assert gradcheck(attend, inputs)


@pytest.mark.parametrize("rank", [3, 4])
def test_gradcheck_merge(rank: int) -> None:
    """First and second derivatives: the backward is plain torch."""
    torch.manual_seed(0)
    lead = (2,) if rank == 4 else ()
    outs = [randn(*lead, 3, 2, 2) for _ in range(2)]
    lses = [randn(*lead, 2, 3) for _ in range(2)]

    def merge(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attn_states(tensors[:2], tensors[2:4], tensors[4])

    assert gradcheck(merge, (*outs, *lses, randn(2)))
    assert gradgradcheck(merge, (*outs, *lses, randn(2)))


def test_gradcheck_apply_sink() -> None:
    torch.manual_seed(0)
    assert gradcheck(apply_sink, (randn(2, 3, 2, 2), randn(2, 2, 3), randn(2)))
    assert gradcheck(apply_sink, (randn(3, 2, 2), randn(2, 3), randn(2)))


def test_one_key() -> None:
    """q = k = scale = 1, v = 2, sink 0: wrong where the gradient of lse is dropped."""
    one = [torch.ones(1, 1, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    v = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    s_aux = torch.zeros(1, dtype=torch.float64)
    out = flash_attn_func(*one, v, softmax_scale=1.0, s_aux=s_aux)
    for gradient in grads(out.sum(), *one):
        assert gradient.item() == pytest.approx(0.39322387, abs=5e-9)
    rescaled, _ = apply_sink(*flash_attn_func(*one, v, softmax_scale=1.0, return_lse=True), s_aux)
    for gradient in grads(rescaled.sum(), *one):
        assert gradient.item() == pytest.approx(0.39322387, abs=5e-9)


# ---- what autograd passes on ----


@pytest.mark.parametrize("used", ["out", "lse", "both"])
def test_gradient_of_one_result(used: str) -> None:
    """Unused results arrive as no gradient, not as a tensor of zeros, and change nothing."""
    inputs = qkvs()

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        weight = torch.arange(lse.numel(), dtype=lse.dtype).reshape(lse.shape).cos()
        terms = {"out": out.sin().sum(), "lse": (lse * weight).sum()}
        return terms.get(used, terms["out"] + terms["lse"])

    q, k, v, s_aux = inputs
    ours = grads(loss(*flash_attn_func(q, k, v, s_aux=s_aux, return_lse=True)), q, k, s_aux)
    expected = grads(loss(*reference.attention(q, k, v, s_aux=s_aux)), q, k, s_aux)
    assert_close(ours, expected)


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of one operator."""

    def __init__(self, op: Callable[..., object]) -> None:
        super().__init__()
        self.op, self.calls = op, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if func is self.op:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_reaches_the_backward_and_an_unused_lse_is_none(deterministic: bool) -> None:
    q, k, v, s_aux = qkvs()
    out = flash_attn_func(q, k, v, s_aux=s_aux, deterministic=deterministic)
    with Recorder(ops.flash_attn_bwd) as recorder:
        out.sum().backward()
    ((_, dlse, *_, passed, _),) = recorder.calls
    assert dlse is None
    assert passed is deterministic


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_gradient_of_out_of_any_stride(layout: str) -> None:
    q, k, v, s_aux = qkvs(head_dims=(3, 4))
    out = flash_attn_func(q, k, v, s_aux=s_aux)
    torch.manual_seed(1)
    if layout == "expanded":
        dout = torch.randn(1, 1, 1, 1, dtype=out.dtype).expand_as(out)
    else:
        dout = torch.randn(4, 4, 5, 2, dtype=out.dtype).permute(3, 2, 1, 0)
    actual = torch.autograd.grad(out, (q, k, v, s_aux), dout, retain_graph=True)
    expected = torch.autograd.grad(out, (q, k, v, s_aux), dout.contiguous())
    assert_close(actual, expected, 0.0)


@pytest.mark.parametrize(
    "s_aux_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtypes_of_their_inputs(
    dtype: torch.dtype, s_aux_dtype: torch.dtype
) -> None:
    q, k, v, s_aux = qkvs(dtype=dtype)
    s_aux = s_aux.detach().to(s_aux_dtype).requires_grad_()
    out, lse = flash_attn_func(q, k, v, s_aux=s_aux, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    gradients = grads(out.float().sum() + lse.sum(), q, k, v, s_aux)
    assert [g.dtype for g in gradients] == [dtype, dtype, dtype, s_aux_dtype]


def test_sinks_that_are_not_contiguous() -> None:
    """One scalar for every head, and every other entry of a longer vector."""
    q, k, v, _ = qkvs()
    scalar, longer = randn(1), randn(8)
    for s_aux, leaf in ((scalar.expand(4), scalar), (longer[::2], longer)):
        (ours,) = grads(flash_attn_func(q, k, v, s_aux=s_aux).sin().sum(), leaf)
        (expected,) = grads(reference.attention(q, k, v, s_aux=s_aux)[0].sin().sum(), leaf)
        assert_close(ours, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    inputs = qkvs()

    def attend(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> Tensor:
        return flash_attn_func(q.sin(), k, v, causal=True, s_aux=s_aux)

    out = checkpoint(attend, *inputs, use_reentrant=use_reentrant)
    assert_close(
        grads_by_backward(out.cos().sum(), inputs), grads(attend(*inputs).cos().sum(), *inputs)
    )


def grads_by_backward(loss: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Reentrant checkpointing knows .backward() only."""
    loss.backward()
    return tuple(tensor.grad for tensor in inputs)


# ---- sinks joined afterwards ----


def test_apply_sink_and_merge_equal_the_sink_in_the_kernel() -> None:
    """Results and every gradient, through out and lse."""
    q, k, v, s_aux = qkvs()

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        return out.sin().sum() + lse.cos().sum()

    def halves() -> tuple[Tensor, Tensor]:
        near = flash_attn_func(q, k[:, 3:], v[:, 3:], return_lse=True)
        far = flash_attn_func(q, k[:, :3], v[:, :3], return_lse=True)
        return merge_attn_states([near[0], far[0]], [near[1], far[1]], s_aux)

    whole = flash_attn_func(q, k, v, s_aux=s_aux, return_lse=True)
    expected = grads(loss(*whole), q, k, v, s_aux)
    applied = apply_sink(*flash_attn_func(q, k, v, return_lse=True), s_aux)
    for other in (applied, halves()):
        assert_close(other, whole)
        assert_close(grads(loss(*other), q, k, v, s_aux), expected)


INF = torch.inf


@pytest.mark.parametrize("sink", [-INF, 0.5, INF])
@pytest.mark.parametrize("first", [-INF, 0.25, INF])
@pytest.mark.parametrize("second", [-INF, -0.75])
def test_merge_and_apply_sink_at_infinity(first: float, second: float, sink: float) -> None:
    """Empty parts (also written +inf) hold NaN: it must reach neither results nor gradients."""
    lses = torch.tensor([first, second], dtype=torch.float64)
    values = torch.tensor([2.0, 3.0], dtype=torch.float64)
    logits = torch.cat([lses.masked_fill(lses == INF, -INF), torch.tensor([sink])])
    shares = torch.nan_to_num(logits.softmax(0))
    if sink == INF:
        shares = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    expected_lse = logits.logsumexp(0)
    expected_out = (shares[:2] * values).sum()

    def part(i: int) -> tuple[Tensor, Tensor]:
        value = torch.nan if lses[i].isinf() else values[i].item()
        out = torch.full((1, 1, 1, 1), value, dtype=torch.float64, requires_grad=True)
        return out, lses[i].reshape(1, 1, 1).clone().requires_grad_()

    s_aux = torch.tensor([sink], dtype=torch.float64, requires_grad=True)
    parts = [part(0), part(1)]
    leaves = [*parts[0], *parts[1], s_aux]

    merged = merge_attn_states([p[0] for p in parts], [p[1] for p in parts], s_aux)
    joined = apply_sink(*merge_attn_states([p[0] for p in parts], [p[1] for p in parts]), s_aux)
    for out, lse in (merged, joined):
        assert_close(out.detach().squeeze(), expected_out)
        assert_close(lse.detach().squeeze(), expected_lse)
        loss = out.sum() + torch.where(lse.isinf(), 0.0, lse).sum()
        gradients = torch.autograd.grad(loss, leaves)
        for gradient in gradients:
            assert gradient.isfinite().all()
        assert_close(gradients[0].squeeze(), shares[0])
        assert_close(gradients[2].squeeze(), shares[1])
        if lse.isfinite().all():
            by_logit = shares[2] * (1 - expected_out)
            assert_close(gradients[4].squeeze(), by_logit)


def test_apply_sink_keeps_the_dtype_of_out() -> None:
    q, k, v, s_aux = qkvs(dtype=torch.bfloat16)
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    out, lse = apply_sink(out, lse, s_aux)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert grads(out.float().sum(), q)[0].dtype == torch.bfloat16


# ---- autocast ----


def test_autocast_casts_qkv_and_not_the_sinks() -> None:
    q, k, v, s_aux = qkvs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = flash_attn_func(q, k, v, causal=True, s_aux=s_aux, return_lse=True)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        gradients = grads(out.float().sum() + lse.sum(), q, k, v, s_aux)
    assert [g.dtype for g in gradients] == [torch.float32] * 4

    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (q, k, v)]
    expected_out, expected_lse = flash_attn_func(*low, causal=True, s_aux=s_aux, return_lse=True)
    expected = grads(expected_out.float().sum() + expected_lse.sum(), *low, s_aux)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    for actual, low_gradient in zip(gradients, expected, strict=True):
        assert torch.equal(actual, low_gradient.float())


def test_autocast_joins_mixed_dtypes_and_leaves_float64_alone() -> None:
    q, k, v, s_aux = qkvs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attn_func(q, k.bfloat16(), v.half(), s_aux=s_aux).dtype == torch.bfloat16
        assert flash_attn_func(q.double(), k.double(), v.double()).dtype == torch.float64
        with pytest.raises(TypeError, match="k must have the dtype of q"):
            flash_attn_func(q.double(), k, v)


def test_autocast_varlen_and_cache() -> None:
    q, k, v, s_aux = qkvs(dtype=torch.float32)
    ends = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 7], dtype=torch.int32)
    k_cache, v_cache = torch.zeros(2, 16, 2, 3), torch.zeros(2, 16, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn_varlen_func(q[0], k[0], v[0], *ends, 5, 7, s_aux=s_aux)
        assert out.dtype == torch.bfloat16
        with torch.no_grad():  # the cache decides: it cannot be cast
            new = k[:, :5].half(), v[:, :5].bfloat16()
            out = flash_attn_with_kvcache(q.bfloat16(), k_cache, v_cache, *new, 0, s_aux=s_aux)
    assert out.dtype == torch.float32
    assert torch.equal(k_cache[:, :5], new[0].float())
    assert torch.equal(v_cache[:, :5], new[1].float())
