"""FlexAttention, compiled, as a peer: with the sink by rescaling with its LSE where that runs.

The sink on top of FlexAttention is `out * sigmoid(lse - s_aux)`. Where the device's compiled kernel
does not return the LSE, plain FlexAttention without a sink is measured instead (it computes less,
like SDPA), and the table gives the reason. Uncompiled FlexAttention materialises the scores and is
not a peer.
"""

from __future__ import annotations

import functools

import torch
import torch._inductor.config
from cases import Layer, Problem
from peers import FLEX, contender
from timing import Contender
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

PROBE = Layer("probe", 2, 1, 64)
SEQLENS = (2048, 8192)  # compiling takes seconds for each shape, so not every length is measured

# Compile in this process: idle compile workers would be one more thing on the measured machine.
torch._inductor.config.compile_threads = 1


def compiled(with_lse: bool):
    """A fresh compilation: dynamo stops compiling a function after a few shapes."""

    def without_sink(q, k, v, s_aux, block_mask):
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)

    def with_sink(q, k, v, s_aux, block_mask):
        request = AuxRequest(lse=True)
        out, aux = flex_attention(
            q, k, v, block_mask=block_mask, enable_gqa=True, return_aux=request
        )
        return out * torch.sigmoid(aux.lse - s_aux[:, None]).unsqueeze(-1).to(out.dtype)

    torch.compiler.reset()
    return torch.compile(with_sink if with_lse else without_sink, dynamic=False)


def build(problem: Problem, *, backward: bool, sink: bool) -> Contender:
    """Compiles for this shape, with one call, outside of the measured time."""
    window = problem.layer.window or problem.seqlen

    def mask_mod(batch, head, q_idx, k_idx):
        return (q_idx >= k_idx) & (q_idx - k_idx < window)

    seqlen, device = problem.seqlen, problem.device
    block_mask = create_block_mask(mask_mod, None, None, seqlen, seqlen, device=str(device))

    function = compiled(sink)

    def attend(q, k, v, s_aux):
        return function(q, k, v, s_aux, block_mask)

    peer = contender(FLEX, problem, attend, backward=backward, sink=sink, heads_first=True)
    peer.call()
    return peer


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype, *, backward: bool, sink: bool) -> str | None:
    """The reason, in torch's words, why this device does not run it; None if it does."""
    try:
        build(Problem(PROBE, 256, dtype, device), backward=backward, sink=sink)
    except Exception as error:  # Inductor raises its own types around the cause
        lines = [line for line in str(error).splitlines() if "Error" in line or "support" in line]
        return (lines or [str(error) or type(error).__name__])[0].strip()
    return None
