"""Which family of CUDA kernels runs a call: by the card, by the call, and by force."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from backends import BACKENDS, NOT_TAKEN

import sink_attention_ext
from sink_attention_ext import ops

ROOT = Path(__file__).resolve().parent.parent
# A build of the kernels for the emulator; cards with and without kernels of their own.
needs_emulator = pytest.mark.skipif("emulated-sm80" not in BACKENDS, reason="make emulator")
CARDS = (80, 86, 89, 90, 100, 120)

FORWARD = {
    "dtype": "bfloat16", "kv_dtype": "bfloat16", "seqlen_q": 300, "num_heads_q": 8,
    "num_heads_kv": 2, "head_dim": 64, "head_dim_v": 64, "paged": False, "num_splits": 0,
    "tree_mask": False, "backward": False,
}  # fmt: skip
CACHE = FORWARD | {"paged": True}
DECODE = CACHE | {"seqlen_q": 1}
BACKWARD = FORWARD | {"backward": True}
QUANTISED = {"kv_dtype": "float8_e4m3fn"}

# (a call, whose kernels run it on Hopper; elsewhere sm80's do, or simt's)
TABLE = [
    (FORWARD, "sm90"),
    (FORWARD | {"dtype": "float16", "kv_dtype": "float16"}, "sm90"),
    (FORWARD | {"head_dim": 256, "head_dim_v": 256}, "sm90"),
    (FORWARD | {"head_dim": 192, "head_dim_v": 128}, "sm90"),
    (FORWARD | {"head_dim": 32, "head_dim_v": 32}, "sm80"),
    (FORWARD | {"head_dim": 60, "head_dim_v": 60}, "sm80"),  # rows not in parts of 16 bytes
    (FORWARD | {"dtype": "float32", "kv_dtype": "float32"}, "simt"),
    (FORWARD | {"dtype": "float64", "kv_dtype": "float64"}, "simt"),
    (CACHE, "sm90"),
    (CACHE | {"num_splits": 1}, "sm90"),
    (CACHE | {"num_splits": 3}, "sm80"),  # in parts, and too many rows to decode
    (CACHE | {"tree_mask": True}, "sm80"),
    (CACHE | QUANTISED, "sm80"),
    (DECODE, "sm90"),
    (DECODE | {"num_splits": 3}, "sm90"),
    (DECODE | {"num_splits": 1}, "sm90"),
    (DECODE | {"num_splits": 1} | QUANTISED, "sm80"),  # prefill's kernels, as the next
    (DECODE | QUANTISED, "sm90"),
    (DECODE | {"dtype": "float32", "kv_dtype": "float32"}, "simt"),
    (BACKWARD, "sm90"),
    (BACKWARD | {"head_dim": 32, "head_dim_v": 32}, "sm80"),
    (BACKWARD | {"dtype": "float64", "kv_dtype": "float64"}, "simt"),
]


def differing(call: dict[str, Any]) -> str:
    base = BACKWARD if call["backward"] else CACHE if call["paged"] else FORWARD
    kind = "backward" if call["backward"] else "cache" if call["paged"] else "forward"
    return "-".join([kind, *(f"{k}={v}" for k, v in call.items() if v != base[k])])


@pytest.fixture
def set_cuda_kernels() -> Iterator[Callable[[str], None]]:
    """ops.set_cuda_kernels of the emulated device, for the length of a test."""
    with emulated.emulated():
        before = ops.cuda_kernels()
        yield ops.set_cuda_kernels
        ops.set_cuda_kernels(before)


def family(call: dict[str, Any], arch: int) -> str:
    return ops.cuda_kernel_family(**call, arch=arch)


@needs_emulator
@pytest.mark.parametrize(
    ("call", "on_hopper"), TABLE, ids=[f"{differing(call)}-{name}" for call, name in TABLE]
)
def test_the_card_and_the_call_choose(
    call: dict[str, Any], on_hopper: str, set_cuda_kernels: Callable[[str], None]
) -> None:
    elsewhere = "simt" if on_hopper == "simt" else "sm80"
    expected = {arch: on_hopper if arch == 90 else elsewhere for arch in CARDS}
    assert {arch: family(call, arch) for arch in CARDS} == expected
    set_cuda_kernels("sm80")  # the kernels for all cards: never those for one
    assert {arch: family(call, arch) for arch in CARDS} == dict.fromkeys(CARDS, elsewhere)
    set_cuda_kernels("sm90")
    for arch in CARDS:
        if expected[arch] == "sm90":
            assert family(call, arch) == "sm90"
        else:
            with pytest.raises(RuntimeError, match=NOT_TAKEN):
                family(call, arch)


@needs_emulator
@pytest.mark.parametrize(
    ("call", "arch", "reason"),
    [
        (FORWARD, 80, "forward: they run on compute capability 9.0 only"),
        (BACKWARD, 120, "backward: they run on compute capability 9.0 only"),
        (FORWARD | {"dtype": "float32", "kv_dtype": "float32"}, 90, "neither bfloat16 nor float16"),
        (FORWARD | {"head_dim": 60, "head_dim_v": 60}, 90, "aligned parts of 16 bytes"),
        (CACHE | {"tree_mask": True}, 90, "forward: there is a tree mask"),
        (CACHE | {"num_splits": 2}, 90, "forward: num_splits is above 1"),
        (BACKWARD | {"head_dim": 16, "head_dim_v": 16}, 90, "are at most 32"),
    ],
)
def test_what_is_forced_and_not_taken_says_why(
    call: dict[str, Any], arch: int, reason: str, set_cuda_kernels: Callable[[str], None]
) -> None:
    set_cuda_kernels("sm90")
    with pytest.raises(RuntimeError, match=f"forces the sm90 kernels, {NOT_TAKEN} .*{reason}"):
        family(call, arch)


def attend(dtype: torch.dtype = torch.bfloat16, backward: bool = False) -> None:
    q = torch.randn(1, 70, 2, 64, dtype=dtype, requires_grad=backward)
    out = sink_attention_ext.flash_attn_func(q, q, q, causal=True)
    if backward:
        out.sum().backward()


def attend_cache(seqlen_q: int, num_splits: int) -> None:
    q = torch.randn(1, seqlen_q, 2, 64).bfloat16()
    cache = torch.randn(5, 16, 1, 64).bfloat16()
    sink_attention_ext.flash_attn_with_kvcache(
        q, cache, cache, cache_seqlens=torch.tensor([70], dtype=torch.int32), causal=True,
        block_table=torch.arange(5, dtype=torch.int32)[None], num_splits=num_splits,
    )  # fmt: skip


def families_run(call: Callable[[], None]) -> set[str]:
    before = emulated.blocks_run()
    call()
    return set(emulated.blocks_run() - before) - {"common"}


CALLS: dict[str, Callable[[], None]] = {
    "forward": attend,
    "backward": lambda: attend(backward=True),
    "prefill": lambda: attend_cache(40, 0),
    "decode": lambda: attend_cache(1, 0),
    "decode in two parts": lambda: attend_cache(1, 2),
    "decode in prefill's order": lambda: attend_cache(1, 1),
}


@needs_emulator
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_the_family_that_is_named_runs(name: str, arch: int) -> None:
    with emulated.emulated(arch=arch):
        assert families_run(CALLS[name]) == {"sm90" if arch == 90 else "sm80"}


@needs_emulator
def test_a_process_can_switch(set_cuda_kernels: Callable[[str], None]) -> None:
    """Results agree within rounding, and a refused call leaves the next ones alone."""
    q = torch.randn(1, 70, 2, 64).bfloat16()
    results = []
    for name in ("sm80", "sm90", ""):
        with emulated.emulated(arch=90):
            set_cuda_kernels(name)
            assert ops.cuda_kernels() == name
            assert families_run(attend) == {name or "sm90"}
            results.append(sink_attention_ext.flash_attn_func(q, q, q, causal=True).float())
    # Each is within a rounding of its bfloat16 output and of its weights.
    torch.testing.assert_close(results[1], results[0], rtol=2.0**-7, atol=2.0**-8)
    assert torch.equal(results[2], results[1])
    set_cuda_kernels("sm90")
    with pytest.raises(RuntimeError, match=NOT_TAKEN):
        attend(torch.float32)
    set_cuda_kernels("")
    attend(torch.float32)


def test_another_name_is_refused() -> None:
    before = ops.cuda_kernels()
    with pytest.raises(ValueError, match="set_cuda_kernels: name must be sm80, sm90 or empty"):
        ops.set_cuda_kernels("sm70")
    assert ops.cuda_kernels() == before


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("", "''"),
        ("sm90", "'sm90'"),
        ("simt", "SINK_ATTENTION_CUDA_KERNELS must be sm80, sm90 or empty"),
    ],
)
def test_the_environment_forces_a_family(value: str, printed: str) -> None:
    environment = os.environ | {"SINK_ATTENTION_CUDA_KERNELS": value}
    code = "from sink_attention_ext import ops; print(repr(ops.cuda_kernels()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert printed in done.stdout + done.stderr
    assert (done.returncode == 0) == (value != "simt")
