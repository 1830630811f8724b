"""A quick check of this machine's kernels against the reference, printed by `python -m`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sink_attention_ext import reference
from sink_attention_ext.cache.functions import flash_attn_with_kvcache
from sink_attention_ext.interface import flash_attn_func, flash_attn_varlen_func
from sink_attention_ext.merge import merge_attn_states

# Bounds on max|ours - reference| for values of about 1; a wrong mask or a sink counted twice gives
# about 1e-1.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM, HEAD_DIM_V = 4, 2, 64, 32
OPTIONS = {"causal": True, "window_size": (24, 0)}


@dataclass(frozen=True)
class Result:
    """One comparison: the largest error of every tensor that was compared, and what is allowed."""

    name: str
    dtype: torch.dtype
    errors: dict[str, float]

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    @property
    def ok(self) -> bool:
        return all(error <= self.tolerance for error in self.errors.values())  # NaN is not


def _max_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    same_inf = torch.isinf(actual) & (actual == expected)
    return torch.where(same_inf, 0.0, (actual - expected).abs()).max().item()


def _randn(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """The same values on every device: drawn on the CPU, moved to torch's default device."""
    values = torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")
    return values.to(torch.get_default_device(), dtype)


def _qkv(
    rows_q: tuple[int, ...], rows_k: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of `dtype` with these leading dimensions, and sinks of at least float32."""
    generator = torch.Generator().manual_seed(0)
    s_aux_dtype = torch.promote_types(dtype, torch.float32)
    return (
        _randn(*rows_q, NUM_HEADS_Q, HEAD_DIM, dtype=dtype, generator=generator),
        _randn(*rows_k, NUM_HEADS_KV, HEAD_DIM, dtype=dtype, generator=generator),
        _randn(*rows_k, NUM_HEADS_KV, HEAD_DIM_V, dtype=dtype, generator=generator),
        _randn(NUM_HEADS_Q, dtype=s_aux_dtype, generator=generator),
    )


def _with_gradients(
    attend: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """out, lse and the gradients of sum(out) + sum of the finite lse."""
    q, k, v, s_aux = (tensor.detach().requires_grad_() for tensor in inputs)
    out, lse = attend(q, k, v, s_aux)
    (out.double().sum() + lse[lse.isfinite()].double().sum()).backward()
    names = ("dq", "dk", "dv", "ds_aux")
    gradients = {n: t.grad for n, t in zip(names, (q, k, v, s_aux), strict=True)}
    # ds_aux is a sum over all rows, so its tolerance grows with their number.
    gradients["ds_aux"] = gradients["ds_aux"] / (q.numel() / (NUM_HEADS_Q * HEAD_DIM))
    return {"out": out.detach(), "lse": lse.detach(), **gradients}


def _compare(
    name: str, dtype: torch.dtype, actual: dict[str, Tensor], expected: dict[str, Tensor]
) -> Result:
    return Result(name, dtype, {key: _max_error(actual[key], expected[key]) for key in actual})


def _check_dense(dtype: torch.dtype) -> Result:
    inputs = _qkv((2, 70), (2, 90), dtype)
    doubles = tuple(tensor.double() for tensor in inputs)
    return _compare(
        "forward, backward",
        dtype,
        _with_gradients(
            lambda q, k, v, s: flash_attn_func(q, k, v, s_aux=s, return_lse=True, **OPTIONS), inputs
        ),
        _with_gradients(
            lambda q, k, v, s: reference.attention(q, k, v, s_aux=s, **OPTIONS), doubles
        ),
    )


def _check_varlen(dtype: torch.dtype) -> Result:
    inputs = _qkv((60,), (75,), dtype)
    doubles = tuple(tensor.double() for tensor in inputs)
    lengths = tuple(
        torch.tensor(ends, dtype=torch.int32) for ends in ([0, 33, 33, 60], [0, 40, 45, 75])
    )
    return _compare(
        "varlen",
        dtype,
        _with_gradients(
            lambda q, k, v, s: flash_attn_varlen_func(
                q, k, v, *lengths, 33, 40, s_aux=s, return_lse=True, **OPTIONS
            ),
            inputs,
        ),
        _with_gradients(
            lambda q, k, v, s: reference.varlen_attention(q, k, v, *lengths, s_aux=s, **OPTIONS),
            doubles,
        ),
    )


def _check_paged(dtype: torch.dtype) -> Result:
    """Two new tokens appended to three sequences of a paged cache, and attended to."""
    q, k_cache, v_cache, s_aux = _qkv((3, 2), (16, 16), dtype)
    _, k, v, _ = _qkv((3, 2), (3, 2), dtype)
    block_table = torch.tensor([[9, 3, 12, 0], [1, 2, 15, 7], [4, 11, 8, 5]], dtype=torch.int32)
    cache_seqlens = torch.tensor([50, 0, 31], dtype=torch.int32)
    out, lse = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens,
        block_table,
        s_aux=s_aux,
        return_lse=True,
        **OPTIONS,
    )
    written = [
        reference.gather_pages(k_cache, block_table[b], int(cache_seqlens[b]) + 2)[-2:]
        for b in range(3)
    ]
    expected_out, expected_lse = reference.paged_attention(
        q.double(), k_cache, v_cache, block_table, cache_seqlens + 2, s_aux=s_aux, **OPTIONS
    )
    return _compare(
        "paged cache",
        dtype,
        {"out": out, "lse": lse, "k_cache": torch.stack(written)},
        {"out": expected_out, "lse": expected_lse, "k_cache": k},
    )


def _check_merge(dtype: torch.dtype) -> Result:
    """Two halves of the keys attended to apart, joined with the sink."""
    q, k, v, s_aux = _qkv((2, 40), (2, 80), dtype)
    parts = [
        flash_attn_func(q, k[:, keys], v[:, keys], return_lse=True)
        for keys in (slice(0, 30), slice(30, 80))
    ]
    out, lse = merge_attn_states([out for out, _ in parts], [lse for _, lse in parts], s_aux)
    expected_out, expected_lse = reference.attention(
        q.double(), k.double(), v.double(), s_aux=s_aux
    )
    return _compare(
        "merge", dtype, {"out": out, "lse": lse}, {"out": expected_out, "lse": expected_lse}
    )


def run_self_check(device: str = "cpu") -> Iterator[Result]:
    """Forward, backward, varlen, paged and merge in every dtype."""
    for dtype in TOLERANCE:
        for check in (_check_dense, _check_varlen, _check_paged, _check_merge):
            with torch.device(device):
                result = check(dtype)
            yield result
