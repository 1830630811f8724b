"""Bad input is refused before anything runs; the message names argument, value, expectation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sink_attention_ext import (
    apply_sink,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attn_states,
    ops,
    reshape_and_cache,
    supports,
)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def dense() -> dict[str, Any]:
    return {"q": randn(2, 5, 4, 8), "k": randn(2, 7, 2, 8), "v": randn(2, 7, 2, 6)}


def varlen() -> dict[str, Any]:
    return {
        "q": randn(6, 4, 8),
        "k": randn(9, 2, 8),
        "v": randn(9, 2, 6),
        "cu_seqlens_q": int32(0, 2, 6),
        "cu_seqlens_k": int32(0, 5, 9),
        "max_seqlen_q": 4,
        "max_seqlen_k": 5,
        "seqused_k": int32(5, 4),
    }


def paged() -> dict[str, Any]:
    return {
        "q": randn(2, 1, 4, 8),
        "k_cache": randn(6, 4, 2, 8),
        "v_cache": randn(6, 4, 2, 6),
        "k": randn(2, 1, 2, 8),
        "v": randn(2, 1, 2, 6),
        "cache_seqlens": int32(5, 7),
        "block_table": int32([0, 1], [3, 5]),
    }


def packed() -> dict[str, Any]:
    new = {"q": randn(4, 4, 8), "k": randn(4, 2, 8), "v": randn(4, 2, 6)}
    lengths = {"cache_seqlens": int32(4, 5), "cu_seqlens_q": int32(0, 1, 4), "max_seqlen_q": 3}
    return {**paged(), **new, **lengths}


def float8() -> dict[str, Any]:
    arguments = paged()
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].to(torch.float8_e4m3fn)
    return {**arguments, "k_scale": torch.ones(2), "v_scale": torch.ones(2)}


def write() -> dict[str, Any]:
    return {
        "k": randn(3, 2, 8),
        "v": randn(3, 2, 6),
        "k_cache": randn(6, 4, 2, 8),
        "v_cache": randn(6, 4, 2, 6),
        "slot_mapping": torch.tensor([3, -1, 23]),
    }


def merge() -> dict[str, Any]:
    return {"outs": [randn(2, 3, 4, 5)] * 2, "lses": [randn(2, 4, 3)] * 2, "s_aux": randn(4)}


def apply() -> dict[str, Any]:
    return {"out": randn(2, 3, 4, 5), "lse": randn(2, 4, 3), "s_aux": randn(4)}


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "dense": (flash_attn_func, dense),
    "varlen": (flash_attn_varlen_func, varlen),
    "paged": (flash_attn_with_kvcache, paged),
    "packed": (flash_attn_with_kvcache, packed),
    "float8": (flash_attn_with_kvcache, float8),
    "write": (reshape_and_cache, write),
    "merge": (merge_attn_states, merge),
    "apply": (apply_sink, apply),
}

META = torch.device("meta")

# function, what is changed, exception, what the message must hold: argument, value, expectation
CASES: list[tuple[str, dict[str, Any], type[Exception], list[str]]] = [
    # rank and type
    ("dense", {"q": randn(5, 4, 8)}, ValueError, ["q must have 4 dim", "(5, 4, 8)", "num_heads_q"]),
    ("dense", {"k": randn(7, 2, 8)}, ValueError, ["k must have 4 dimensions", "(7, 2, 8)"]),
    ("dense", {"v": [1.0]}, TypeError, ["v must be a torch.Tensor", "list"]),
    ("varlen", {"q": randn(1, 6, 4, 8)}, ValueError, ["q must have 3 dim", "(1, 6, 4, 8)"]),
    ("paged", {"q": randn(2, 4, 8)}, ValueError, ["q must have 4 dimensions", "(2, 4, 8)"]),
    ("packed", {"q": randn(1, 4, 4, 8)}, ValueError, ["q must have 3 dim", "(1, 4, 4, 8)"]),
    ("paged", {"k_cache": randn(6, 4, 16)}, ValueError, ["k_cache must have 4 dim", "page_size"]),
    ("write", {"k": randn(3, 16)}, ValueError, ["k must have 3 dimensions", "(3, 16)"]),
    # dtypes
    ("dense", {"k": randn(2, 7, 2, 8).half()}, TypeError, ["k must", "float32", "float16"]),
    ("dense", {"v": randn(2, 7, 2, 6).double()}, TypeError, ["v must", "float32", "float64"]),
    ("dense", {"q": torch.ones(2, 5, 4, 8, dtype=torch.int64)}, TypeError, ["q must", "int64"]),
    ("paged", {"q": randn(2, 1, 4, 8).half()}, TypeError, ["q must", "k_cache", "float16"]),
    ("paged", {"k": randn(2, 1, 2, 8).half()}, TypeError, ["k must", "k_cache", "float16"]),
    ("paged", {"v_cache": randn(6, 4, 2, 6).half()}, TypeError, ["v_cache must", "float16"]),
    ("write", {"v": randn(3, 2, 6).bfloat16()}, TypeError, ["v must", "float32", "bfloat16"]),
    ("write", {"k_cache": torch.ones(6, 4, 2, 8, dtype=torch.int8)}, TypeError, ["int8"]),
    # devices
    ("dense", {"k": torch.empty(2, 7, 2, 8, device=META)}, ValueError, ["k must", "cpu", "meta"]),
    ("dense", {"s_aux": torch.empty(4, device=META)}, ValueError, ["s_aux must", "cpu", "meta"]),
    (
        "varlen", {"cu_seqlens_k": int32(0, 5, 9).to(META)}, ValueError,
        ["cu_seqlens_k must", "cpu", "meta"],
    ),
    (
        "paged", {"block_table": int32([0, 1], [3, 5]).to(META)}, ValueError,
        ["block_table must", "cpu", "meta"],
    ),
    # heads and head dims
    ("dense", {"q": randn(2, 5, 3, 8)}, ValueError, ["k must", "num_heads_q = 3", "got 2"]),
    ("dense", {"q": randn(2, 5, 0, 8)}, ValueError, ["q must have num_heads_q of at least 1"]),
    ("dense", {"v": randn(2, 7, 4, 6)}, ValueError, ["v must have num_heads_kv = 2", "7, 4, 6"]),
    ("dense", {"k": randn(2, 7, 2, 4)}, ValueError, ["k must have head_dim = 8", "(2, 7, 2, 4)"]),
    ("dense", {"v": randn(2, 7, 2, 257)}, ValueError, ["v must have head_dim_v", "256", "257"]),
    (
        "dense", {"q": randn(2, 5, 4, 300), "k": randn(2, 7, 2, 300)}, ValueError,
        ["q must have head_dim from 1 to 256", "300"],
    ),
    ("paged", {"q": randn(2, 1, 3, 8)}, ValueError, ["k_cache", "num_heads", "got 3 and 2"]),
    ("paged", {"k": randn(2, 1, 1, 8)}, ValueError, ["k must have shape (2, 1, 2, 8)", "(2, 1, 1, 8)"]),
    ("paged", {"v": randn(2, 1, 2, 8)}, ValueError, ["v must have shape (2, 1, 2, 6)", "(2, 1, 2, 8)"]),
    # batch and lengths
    ("dense", {"k": randn(3, 7, 2, 8)}, ValueError, ["k must have batch = 2", "(3, 7, 2, 8)"]),
    ("dense", {"v": randn(2, 8, 2, 6)}, ValueError, ["v must have seqlen_k = 7", "(2, 8, 2, 6)"]),
    ("varlen", {"v": randn(8, 2, 6)}, ValueError, ["v must have total_k = 9", "(8, 2, 6)"]),
    ("paged", {"k": randn(3, 1, 2, 8), "v": randn(3, 1, 2, 6)}, ValueError, ["k must have shape (2, 1"]),
    ("paged", {"v": randn(2, 2, 2, 6)}, ValueError, ["v must have shape (2, 1, 2, 6)", "(2, 2, 2, 6)"]),
    ("packed", {"k": randn(3, 2, 8), "v": randn(3, 2, 6)}, ValueError, ["k must have shape (4, 2, 8)"]),
    ("paged", {"v_cache": randn(5, 4, 2, 6)}, ValueError, ["v_cache must have", "(5, 4, 2, 6)"]),
    ("paged", {"block_table": None}, ValueError, ["k_cache must have batch = 2", "block_table"]),
    ("paged", {"block_table": int32([0, 1])}, ValueError, ["block_table must have batch = 2"]),
    # strides
    (
        "dense", {"q": randn(2, 5, 8, 4).transpose(2, 3)}, ValueError,
        ["q must have stride 1", "(160, 32, 1, 4)", "contiguous"],
    ),
    ("paged", {"k_cache": randn(6, 4, 8, 2).transpose(2, 3)}, ValueError, ["k_cache", "stride 1"]),
    ("paged", {"block_table": int32([0, 3], [1, 5]).t()}, ValueError, ["block_table", "stride 1", "2"]),
    # sinks
    ("dense", {"s_aux": randn(2)}, ValueError, ["s_aux must have shape", "(4,)", "(2,)"]),
    ("dense", {"s_aux": randn(1, 4)}, ValueError, ["s_aux must have shape", "(4,)", "(1, 4)"]),
    ("dense", {"s_aux": randn(())}, ValueError, ["s_aux must have shape", "(4,)", "()"]),
    ("dense", {"s_aux": torch.zeros(4, dtype=torch.int32)}, TypeError, ["s_aux must", "int32"]),
    ("dense", {"s_aux": 0.0}, TypeError, ["s_aux must be None or a torch.Tensor", "float"]),
    ("varlen", {"s_aux": randn(6)}, ValueError, ["s_aux must have shape", "(4,)", "(6,)"]),
    ("paged", {"s_aux": randn(8)}, ValueError, ["s_aux must have shape", "(4,)", "(8,)"]),
    ("merge", {"s_aux": randn(3)}, ValueError, ["s_aux must have shape", "(4,)", "(3,)"]),
    ("apply", {"s_aux": randn(3)}, ValueError, ["s_aux must have shape", "(4,)", "(3,)"]),
    ("apply", {"s_aux": None}, TypeError, ["s_aux must be", "None"]),
    # windows and numbers
    ("dense", {"window_size": (-2, 0)}, ValueError, ["window_size", "left = -2", "-1 for"]),
    ("dense", {"window_size": (1, -7), "causal": True}, ValueError, ["window_size", "right = -7"]),
    ("dense", {"window_size": 128}, TypeError, ["window_size must be a pair", "128"]),
    ("dense", {"window_size": (1, 2, 3)}, TypeError, ["window_size must be a pair", "(1, 2, 3)"]),
    ("dense", {"window_size": (1.5, 0)}, TypeError, ["window_size", "left = 1.5"]),
    ("dense", {"softmax_scale": 0.0}, ValueError, ["softmax_scale must be", "0.0", "dropout_p"]),
    ("dense", {"softmax_scale": torch.nan}, ValueError, ["softmax_scale must be finite", "nan"]),
    ("dense", {"softmax_scale": "auto"}, TypeError, ["softmax_scale must be", "'auto'"]),
    ("dense", {"softcap": -1.0}, ValueError, ["softcap must be", "at least 0", "-1.0"]),
    ("dense", {"softcap": torch.inf}, ValueError, ["softcap must be finite", "inf"]),
    ("dense", {"softcap": None}, TypeError, ["softcap must be a number", "None"]),
    ("dense", {"causal": 1}, TypeError, ["causal must be True or False", "1"]),
    ("dense", {"deterministic": None}, TypeError, ["deterministic must be True or False", "None"]),
    ("paged", {"num_splits": -1}, ValueError, ["num_splits must be", "-1"]),
    ("paged", {"num_splits": 1.0}, TypeError, ["num_splits must be an int", "1.0"]),
    # packed sequences
    (
        "varlen", {"cu_seqlens_q": torch.tensor([0, 2, 6])}, TypeError,
        ["cu_seqlens_q must have dtype torch.int32", "int64"],
    ),
    ("varlen", {"cu_seqlens_k": int32([0, 5, 9])}, ValueError, ["cu_seqlens_k must have 1 dim"]),
    ("varlen", {"cu_seqlens_k": int32(0, 9)}, ValueError, ["cu_seqlens_k", "batch + 1 = 3", "(2,"]),
    ("varlen", {"cu_seqlens_q": int32()}, ValueError, ["cu_seqlens_q must have batch + 1", "(0,)"]),
    ("varlen", {"cu_seqlens_q": None}, TypeError, ["cu_seqlens_q must be a torch.Tensor", "None"]),
    ("varlen", {"seqused_k": int32(1)}, ValueError, ["seqused_k must have batch = 2", "(1,)"]),
    ("varlen", {"seqused_k": torch.ones(2)}, TypeError, ["seqused_k", "int32", "float32"]),
    ("varlen", {"max_seqlen_q": -1}, ValueError, ["max_seqlen_q must be at least 0", "-1"]),
    ("varlen", {"max_seqlen_k": 5.0}, TypeError, ["max_seqlen_k must be an int", "5.0"]),
    ("varlen", {"max_seqlen_q": torch.ones(1)}, TypeError, ["max_seqlen_q", "0-d", "float32"]),
    # their values, looked at by the operator
    ("varlen", {"cu_seqlens_q": int32(1, 2, 6)}, ValueError, ["cu_seqlens_q[0]", "0", "1"]),
    ("varlen", {"cu_seqlens_q": int32(0, 4, 3)}, ValueError, ["cu_seqlens_q[2]", "3", "4"]),
    ("varlen", {"cu_seqlens_k": int32(0, 5, 10)}, ValueError, ["cu_seqlens_k[2]", "9", "10"]),
    ("varlen", {"max_seqlen_q": 3}, ValueError, ["max_seqlen_q", "3", "4"]),
    ("varlen", {"max_seqlen_k": 4}, ValueError, ["max_seqlen_k", "4", "5"]),
    ("varlen", {"seqused_k": int32(5, 5)}, ValueError, ["seqused_k[1]", "4", "5"]),
    ("varlen", {"seqused_k": int32(-1, 4)}, ValueError, ["seqused_k[0]", "-1"]),
    # caches
    ("paged", {"v": None}, ValueError, ["v must be given where k is"]),
    ("paged", {"k": None}, ValueError, ["k must be given where v is"]),
    ("paged", {"cache_seqlens": None}, ValueError, ["cache_seqlens must be given", "None"]),
    ("paged", {"cache_seqlens": int32(5)}, ValueError, ["cache_seqlens", "(2,)", "(1,)"]),
    ("paged", {"cache_seqlens": torch.tensor([5, 7])}, TypeError, ["cache_seqlens", "int64"]),
    ("paged", {"cache_seqlens": 2.0}, TypeError, ["cache_seqlens must be an int", "2.0"]),
    ("paged", {"cache_seqlens": 9}, ValueError, ["cache_seqlens must be from 0 to 8", "9"]),
    ("paged", {"cache_seqlens": 8}, ValueError, ["cache_seqlens[0]", "from 0 to 7", "8"]),
    ("paged", {"cache_seqlens": int32(5, 8)}, ValueError, ["cache_seqlens[1]", "from 0 to 7", "8"]),
    ("paged", {"cache_seqlens": int32(-1, 7)}, ValueError, ["cache_seqlens[0]", "-1"]),
    ("paged", {"block_table": torch.ones(2, 2)}, TypeError, ["block_table", "int32", "float32"]),
    (
        "paged", {"block_table": int32([0, 1], [3, 6])}, ValueError,
        ["block_table[1, 1] must be in [0, 6)", "6"],
    ),
    ("paged", {"block_table": int32([-1, 1], [3, 5])}, ValueError, ["block_table[0, 0]", "-1"]),
    ("paged", {"max_seqlen_q": 0}, ValueError, ["max_seqlen_q", "seqlen_q = 1", "0"]),
    ("paged", {"k_scale": torch.ones(1)}, ValueError, ["k_scale must be None", "float32"]),
    ("packed", {"cu_seqlens_q": int32(0, 2, 1)}, ValueError, ["cu_seqlens_q[2] = 1 after 2"]),
    ("packed", {"cu_seqlens_q": int32(1, 1, 4)}, ValueError, ["cu_seqlens_q[0] must be 0", "1"]),
    ("packed", {"cu_seqlens_q": int32(0, 1, 5)}, ValueError, ["cu_seqlens_q[2]", "total_q = 4"]),
    ("packed", {"cu_seqlens_q": int32(0, 4)}, ValueError, ["block_table must have batch = 1"]),
    ("packed", {"max_seqlen_q": 2}, ValueError, ["max_seqlen_q must be at least", "2", "3"]),
    ("packed", {"cache_seqlens": int32(4, 6)}, ValueError, ["cache_seqlens[1]", "0 to 5", "6"]),
    ("float8", {"k_scale": None}, ValueError, ["k_scale must be given", "float8_e4m3fn"]),
    ("float8", {"v_scale": torch.ones(3)}, ValueError, ["v_scale must have shape", "(2,)", "(3,)"]),
    ("float8", {"v_scale": torch.ones(2).half()}, TypeError, ["v_scale", "float32", "float16"]),
    # without an append the operator looks at the values
    (
        "paged", {"k": None, "v": None, "cache_seqlens": int32(5, 9)}, ValueError,
        ["cache_seqlens[1]", "8", "9"],
    ),
    (
        "paged", {"k": None, "v": None, "block_table": int32([0, 1], [3, 6])}, ValueError,
        ["block_table[1, 1]", "6"],
    ),
    # reshape_and_cache
    ("write", {"slot_mapping": int32(1, 2, 3)}, TypeError, ["slot_mapping", "int64", "int32"]),
    ("write", {"slot_mapping": torch.tensor([1, 2])}, ValueError, ["slot_mapping", "(3,)", "(2,)"]),
    ("write", {"slot_mapping": torch.tensor([1, 24, 2])}, ValueError, ["slot_mapping[1]", "24"]),
    ("write", {"slot_mapping": torch.tensor([1, 2, -2])}, ValueError, ["slot_mapping[2]", "-2"]),
    # partial results
    ("merge", {"outs": randn(2, 3, 4, 5)}, TypeError, ["outs must be a list or tuple", "Tensor"]),
    ("merge", {"outs": [], "lses": []}, ValueError, ["outs and lses", "at least 1", "0 outs"]),
    ("merge", {"lses": [randn(2, 4, 3)]}, ValueError, ["same length", "2 outs", "1 lses"]),
    ("merge", {"lses": [randn(2, 3, 4)] * 2}, ValueError, ["lses[0]", "(2, 4, 3)", "(2, 3, 4)"]),
    ("merge", {"lses": [randn(2, 4, 3).double()] * 2}, TypeError, ["lses[0]", "32", "float64"]),
    (
        "merge", {"outs": [randn(2, 3, 4, 5), randn(2, 3, 4, 6)]}, ValueError,
        ["outs[1]", "(2, 3, 4, 5)", "(2, 3, 4, 6)"],
    ),
    (
        "merge", {"outs": [randn(2, 3, 4, 5), randn(2, 3, 4, 5).half()]}, TypeError,
        ["outs[1]", "float32", "float16"],
    ),
    ("apply", {"out": randn(2, 3, 4, 5, 6)}, ValueError, ["out must be", "(2, 3, 4, 5, 6)"]),
    ("apply", {"lse": randn(2, 3, 4)}, ValueError, ["lse must", "(2, 4, 3)", "heads before"]),
    ("apply", {"lse": randn(2, 4, 3).half()}, TypeError, ["lse must have dtype", "float16"]),
]  # fmt: skip


def case_id(case: tuple[str, dict[str, Any], type[Exception], list[str]]) -> str:
    name, changes, _, fragments = case
    return f"{name}-{'-'.join(changes)}-{fragments[-1]}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_refused(case: tuple[str, dict[str, Any], type[Exception], list[str]]) -> None:
    """The right exception, its message complete, and no tensor written."""
    name, changes, exception, fragments = case
    function, make_arguments = FUNCTIONS[name]
    arguments = {**make_arguments(), **changes}
    tensors = [t for t in arguments.values() if isinstance(t, Tensor) and t.device != META]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(exception) as refused:
        function(**arguments)
    for fragment in fragments:
        assert fragment in str(refused.value)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.double(), copy.double()), "it wrote"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_unchanged_arguments_are_accepted(name: str) -> None:
    """Each case above is refused for its change alone."""
    function, make_arguments = FUNCTIONS[name]
    function(**make_arguments())


@pytest.mark.parametrize("max_seqlen", [torch.tensor(4), torch.tensor(4, dtype=torch.int32), 4])
def test_max_seqlen_may_be_a_tensor(max_seqlen: int | Tensor) -> None:
    arguments = varlen()
    expected = flash_attn_varlen_func(**arguments)
    arguments.update(max_seqlen_q=max_seqlen)
    assert torch.equal(flash_attn_varlen_func(**arguments), expected)


def test_window_none_is_unbounded_and_causal_wins() -> None:
    arguments = dense()
    for window, same in (((None, None), (-1, -1)), ((2, None), (2, -1)), ([2, 1], (2, 1))):
        ours = flash_attn_func(**arguments, window_size=window)
        assert torch.equal(ours, flash_attn_func(**arguments, window_size=same))
    ours = flash_attn_func(**arguments, causal=True, window_size=(3, 2))
    assert torch.equal(ours, flash_attn_func(**arguments, window_size=(3, 0)))
    assert not torch.equal(ours, flash_attn_func(**arguments, window_size=(3, 2)))


def test_meta_tensors_give_shapes() -> None:
    out, lse = flash_attn_func(
        **{name: tensor.to(META) for name, tensor in dense().items()}, return_lse=True
    )
    assert (out.shape, lse.shape, out.device) == ((2, 5, 4, 6), (2, 4, 5), META)


def test_a_device_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raises there is in the words of its dispatcher."""

    def without_kernel(*args: Any) -> None:
        raise NotImplementedError("Could not run 'sink_attention_ext::flash_attn_fwd' with ...")

    monkeypatch.setattr(ops, "BACKENDS", ("cuda",))
    monkeypatch.setattr(ops, "flash_attn_fwd_direct", without_kernel)
    with pytest.raises(ValueError, match=r"q must be on a device .*\(cuda\); got cpu"):
        flash_attn_func(**dense())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "LIBRARY_PATH", None)
    with pytest.raises(ImportError, match=r"flash_attn_fwd needs .*make build"):
        ops.lookup("flash_attn_fwd")(1, 2)
    answer = supports(dtype=torch.float32, head_dim=64)
    assert not answer and "make build" in answer.reason
