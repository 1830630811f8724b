"""The backends of the test matrix.

Tests take the fixture `backend` and call the library through it. So the same tests run on every
backend that this machine has: the CPU, the CUDA kernels in the emulator (`make emulator`), and a
GPU where both the build and the machine have one.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import cases
import emulated
import torch

import sink_attention_ext
from sink_attention_ext import ops, support

CaseT = TypeVar("CaseT", bound=cases.AttentionCase)
EMULATED = {"emulated-sm80": 80, "emulated-sm90": 90}  # the device's compute capability
# A family of kernels forced for all tests on a GPU, and the error of what it does not take.
FORCED = os.environ.get("SINK_ATTENTION_CUDA_KERNELS")
NOT_TAKEN = "but they do not take this"


@dataclass(frozen=True)
class Backend:
    """The public functions on one device; attention always returns (out, lse)."""

    name: str
    device: str
    use: Callable[[], contextlib.AbstractContextManager]  # while a test runs on it
    flash_attn: Callable[..., Any]
    flash_attn_varlen: Callable[..., Any]
    flash_attn_with_kvcache: Callable[..., Any]
    reshape_and_cache: Callable[..., Any]
    merge_attn_states: Callable[..., Any]

    @property
    def arch(self) -> int:
        """10 * major + minor of the compute capability that kernels are chosen by; 0 on the CPU."""
        return EMULATED.get(self.name) or (support.cuda_arch() if self.device == "cuda" else 0)

    @property
    def is_hopper(self) -> bool:
        """Whether Hopper's kernels run what they take, on an emulated card or a real one. They take
        no float32 or float64, and few of the small head_dims that keep tests quick; so a test of
        other things asks the properties and methods below for dtypes and head_dims."""
        return self.arch == 90 and FORCED != "sm80"

    @property
    def dtype(self) -> torch.dtype:
        """Of tests for which one is enough."""
        return torch.bfloat16 if self.is_hopper else torch.float32

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of tests that go through all of them."""
        return cases.HALF_DTYPES if self.is_hopper else cases.FLOAT_DTYPES

    def hopper_takes(self, case: cases.AttentionCase, stored: torch.dtype | None = None) -> bool:
        """Whether Hopper's kernels run a case of aligned rows, over a cache of `stored` where that
        is not the case's own dtype."""
        is_paged = isinstance(case, cases.PagedCase)
        if isinstance(case, cases.DenseCase):
            longest = case.seqlen_q
        elif is_paged and case.packed_q and not case.tree:  # max_seqlen_q is not given
            longest = sum(case.seqlens_q)
        else:
            longest = max(case.seqlens_q, default=0)
        if stored is None:
            stored = cases.FLOAT8 if is_paged and case.float8 else case.dtype
        try:
            chosen = support.cuda_kernel(
                longest, arch=self.arch, dtype=case.dtype, kv_dtype=stored,
                head_dim=case.head_dim, head_dim_v=case.dim_v, num_heads_q=case.num_heads_q,
                num_heads_kv=case.num_heads_kv, paged=is_paged,
                tree_mask=bool(is_paged and case.tree),
                num_splits=case.num_splits if is_paged else 0,
            )  # fmt: skip
        except RuntimeError as error:  # of a family that is forced
            if NOT_TAKEN in str(error):
                return False
            raise
        return chosen.startswith("sm90::")

    def fitting(self, case: CaseT, stored: torch.dtype | None = None) -> CaseT:
        """The case; on Hopper with head_dims that its kernels take. `stored` as above."""
        if not self.is_hopper or case.dtype not in cases.HALF_DTYPES:
            return case
        if self.hopper_takes(case, stored):
            return case
        is_narrow = stored is not None or getattr(case, "float8", None) is not None
        part = 16 if is_narrow else 8  # numbers in 16 bytes
        dims = [-(-dim // part) * part for dim in (case.head_dim, case.dim_v)]
        if max(dims) <= 32:
            dims = [dim + 32 for dim in dims]
        return replace(case, head_dim=dims[0], head_dim_v=dims[1])

    def fitting_dim(self, head_dim: int) -> int:
        """The same for a test that has no case."""
        return self.fitting(
            cases.DenseCase(seqlen_q=1, seqlen_k=1, head_dim=head_dim, dtype=self.dtype)
        ).head_dim


def _backend(name: str, device: str, use: Callable = contextlib.nullcontext) -> Backend:
    return Backend(
        name,
        device,
        use,
        functools.partial(sink_attention_ext.flash_attn_func, return_lse=True),
        functools.partial(sink_attention_ext.flash_attn_varlen_func, return_lse=True),
        functools.partial(sink_attention_ext.flash_attn_with_kvcache, return_lse=True),
        sink_attention_ext.reshape_and_cache,
        sink_attention_ext.merge_attn_states,
    )


def _available_backends() -> dict[str, Backend]:
    backends = {}
    if "cpu" in ops.BACKENDS:
        backends["cpu"] = _backend("cpu", "cpu")
    if emulated.load():
        for name, arch in EMULATED.items():
            use = functools.partial(emulated.emulated, arch=arch)
            backends[name] = _backend(name, "cpu", use)
    if "cuda" in ops.BACKENDS and torch.cuda.is_available():
        backends["cuda"] = _backend("cuda", "cuda")
    return backends


BACKENDS = _available_backends()
