"""Answers of eight prompts at once: continuous batching over a paged cache, and eager generate."""

from __future__ import annotations

import time

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from tiny_gpt_oss.text import BOS


def generation_config(new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=BOS
    )


def serve_paged(
    model: nn.Module, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], float]:
    """Greedy answers by generate_batch through our paged operator, and new tokens per second."""
    model.set_attn_implementation("paged|sink_attention")
    start = time.perf_counter()
    results = model.generate_batch(
        inputs=prompts,
        generation_config=generation_config(new_tokens),
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=32, num_blocks=128, max_batch_tokens=256
        ),
        progress_bar=False,
    )
    seconds = time.perf_counter() - start
    answers = {tuple(r.prompt_ids): r.generated_tokens for r in results.values()}
    return [answers[tuple(p)] for p in prompts], len(prompts) * new_tokens / seconds


def serve_eager(model: nn.Module, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """New tokens per second of eager generate: prompts one by one, and in one left-padded batch."""
    model.set_attn_implementation("eager")
    config = generation_config(new_tokens)
    start = time.perf_counter()
    for prompt in prompts:
        model.generate(torch.tensor([prompt]), generation_config=config)
    one_by_one = time.perf_counter() - start

    longest = max(map(len, prompts))
    ids = torch.tensor([[BOS] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    start = time.perf_counter()
    model.generate(ids, attention_mask=mask, generation_config=config)
    batched = time.perf_counter() - start
    total = len(prompts) * new_tokens
    return total / one_by_one, total / batched


@torch.no_grad()
def worst_choice(model: nn.Module, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """How far below eager's best logit the token that was served ever is; 0 if it always is the best."""
    model.set_attn_implementation("eager")
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : -1]
        served = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        worst = max(worst, (logits.amax(-1) - served).max().item())
    return worst
