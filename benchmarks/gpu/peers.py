"""Who is measured on a GPU beside ours, eager and FlexAttention; why one is left out.

SDPA          each of torch's backends, forced. enable_gqa, but for the efficient one, which does
              not know it and gets K and V expanded, in the measured time. No sink.
flash-attn 2  flash_attn.flash_attn_func. No sink.
flash-attn 3  a build with sinks, in a folder named by SINK_FA3_PEER that holds a fa3_peer.py with
              load(folder) and varlen(...). Forward only, Hopper only.
flash-attn 4  flash_attn.cute, with the sink.
FlashInfer    single_prefill_with_kv_cache. Forward only, no sink.

And our own kernels for all cards, forced, where a Hopper card would run its own.

None of these libraries has been called from here yet. One whose call is not as expected drops out
with its error, as one with a wrong result does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from cases import Layer, Problem
from peers import contender, ours
from timing import Contender
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sink_attention_ext import ops, supports

HALF = (torch.float16, torch.bfloat16)
SDPA_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
FA2, FA3, FA4, FLASHINFER = "flash-attn 2", "flash-attn 3", "flash-attn 4", "FlashInfer"
OURS_SM80 = "sink_attention_ext sm80"
FA3_FOLDER = "SINK_FA3_PEER"
MATH_MOST_BYTES = 8 << 30  # of one heads x seqlen x seqlen matrix


@functools.cache
def load(peer: str) -> ModuleType | str:
    """The peer's module, or why it is not there."""
    names = {FA2: "flash_attn", FA4: "flash_attn.cute", FLASHINFER: "flashinfer"}
    try:
        if peer == FA3:
            return load_fa3(os.environ.get(FA3_FOLDER))
        return importlib.import_module(names[peer])
    except Exception as error:  # a library for another card or torch fails in its own ways
        text = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {text}"


def load_fa3(folder: str | None) -> ModuleType | str:
    if not folder:
        return f"{FA3_FOLDER} is not set"
    spec = importlib.util.spec_from_file_location("fa3_peer", Path(folder) / "fa3_peer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load(folder)
    return module


def importable() -> dict[str, str]:
    """Of each optional peer: "yes", or why not."""
    found = {peer: load(peer) for peer in (FA2, FA3, FA4, FLASHINFER)}
    return {peer: module if isinstance(module, str) else "yes" for peer, module in found.items()}


def why_not(peer: str, problem: Problem, backward: bool) -> str | None:
    """Why a peer cannot do this problem, as far as that is known without calling it."""
    layer = problem.layer
    if peer in SDPA_BACKENDS:
        scores = layer.num_heads_q * problem.seqlen**2 * problem.dtype.itemsize
        if peer == "SDPA math" and scores > MATH_MOST_BYTES:
            return f"a matrix of scores would take {scores / 1e9:.0f} GB"
        if peer == "SDPA flash" and layer.window:
            return "takes no mask, so no window"
        return None
    if isinstance(module := load(peer), str):
        return module
    if problem.dtype not in HALF:
        return "bfloat16 and float16 only"
    if backward and peer in (FA3, FLASHINFER):
        return "forward only"
    return None


def attend_sdpa(problem: Problem, backend: SDPBackend) -> Callable:
    mask = problem.bool_mask() if problem.layer.window else None
    group = problem.layer.num_heads_q // problem.layer.num_heads_kv
    expands = backend == SDPBackend.EFFICIENT_ATTENTION  # it does not know enable_gqa

    def attend(q, k, v, _):
        if expands:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=not expands
            )

    return attend


def attend_library(peer: str, module: ModuleType, problem: Problem) -> Callable:
    """attend(q, k, v, s_aux) on (1, seqlen, heads, head_dim)."""
    left, right = problem.layer.window_size
    windowed = problem.layer.window is not None

    def fa2(q, k, v, _):
        return module.flash_attn_func(q, k, v, causal=True, window_size=(left, right))

    def fa4(q, k, v, s_aux):
        window = (left, right) if windowed else (None, None)
        return module.flash_attn_func(
            q, k, v, causal=True, window_size=window, learnable_sink=s_aux
        )[0]

    def flashinfer(q, k, v, _):
        out = module.single_prefill_with_kv_cache(q[0], k[0], v[0], causal=True, window_left=left)
        return out[None]

    ends = torch.tensor([0, problem.seqlen], dtype=torch.int32, device=problem.device)

    def fa3(q, k, v, s_aux):
        out, _ = module.varlen(
            q[0],
            k[0],
            v[0],
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=problem.seqlen,
            max_seqlen_k=problem.seqlen,
            softmax_scale=problem.layer.head_dim**-0.5,
            causal=True,
            window_size=(left, right),
            s_aux=s_aux.to(torch.bfloat16),
        )
        return out[None]

    return {FA2: fa2, FA3: fa3, FA4: fa4, FLASHINFER: flashinfer}[peer]


def by_sm80(call: Callable, layer: Layer, **facts) -> Callable | str:
    """The same call of ours by the kernels for all cards, or why that is no other call. facts: what
    supports() asks beside the layer's."""
    heads = {"num_heads_q": layer.num_heads_q, "num_heads_kv": layer.num_heads_kv}
    kernel = supports(head_dim=layer.head_dim, **heads, **facts).kernel
    if kernel is None or "sm90" not in kernel:
        return f"our call runs {kernel} anyway"

    def forced():
        with ops.forced_cuda_kernels("sm80"):
            return call()

    return forced


def contenders(problem: Problem, *, backward: bool) -> tuple[list[Contender], dict[str, str]]:
    """Those that can be measured, and the others with the reason."""
    found, left_out = [], {}
    usual = ours(problem, backward=backward)
    facts = {"dtype": problem.dtype, "device": problem.device, "backward": backward}
    if isinstance(call := by_sm80(usual.call, problem.layer, **facts), str):
        left_out[OURS_SM80] = call
    else:
        found.append(Contender(OURS_SM80, call, usual.check))
    for peer in (*SDPA_BACKENDS, FA2, FA3, FA4, FLASHINFER):
        if reason := why_not(peer, problem, backward):
            left_out[peer] = reason
            continue
        is_sdpa = peer in SDPA_BACKENDS
        attend = (
            attend_sdpa(problem, SDPA_BACKENDS[peer])
            if is_sdpa
            else attend_library(peer, load(peer), problem)
        )
        sink = peer in (FA3, FA4)
        found.append(
            contender(peer, problem, attend, backward=backward, sink=sink, heads_first=is_sdpa)
        )
    return found, left_out
