"""supports(): what runs, through which kernel, and why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sink_attention_ext import checks, ops, supports


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "xpu"}, "no XPU kernels"),
        ({"dtype": torch.int8}, "torch.int8"),
        ({"head_dim": 257}, "head_dim is 1 to 256, not 257"),
        ({"head_dim_v": 0}, "head_dim_v is 1 to 256, not 0"),
        ({"num_heads_q": 6, "num_heads_kv": 4}, "num_heads_kv = 4 does not divide"),
        ({"kv_dtype": torch.float8_e4m3fn}, "paged cache"),
        ({"kv_dtype": torch.float16, "paged": True}, "torch.float16"),
        ({"paged": True, "backward": True}, "no backward"),
        ({"s_aux_dtype": torch.int32}, "torch.int32"),
        ({"softcap": -1.0}, "softcap"),
        ({"window_size": (-2, 0)}, "window_size"),
        ({"num_sink_tokens": -1}, "num_sink_tokens"),
        ({"tree_mask": True, "causal": True}, "key-value cache"),
        ({"tree_mask": True, "paged": True}, "tree_mask needs causal"),
    ],
)
def test_supports_says_why_not(change: dict[str, Any], reason: str) -> None:
    answer = supports(**{"dtype": torch.float32, "head_dim": 64, **change})
    assert not answer.supported and answer.kernel is None
    assert reason in answer.reason


def test_supports_what_runs() -> None:
    answer = supports(
        dtype=torch.bfloat16, head_dim=192, head_dim_v=128, num_heads_q=64, num_heads_kv=8,
        causal=True, window_size=(127, 0), softcap=15.0, s_aux_dtype=torch.float32,
        backward=True, deterministic=True,
    )  # fmt: skip
    assert answer and answer.reason is None
    assert answer.kernel == f"cpu/{ops.cpu_instruction_set()}"
    kv_dtype = checks.FLOAT8
    assert supports(dtype=torch.bfloat16, head_dim=64, kv_dtype=kv_dtype, paged=True)
    assert supports(
        dtype=torch.bfloat16, head_dim=64, paged=True, window_size=(127, 0), num_sink_tokens=4,
        tree_mask=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        (torch.bfloat16, "cuda/sm80"),
        (torch.float16, "cuda/sm80"),
        (torch.float32, "cuda/simt"),
        (torch.float64, "cuda/simt"),
    ],
)
def test_supports_names_the_cuda_kernels(
    dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "BACKENDS", ("cpu", "cuda"))
    for extra in ({"backward": True}, {"paged": True, "kv_dtype": checks.FLOAT8}):
        answer = supports(dtype=dtype, head_dim=64, device="cuda:0", **extra)
        assert answer and (answer.kernel, answer.reason) == (kernel, None)
    answer = supports(dtype=dtype, head_dim=320, device="cuda")
    assert not answer and "head_dim is 1 to 256" in answer.reason


def test_supports_says_that_the_build_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "BACKENDS", ("cpu",))
    answer = supports(dtype=torch.bfloat16, head_dim=64, device="cuda")
    assert not answer and answer.reason == "this build has no CUDA kernels: it has cpu"
