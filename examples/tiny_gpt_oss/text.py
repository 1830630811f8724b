"""English text that ships with Python, as bytes: the tokens of the model are byte values."""

from __future__ import annotations

from pydoc_data import topics

import torch
from torch import Tensor

BOS, EOS = 256, 257
VOCAB = 258
HELD_OUT = 0.05  # the end of the text is for testing


def load() -> tuple[Tensor, Tensor]:
    """(training text, held-out text), int64 byte values."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    split = int(len(data) * (1 - HELD_OUT))
    return data[:split], data[split:]


def batch(data: Tensor, size: int, seqlen: int, generator: torch.Generator) -> Tensor:
    """(size, seqlen) random pieces."""
    starts = torch.randint(len(data) - seqlen, (size,), generator=generator).tolist()
    return torch.stack([data[start : start + seqlen] for start in starts])


def encode(text: str) -> list[int]:
    return [BOS, *text.encode()]


def decode(ids: list[int]) -> str:
    return bytes(i for i in ids if i < 256).decode(errors="replace")
