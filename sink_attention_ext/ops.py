"""The compiled operators: loads `_C`, tells torch the shapes of their results, and binds them to
names.

Importing works without the compiled library (``sink_attention_ext.reference`` needs none); then
every name bound here raises an ImportError when it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

NAMESPACE = "sink_attention_ext"


def _load_library() -> Path | None:
    for suffix in (".abi3.so", ".so"):
        path = Path(__file__).with_name("_C" + suffix)
        if path.exists():
            torch.ops.load_library(str(path))
            return path
    return None


LIBRARY_PATH = _load_library()


def lookup(name: str) -> Callable[..., Any]:
    """The operator `name` ("op" or "op.overload"), or a function that says how to build it."""
    if LIBRARY_PATH is not None:
        packet, _, overload = name.partition(".")
        return getattr(getattr(torch.ops.sink_attention_ext, packet), overload or "default")

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(
            f"sink_attention_ext.{name} needs the compiled library sink_attention_ext/_C.abi3.so, "
            "which is not there: run `make build` with this interpreter"
        )

    return missing


flash_attn_fwd = lookup("flash_attn_fwd")
flash_attn_bwd = lookup("flash_attn_bwd")
flash_attn_varlen_fwd = lookup("flash_attn_varlen_fwd")
flash_attn_varlen_bwd = lookup("flash_attn_varlen_bwd")
flash_attn_float8_fwd = lookup("flash_attn_float8_fwd")
flash_attn_float8_varlen_fwd = lookup("flash_attn_float8_varlen_fwd")
flash_attn_float8_kernel = lookup("flash_attn_float8_kernel")
paged_attn = lookup("paged_attn")
paged_attn_out = lookup("paged_attn.out")
check_paged_attn = lookup("check_paged_attn")
reshape_and_cache = lookup("reshape_and_cache")
reshape_and_cache_token_scales = lookup("reshape_and_cache.token_scales")
merge_attn_states = lookup("merge_attn_states")
cpu_instruction_set = lookup("cpu_instruction_set")
cpu_instruction_sets = lookup("cpu_instruction_sets")
set_cpu_instruction_set = lookup("set_cpu_instruction_set")
cuda_kernels = lookup("cuda_kernels")
set_cuda_kernels = lookup("set_cuda_kernels")
cuda_kernel_family = lookup("cuda_kernel_family")
debug_checks = lookup("debug_checks")
set_debug_checks = lookup("set_debug_checks")


@contextlib.contextmanager
def forced_cuda_kernels(family: str) -> Iterator[None]:
    """CUDA's attention runs the kernels of `family`, "sm80" or "sm90", meanwhile; what they do not
    take is a RuntimeError with the reason. The CPU's are not concerned."""
    before = cuda_kernels()
    set_cuda_kernels(family)
    try:
        yield
    finally:
        set_cuda_kernels(before)


def _built_backends() -> tuple[str, ...]:
    if LIBRARY_PATH is None:
        return ()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    return tuple(d for d, key in keys.items() if has_kernel(f"{NAMESPACE}::flash_attn_fwd", key))


BACKENDS = _built_backends()  # device types that the library holds kernels for


# ---- shapes, dtypes and strides of the results, for FakeTensor and meta tensors ----


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the log-sum-exp of inputs of `dtype` is returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_attention(q: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    """Rows of q are (..., seqlen or total, num_heads_q, head_dim): lse has heads before rows."""
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return (
        q.new_empty((*q.shape[:-1], head_dim_v)),
        q.new_empty(lse_shape, dtype=lse_dtype(q.dtype)),
    )


def _fake_gradients(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if s_aux is None:
        ds_aux = q.new_empty((0,), dtype=torch.float32)
    else:
        ds_aux = s_aux.new_empty(s_aux.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), ds_aux


def _fake_flash_attn_fwd(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _fake_attention(q, v.shape[-1])


def _fake_flash_attn_float8_fwd(
    q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    out, lse = _fake_attention(q, v.shape[-1])
    return out.new_empty(out.shape, dtype=torch.bfloat16), lse


def _fake_flash_attn_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    s_aux: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _fake_gradients(q, k, v, s_aux)


def _fake_flash_attn_varlen_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, s_aux: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _fake_gradients(q, k, v, s_aux)


def _fake_paged_attn(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return _fake_attention(q, v_cache.shape[-1])


def _fake_mutation(*args: Any, **kwargs: Any) -> None:
    return None


def _fake_merge_attn_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], s_aux: Tensor | None
) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


FAKE_KERNELS: dict[str, Callable[..., Any]] = {
    "flash_attn_fwd": _fake_flash_attn_fwd,
    "flash_attn_bwd": _fake_flash_attn_bwd,
    "flash_attn_varlen_fwd": _fake_flash_attn_fwd,
    "flash_attn_varlen_bwd": _fake_flash_attn_varlen_bwd,
    "flash_attn_float8_fwd": _fake_flash_attn_float8_fwd,
    "flash_attn_float8_varlen_fwd": _fake_flash_attn_float8_fwd,
    "paged_attn": _fake_paged_attn,
    "paged_attn.out": _fake_mutation,
    "check_paged_attn": _fake_mutation,
    "reshape_and_cache": _fake_mutation,
    "reshape_and_cache.token_scales": _fake_mutation,
    "merge_attn_states": _fake_merge_attn_states,
}

if LIBRARY_PATH is not None:
    for _name, _kernel in FAKE_KERNELS.items():
        torch.library.register_fake(f"{NAMESPACE}::{_name}")(_kernel)
