"""Who is measured. Each peer gets the same values in the memory layout that it likes best.

ours     sink_attention_ext.flash_attn_func; contiguous (batch, seqlen, heads, head_dim)
eager    transformers' GPT-OSS code; contiguous (batch, heads, seqlen, head_dim), ready mask
SDPA     torch's scaled_dot_product_attention; layout as eager. It has no sink: it computes less
flex     torch.compile(flex_attention), see flex.py
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from cases import Layer, Problem
from check import make_check
from environment import available_memory_bytes
from timing import Contender, Rounds, interleave
from torch.nn.functional import scaled_dot_product_attention

import sink_attention_ext

OURS = "sink_attention_ext"
OURS_NO_SINK = "sink_attention_ext, s_aux=None"
OURS_PLAIN = "sink_attention_ext, plain"
EAGER = "HuggingFace eager"
SDPA = "torch SDPA (no sink)"
FLEX = "FlexAttention"
READ = "memory read"

# attend(q, k, v, s_aux) -> out, in the peer's own layout.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def contender(
    name: str,
    problem: Problem,
    attend: Attend,
    *,
    backward: bool,
    sink: bool,
    heads_first: bool,
    out_heads_first: bool | None = None,
) -> Contender:
    """Wraps `attend` into a call that returns `(out, dq, dk, dv, ds_aux)` as (1, seqlen, heads, d).

    heads_first says that the peer takes (1, heads, seqlen, d) tensors, out_heads_first that it
    returns them (like its inputs if None). The layout is changed outside of the timing.
    """
    out_heads_first = heads_first if out_heads_first is None else out_heads_first

    def layout(tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
        return tensor.transpose(1, 2).contiguous() if transposed else tensor

    inputs = [layout(t, heads_first) for t in (problem.q, problem.k, problem.v)]
    leaves = [t.detach().requires_grad_(backward) for t in (*inputs, problem.s_aux)]
    dout = layout(problem.dout, out_heads_first) if backward else None

    def call() -> tuple[torch.Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return (attend(*leaves),)
        out = attend(*leaves)
        wanted = leaves if sink else leaves[:3]
        return (out.detach(), *torch.autograd.grad(out, wanted, dout))

    check = make_check(problem, sink=sink, backward=backward)

    def check_result(result: tuple[torch.Tensor, ...]) -> float:
        out, *grads = result
        out = out.transpose(1, 2) if out_heads_first else out
        grads = [g.transpose(1, 2) if heads_first else g for g in grads[:3]] + grads[3:]
        return check((out, *grads))

    return Contender(name, call, check_result)


def ours(problem: Problem, *, backward: bool, sink: bool = True) -> Contender:
    window_size = problem.layer.window_size

    def attend(q, k, v, s_aux):
        return sink_attention_ext.flash_attn_func(
            q, k, v, causal=True, window_size=window_size, s_aux=s_aux if sink else None
        )

    name = OURS if sink else OURS_NO_SINK
    return contender(name, problem, attend, backward=backward, sink=sink, heads_first=False)


def eager(problem: Problem, *, backward: bool) -> Contender:
    """transformers' eager_attention_forward, called as its GptOssAttention calls it."""
    eager_attention_forward = eager_function()
    group = problem.layer.num_heads_q // problem.layer.num_heads_kv
    mask, scaling = problem.additive_mask(), problem.layer.head_dim**-0.5

    def attend(q, k, v, s_aux):
        module = SimpleNamespace(num_key_value_groups=group, sinks=s_aux, training=backward)
        return eager_attention_forward(module, q, k, v, mask, scaling)[0]

    return contender(
        EAGER,
        problem,
        attend,
        backward=backward,
        sink=True,
        heads_first=True,
        out_heads_first=False,  # it ends with transpose(1, 2).contiguous()
    )


@functools.cache
def eager_function() -> Callable | str:
    """transformers' eager_attention_forward of GPT-OSS, or why it is not there."""
    # Imported here, since it takes seconds and memory.py starts many processes.
    try:
        from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return eager_attention_forward


def eager_bytes(layer: Layer, seqlen: int, itemsize: int, backward: bool) -> int:
    """Estimate of eager's peak: so many (heads, seqlen, seqlen) matrices are alive at once."""
    return layer.num_heads_q * seqlen * seqlen * itemsize * (5 if backward else 4)


def why_not_eager(
    layer: Layer,
    seqlen: int,
    dtype: torch.dtype,
    *,
    backward: bool,
    seconds: float = 0.0,
    limit_s: float = math.inf,
    device: torch.device | None = None,
) -> str | None:
    """Why eager is left out; `seconds` is what it is expected to take."""
    if isinstance(missing := eager_function(), str):
        return missing
    needed = eager_bytes(layer, seqlen, dtype.itemsize, backward)
    allowed = available_memory_bytes(device) * 6 // 10
    if needed > allowed:
        return f"would take about {needed / 1e9:.0f} GB; {allowed / 1e9:.0f} GB allowed here"
    if seconds > limit_s:
        return f"would take about {seconds:.0f} s a call; the limit is {limit_s:.0f} s"
    return None


def sdpa(problem: Problem, *, backward: bool, expand: bool) -> Contender:
    """SDPA with enable_gqa, or with K and V expanded to all query heads (in the measured time)."""
    mask = problem.bool_mask() if problem.layer.window else None
    group = problem.layer.num_heads_q // problem.layer.num_heads_kv

    def attend(q, k, v, _):
        if expand:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=not expand
        )

    return contender(SDPA, problem, attend, backward=backward, sink=False, heads_first=True)


def faster_sdpa_expands(layer: Layer, dtype: torch.dtype, device: torch.device, backward: bool):
    """Whether expanding K and V beats enable_gqa for this layer, tried at 1024 tokens."""
    problem = Problem(layer, 1024, dtype, device)
    contenders = []
    for expand in (False, True):
        variant = sdpa(problem, backward=backward, expand=expand)
        contenders.append(Contender(str(expand), variant.call, variant.check))
    timings = interleave(contenders, Rounds(least=3, most=5, budget_s=1.0), device)
    return timings["True"].median < timings["False"].median
