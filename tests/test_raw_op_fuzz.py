"""3,000 invalid calls of the operators themselves: each an exception by name, nothing written.

The operators are public: graphs that torch.compile made and C++ programs call them. A call is a
valid one (op_samples.py) with one argument made wrong, and in half of them a number, too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_samples import SAMPLES
from torch import Tensor

pytestmark = pytest.mark.sanitize

NUM_CALLS = 3_000

# Samples whose operators are fuzzed. FREE says which changes leave a call valid.
FUZZED = (
    "fwd", "fwd_without_sink", "bwd", "bwd_without_sink", "varlen_fwd", "varlen_bwd", "fwd_float8",
    "varlen_fwd_float8", "merge",
)  # fmt: skip

# (sample, argument): the kinds of changes after which the call may be valid.
FREE: dict[tuple[str, str], set[str]] = {
    ("varlen_fwd", "q"): {"more rows"},  # rows in no sequence
    ("varlen_fwd_float8", "q"): {"more rows"},
    **{
        (name, argument): {"stride"}  # gradients and saved results come in any layout
        for name in ("bwd", "bwd_without_sink", "varlen_bwd")
        for argument in ("dout", "dlse", "out", "lse")
    },
    **{(name, f"{x}_descale"): {"stride"} for name in ("fwd_float8", "varlen_fwd_float8")
       for x in "qkv"},
    ("merge", "outs"): {"stride"},
    ("merge", "lses"): {"stride"},
}  # fmt: skip


def strided(tensor: Tensor) -> Tensor:
    """The same elements, with a last stride of 2."""
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]
    return wide.copy_(tensor)


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    return torch.zeros(shape).to(tensor.dtype)


TENSOR_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "int16": lambda x: x.to(torch.int16),
    "bool": lambda x: torch.zeros(x.shape, dtype=torch.bool),
    "complex": lambda x: torch.zeros(x.shape, dtype=torch.complex64),
    "float8_e5m2": lambda x: torch.zeros(x.shape).to(torch.float8_e5m2),
    "uint16": lambda x: torch.zeros(x.shape, dtype=torch.uint16),
    "higher rank": lambda x: x[None],
    "lower rank": lambda x: x[0],
    "rank 0": lambda x: torch.zeros((), dtype=torch.float32).to(x.dtype),
    "rank 9": lambda x: x[(None,) * (9 - x.dim())],
    "stride": strided,
    "more rows": lambda x: resized(x, 0, x.shape[0] + 1),
    "no rows": lambda x: resized(x, 0, 0),
    "wide": lambda x: resized(x, -1, 257 + x.shape[-1]),
    "no columns": lambda x: resized(x, -1, 0),
    "meta": lambda x: x.to("meta"),
    "none": lambda x: None,
    "a float": lambda x: 1.5,
    "a string": lambda x: "q",
    "a list": lambda x: [1.0, 2.0],
}
PYTHON_TYPES = {"none", "a float", "a string", "a list"}

LENGTHS = {  # of the starts and lengths in op_samples.py, which have 4 and 3 entries
    "cu_seqlens_q": ([1, 2, 2, 5], [0, 3, 2, 5], [0, 2, 2, 7], [-1, 0, 2, 5], [0, 2, 2, -5],
                     [0, 2**31 - 1, 2, 5], [0, -(2**31), 2, 5]),
    "cu_seqlens_k": ([1, 4, 6, 9], [0, 7, 6, 9], [0, 4, 6, 10], [0, 4, 6, 2**31 - 1], [5, 5, 5, 5]),
    "seqused_k": ([-1, 1, 2], [5, 1, 2], [4, 2**31 - 1, 2], [4, 1, -(2**31)]),
}  # fmt: skip
NUMBERS: dict[str, tuple[Any, ...]] = {
    "softmax_scale": (0.0, torch.nan, torch.inf, -torch.inf, 1e50, -1e39, 1e-50, 5e-324),
    "softcap": (-1.0, torch.nan, torch.inf, 1e50, 1e-50, -0.5),
    "window_left": (-2, -7, -(2**31), -(2**62), -(2**63)),
    "window_right": (-2, -9, -(2**32), -(2**63)),
    "num_sink_tokens": (-1, -(2**31), -(2**63)),
    "max_seqlen_q": (-1, 0, 1, 2, -(2**63)),
    "max_seqlen_k": (-1, 0, 1, -(2**63)),
}
WRONG_TYPES: dict[str, tuple[Any, ...]] = {  # not of bools: torch takes the truth of anything
    "int": ("x", 1.5, None, [1], {}, 2**63, -(2**70)),
    "float": ("x", [1.0], {}, 1j, 10**400),
}

Change = tuple[str, str, Any]  # kind, argument, what it becomes


def changes_of(sample: str, names: list[str], types: list[str], args: list[Any]) -> list[Change]:
    """Every way of making one argument wrong."""
    found: list[Change] = []
    for name, kind, value in zip(names, types, args, strict=True):
        free = FREE.get((sample, name), set())
        if isinstance(value, Tensor):
            optional = kind.startswith("Optional")
            for change, make in TENSOR_CHANGES.items():
                if change in free or (change == "none" and optional):
                    continue
                if change in ("stride", "lower rank") and value.numel() < 2:
                    continue
                found.append((change, name, lambda x, make=make: make(x)))
            found += [
                ("values", name, lambda x, v=v: torch.tensor(v, dtype=torch.int32))
                for v in LENGTHS.get(name, ())
            ]
        elif isinstance(value, list):
            for change, make in TENSOR_CHANGES.items():
                if change not in free:
                    found.append((change, name, lambda x, make=make: [*x[:-1], make(x[-1])]))
            found += [
                ("values", name, lambda x: []),
                ("values", name, lambda x: x[:-1]),
                ("a list", name, lambda x: 3),
                ("a list", name, lambda x: None),
            ]
        elif value is not None:
            found += [("number", name, lambda x, v=v: v) for v in NUMBERS.get(name, ())]
            base = kind.removeprefix("Optional[").removesuffix("]")
            found += [
                ("a list", name, lambda x, v=v: v)
                for v in WRONG_TYPES.get(base, ())
                if not (v is None and kind.startswith("Optional"))
            ]
    return found


def tensors_of(args: list[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor) and arg.device.type != "meta":
            yield arg
        elif isinstance(arg, list):
            yield from tensors_of(arg)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def check_refused(op: Any, names: list[str], args: list[Any], kinds: set[str], what: str) -> None:
    before = [bits(tensor).clone() for tensor in tensors_of(args)]
    with pytest.raises((ValueError, TypeError, RuntimeError)) as refused:
        op(*args)
        pytest.fail(f"accepted: {what}")
    text = str(refused.value)
    if isinstance(refused.value, RuntimeError):
        assert kinds & PYTHON_TYPES, (what, text)
        assert text.startswith(f"{op._schema.name}()"), (what, text)  # torch's, about the schema
    else:
        named = "|".join(map(re.escape, (*names, "window_size", "outs and lses")))
        assert re.match(rf"({named})(\[\d+\])? (must|/ softcap must)", text), (what, text)
    for tensor, copy in zip(tensors_of(args), before, strict=True):
        assert torch.equal(bits(tensor), copy), f"it wrote: {what}"


@pytest.mark.parametrize("sample", FUZZED)
def test_every_invalid_call_is_refused_by_name(sample: str) -> None:
    op, make = SAMPLES[sample]
    schema = op._schema.arguments
    names, types = [a.name for a in schema], [str(a.type) for a in schema]
    rng = random.Random(sample)
    torch.manual_seed(0)
    valid, kwargs = make(torch.float32, False)
    assert not kwargs
    op(*valid)
    changes = changes_of(sample, names, types, list(valid))
    rng.shuffle(changes)
    for i in range(-(-NUM_CALLS // len(FUZZED))):
        kind, name, change = changes[i % len(changes)]
        args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in valid]
        at = names.index(name)
        args[at], kinds, what = change(args[at]), {kind}, f"{kind} of {name}"
        other = rng.choice(sorted(NUMBERS.keys() & set(names) - {name}) or [""])
        if other and rng.random() < 0.5:
            args[names.index(other)] = rng.choice(NUMBERS[other])
            what += f", {other}"
        check_refused(op, names, args, kinds, what)
