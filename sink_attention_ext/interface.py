"""flash_attn_func and flash_attn_varlen_func: attention with learnable sinks, with gradients.

Conventions of every function of this package:

* q is (..., num_heads_q, head_dim); num_heads_kv divides num_heads_q, and query head h reads kv
  head ``h // (num_heads_q // num_heads_kv)`` (multi-query and grouped-query attention).
* ``s_aux`` (num_heads_q,) holds each head's sink: a logit that takes part in the softmax and has no
  value, as in GPT-OSS. It is a natural-logarithm logit, neither multiplied by softmax_scale nor
  softcapped. None and -inf both mean no sink.
* ``causal`` and ``window_size = (left, right)`` are aligned bottom-right: row i stands at key
  position ``p = i + seqlen_k - seqlen_q`` and sees the keys ``p - left <= j <= p + right``, both
  bounds included; -1 or None is unbounded. Causal makes ``right`` 0, whatever was passed. A sliding
  window of N tokens, the token itself included (transformers' ``sliding_window=N``), is therefore
  ``window_size=(N - 1, 0)``.
* ``num_sink_tokens`` keeps the first tokens of a sequence visible beside a sliding window
  (StreamingLLM, arXiv 2309.17453): row i also sees the keys ``j < num_sink_tokens`` that
  ``window_size[0]`` would mask. It is about keys, ``s_aux`` about a logit; both work together.
  Without a left bound it changes nothing.
* ``lse`` is the natural logarithm of the softmax's denominator, **the sink included**, float32
  (float64 for float64 inputs). It is differentiable.
* A row without a visible key gives ``out = 0`` and ``lse = s_aux`` (``-inf`` without a sink), never
  NaN.

Argument names and order are FlashAttention's; the formula is in sink_attention_ext/reference.py.

Float8
------
q, k and v may be float8_e4m3fn, all three together. Forward only; ``out`` is bfloat16.

* **Format**, as in FlashAttention-3: ``value = stored * descale[sequence, kv_head]``, with
  ``q_descale``, ``k_descale`` and ``v_descale``. q takes the descale of the kv head that it reads.
* **Where native**: compute capability 9.0 multiplies float8 operands. All other devices dequantise
  q, k and v first: the CPU to float32, other cards to bfloat16.
* **Error of the native kernels**. The tensor cores keep about 14 bits of a sum of float8 products:

  ========  ====================================================================================
  score     at most about ``head_dim / 32 * 2**-13 * softmax_scale * sum(abs(q * k))``
  lse       the mean of the row's score errors, weighted by P
  P         rounded to float8: relative ``2**-4``, more for the smallest values
  out       ``P V`` in float8 over 128 keys at a time; longer sums are float32
  ========  ====================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from sink_attention_ext import checks, explain, ops, torch_context_parallel
from sink_attention_ext.dispatch_rules import below_autograd, needs_autograd
from sink_attention_ext.fake_checks import FLOAT8
from sink_attention_ext.reference import WindowSize

NO_DESCALES = (None, None, None)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    num_sink_tokens: int = 0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with an optional learnable sink per head. Differentiable in q, k, v and s_aux.

    Memory is O(seqlen): no (seqlen_q, seqlen_k) matrix exists, in the backward neither. Tiles
    without a visible key are skipped, so a windowed layer costs seqlen * window.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), float64, float32, float16, bfloat16 or
            float8_e4m3fn; head_dim 1 to 256.
        k: (batch, seqlen_k, num_heads_kv, head_dim), the dtype of q.
        v: (batch, seqlen_k, num_heads_kv, head_dim_v), the dtype of q; head_dim_v 1 to 256, not
            necessarily head_dim. Strides of q, k and v are free but for the last, which is 1.
        softmax_scale: factor of the scores <q, k>, of magnitude 2**-126 to 2**100 (2**-1022 to
            2**1000 for float64); None is head_dim ** -0.5.
        causal: row i sees no key after its position i + seqlen_k - seqlen_q. Wins over
            window_size[1].
        window_size: (left, right) keys visible beside the row's own position; -1 or None:
            unbounded.
        softcap: if > 0, scores become softcap * tanh(score / softcap); softcap and softmax_scale /
            softcap in the range of softmax_scale.
        s_aux: (num_heads_q,) sinks of any of the four float dtypes, whatever q has; read as
            float32, its gradient comes in its own dtype.
        deterministic: makes the backward bitwise repeatable (on the CPU it always is). So does
            torch.use_deterministic_algorithms(True), if it is on when the backward runs.
        return_lse: also return lse.
        num_sink_tokens: the first keys, which stay visible beside the window (StreamingLLM). Those
            between them and the window are not loaded.
        q_descale, k_descale, v_descale: (batch, num_heads_kv) float32, what float8 values of q, k
            and v are multiplied with, q's heads by that of the kv head which they read; None: 1.
            Only with float8_e4m3fn q, k and v.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v) in the dtype of q, bfloat16 for float8; with
        return_lse ``(out, lse)``, lse (batch, num_heads_q, seqlen_q) float32 (float64 for float64).
        The gradient through lse is exact. With float8 on compute capability 9.0 P is rounded
        to float8, and lse is off by up to about ``head_dim / 32 * 2**-13 *
        softmax_scale * sum(abs(q * k))``, as the module says.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing has been
            computed.
        RuntimeError: from a second derivative, which is not implemented, with float8 q, k and v
            where s_aux or a descale requires grad, and under torch's context_parallel, in which
            sink_attention_ext.parallel.context_parallel_attn_func takes this function's place.
        NotImplementedError: under forward-mode AD (torch.func.jvp, jacfwd, dual tensors).

    torch.func's grad, vjp and jacrev, and torch.vmap over any of the tensors, work; vmap over a
    gradient gives each sample's own, of s_aux too. FlopCounterMode counts as it does for
    scaled_dot_product_attention, and sliding windows by the pairs that are visible.

    Under torch.autocast q, k and v are cast to autocast's dtype unless they are float8; s_aux and
    lse are not.

    Example::

        q, k, v = (torch.randn(2, 128, heads, 64) for heads in (8, 2, 2))
        sinks = torch.zeros(8, requires_grad=True)
        out = flash_attn_func(q, k, v, causal=True, window_size=(127, 0), s_aux=sinks)
        out.sum().backward()  # sinks.grad is the gradient of each head's sink
    """
    torch_context_parallel.refuse("flash_attn_func")
    checks.check_bools(causal, deterministic, return_lse)
    left, right = checks.window_bounds(window_size)
    scale, softcap, num_sink_tokens = checks.check_number_types(
        softmax_scale, softcap, num_sink_tokens
    )
    descales = (q_descale, k_descale, v_descale)
    s_aux = checks.local_sinks(s_aux)
    try:
        if q.dtype == FLOAT8:
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            checks.refuse_float8_gradient(q, k, v, *descales, s_aux)
            out, lse = ops.flash_attn_fp8_fwd(
                q, k, v, *descales, s_aux, scale, causal, left, right, softcap, num_sink_tokens
            )
            return (out, lse) if return_lse else out
        if descales != NO_DESCALES:
            checks.refuse_descales(q, descales)
        if needs_autograd(q, k, v, s_aux):
            out, lse = ops.flash_attn_fwd(
                q, k, v, s_aux, scale, causal, left, right, softcap, deterministic, num_sink_tokens
            )
        else:
            with below_autograd():
                out, lse = ops.flash_attn_fwd_direct(
                    q, k, v, s_aux, scale, causal, left, right, softcap, deterministic,
                    num_sink_tokens,
                )  # fmt: skip
    except Exception:
        explain.attention(
            (q, k, v), explain.DENSE, s_aux, descales, scale, softcap,
            (("window_size", left), ("window_size", right), ("num_sink_tokens", num_sink_tokens)),
        )  # fmt: skip
        raise
    return (out, lse) if return_lse else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | torch.SymInt | Tensor,
    max_seqlen_k: int | torch.SymInt | Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    seqused_k: Tensor | None = None,
    num_sink_tokens: int = 0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed sequences of different lengths. Differentiable in q, k, v and s_aux.

    Sequence b is rows ``[cu_seqlens_q[b], cu_seqlens_q[b + 1])`` of q and ``[cu_seqlens_k[b],
    cu_seqlens_k[b + 1])`` of k and v; it sees no other sequence. An empty sequence is allowed on
    either side.

    Args:
        q: (total_q, num_heads_q, head_dim).
        k: (total_k, num_heads_kv, head_dim).
        v: (total_k, num_heads_kv, head_dim_v).
        cu_seqlens_q: (batch + 1,) int32, starts of the sequences in q, from 0, never falling, at
            most total_q. Rows from cu_seqlens_q[-1] on are in no sequence: out = 0, lse = -inf,
            gradient 0.
        cu_seqlens_k: (batch + 1,) int32, the same for k and v.
        max_seqlen_q: at least the longest query length. An int (also a SymInt or a 0-d integer
            tensor, which is read by the host).
        max_seqlen_k: at least the longest key length.
        seqused_k: (batch,) int32: only the first seqused_k[b] keys of sequence b count, which also
            is the seqlen_k of the bottom-right alignment. None: all.
        softmax_scale, causal, window_size, softcap, s_aux, deterministic, return_lse,
            num_sink_tokens, q_descale, k_descale, v_descale: as in flash_attn_func; each sequence
            has its own first tokens.

    Returns:
        out (total_q, num_heads_q, head_dim_v); with return_lse ``(out, lse)``, lse (num_heads_q,
        total_q). dtypes, and accuracy with float8, as in flash_attn_func.

    Raises:
        TypeError, ValueError: an argument does not fit, or lengths inside cu_seqlens or seqused_k
            are out of range (looked at before anything is computed; on CUDA under set_debug_checks
            only); the message names it.
        RuntimeError: a second derivative is taken, or a gradient with float8 q, k and v, or torch's
            context_parallel is on.
        NotImplementedError: under forward-mode AD, and torch.vmap over lengths.

    Example::

        cu_seqlens = torch.tensor([0, 5, 8], dtype=torch.int32)  # lengths 5 and 3
        q, k, v = (torch.randn(8, heads, 64) for heads in (8, 2, 2))
        sinks = torch.zeros(8)
        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, 5, 5, causal=True, s_aux=sinks
        )
    """
    torch_context_parallel.refuse("flash_attn_varlen_func")
    checks.check_bools(causal, deterministic, return_lse)
    left, right = checks.window_bounds(window_size)
    scale, softcap, num_sink_tokens = checks.check_number_types(
        softmax_scale, softcap, num_sink_tokens
    )
    if type(max_seqlen_q) is not int:
        max_seqlen_q = checks.check_max_seqlen("max_seqlen_q", max_seqlen_q)
    if type(max_seqlen_k) is not int:
        max_seqlen_k = checks.check_max_seqlen("max_seqlen_k", max_seqlen_k)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_k)
    descales = (q_descale, k_descale, v_descale)
    s_aux = checks.local_sinks(s_aux)
    try:
        if q.dtype == FLOAT8:
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            checks.refuse_float8_gradient(q, k, v, *descales, s_aux)
            out, lse = ops.flash_attn_fp8_varlen_fwd(
                q, k, v, *descales, *lengths, s_aux, max_seqlen_q, max_seqlen_k, scale, causal,
                left, right, softcap, num_sink_tokens,
            )  # fmt: skip
            return (out, lse) if return_lse else out
        if descales != NO_DESCALES:
            checks.refuse_descales(q, descales)
        if needs_autograd(q, k, v, s_aux):
            out, lse = ops.flash_attn_varlen_fwd(
                q, k, v, *lengths, s_aux, max_seqlen_q, max_seqlen_k, scale, causal, left, right,
                softcap, deterministic, num_sink_tokens,
            )  # fmt: skip
        else:
            with below_autograd():
                out, lse = ops.flash_attn_varlen_fwd_direct(
                    q, k, v, *lengths, s_aux, max_seqlen_q, max_seqlen_k, scale, causal, left,
                    right, softcap, deterministic, num_sink_tokens,
                )  # fmt: skip
    except Exception:
        explain.attention(
            (q, k, v), explain.PACKED, s_aux, descales, scale, softcap,
            (("window_size", left), ("window_size", right), ("num_sink_tokens", num_sink_tokens),
             ("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)),
            lengths,
        )  # fmt: skip
        raise
    return (out, lse) if return_lse else out
