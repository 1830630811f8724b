"""The compiled operators: loads `_C`, registers their fake kernels, and binds them to names.

Importing works without the compiled library (``sink_attention_ext.reference`` needs none); then
every name bound here raises an ImportError when it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from sink_attention_ext import fakes
from sink_attention_ext.cache import fakes as cache_fakes
from sink_attention_ext.fake_checks import lse_dtype as lse_dtype

NAMESPACE = "sink_attention_ext"
FAKE_KERNELS = fakes.FAKE_KERNELS | cache_fakes.FAKE_KERNELS


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


def direct(op: Callable[..., Any]) -> Callable[..., Any]:
    """What an operator's __call__ calls: a frame of Python less. Not for code that is compiled."""
    return getattr(op, "_op", op)


flash_attn_fwd = lookup("flash_attn_fwd")
flash_attn_bwd = lookup("flash_attn_bwd")
flash_attn_varlen_fwd = lookup("flash_attn_varlen_fwd")
flash_attn_varlen_bwd = lookup("flash_attn_varlen_bwd")
flash_attn_fp8_fwd = lookup("flash_attn_fp8_fwd")
flash_attn_fp8_varlen_fwd = lookup("flash_attn_fp8_varlen_fwd")
flash_attn_fp8_is_native = lookup("flash_attn_fp8_is_native")
flash_attn_fp8_native = lookup("flash_attn_fp8_native")
paged_attn = lookup("paged_attn")
paged_attn_out = lookup("paged_attn.out")
append_and_attend = lookup("append_and_attend")
append_and_attend_out = lookup("append_and_attend.out")
reshape_and_cache = lookup("reshape_and_cache")
reshape_and_cache_token_scales = lookup("reshape_and_cache.token_scales")
merge_attn_states = lookup("merge_attn_states")
flash_attn_fwd_direct = direct(flash_attn_fwd)
flash_attn_varlen_fwd_direct = direct(flash_attn_varlen_fwd)
paged_attn_direct = direct(paged_attn)
append_and_attend_direct = direct(append_and_attend)
reshape_and_cache_direct = direct(reshape_and_cache)
cpu_instruction_set = lookup("cpu_instruction_set")
cpu_instruction_sets = lookup("cpu_instruction_sets")
set_cpu_instruction_set = lookup("set_cpu_instruction_set")
cuda_kernels = lookup("cuda_kernels")
set_cuda_kernels = lookup("set_cuda_kernels")
cuda_plan = lookup("cuda_plan")
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

if LIBRARY_PATH is not None:
    for _name, _kernel in FAKE_KERNELS.items():
        torch.library.register_fake(f"{NAMESPACE}::{_name}")(_kernel)
