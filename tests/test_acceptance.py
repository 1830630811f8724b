"""Acceptance: the nine checks of anyone who has added sinks to a model, by name (make checklist).

Each is one short reading of a behaviour whose cases are in another file: refused shapes
(test_errors.py), parity (test_transformers_parity.py), paging (test_paged.py), gradients
(test_dense.py), magnitudes (test_edges.py), sharding (test_tensor_parallel.py).
"""

import functools
import itertools

import oracle
import pytest
import tolerance
import torch
from cases import Inputs
from sharded_heads import sharded_attention, whole_attention
from tiny_models import OURS, both, gpt_oss, gradients, logits, max_diff, tokens
from transformers import AttentionInterface, DynamicCache
from two_ranks import on_two_ranks

from sink_attention_ext import (
    apply_sink,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attn_states,
    reference,
    reshape_and_cache,
)
from sink_attention_ext.integrations import transformers as adapter

BATCH, SEQLEN, HEADS_Q, HEADS_KV, HEAD_DIM = 2, 33, 8, 2, 16


def inputs(dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    q = draw(BATCH, SEQLEN, HEADS_Q, HEAD_DIM) * scale
    k, v = (draw(BATCH, SEQLEN, HEADS_KV, HEAD_DIM) * scale for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype), draw(HEADS_Q)


def eager(q, k, v, s_aux, window):
    """As transformers' GPT-OSS does it: append the sink as a column, softmax, drop the column."""
    k, v = (t.repeat_interleave(HEADS_Q // HEADS_KV, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * HEAD_DIM**-0.5
    row = torch.arange(SEQLEN)
    hidden = (row[None] > row[:, None]) | (row[None] <= row[:, None] - window)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    sink = s_aux.view(1, -1, 1, 1).expand(BATCH, -1, SEQLEN, 1)
    probs = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("bhij,bjhd->bihd", probs, v)


@pytest.mark.parametrize("shape", [(1, HEADS_Q), (HEADS_KV,), (HEADS_Q + 1,), (HEADS_Q, 1), ()])
def test_1_sinks_have_one_value_per_query_head_and_other_shapes_are_refused(shape):
    config = gpt_oss(num_hidden_layers=1)
    sinks = config.model.layers[0].self_attn.sinks
    assert sinks.shape == (config.config.num_attention_heads,)
    q, k, v, _ = inputs()
    flash_attn_func(q, k, v, s_aux=torch.zeros(HEADS_Q))
    packed = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    cu_seqlens = torch.tensor([0, BATCH * SEQLEN], dtype=torch.int32)
    lengths = (cu_seqlens, cu_seqlens, BATCH * SEQLEN, BATCH * SEQLEN)
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    for refused in (
        lambda s_aux: flash_attn_func(q, k, v, s_aux=s_aux),
        lambda s_aux: flash_attn_varlen_func(*packed, *lengths, s_aux=s_aux),
        lambda s_aux: flash_attn_with_kvcache(q, k, v, s_aux=s_aux),
        lambda s_aux: merge_attn_states([out], [lse], s_aux),
        lambda s_aux: apply_sink(out, lse, s_aux),
    ):
        with pytest.raises(ValueError, match="s_aux"):
            refused(torch.zeros(shape))


@pytest.mark.parametrize("window", [SEQLEN, 7])
def test_2_forward_with_sinks_equals_eager_concatenate_and_drop(window):
    q, k, v, s_aux = inputs()
    ours = flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0), s_aux=s_aux)
    torch.testing.assert_close(ours, eager(q, k, v, s_aux, window), atol=1e-5, rtol=1e-5)
    model, ids = gpt_oss(), tokens(2, 40)
    ours, expected = both(model, lambda m: logits(m, ids))
    assert max_diff(ours, expected) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_3_s_aux_reaches_the_kernel_from_the_model_unchanged(dtype, monkeypatch):
    """The Parameter itself, in its own dtype: neither scaled nor cast to that of the queries."""
    model = gpt_oss(num_hidden_layers=2).to(dtype)
    model.model.layers[1].self_attn.sinks.data = torch.randn(8)  # float32 sinks beside bf16 weights
    arrived = []
    original = adapter.sink_attention

    def record(module, *args, s_aux=None, **kwargs):
        arrived.append((module, s_aux))
        return original(module, *args, s_aux=s_aux, **kwargs)

    kernel = []

    def at_the_kernel(q, k, v, s_aux, *options):
        kernel.append(s_aux)
        return real(q, k, v, s_aux, *options)

    from sink_attention_ext import ops

    real = ops.flash_attn_fwd
    monkeypatch.setattr(ops, "flash_attn_fwd", at_the_kernel)
    monkeypatch.setitem(AttentionInterface._global_mapping, adapter.NAME, record)
    with torch.enable_grad():
        model(tokens(1, 20), use_cache=False)
    assert len(arrived) == len(kernel) == 2
    for (module, s_aux), passed in zip(arrived, kernel, strict=True):
        assert s_aux is module.sinks and passed is module.sinks
    assert [s_aux.dtype for s_aux in kernel] == [dtype, torch.float32]


class TorchFlashWithSink(torch.autograd.Function):
    """torch's own flash attention, renormalised by its LSE.

    Its backward needs no change: it takes out and lse, and with the renormalised ones it computes
    exp(score - lse) and <dout, out> of attention with the sink.
    """

    @staticmethod
    def forward(ctx, q, k, v, s_aux):
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(*heads_first, 0.0, True)
        out, lse = apply_sink(out.transpose(1, 2), lse, s_aux)
        ctx.save_for_backward(*heads_first, out.transpose(1, 2), lse, s_aux)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, s_aux = ctx.saved_tensors
        dout = dout.transpose(1, 2)
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = flash_backward(dout, q, k, v, out, lse, 0.0, True)
        share = torch.exp(s_aux[None, :, None] - lse)
        ds_aux = -(share * (dout * out).sum(-1)).sum((0, 2))
        return *(t.transpose(1, 2) for t in gradients), ds_aux


def test_4_lse_renormalisation_of_torch_flash_attention_equals_ours_with_gradients():
    q, k, v, s_aux = (t.requires_grad_() for t in inputs())
    groups = HEADS_Q // HEADS_KV
    dout = torch.randn(BATCH, SEQLEN, HEADS_Q, HEAD_DIM)

    def gradients(out):
        return out, *torch.autograd.grad(out, (q, k, v, s_aux), dout)

    ours = gradients(flash_attn_func(q, k, v, causal=True, s_aux=s_aux))
    k_all, v_all = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    torchs = gradients(TorchFlashWithSink.apply(q, k_all, v_all, s_aux))
    # And by autograd alone, where the backend's backward takes the gradient of its lse, as ours
    # does.
    without = flash_attn_func(q, k, v, causal=True, return_lse=True)
    renormalised = gradients(apply_sink(*without, s_aux)[0])
    for name, a, b, c in zip(
        ("out", "q", "k", "v", "s_aux"), ours, torchs, renormalised, strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(a, c, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("with_sinks", [True, False])
def test_5_paged_attention_with_and_without_sinks(with_sinks):
    q, k, v, s_aux = inputs()
    options = {"causal": True, "window_size": (11, 0), "s_aux": s_aux if with_sinks else None}
    expected = flash_attn_func(q, k, v, **options)
    page_size, pages = 4, -(-SEQLEN // 4)
    table = torch.randperm(BATCH * pages).view(BATCH, pages).to(torch.int32)
    k_cache, v_cache = torch.full((2, BATCH * pages, page_size, HEADS_KV, HEAD_DIM), torch.nan)
    position = torch.arange(SEQLEN)
    slots = table[:, position // page_size].long() * page_size + position % page_size
    reshape_and_cache(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots.flatten())
    full = torch.full((BATCH,), SEQLEN, dtype=torch.int32)
    paged = {"cache_seqlens": full, "block_table": table}
    ours = flash_attn_with_kvcache(q, k_cache, v_cache, **paged, **options)  # the whole prompt
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    ours = flash_attn_with_kvcache(q[:, -1:], k_cache, v_cache, **paged, **options)  # decode
    torch.testing.assert_close(ours, expected[:, -1:], atol=1e-5, rtol=1e-5)
    if with_sinks:
        without = flash_attn_func(q, k, v, **(options | {"s_aux": None}))
        assert max_diff(expected, without) > 0.01


def test_6_sinks_receive_gradients():
    model, ids = gpt_oss(), tokens(2, 40)
    ours, expected = both(model, lambda m: gradients(m, ids))
    names = [name for name in expected if name.endswith("sinks")]
    assert len(names) == 4
    for name in names:
        assert ours[name].abs().min() > 0
        assert max_diff(ours[name], expected[name]) <= 1e-4 * expected[name].abs().max()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1.0, 1e2, 1e4, 1e18])
def test_7_bfloat16_is_right_at_every_magnitude(magnitude):
    """Out and lse within tolerance of float64 for q, k, v and sinks of any size.

    Gradients are compared while float32 scores resolve the softmax. Beyond that they are finite,
    and P <= 1 bounds dv.
    """
    q, k, v, _ = inputs(torch.bfloat16, magnitude)
    if magnitude > 1e6:  # keep <q, k> itself inside bfloat16
        q = inputs(torch.bfloat16)[0]
    dout = torch.randn(q.shape).bfloat16()
    options = {"causal": True}
    for sink in (-3e38, -1e4, -1.0, 0.0, 1.0, 1e4, 3e38):
        s_aux = torch.full((HEADS_Q,), sink, dtype=torch.bfloat16)
        made = Inputs(q, k, v, s_aux, dout, torch.zeros(BATCH, HEADS_Q, SEQLEN))
        attention = functools.partial(flash_attn_func, return_lse=True)
        ours = oracle.run(attention, made, options)
        ref = oracle.run(reference.attention, made, options, torch.float64, True, torch.float64)
        pt = oracle.run(reference.attention, made, options, torch.bfloat16)
        if magnitude <= 1.0:
            noise = oracle.noise(torch.bfloat16, options, made, ref, reference.attention)
            tolerance.check(ours, oracle.Expected(ref, pt, noise))
            continue
        forward = [oracle.Results(x.out, x.lse) for x in (ours, ref, pt)]
        tolerance.check(forward[0], oracle.Expected(*forward[1:], {}))
        for name, tensor in ours.items().items():
            assert tensor.isfinite().all(), (name, sink)
        group = HEADS_Q // HEADS_KV
        assert ours.dv.abs().max() <= 1.01 * SEQLEN * group * dout.abs().max()


def test_8_long_sequences_keep_a_bounded_cache():
    """transformers' sliding cache keeps window - 1 tokens, and every chunk sees the right ones.

    With one layer a token's logits depend on the last `window` tokens alone, so eager attention
    over those is the reference.
    """
    model = gpt_oss(num_hidden_layers=1, layer_types=["sliding_attention"])
    window, cache = model.config.sliding_window, DynamicCache(config=model.config)
    chunks = (64, 1, 1, 15, 16, 17, 100, 1)
    ids = tokens(1, sum(chunks))
    ends = list(itertools.accumulate(chunks))
    for start, end in zip([0, *ends], ends, strict=False):
        part = {"past_key_values": cache, "logits_to_keep": 1}
        last = logits(model, ids[:, start:end], **part)
        assert cache.layers[0].keys.shape[2] == window - 1
        tail = {"position_ids": torch.arange(end - window, end)[None]}
        model.set_attn_implementation("eager")
        expected = logits(model, ids[:, end - window : end], **tail)[:, -1:]
        model.set_attn_implementation(OURS)
        assert last.shape == expected.shape and max_diff(last, expected) < 1e-3


def test_9_sharded_heads_with_sharded_sinks_equal_the_whole(tmp_path):
    path = str(tmp_path / "whole.pt")
    whole_attention(path)
    on_two_ranks(sharded_attention, path)
