"""torch.library.opcheck on every operator, and its fake kernel against the real one."""

from __future__ import annotations

import pytest
import torch
from op_samples import DIFFERENTIABLE, SAMPLES
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

import sink_attention_ext  # noqa: F401  registers autograd
from sink_attention_ext import fakes, ops

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


ALL_UTILITIES = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    torch.manual_seed(0)
    op, sample = SAMPLES[name]
    args, kwargs = sample(torch.float32, name in DIFFERENTIABLE)
    utilities = ALL_UTILITIES
    if name.endswith("float8"):  # test_schema compares inputs by allclose, which float8 lacks
        utilities = ALL_UTILITIES[1:]
    results = torch.library.opcheck(op, args, kwargs, test_utils=utilities)
    assert results == dict.fromkeys(utilities, "SUCCESS")


def _layout(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAMPLES)
def test_fake_kernel_returns_what_the_real_one_does(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    op, sample = SAMPLES[name]
    args, kwargs = sample(dtype, False)
    with FakeTensorMode() as mode:
        fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        fake = op(*fake_args, **fake_kwargs)
    real = op(*args, **kwargs)
    fake_leaves, real_leaves = tree_flatten(fake)[0], tree_flatten(real)[0]
    assert [type(leaf) for leaf in real_leaves] == [Tensor] * len(real_leaves) or real is None
    if real is not None:
        assert list(map(_layout, fake_leaves)) == list(map(_layout, real_leaves))
    inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_flatten(args)[0] if _owns(leaf)}
    results = {leaf.untyped_storage().data_ptr() for leaf in real_leaves if _owns(leaf)}
    assert not inputs & results, "a result shares memory with an input"


def _owns(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.numel() > 0


def test_every_operator_has_a_sample() -> None:
    sampled = {op._name for op, _ in SAMPLES.values()}
    assert sampled == {f"{ops.NAMESPACE}::{name}" for name in ops.FAKE_KERNELS}


def test_a_wrong_fake_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: a fake kernel with lse in the dtype of q does."""
    monkeypatch.setattr(fakes, "lse_dtype", lambda dtype: dtype)
    with pytest.raises(AssertionError):
        test_fake_kernel_returns_what_the_real_one_does("fwd", torch.bfloat16)
