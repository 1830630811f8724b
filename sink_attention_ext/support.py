"""supports(): whether this build runs a combination, through which kernel, and if not, why."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from sink_attention_ext import checks, ops

LEAST_ARCH = 80  # of the CUDA kernels


@dataclass(frozen=True)
class Support:
    """The answer of supports(); true in a condition when supported."""

    supported: bool
    kernel: str | None  # what would run, e.g. "cpu/avx2", "cuda/sm90"; None when not supported
    reason: str | None  # why not; None when supported

    def __bool__(self) -> bool:
        return self.supported


def _no(reason: str) -> Support:
    return Support(False, None, reason)


def cuda_arch(device: torch.device | None = None) -> int:
    """10 * major + minor of the card's compute capability; where there is none, of the oldest that
    the kernels run on."""
    if not torch.cuda.is_available():
        return LEAST_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def cuda_kernel(
    seqlen_q: int, backward: bool = False, *, arch: int, dtype: torch.dtype, kv_dtype: torch.dtype,
    head_dim: int, head_dim_v: int, num_heads_q: int, num_heads_kv: int, paged: bool,
    tree_mask: bool, num_splits: int = 0,
) -> str:  # fmt: skip
    """The kernel that runs such a call on contiguous tensors, e.g. "sm90::flash_fwd_hdim64"; "" for
    float8 q, k and v that are dequantised first. It is read of the plan that the call itself makes.

    Raises:
        RuntimeError: no kernel takes it on such a card, with the reasons.
    """
    empty = functools.partial(torch.empty, device="meta")
    keys = (256, 16) if paged else (1, 4096)
    return ops.cuda_plan(
        empty(1, seqlen_q, num_heads_q, head_dim, dtype=dtype),
        empty(*keys, num_heads_kv, head_dim, dtype=kv_dtype),
        empty(*keys, num_heads_kv, head_dim_v, dtype=kv_dtype),
        paged, tree_mask, num_splits, backward, arch,
    )  # fmt: skip


def cuda_families(backward: bool, **call: Any) -> str:
    """The families of kernels that run on such a card: "sm80", or where parts of a call go to
    different ones (a decode and a prefill, a forward and a backward) "sm90+sm80".

    Raises:
        RuntimeError: as cuda_kernel.
    """
    long = 4096  # query positions: none of the kernels for a few rows
    if call["dtype"] == checks.FLOAT8:
        if cuda_kernel(long, **call):
            return "sm90-float8"
        call |= {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16}
    kernels = [cuda_kernel(1, **call)] if call["paged"] else []
    kernels.append(cuda_kernel(long, **call))
    if backward:
        kernels.append(cuda_kernel(long, True, **call))
    return "+".join(dict.fromkeys(kernel.partition("::")[0] for kernel in kernels))


def supports(
    *,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int | None = None,
    num_heads_q: int = 1,
    num_heads_kv: int | None = None,
    device: torch.device | str = "cpu",
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    s_aux_dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
    varlen: bool = False,
    paged: bool = False,
    backward: bool = False,
    deterministic: bool = False,
    num_sink_tokens: int = 0,
    tree_mask: bool = False,
) -> Support:
    """Whether this build computes attention for such inputs.

    Args:
        dtype: of q (and of k and v, unless kv_dtype says otherwise). float8_e4m3fn is for the
            forward without a cache.
        head_dim: of q and k.
        head_dim_v: of v; None is head_dim.
        num_heads_q: query heads.
        num_heads_kv: key-value heads; None is num_heads_q.
        device: where the tensors lie.
        causal, window_size, softcap, deterministic, num_sink_tokens: as in flash_attn_func.
        s_aux_dtype: dtype of the sinks; None: no sinks.
        kv_dtype: dtype of the paged cache; None is dtype.
        varlen: sequences packed by cu_seqlens.
        paged: over a key-value cache (flash_attn_with_kvcache).
        backward: gradients are wanted.
        tree_mask: the queries are a tree of draft tokens (flash_attn_with_kvcache).

    Returns:
        Support(supported, kernel, reason). A kernel is "cpu/<instruction set>" or, on CUDA,
        "cuda/simt" (float32 and float64, slower), "cuda/sm80" (float16 and bfloat16 on tensor
        cores, every card from compute capability 8.0 on), "cuda/sm90" (compute capability 9.0
        only), "cuda/sm90-float8" (there, on float8 q, k and v as they are; the others have them
        dequantised), or "cuda/sm90+sm80" where decode and prefill, or forward and backward, differ.
        The card that `device` names decides, for contiguous tensors, and what the library was built
        for: on a card below compute capability 8.0, or one that TORCH_CUDA_ARCH_LIST left out,
        nothing is supported. Where the machine has none, the answer is that of compute capability
        8.0.

    Arguments of a wrong type are not supported either; the reason names them.

    Example::

        if not (answer := supports(dtype=torch.bfloat16, head_dim=64, device="cuda")):
            print(answer.reason)
    """
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    num_heads_kv = num_heads_q if num_heads_kv is None else num_heads_kv
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    try:
        for name, size in (
            ("head_dim", head_dim),
            ("head_dim_v", head_dim_v),
            ("num_heads_q", num_heads_q),
            ("num_heads_kv", num_heads_kv),
        ):
            checks.check_int(name, size)
        for name, flag in (
            ("causal", causal),
            ("varlen", varlen),
            ("paged", paged),
            ("backward", backward),
            ("deterministic", deterministic),
            ("tree_mask", tree_mask),
        ):
            checks.check_bool(name, flag)
        device = checks.check_device_name(device)
    except (TypeError, ValueError) as error:
        return _no(str(error))
    device_type = device.type

    if ops.LIBRARY_PATH is None:
        return _no("the compiled library is missing: run `make build`")
    if device_type not in ops.BACKENDS:
        return _no(
            f"this build has no {device_type.upper()} kernels: it has {', '.join(ops.BACKENDS)}"
        )
    if dtype == checks.FLOAT8 and (paged or backward):
        return _no("float8_e4m3fn q, k and v are for the forward without a key-value cache")
    if dtype not in (*checks.FLOAT_DTYPES, checks.FLOAT8):
        return _no(f"dtype is float64, float32, float16, bfloat16 or float8_e4m3fn, not {dtype}")
    if s_aux_dtype is not None and s_aux_dtype not in checks.FLOAT_DTYPES:
        return _no(f"s_aux_dtype is float64, float32, float16 or bfloat16, not {s_aux_dtype}")
    for name, size in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
        if not 1 <= size <= checks.MAX_HEAD_DIM:
            return _no(f"{name} is 1 to {checks.MAX_HEAD_DIM}, not {size}")
    if num_heads_q < 1 or num_heads_kv < 1 or num_heads_q % num_heads_kv != 0:
        return _no(f"num_heads_kv = {num_heads_kv} does not divide num_heads_q = {num_heads_q}")
    if kv_dtype != dtype and not (paged and kv_dtype in checks.QUANTISED_DTYPES):
        return _no(
            f"kv_dtype is {dtype}, or float8_e4m3fn or int8 in a paged cache, not {kv_dtype}"
        )
    if paged and backward:
        return _no("attention over a key-value cache has no backward")
    try:
        _, window_right = checks.check_window(window_size, causal)
        checks.check_softcap(softcap)
        checks.check_num_sink_tokens(num_sink_tokens)
    except (TypeError, ValueError) as error:
        return _no(str(error))
    if tree_mask and not paged:
        return _no("tree_mask is for attention over a key-value cache")
    if tree_mask and window_right != 0:
        return _no(f"tree_mask needs causal=True (or window_size[1] = 0), not {window_right}")
    # What remains is one computation: varlen only changes where rows lie.
    if device_type == "cpu":
        return Support(True, f"cpu/{ops.cpu_instruction_set()}", None)
    try:
        families = cuda_families(
            backward, arch=cuda_arch(device), dtype=dtype, kv_dtype=kv_dtype, head_dim=head_dim,
            head_dim_v=head_dim_v, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, paged=paged,
            tree_mask=tree_mask,
        )  # fmt: skip
    except (AssertionError, RuntimeError) as error:  # no such card; no kernel takes it
        return _no(str(error))
    return Support(True, f"cuda/{families}", None)
