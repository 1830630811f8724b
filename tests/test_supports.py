"""supports(): what runs, through which kernel, and why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import emulated
import pytest
import torch
from backends import BACKENDS
from torch import Tensor

from sink_attention_ext import __main__ as command
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


Card = Callable[[tuple[int, int] | None], None]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """A build with CUDA kernels, those in the emulator, on a machine with such a card or none."""
    if "emulated-sm80" not in BACKENDS:
        pytest.skip("make emulator")
    monkeypatch.setattr(ops, "BACKENDS", ("cpu", "cuda"))

    def put(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)

    with emulated.emulated():
        yield put
        ops.set_cuda_kernels("")


@pytest.mark.parametrize("capability", [None, (8, 0), (12, 0)])
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
    dtype: torch.dtype, kernel: str, capability: tuple[int, int] | None, card: Card
) -> None:
    card(capability)
    for extra in ({"backward": True}, {"paged": True, "kv_dtype": checks.FLOAT8}):
        answer = supports(dtype=dtype, head_dim=64, device="cuda:0", **extra)
        assert answer and (answer.kernel, answer.reason) == (kernel, None)
    answer = supports(dtype=dtype, head_dim=320, device="cuda")
    assert not answer and "head_dim is 1 to 256" in answer.reason


def test_supports_names_what_the_parts_of_a_call_run(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position and many of a cache, forward and backward: each is asked for, on its card."""
    card((9, 0))
    asked = []

    def plan(q: Tensor, *call: Any) -> str:
        paged, backward, arch = call[2], call[5], call[6]
        asked.append((q.shape[1] > 1, paged, backward, arch))
        return "sm80::kernel" if backward or q.shape[1] == 1 else "sm90::kernel"

    monkeypatch.setattr(ops, "cuda_plan", plan)
    shape = {"dtype": torch.bfloat16, "head_dim": 64, "device": "cuda"}
    assert supports(**shape).kernel == "cuda/sm90"
    assert supports(**shape, backward=True).kernel == "cuda/sm90+sm80"
    assert supports(**shape, paged=True).kernel == "cuda/sm80+sm90"
    assert asked == [
        (True, False, False, 90),
        (True, False, False, 90),
        (True, False, True, 90),
        (False, True, False, 90),
        (True, True, False, 90),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, checks.FLOAT8], ids=str)
@pytest.mark.parametrize(
    ("capability", "archs", "reason"),
    [
        ((7, 5), "", "on compute capability 7.5: .*they need compute capability 8.0 or later"),
        ((8, 0), "9.0a", "8.0, built for 9.0a: .*this library was built without them"),
        ((12, 0), "8.0;9.0", "12.0, built for 8.0;9.0: .*this library was built without them"),
    ],
)
def test_supports_says_that_a_card_runs_no_kernel(
    capability: tuple[int, int], archs: str, reason: str, dtype: torch.dtype, card: Card
) -> None:
    card(capability)
    with emulated.emulated(build_archs=archs):
        answer = supports(dtype=dtype, head_dim=64, device="cuda")
    assert not answer and re.search(reason, answer.reason)
    with emulated.emulated(build_archs="8.0+PTX"):
        answer = supports(dtype=dtype, head_dim=64, device="cuda")
    assert bool(answer) == (capability >= (8, 0))


def test_supports_says_what_forced_kernels_do_not_take(card: Card) -> None:
    card((8, 9))
    ops.set_cuda_kernels("sm90")
    answer = supports(dtype=torch.bfloat16, head_dim=64, device="cuda")
    assert not answer and "they run on compute capability 9.0 only" in answer.reason
    ops.set_cuda_kernels("sm80")
    assert supports(dtype=torch.bfloat16, head_dim=64, device="cuda").kernel == "cuda/sm80"


def test_the_command_names_the_kernels(card: Card) -> None:
    card((8, 0))
    text = "training cuda/sm80, serving cuda/sm80 at head_dim 64 in bfloat16"
    assert command.describe_cuda_kernels() == text
    ops.set_cuda_kernels("sm80")
    assert "forced to sm80" in command.describe_cuda_kernels()


def test_supports_says_that_the_build_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "BACKENDS", ("cpu",))
    answer = supports(dtype=torch.bfloat16, head_dim=64, device="cuda")
    assert not answer and answer.reason == "this build has no CUDA kernels: it has cpu"
