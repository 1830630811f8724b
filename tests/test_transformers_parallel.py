"""Tensor parallelism: each rank holds some heads, and the sinks of those heads as a DTensor."""

import pytest
import torch
from tiny_models import gpt_oss, logits, max_diff, tokens
from torch import nn
from torch.distributed.tensor import DTensor
from two_ranks import on_two_ranks

from sink_attention_ext.integrations.transformers import sink_attention

LAYER = "model.layers.*.self_attn"
PLAN = {
    f"{LAYER}.q_proj": "colwise",
    f"{LAYER}.k_proj": "colwise",
    f"{LAYER}.v_proj": "colwise",
    f"{LAYER}.o_proj": "rowwise",
    f"{LAYER}.sinks": "colwise",
}


def backward(model, ids):
    model(ids, labels=ids, use_cache=False).loss.backward()
    return [layer.self_attn.sinks.grad for layer in model.model.layers]


def sharded_model(rank, folder):
    from transformers import GptOssForCausalLM
    from transformers.distributed import DistributedConfig

    expected = torch.load(f"{folder}/expected.pt")
    model = GptOssForCausalLM.from_pretrained(
        folder,
        attn_implementation="sink_attention",
        distributed_config=DistributedConfig(tp_plan=PLAN, tp_size=2),
    )
    sinks = model.model.layers[0].self_attn.sinks
    assert isinstance(sinks, DTensor) and sinks.shape == (8,) and sinks.to_local().shape == (4,)
    ids = expected["ids"]
    assert max_diff(logits(model, ids), expected["logits"]) < 2e-5
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, expected["generated"])
    for gradient, whole in zip(backward(model, ids), expected["sinks.grad"], strict=True):
        assert max_diff(gradient.full_tensor(), whole) <= 1e-4 * whole.abs().max()


def test_gpt_oss_with_sharded_heads_and_sinks(tmp_path):
    model = gpt_oss()
    model.save_pretrained(tmp_path)
    ids = tokens(2, 24)
    expected = {
        "ids": ids,
        "logits": logits(model, ids),
        "generated": model.generate(ids, max_new_tokens=6, do_sample=False),
        "sinks.grad": backward(model, ids),
    }
    torch.save(expected, tmp_path / "expected.pt")
    on_two_ranks(sharded_model, str(tmp_path))


def test_sinks_of_all_heads_beside_sharded_heads_are_refused():
    q, k, v = (torch.randn(1, heads, 5, 8) for heads in (4, 1, 1))
    with pytest.raises(
        ValueError, match="4 query heads .* Under tensor parallelism shard the sinks"
    ):
        sink_attention(nn.Module(), q, k, v, None, is_causal=True, s_aux=torch.zeros(8))
