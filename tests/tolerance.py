"""How close is close enough: the one rule that every comparison with the oracle goes by.

`ref` is the formula in float64, `pt` the same formula computed by torch in the inputs' dtype. First
NaN and infinities must be in the same places. Then, over the finite elements::

    max |actual - ref|  <=  factor * max |pt - ref|  + ulps + noise          factor 2, softcap 3
    mean |actual - ref| <=  3 * mean |pt - ref| + ulps on average

The first is FlashAttention's rule, with ``ulps = 2 max |(ref + 0.3 - 0.3) - ref|`` in the result's
dtype, and an ulp of the largest element at least (in a tensor of few elements the errors of `pt`
and of that sum can all be zero by chance). The second sees what a large element hides from the
first: one key of thousands left out in every row. float32 and float64 have ``PRECISE_ULPS`` ulps of
the largest element on top: a flash backward subtracts <dout, out> from <dout, v> where torch's
softmax multiplies by an exact zero, and float64 has no `pt` beside `ref`. `noise` is what rounding
does to sums of few or much cancelled terms (oracle.py).

lse is a float32 value made from exact products even where the inputs are bfloat16, so it is
compared as such: 2e-5 of 1 + |lse|. That resolves one key in ten thousand, in every row and dtype.
"""

from __future__ import annotations

import torch
from oracle import Expected, Results
from torch import Tensor

PRECISE_ULPS = {torch.float32: 64, torch.float64: 4096}
LSE_ERROR = {torch.float32: 2e-5, torch.float64: 1e-11}
NOISE = 4  # standard deviations
FEW = 64  # a mean of fewer errors is a matter of luck


def _place(error: Tensor, *tensors: Tensor) -> str:
    """Index of the largest error, and what the tensors hold there."""
    flat = int(error.flatten().argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape)]
    values = ", ".join(f"{float(t.flatten()[flat]):.6g}" for t in tensors)
    return f"worst at {index} of {tuple(error.shape)} (actual, ref, pt: {values})"


def _check_like(name: str, actual: Tensor, ref: Tensor) -> None:
    assert actual.shape == ref.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(ref.shape)}"
    for what, find in (("NaN", Tensor.isnan), ("inf", Tensor.isposinf), ("-inf", Tensor.isneginf)):
        # What is infinite in float64 and in the result's dtype; a float16 may overflow.
        wrong = find(actual) != find(ref.to(actual.dtype))
        if wrong.any():
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} places differ in {what}; "
                f"{_place(wrong.double(), actual, ref)}"
            )


def _finite(tensor: Tensor) -> Tensor:
    return torch.where(tensor.isfinite(), tensor, 0.0)


def _ulps(ref: Tensor, dtype: torch.dtype) -> float:
    rounded = _finite(ref.to(dtype))
    by_chance = 2 * float(((rounded + 0.3 - 0.3) - rounded).abs().max())
    return max(by_chance, torch.finfo(dtype).eps * float(rounded.abs().max()))


def assert_close(
    name: str,
    actual: Tensor,
    ref: Tensor,
    pt: Tensor,
    softcap: float = 0.0,
    noise: Tensor | None = None,
    computed_in: torch.dtype | None = None,
) -> None:
    """The rule above for one tensor.

    noise: a standard deviation for each element.
    computed_in: the dtype whose ulps count, where it is not the tensor's own.
    """
    actual, ref, pt = actual.detach().cpu(), ref.detach().cpu(), pt.detach().cpu()
    _check_like(name, actual, ref)
    if actual.numel() == 0:
        return
    dtype = computed_in or actual.dtype
    ref, pt = _finite(ref), _finite(pt.double())
    error, pt_error = (_finite(actual.double()) - ref).abs(), (pt - ref).abs()
    factor = 3 if softcap > 0 else 2
    eps = torch.finfo(dtype).eps
    ulps = _ulps(ref, dtype) + PRECISE_ULPS.get(dtype, 0) * eps * float(ref.abs().max())
    chance = NOISE * float(noise.max()) if noise is not None else 0.0
    allowed = factor * float(pt_error.max()) + ulps + chance
    if not float(error.max()) <= allowed:
        raise AssertionError(
            f"{name}: max error {float(error.max()):.4g} > {allowed:.4g} = {factor} * "
            f"{float(pt_error.max()):.4g} (pt) + {ulps:.4g} (ulps) + {chance:.4g} (noise); "
            f"{_place(error, actual, ref, pt)}"
        )
    if error.numel() < FEW:
        return
    mean_ulps = PRECISE_ULPS.get(dtype, 0.25) * eps * float(ref.abs().mean())
    mean_allowed = 3 * float(pt_error.mean()) + mean_ulps + chance
    if not float(error.mean()) <= mean_allowed:
        raise AssertionError(
            f"{name}: mean error {float(error.mean()):.4g} > {mean_allowed:.4g} = 3 * "
            f"{float(pt_error.mean()):.4g} (pt) + {mean_ulps:.4g} (ulps) + {chance:.4g} (noise); "
            f"{_place(error, actual, ref, pt)}"
        )


def short_rows(dtype: torch.dtype) -> dict[str, float]:
    """rtol and atol for an average of a few standard normal values, computed in `dtype`."""
    bound = max(1e-5, 4 * torch.finfo(dtype).eps)
    return {"rtol": bound, "atol": bound}


def assert_lse_close(actual: Tensor, ref: Tensor, name: str = "lse") -> None:
    """float32 (float64 for float64), whatever the inputs' dtype."""
    actual, ref = actual.detach().cpu(), ref.detach().cpu()
    _check_like(name, actual, ref)
    if actual.numel() == 0:
        return
    ref = _finite(ref)
    allowed = LSE_ERROR[actual.dtype] * (1 + ref.abs())
    error = (_finite(actual.double()) - ref).abs()
    if not (error <= allowed).all():
        raise AssertionError(
            f"{name}: {int((error > allowed).sum())} of {error.numel()} errors exceed "
            f"{LSE_ERROR[actual.dtype]:.0e} * (1 + |lse|); "
            f"{_place(error / allowed, actual, ref, ref)}"
        )


def check(actual: Results, expected: Expected, softcap: float = 0.0) -> None:
    """Every result that `actual` has, and exactly those that are expected of it."""
    ref, pt = expected.ref.items(), expected.pt.items()
    assert actual.items().keys() == ref.keys()
    for name, tensor in actual.items().items():
        assert tensor.dtype == pt[name].dtype, f"{name}: {tensor.dtype}, not {pt[name].dtype}"
        noise = expected.noise.get(name)
        if name == "lse":
            assert_lse_close(tensor, ref[name])
        elif name == "ds_aux" and tensor.dtype == torch.float64:  # float32 unless q is float64
            assert_close(name, tensor, ref[name], pt[name], softcap, noise, actual.lse.dtype)
        else:
            assert_close(name, tensor, ref[name], pt[name], softcap, noise)
