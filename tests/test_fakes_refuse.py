"""Fake kernels refuse what the real ones do: a meta tensor among others, and every odd argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_samples import SAMPLES
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from sink_attention_ext import ops

META = torch.device("meta")
Arguments = tuple[list[Any], dict[str, Any]]


def sample(name: str) -> tuple[Callable[..., Any], Arguments]:
    torch.manual_seed(0)
    op, make = SAMPLES[name]
    args, kwargs = make(torch.float32, False)
    return op, (list(args), dict(kwargs))


def places(arguments: Arguments) -> Iterator[tuple[Any, Any, Tensor]]:
    """Where each tensor is: a container, a key in it, and the tensor."""
    args, kwargs = arguments
    for container, keys in ((args, range(len(args))), (kwargs, kwargs)):
        for key in keys:
            if isinstance(container[key], list):
                yield from ((container[key], i, x) for i, x in enumerate(container[key]))
            elif isinstance(container[key], Tensor):
                yield container, key, container[key]


def tensors(arguments: Arguments) -> list[Tensor]:
    return [tensor for _, _, tensor in places(arguments)]


@pytest.mark.parametrize("name", SAMPLES)
def test_one_meta_tensor_among_real_ones_is_refused_and_nothing_written(name: str) -> None:
    op, arguments = sample(name)
    before = [tensor.clone() for tensor in tensors(arguments)]
    assert len(before) > 1
    for container, key, tensor in list(places(arguments)):
        container[key] = tensor.to(META)
        with pytest.raises(ValueError, match="must be on .* like the other tensors"):
            op(*arguments[0], **arguments[1])
        container[key] = tensor
    for tensor, copy in zip(tensors(arguments), before, strict=True):
        torch.testing.assert_close(
            tensor.float(), copy.float(), rtol=0, atol=0, equal_nan=True, msg="it wrote"
        )


@pytest.mark.parametrize("name", SAMPLES)
def test_one_real_tensor_among_meta_ones_is_refused(name: str) -> None:
    op, arguments = sample(name)
    real = tensors(arguments)
    for container, key, tensor in list(places(arguments)):
        container[key] = tensor.to(META)
    for (container, key, tensor), other in zip(list(places(arguments)), real, strict=True):
        container[key] = other
        with pytest.raises(ValueError, match="must be on .* like the other tensors"):
            op(*arguments[0], **arguments[1])
        container[key] = tensor
    op(*arguments[0], **arguments[1])  # all of them together are fine


def with_more_rows(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.float(), tensor[:1].float()]).to(tensor.dtype)


def of_another_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int16 if tensor.is_floating_point() else torch.float32)


def with_wide_rows(tensor: Tensor) -> Tensor:
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]
    return wide.copy_(tensor)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": of_another_dtype,
    "int8": lambda tensor: tensor.to(torch.int8),
    "rank": lambda tensor: tensor[None],
    "lower rank": lambda tensor: tensor[0],
    "first size": with_more_rows,
    "last size": lambda tensor: torch.cat([tensor, tensor], dim=-1),
    "narrower": lambda tensor: tensor[..., :-1].contiguous(),
    "empty": lambda tensor: tensor[..., :0],
    "stride": with_wide_rows,
}


def outcome(op: Callable[..., Any], arguments: Arguments) -> type[Exception] | None:
    try:
        op(*arguments[0], **arguments[1])
    except Exception as error:
        return type(error)
    return None


@pytest.mark.sanitize
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", SAMPLES)
def test_every_changed_tensor_is_refused_where_the_real_kernel_refuses_it(
    name: str, change: str
) -> None:
    """Or accepted where that accepts it. Values in tensors, which only real kernels see, stay."""
    op, arguments = sample(name)
    for container, key, tensor in list(places(arguments)):
        if tensor.dim() == 0:
            continue
        try:
            container[key] = CHANGES[change](tensor)
        except (RuntimeError, NotImplementedError):
            continue  # float8 has no such operation
        real = outcome(op, arguments)
        on_meta = tree_map_only(Tensor, lambda x: x.to(META), arguments)
        for (a, k, _), b in zip(places(on_meta), tensors(arguments), strict=True):
            a[k] = torch.empty_strided(b.shape, b.stride(), dtype=b.dtype, device=META)
        meta = outcome(op, on_meta)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = outcome(op, tree_map_only(Tensor, mode.from_tensor, arguments))
        container[key] = tensor
        if real is None:
            assert meta is None and fake is None, (name, change, key)
        elif not _is_about_values(name, change, key):
            assert meta is not None and fake is not None, (name, change, key, real)


def _is_about_values(name: str, change: str, key: Any) -> bool:
    """More columns or rows of the same table are another shape that fits, with wrong values."""
    tables = (5, 6, 7) if name.startswith("append") else (3, 4, 5)
    return change in ("narrower", "empty", "last size", "first size") and key in tables


NUMBERS = {
    "window_left": -2, "window_right": -2, "num_sink_tokens": -1, "max_seqlen_q": -1,
    "max_seqlen_k": -1, "num_splits": -1, "softcap": -1.0, "softmax_scale": 0.0,
}  # fmt: skip


@pytest.mark.sanitize
@pytest.mark.parametrize("name", SAMPLES)
def test_every_bad_number_is_refused(name: str) -> None:
    op, (args, kwargs) = sample(name)
    names = [argument.name for argument in op._schema.arguments]
    if name.startswith(("reshape", "merge")):
        assert not NUMBERS.keys() & set(names)
    for argument in NUMBERS.keys() & set(names):
        at = names.index(argument)
        changed = [*args[:at], NUMBERS[argument], *args[at + 1 :]], kwargs
        for arguments in (changed, tree_map_only(Tensor, lambda x: x.to(META), changed)):
            with pytest.raises(ValueError, match=argument.replace("_", ".")):
                op(*arguments[0], **arguments[1])


def test_symbols_are_compared_only_where_it_is_known() -> None:
    """Sizes that a graph does not know are no error and make no guard: the real kernel looks."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as mode:
        q, k, v = (
            mode.from_tensor(torch.randn(2, n, h, 8), symbolic_context=None)
            for n, h in ((5, 4), (7, 2), (7, 2))
        )
        rows = shapes.create_unbacked_symint()
        torch._check(rows >= 0)
        table = torch.empty(rows, dtype=torch.int32)
        packed = torch.empty(rows, 4, 8)
        guards = len(shapes.guards)
        ops.flash_attn_fwd(q, k, v, None, 0.5, True, -1, -1, 0.0, False, 0)
        ops.flash_attn_varlen_fwd(
            packed, packed, packed, table, table, None, None, 3, 3, 0.5, True, -1, -1, 0.0, False, 0
        )
    assert len(shapes.guards) == guards
