"""A small byte-level GPT-OSS model, the text it learns, and its training loop."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GptOssConfig, GptOssForCausalLM

from sink_attention_ext.integrations.transformers import register

register()  # from here on transformers knows attn_implementation="sink_attention"

PAD, END = 256, 257  # the tokens that are no bytes: padding, and the end of a topic
WINDOW = 32  # tokens that a sliding layer sees, the current one included
SEQLEN, BATCH = 128, 8
LEARNING_RATE = 4e-3
SINK_LEARNING_RATE = 2e-2  # a handful of scalars that start near 0: they may take larger steps


def make_model(seed: int = 0) -> GptOssForCausalLM:
    """4 layers, sliding and full in turn, 8 query and 2 kv heads, 2 of 4 experts for each token."""
    torch.manual_seed(seed)
    config = GptOssConfig(
        vocab_size=258,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.04,
        pad_token_id=PAD,
        bos_token_id=END,
        eos_token_id=END,
    )
    model = GptOssForCausalLM(config)
    model.set_attn_implementation("sink_attention")
    return model


def sinks_of(model: GptOssForCausalLM) -> Tensor:
    """A copy of the sinks, (layers, heads)."""
    return torch.stack([layer.self_attn.sinks.detach().clone() for layer in model.model.layers])


def load_text() -> tuple[Tensor, Tensor]:
    """Python's language reference, as python's help() shows it: tokens to train on and held out."""
    tokens: list[int] = []
    for topic in topics.values():
        tokens += [*topic.strip().encode(), END]
    text = torch.tensor(tokens)
    cut = len(text) - 16 * 1024
    return text[:cut], text[cut:]


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(tokens: Iterable[int]) -> str:
    return bytes(t for t in tokens if t < 256).decode(errors="replace")


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """(len(starts), SEQLEN) tokens of text."""
    return text[starts[:, None] + torch.arange(SEQLEN)]


def train(model: GptOssForCausalLM, text: Tensor, steps: int) -> list[float]:
    """An ordinary training loop: the attention backward, sinks included, is the extension's."""
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    others = [p for name, p in model.named_parameters() if not name.endswith("sinks")]
    optimizer = torch.optim.AdamW(
        [
            {"params": others, "lr": LEARNING_RATE, "weight_decay": 0.05},
            {"params": sinks, "lr": SINK_LEARNING_RATE, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    warmup = max(1, min(20, steps // 5))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.52 + 0.48 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    model.train()
    interval = 0.2 if sys.stderr.isatty() else 15  # seconds; in a log few lines are enough
    with tqdm(total=steps, desc="  training", ncols=80, mininterval=interval) as bar:
        for _ in range(steps):
            batch = windows(text, torch.randint(len(text) - SEQLEN, (BATCH,), generator=generator))
            loss = model(batch, labels=batch, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{smooth(losses)[-1]:.2f}", refresh=False)
            bar.update()
    model.eval()
    return losses


@torch.no_grad()
def held_out_loss(model: GptOssForCausalLM, text: Tensor, count: int = 16) -> float:
    """Nats per byte on text that was not trained on."""
    starts = torch.linspace(0, len(text) - SEQLEN, count).long()
    batch = windows(text, starts)
    return model(batch, labels=batch, use_cache=False).loss.item()


@torch.no_grad()
def sample(model: GptOssForCausalLM, prompt: str, new_tokens: int) -> str:
    """The prompt and a continuation drawn at random, by generate() on the extension's attention."""
    torch.manual_seed(0)
    start = torch.tensor([encode(prompt)])
    options = {"do_sample": True, "temperature": 0.6, "eos_token_id": -1, "pad_token_id": PAD}
    return decode(model.generate(start, max_new_tokens=new_tokens, **options)[0].tolist())


def smooth(losses: list[float], span: int = 20) -> list[float]:
    """Means of the last `span` losses at each step."""
    means = []
    for i in range(len(losses)):
        recent = losses[max(0, i + 1 - span) : i + 1]
        means.append(sum(recent) / len(recent))
    return means
