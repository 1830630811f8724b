"""Serving: eight prompts at once by continuous batching over the paged cache, against generate."""

from __future__ import annotations

import time

import torch
from small_model import PAD, encode
from transformers import GenerationConfig, GptOssForCausalLM
from transformers.generation import ContinuousBatchingConfig

PROMPTS = (
    "The",
    "If the",
    "A function",
    "An object's ",
    "The value of the",
    "When a class is defined, the",
    'The "for" statement is used to iterate over the elements of a sequence. The',
    "Assignment statements are used to (re)bind names to values and to modify attributes or items "
    "of mutable objects. An assignment statement evaluates the expression list and assigns",
)


def greedy(new_tokens: int) -> GenerationConfig:
    """Always exactly new_tokens tokens, the most likely one each."""
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=PAD)
    config.eos_token_id = -1  # no token ends a text early: every run produces as many tokens
    return config


def serve_paged(
    model: GptOssForCausalLM, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], float]:
    """The new tokens of each prompt, and the seconds they took.

    Prefill in chunks and decode of different requests share a forward pass. Keys and values live in
    pages of one cache; the paged operator reads them in place.
    """
    model.set_attn_implementation("paged|sink_attention")
    # 64 pages of 32 tokens; a pass takes 64 tokens at most, so the longest prompt needs several.
    batching = ContinuousBatchingConfig(block_size=32, num_blocks=64, max_batch_tokens=64)
    start = time.perf_counter()
    results = model.generate_batch(
        inputs=prompts,
        generation_config=greedy(new_tokens),
        continuous_batching_config=batching,
    )
    seconds = time.perf_counter() - start
    model.set_attn_implementation("sink_attention")
    outputs = list(results.values())  # in the order of the prompts
    if len(outputs) != len(prompts) or any(output.error for output in outputs):
        raise RuntimeError(f"generate_batch failed: {[output.error for output in outputs]}")
    return [output.generated_tokens for output in outputs], seconds


def generate_eager(
    model: GptOssForCausalLM, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], float]:
    """The same by generate() on HuggingFace's eager attention, one prompt after the other."""
    model.set_attn_implementation("eager")
    start = time.perf_counter()
    outputs = [model.generate(torch.tensor([p]), greedy(new_tokens))[0].tolist() for p in prompts]
    seconds = time.perf_counter() - start
    model.set_attn_implementation("sink_attention")
    return [output[len(p) :] for p, output in zip(prompts, outputs, strict=True)], seconds


def generate_eager_padded(
    model: GptOssForCausalLM, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], float]:
    """The same as one batch, the prompts padded on the left to the longest."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    model.set_attn_implementation("eager")
    start = time.perf_counter()
    output = model.generate(padded, greedy(new_tokens), attention_mask=(padded != PAD).long())
    seconds = time.perf_counter() - start
    model.set_attn_implementation("sink_attention")
    return output[:, longest:].tolist(), seconds


@torch.no_grad()
def worst_choice(
    model: GptOssForCausalLM, prompts: list[list[int]], answers: list[list[int]]
) -> float:
    """How far below eager's best logit the chosen tokens lie at most; 0: eager would choose them.

    Two sums of the same terms in another order differ by rounding, so that two tokens that are
    almost equally likely may change places. This tells such a tie from an error.
    """
    model.set_attn_implementation("eager")
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -1]  # the row before a token predicts it
        chosen = rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
        worst = max(worst, (rows.max(dim=1).values - chosen).max().item())
    model.set_attn_implementation("sink_attention")
    return worst


def eight_prompts() -> list[list[int]]:
    return [encode(prompt) for prompt in PROMPTS]
