"""Tensor parallelism: each rank holds some heads, and the sinks of those heads as a DTensor."""

import pytest
import torch
from tiny_models import gpt_oss, gradients, logits, max_diff, tokens
from torch import nn
from torch.distributed.tensor import DTensor
from two_ranks import on_ranks

from sink_attention_ext.integrations.transformers import sink_attention
from sink_attention_ext.parallel import GPT_OSS_TP_PLAN

HEADS = 8


def sharded_model(rank, folder, world_size):
    from transformers import GptOssForCausalLM
    from transformers.distributed import DistributedConfig

    expected = torch.load(f"{folder}/expected.pt")
    model = GptOssForCausalLM.from_pretrained(
        folder,
        attn_implementation="sink_attention",
        distributed_config=DistributedConfig(tp_plan=GPT_OSS_TP_PLAN, tp_size=world_size),
    )
    attention = model.model.layers[0].self_attn
    for parameter, rows in (
        (attention.sinks, HEADS // world_size),
        (attention.q_proj.weight, HEADS * 64 // world_size),
        (attention.k_proj.weight, 4 * 64 // world_size),
    ):
        assert isinstance(parameter, DTensor) and parameter.to_local().shape[0] == rows
    ids = expected["ids"]
    assert max_diff(logits(model, ids), expected["logits"]) < 2e-5
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, expected["generated"])
    ours = gradients(model, ids)
    assert ours.keys() == expected["gradients"].keys()
    for name, whole in expected["gradients"].items():
        gradient = ours[name]
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()  # gathers; a collective, in the same order everywhere
        assert max_diff(gradient, whole) <= 1e-4 * whole.abs().max(), name


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A folder with a model of two layers, sliding and full, and what it gives on one process."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    model = gpt_oss(num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=4)
    model.save_pretrained(folder)
    ids = tokens(2, 24)
    expected = {
        "ids": ids,
        "logits": logits(model, ids),
        "generated": model.generate(ids, max_new_tokens=4, do_sample=False),
        "gradients": gradients(model, ids),
    }
    assert sum("sinks" in name for name in expected["gradients"]) == 2
    torch.save(expected, folder / "expected.pt")
    return str(folder)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gpt_oss_with_sharded_heads_and_sinks(saved_model, world_size):
    """Logits, generation, and the gradient of every parameter."""
    on_ranks(world_size, sharded_model, saved_model, world_size)


def test_sinks_of_all_heads_beside_sharded_heads_are_refused():
    q, k, v = (torch.randn(1, heads, 5, 8) for heads in (4, 1, 1))
    with pytest.raises(
        ValueError, match="s_aux has 8 logits, q has 4 heads .* tensor parallel.*GPT_OSS_TP_PLAN"
    ):
        sink_attention(nn.Module(), q, k, v, None, is_causal=True, s_aux=torch.zeros(8))
