"""torch.func: grad, vjp, jacrev and functional_call, vmap of the forward and over gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap

from sink_attention_ext import (
    apply_sink,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attn_states,
    reference,
    reshape_and_cache,
)

OPTIONS = {"causal": True, "window_size": (3, -1), "softcap": 5.0}
ENDS_Q = torch.tensor([0, 2, 6], dtype=torch.int32)  # row 6 of q is in no sequence
ENDS_K = torch.tensor([0, 5, 9], dtype=torch.int32)
USED_K = torch.tensor([5, 3], dtype=torch.int32)

Function = Callable[..., tuple[Tensor, Tensor]]


def ours_dense(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    return flash_attn_func(q, k, v, s_aux=s_aux, return_lse=True, **OPTIONS)


def plain_dense(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    return reference.attention(q, k, v, s_aux=s_aux, **OPTIONS)


def ours_varlen(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    return flash_attn_varlen_func(
        q, k, v, ENDS_Q, ENDS_K, 4, 5, s_aux=s_aux, seqused_k=USED_K, return_lse=True, **OPTIONS
    )


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for b in range(2):
        rows = slice(ENDS_Q[b].item(), ENDS_Q[b + 1].item())
        keys = slice(ENDS_K[b].item(), ENDS_K[b].item() + USED_K[b].item())
        out, lse = plain_dense(q[None, rows], k[None, keys], v[None, keys], s_aux)
        outs.append(out[0])
        lses.append(lse[0])
    rest = q[6:].shape[0]
    outs.append(q.new_zeros(rest, *outs[0].shape[1:]))
    lses.append(q.new_full((q.shape[1], rest), -torch.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)


def lse_like(out: Tensor) -> Tensor:
    return out.sum(-1).transpose(-1, -2)


def ours_merge(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of three parts that are shaped like q."""
    parts = (q, q.square(), q.sin())
    return merge_attn_states(list(parts), [lse_like(part) for part in parts], s_aux)


def plain_merge(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    parts = torch.stack((q, q.square(), q.sin()))
    lses = lse_like(parts)
    logits = lses
    if s_aux is not None:
        logits = torch.cat([lses, s_aux[:, None].expand_as(lses[0])[None]])
    lse = logits.logsumexp(0)
    weights = (lses - lse).exp().transpose(-1, -2).unsqueeze(-1)
    return (weights * parts).sum(0), lse


def ours_apply(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    return apply_sink(q, lse_like(q), torch.full_like(q[0, 0, ..., 0], 0.3).flatten()[: q.shape[-2]]
                      if s_aux is None else s_aux)  # fmt: skip


def plain_apply(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    lse = lse_like(q)
    sink = q.new_full((q.shape[-2],), 0.3) if s_aux is None else s_aux
    share = torch.sigmoid(lse - sink[:, None]).transpose(-1, -2).unsqueeze(-1)
    return q * share, torch.logaddexp(lse, sink[:, None].expand_as(lse))


FUNCTIONS: dict[str, tuple[Function, Function, bool]] = {  # ours, plain torch, packed rows
    "dense": (ours_dense, plain_dense, False),
    "varlen": (ours_varlen, plain_varlen, True),
    "merge": (ours_merge, plain_merge, False),
    "merge_packed": (ours_merge, plain_merge, True),
    "apply_sink": (ours_apply, plain_apply, False),
}


def tensors(packed: bool, *mapped: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and sinks, with mapped dimensions in front. Sinks from -20 to 20."""
    batch = () if packed else (2,)
    q = torch.randn(*mapped, *batch, 7, 4, 3, dtype=torch.float64)
    k = torch.randn(*mapped, *batch, 9, 2, 3, dtype=torch.float64)
    v = torch.randn(*mapped, *batch, 9, 2, 5, dtype=torch.float64)
    s_aux = torch.randn(*mapped, 4, dtype=torch.float64)
    s_aux[..., 0], s_aux[..., 1] = 20.0, -20.0
    return q, k, v, s_aux


def loss_of(function: Function) -> Callable[..., Tensor]:
    def loss(*args: Tensor | None) -> Tensor:
        out, lse = function(*args)
        return out.square().sum() + lse.nan_to_num(neginf=0.0).sin().sum()

    return loss


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


every_function = pytest.mark.parametrize("name", FUNCTIONS)


# ---- reverse mode ----


@every_function
def test_grad_equals_plain_torch(name: str) -> None:
    ours, plain, packed = FUNCTIONS[name]
    args = tensors(packed)
    argnums = (0, 3) if "merge" in name or name == "apply_sink" else (0, 1, 2, 3)
    expected = grad(loss_of(plain), argnums)(*args)
    assert_close(grad(loss_of(ours), argnums)(*args), expected)


@every_function
def test_vjp_after_its_transform_has_ended(name: str) -> None:
    ours, plain, packed = FUNCTIONS[name]
    q, k, v, s_aux = tensors(packed)
    (out, lse), pull_back = vjp(lambda q, s_aux: ours(q, k, v, s_aux), q, s_aux)
    expected, plain_pull_back = vjp(lambda q, s_aux: plain(q, k, v, s_aux), q, s_aux)
    assert_close((out, lse), expected)
    cotangents = torch.randn_like(out), torch.randn_like(lse)
    assert_close(pull_back(cotangents), plain_pull_back(cotangents))


@every_function
def test_jacrev(name: str) -> None:
    ours, plain, packed = FUNCTIONS[name]
    args = tensors(packed)
    for argnum in (0, 3):
        jacobians = [jacrev(lambda *a, f=f: f(*a)[0], argnum)(*args) for f in (ours, plain)]
        assert_close(*jacobians)


@every_function
def test_batched_gradients_of_autograd(name: str) -> None:
    """is_grads_batched, and jacobian(vectorize=True), which uses it."""
    ours, plain, packed = FUNCTIONS[name]
    q, k, v, s_aux = tensors(packed)
    results = []
    for function in (ours, plain):
        leaves = [q.clone().requires_grad_(), s_aux.clone().requires_grad_()]
        out, _ = function(leaves[0], k, v, leaves[1])
        douts = torch.linspace(-1, 1, 3 * out.numel(), dtype=out.dtype).reshape(3, *out.shape)
        results.append(torch.autograd.grad(out, leaves, douts, is_grads_batched=True))
    assert_close(*results)
    jacobians = [
        torch.autograd.functional.jacobian(
            lambda s_aux, f=f: f(q, k, v, s_aux)[0], s_aux, vectorize=True
        )
        for f in (ours, plain)
    ]
    assert_close(*jacobians)


def test_functional_call_of_a_module_with_sinks() -> None:
    class Attention(nn.Module):
        def __init__(self, function: Function) -> None:
            super().__init__()
            self.function = function
            self.project = nn.Linear(3, 3, dtype=torch.float64)
            self.sinks = nn.Parameter(torch.linspace(-20, 20, 4, dtype=torch.float64))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.function(self.project(q), k, v, self.sinks)[0].square().sum()

    torch.manual_seed(1)
    ours, plain = Attention(ours_dense), Attention(plain_dense)
    plain.load_state_dict(ours.state_dict())
    args = tensors(False)[:3]
    gradients = []
    for module in (ours, plain):
        loss = functools.partial(functional_call, module, args=args)
        gradients.append(grad(loss)(dict(module.named_parameters())))
    assert gradients[0].keys() == {"project.weight", "project.bias", "sinks"}
    assert_close(*gradients)


def test_a_second_derivative_is_refused_by_name() -> None:
    q, k, v, s_aux = tensors(False)

    def first(s_aux: Tensor) -> Tensor:
        return grad(loss_of(ours_dense), 3)(q, k, v, s_aux).sum()

    with pytest.raises(RuntimeError, match=r"sink_attention_ext.*double backward"):
        grad(first)(s_aux)


# ---- vmap ----


@every_function
@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0, 0), (0, 0, 0, None), (0, None, None, None), (None, None, 0, 0)]
)
def test_vmap_of_the_forward(name: str, in_dims: tuple[int | None, ...]) -> None:
    ours, _, packed = FUNCTIONS[name]
    if name not in ("dense", "varlen"):
        in_dims = (0, None, None, in_dims[3])
    args = [x if dim == 0 else x[0] for x, dim in zip(tensors(packed, 3), in_dims, strict=True)]
    out, lse = vmap(ours, in_dims)(*args)
    for i in range(3):
        one = ours(*(x if dim is None else x[i] for x, dim in zip(args, in_dims, strict=True)))
        assert_close((out[i], lse[i]), one)


@every_function
@pytest.mark.parametrize("dim", [1, -1])
def test_vmap_over_another_dimension(name: str, dim: int) -> None:
    """The last one too, which leaves rows without unit stride."""
    ours, _, packed = FUNCTIONS[name]
    args = tensors(packed, 3)
    moved = [x.movedim(0, dim).contiguous() for x in args]
    out, lse = vmap(ours, dim, (1, 0))(*moved)
    expected = vmap(ours)(*args)
    assert_close((out.movedim(1, 0), lse), expected)


@every_function
def test_nested_vmap(name: str) -> None:
    ours, _, packed = FUNCTIONS[name]
    q, k, v, s_aux = tensors(packed, 2, 3)
    nested = vmap(vmap(ours, (0, None, 0, 0)), (0, 0, 0, None))(q, k[:, 0], v, s_aux[0])
    for i in range(2):
        for j in range(3):
            one = ours(q[i, j], k[i, 0], v[i, j], s_aux[0, j])
            assert_close(tuple(x[i, j] for x in nested), one)


@every_function
@pytest.mark.parametrize("with_sinks", [True, False])
def test_per_sample_gradients(name: str, with_sinks: bool) -> None:
    """vmap(grad): each sample's gradient of shared sinks, not their sum."""
    ours, plain, packed = FUNCTIONS[name]
    q, k, v, s_aux = tensors(packed, 3)
    shared = s_aux[0] if with_sinks else None
    argnums = (0, 3) if with_sinks else (0,)
    if name in ("dense", "varlen"):
        argnums += (1, 2)
    actual = vmap(grad(loss_of(ours), argnums), (0, 0, 0, None))(q, k, v, shared)
    for i in range(3):
        expected = grad(loss_of(plain), argnums)(q[i], k[i], v[i], shared)
        assert_close(tuple(x[i] for x in actual), expected)


@every_function
def test_vmap_outside_of_functorch_gradients(name: str) -> None:
    """Plain autograd through vmap."""
    ours, plain, packed = FUNCTIONS[name]
    args = tensors(packed, 3)
    used = (0, 1, 2, 3) if name in ("dense", "varlen") else (0, 3)
    results = []
    for function in (ours, plain):
        leaves = [x.clone().requires_grad_() for x in args]
        total = vmap(loss_of(function))(*leaves).sum()
        results.append(torch.autograd.grad(total, [leaves[i] for i in used]))
    assert_close(*results)


def test_vmap_of_no_calls() -> None:
    for s_aux_dim in (0, None):
        q, k, v, s_aux = tensors(False, 0)
        s_aux = s_aux if s_aux_dim == 0 else torch.zeros(4, dtype=torch.float64)
        out, lse = vmap(ours_dense, (0, 0, 0, s_aux_dim))(q, k, v, s_aux)
        assert (out.shape, lse.shape) == ((0, 2, 7, 4, 5), (0, 2, 4, 7))


def test_vmap_over_lengths_is_refused_by_name() -> None:
    q, k, v, _ = tensors(True)
    ends = torch.stack([ENDS_Q, ENDS_Q])
    for mapped in (True, False):
        arguments = (ends, ENDS_K) if mapped else (ENDS_Q, torch.stack([ENDS_K, ENDS_K]))
        dims = (0, None) if mapped else (None, 0)
        call = vmap(lambda a, b: flash_attn_varlen_func(q, k, v, a, b, 4, 5), dims)
        with pytest.raises(NotImplementedError, match=r"sink_attention_ext.*vmap over cu_seqlens"):
            call(*arguments)


@pytest.mark.parametrize("mapped", ["q", "k_cache", "new"])
def test_vmap_over_caches_is_refused_by_name_and_nothing_is_written(mapped: str) -> None:
    caches = torch.zeros(2, 3, 2, 8, 2, 4)
    rows = torch.randn(3, 2, 1, 2, 4)

    def attend(q: Tensor, k_cache: Tensor, new: Tensor) -> Tensor:
        return flash_attn_with_kvcache(q, k_cache, caches[1, 0], new, new, cache_seqlens=3)

    args = {"q": rows[0], "k_cache": caches[0, 0], "new": rows[1]}
    args[mapped] = caches[0] if mapped == "k_cache" else rows
    dims = tuple(0 if name == mapped else None for name in args)
    with pytest.raises(NotImplementedError, match=r"flash_attn_with_kvcache.*vmap"):
        vmap(attend, dims)(*args.values())
    assert not caches.any()
    slots = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"reshape_and_cache.*vmap"):
        vmap(lambda k: reshape_and_cache(k, k, *caches[:, 0], slots))(rows[:, :, 0])
    assert not caches.any()
