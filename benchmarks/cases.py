"""The shapes that are measured, the tensors made for them, and the record of one measurement."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Layer:
    """One layer's heads. `window` counts the visible tokens, the query's own included."""

    name: str
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    window: int | None = None

    @property
    def window_size(self) -> tuple[int, int]:
        """FlashAttention's `(left, right)`, both inclusive: a window of 128 tokens is (127, 0)."""
        return (-1, -1) if self.window is None else (self.window - 1, 0)


GPT_OSS_FULL = Layer("GPT-OSS full", 64, 8, 64)
GPT_OSS_WINDOW = Layer("GPT-OSS window 128", 64, 8, 64, window=128)
HEAD_DIM_128 = Layer("32/8 heads, d 128", 32, 8, 128)


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    device: torch.device
    quick: bool = False
    seqlens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)


class Problem:
    """Inputs of one layer at one length, batch 1, causal, in the layouts that the peers take.

    q `(1, seqlen, num_heads_q, head_dim)`, k and v `(1, seqlen, num_heads_kv, head_dim)`, s_aux
    `(num_heads_q,)`, dout like q; all of `dtype`, normal(0, 1), the same for every peer.
    """

    def __init__(self, layer: Layer, seqlen: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seqlen)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

        self.layer, self.seqlen, self.dtype, self.device = layer, seqlen, dtype, device
        self.q = normal(1, seqlen, layer.num_heads_q, layer.head_dim)
        self.k = normal(1, seqlen, layer.num_heads_kv, layer.head_dim)
        self.v = normal(1, seqlen, layer.num_heads_kv, layer.head_dim)
        self.dout = normal(1, seqlen, layer.num_heads_q, layer.head_dim)
        self.s_aux = normal(layer.num_heads_q)

    def visible(self, rows: torch.Tensor, num_keys: int) -> torch.Tensor:
        """Bool `(len(rows), num_keys)`: which keys each query row sees."""
        distance = rows[:, None] - torch.arange(num_keys, device=rows.device)[None, :]
        window = self.layer.window or self.seqlen
        return (distance >= 0) & (distance < window)

    def bool_mask(self) -> torch.Tensor:
        """Bool `(seqlen, seqlen)`, True where visible: what SDPA takes for a windowed layer."""
        return self.visible(torch.arange(self.seqlen, device=self.device), self.seqlen)

    def additive_mask(self) -> torch.Tensor:
        """`(1, 1, seqlen, seqlen)` of `dtype`: what transformers gives its eager attention."""
        mask = torch.zeros(self.seqlen, self.seqlen, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~self.bool_mask(), torch.finfo(self.dtype).min)[None, None]


@dataclass
class Record:
    """A peer on a shape. `value` is median seconds, or bytes; None where `reason` says why."""

    section: str
    peer: str
    layer: str
    dtype: str
    seqlen: int
    direction: str  # "forward" or "forward+backward" or "decode"
    batch: int = 1
    value: float | None = None
    best: float | None = None
    samples: list[float] = field(default_factory=list)
    error: float | None = None  # max |result - float64 reference| / max |reference| on checked rows
    reason: str | None = None
    detail: str | None = None  # e.g. which of two variants of a peer was the faster
    kv_bytes: int | None = None

    @property
    def shape(self) -> tuple[str, str, str, int, int]:
        """Everything but the peer: records of one shape stand in one row."""
        return (self.layer, self.dtype, self.direction, self.batch, self.seqlen)

    def as_dict(self) -> dict:
        return {key: value for key, value in asdict(self).items() if value not in (None, [])}
