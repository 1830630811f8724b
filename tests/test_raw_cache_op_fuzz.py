"""Invalid raw calls of the ops that write caches: a named Python exception, nothing written."""

from __future__ import annotations

import random
from typing import Any

import op_samples
import pytest
import torch
from test_refused_writes import NUMBERS, bits, changes_of, same
from torch import Tensor

NAMES = [n for n in op_samples.SAMPLES if n.startswith(("append", "reshape_and_cache"))]


@pytest.mark.sanitize
@pytest.mark.parametrize("name", NAMES)
def test_a_raw_call_that_raises_has_not_written(name: str) -> None:
    op, make = op_samples.SAMPLES[name]
    draw = random.Random(name)
    raised = 0
    for _ in range(250):
        torch.manual_seed(0)
        args, kwargs = make(torch.float32, False)
        given: dict[str, Any] = dict(
            zip([a.name for a in op._schema.arguments], args, strict=False), **kwargs
        )
        tensors = {n: t for n, t in given.items() if isinstance(t, Tensor)}
        before = bits({n: t.reshape(-1) for n, t in tensors.items()})
        changed = dict(given)
        for argument in draw.sample(sorted(given), draw.choice((1, 1, 2))):
            value = given[argument]
            if isinstance(value, Tensor) and value.dim() == 0:
                changed[argument] = torch.full((3,), 0.5)
                continue
            changed[argument] = draw.choice(
                changes_of(value) if isinstance(value, Tensor) else NUMBERS
            )
        try:
            op(**changed)
        except Exception as error:
            raised += 1
            assert isinstance(error, (TypeError, ValueError, RuntimeError)), error
            assert same(before, bits({n: t.reshape(-1) for n, t in tensors.items()})), (
                changed,
                str(error)[:300],
            )
    assert raised > 80
