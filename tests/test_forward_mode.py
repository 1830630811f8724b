"""Forward-mode AD: refused by name on every tensor of every function and operator, never 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_samples import SAMPLES
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, linearize, vmap

from sink_attention_ext import (
    PagedKVCache,
    apply_sink,
    cascade_attn_with_kvcache,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attn_states,
    reshape_and_cache,
)

NAMED = r"(sink_attention_ext::|_|CacheStep\.)\w+.* has no forward-mode derivative"


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attend_in_a_cache(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> Tensor:
    cache = PagedKVCache(
        [(-1, 0)], num_heads_kv=2, head_dim=4, num_pages=4, max_num_seqs=2, max_seqlen=16,
        max_num_batched_tokens=8, dtype=torch.float32,
    )  # fmt: skip
    cache.k_cache(0).zero_()
    cache.v_cache(0).zero_()
    step = cache.append([cache.allocate()], [3])
    try:
        return step.attend(0, q, k, v, s_aux=s_aux)
    except NotImplementedError:
        assert not cache.k_cache(0).any() and not cache.v_cache(0).any(), "it wrote"
        raise


def write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    reshape_and_cache(k, v, k_cache, v_cache, torch.tensor([3, 0, 1]))
    return k_cache


def shapes(*sizes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(size) for size in sizes)


DENSE_CACHE = (1, 8, 2, 4)
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
    "dense": (
        lambda q, k, v, s: flash_attn_func(q, k, v, s_aux=s),
        shapes((1, 3, 4, 4), (1, 5, 2, 4), (1, 5, 2, 4), (4,)),
    ),
    "varlen": (
        lambda q, k, v, s: flash_attn_varlen_func(q, k, v, int32(0, 3), int32(0, 5), 3, 5, s_aux=s),
        shapes((3, 4, 4), (5, 2, 4), (5, 2, 4), (4,)),
    ),
    "kvcache": (
        lambda q, k_cache, v_cache, k, v, s: flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=2, s_aux=s
        ),
        shapes((1, 3, 4, 4), DENSE_CACHE, DENSE_CACHE, (1, 3, 2, 4), (1, 3, 2, 4), (4,)),
    ),
    "cascade": (
        lambda q, k_cache, v_cache, s: cascade_attn_with_kvcache(
            q, k_cache, v_cache, int32(6), int32([0, 1]), 4, causal=True, s_aux=s
        ),
        shapes((1, 1, 4, 4), (2, 4, 2, 4), (2, 4, 2, 4), (4,)),
    ),
    "attend": (attend_in_a_cache, shapes((3, 4, 4), (3, 2, 4), (3, 2, 4), (4,))),
    "write": (write, shapes((3, 2, 4), (3, 2, 4), (2, 4, 2, 4), (2, 4, 2, 4))),
    "merge": (
        lambda a, b, x, y, s: merge_attn_states([a, b], [x, y], s),
        shapes((1, 3, 4, 4), (1, 3, 4, 4), (1, 4, 3), (1, 4, 3), (4,)),
    ),
}
CASES = [(name, i) for name, (_, make) in FUNCTIONS.items() for i in range(len(make()))]


def of_one(name: str, index: int) -> tuple[Callable[[Tensor], Any], Tensor, tuple[Tensor, ...]]:
    """The function of one of its tensors, that tensor, and all of them."""
    function, make_arguments = FUNCTIONS[name]
    arguments = make_arguments()

    def call(tensor: Tensor) -> Any:
        return function(*arguments[:index], tensor, *arguments[index + 1 :])

    return call, arguments[index], arguments


@pytest.mark.parametrize(("name", "index"), CASES)
def test_refused_on_each_tensor_and_nothing_written(name: str, index: int) -> None:
    call, tensor, arguments = of_one(name, index)
    before = [x.clone() for x in arguments]
    with pytest.raises(NotImplementedError, match=NAMED):
        jvp(call, (tensor,), (torch.ones_like(tensor),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=NAMED):
        call(forward_ad.make_dual(tensor, torch.ones_like(tensor)))
    with torch.no_grad(), forward_ad.dual_level():  # forward mode is on there too
        with pytest.raises(NotImplementedError, match=NAMED):
            call(forward_ad.make_dual(tensor, torch.ones_like(tensor)))
    assert all(map(torch.equal, arguments, before))
    with forward_ad.dual_level():  # tensors without tangents pass
        call(tensor)


@pytest.mark.parametrize(("name", "index"), [("dense", 0), ("varlen", 3), ("merge", 2)])
def test_refused_where_other_tensors_require_grad(name: str, index: int) -> None:
    call, tensor, arguments = of_one(name, index)
    for x in arguments:
        x.requires_grad_()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=NAMED):
        call(forward_ad.make_dual(tensor.detach(), torch.ones_like(tensor)))


@pytest.mark.parametrize("name", ["dense", "varlen", "merge"])
@pytest.mark.parametrize("index", [0, -1])
def test_refused_in_every_form(name: str, index: int) -> None:
    call, tensor, _ = of_one(name, index % len(FUNCTIONS[name][1]()))

    def loss(x: Tensor) -> Tensor:
        out = call(x)
        return (out if isinstance(out, Tensor) else out[0]).sum()

    ones = torch.ones_like(tensor)
    for transform in (
        lambda: jacfwd(loss)(tensor),
        lambda: linearize(loss, tensor),
        lambda: jvp(grad(loss), (tensor,), (ones,)),  # forward over reverse
        lambda: grad(lambda x: jvp(loss, (x,), (ones,))[1])(tensor),
        lambda: vmap(lambda t: jvp(loss, (tensor,), (t,))[1])(torch.stack([ones, ones])),
        lambda: torch.autograd.functional.jacobian(
            loss, tensor, vectorize=True, strategy="forward-mode"
        ),
    ):
        with pytest.raises(NotImplementedError, match=NAMED):
            transform()


def with_tangents(value: Any) -> Any:
    if isinstance(value, list):
        return [with_tangents(x) for x in value]
    is_tensor = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)
    return forward_ad.make_dual(value, torch.ones_like(value)) if is_tensor else value


@pytest.mark.parametrize("name", SAMPLES)
def test_operators_refuse_it_on_each_tensor(name: str) -> None:
    torch.manual_seed(0)
    op, sample = SAMPLES[name]
    args, kwargs = sample(torch.float32, False)
    for position in [*range(len(args)), *kwargs]:
        changed_args, changed_kwargs = list(args), dict(kwargs)
        changed = changed_kwargs if isinstance(position, str) else changed_args
        with forward_ad.dual_level():
            changed[position] = with_tangents(changed[position])
            if not isinstance(changed[position], (Tensor, list)):
                continue
            one = changed[position][0] if isinstance(changed[position], list) else changed[position]
            if forward_ad.unpack_dual(one).tangent is None:
                continue  # of a dtype without derivatives
            with pytest.raises(NotImplementedError, match=NAMED):
                op(*changed_args, **changed_kwargs)


def test_apply_sink_has_one() -> None:
    out, lse, s_aux = torch.randn(1, 3, 4, 5), torch.randn(1, 4, 3), torch.randn(4)
    tangents = tuple(torch.randn_like(x) for x in (out, lse, s_aux))
    tensors = tuple(x.double() for x in (out, lse, s_aux))
    _, actual = jvp(lambda *x: apply_sink(*x), tensors, tuple(x.double() for x in tangents))
    step = 1e-6
    ahead, behind = (
        apply_sink(*(x + sign * step * t for x, t in zip(tensors, tangents, strict=True)))
        for sign in (1, -1)
    )
    for tangent, plus, minus in zip(actual, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (plus - minus) / (2 * step), rtol=1e-6, atol=1e-8)
        assert tangent.abs().max() > 0.1
