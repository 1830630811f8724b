"""Unmodified user code with attn_implementation="kernels-community/vllm-flash-attn3" runs on us.

The environment says where that kernel lies; nothing is registered, no model class is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("kernels", reason="needs kernels: python tools/install_missing.py transformers")

import kernels  # noqa: E402
from tiny_models import (
    Result,
    assert_same_gradients,
    gpt_oss,
    gradients,
    logits,
    max_diff,
    padding_mask,
    positions,
    tokens,
)
from transformers import GenerationConfig, GptOssForCausalLM
from transformers.generation import ContinuousBatchingConfig
from transformers.integrations import hub_kernels

from sink_attention_ext.integrations.flash_attention_3 import KERNEL_REPO, local_kernels

GREEDY = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
TOLERANCE = 2e-5  # of logits of about 1, float32


@pytest.fixture(scope="module", autouse=True)
def kernel() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_KERNELS", local_kernels())
        if not hub_kernels.is_kernels_available():
            # transformers takes another version of `kernels` than the one that is here for none.
            # Then the folder is loaded by that one, and all but the loading is tested.
            patch.setattr(hub_kernels, "is_kernels_available", lambda: True)
            patch.setattr(hub_kernels, "get_kernel_hub", kernels.get_kernel, raising=False)
        yield


@pytest.fixture
def model() -> GptOssForCausalLM:
    return gpt_oss()


def both(
    model: GptOssForCausalLM, run: Callable[[GptOssForCausalLM], Result]
) -> tuple[Result, Result]:
    """run(model) on our kernel and with eager attention."""
    results = []
    for name in (KERNEL_REPO, "eager"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        results.append(run(model))
    return results[0], results[1]


@pytest.mark.parametrize("name", [KERNEL_REPO, "flash_attention_3", "flash_attention_2"])
def test_names(model: GptOssForCausalLM, name: str) -> None:
    """GPT-OSS has transformers replace the two generic ones."""
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == KERNEL_REPO
    ours = logits(model, tokens(2, 40))
    model.set_attn_implementation("eager")
    assert max_diff(ours, logits(model, tokens(2, 40))) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: GptOssForCausalLM, side: str) -> None:
    ids, mask = tokens(3, 40), padding_mask(40, [40, 23, 7], side)
    given = {"attention_mask": mask, "position_ids": positions(mask)}
    ours, eager = both(model, lambda m: logits(m, ids, **given))
    assert max_diff(ours[mask.bool()], eager[mask.bool()]) < TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("lengths", [[40, 40], [40, 9]])
def test_generate(model: GptOssForCausalLM, cache: str, lengths: list[int]) -> None:
    """Prompts shorter and longer than the window of 16, whole and padded on the left."""
    ids, mask = tokens(2, 40), padding_mask(40, lengths, "left")
    given = {"attention_mask": mask, "cache_implementation": cache}
    ours, eager = both(model, lambda m: m.generate(ids, GREEDY, **given))
    assert torch.equal(ours, eager)
    assert len(ours[:, 40:].unique()) > 10


def test_packed_sequences(model: GptOssForCausalLM) -> None:
    """Against each alone: transformers' eager GPT-OSS does not look at position_ids."""
    parts = [tokens(1, n, seed=n) for n in (21, 5, 30)]
    position_ids = torch.cat([torch.arange(p.shape[1])[None] for p in parts], dim=1)
    model.set_attn_implementation(KERNEL_REPO)
    packed = logits(model, torch.cat(parts, dim=1), position_ids=position_ids, use_cache=False)
    model.set_attn_implementation("eager")
    alone = torch.cat([logits(model, part) for part in parts], dim=1)
    assert max_diff(packed, alone) < TOLERANCE


def test_training(model: GptOssForCausalLM) -> None:
    ids = tokens(2, 40)
    ours, eager = both(model, lambda m: gradients(m, ids))
    assert any(name.endswith("sinks") for name in ours)
    assert_same_gradients(ours, eager, relative=1e-4)


def test_bfloat16(model: GptOssForCausalLM) -> None:
    ids = tokens(2, 40)
    ours, eager = both(model.to(torch.bfloat16), lambda m: logits(m, ids))
    assert torch.isfinite(ours).all()
    # Two roundings of one computation; what they differ by is measured against float32.
    exact = both(model.float(), lambda m: logits(m, ids))[1]
    assert max_diff(ours, exact) < 2 * max_diff(eager, exact)


# ---- continuous batching ----


@pytest.mark.parametrize("name", [KERNEL_REPO, f"paged|{KERNEL_REPO}"])
def test_continuous_batching(model: GptOssForCausalLM, name: str) -> None:
    """Chunks of 32 tokens and decode steps in one batch; the sliding layers' ring wraps around."""
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (37, 9, 23, 1, 60, 5)]
    model.set_attn_implementation("eager")
    expected = [model.generate(torch.tensor([p]), GREEDY)[0, len(p) :].tolist() for p in prompts]

    model.set_attn_implementation(name)
    results = model.generate_batch(
        inputs=prompts,
        generation_config=GREEDY,
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=8, num_blocks=96, max_batch_tokens=32
        ),
    )
    assert [output.error for output in results.values()] == [None] * len(prompts)
    by_prompt = {tuple(o.prompt_ids): o.generated_tokens for o in results.values()}
    assert [by_prompt[tuple(p)] for p in prompts] == expected
