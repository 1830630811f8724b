"""A server's loop over PagedKVCache, to be copied: continuous batching in under 200 lines.

    python examples/server_loop.py

Requests arrive over time. Each turn of the loop is one forward pass over one packed batch: every
running request decodes a token, and what is left of the token budget prefills waiting prompts in
chunks. All prompts begin with a system prompt, which is prefilled once and forked. If pages run
out, the youngest request is put back and starts again later.

The model is a small random one with GPT-OSS's attention: windowed and full layers, grouped-query
heads, a sink for each. In float64 the order of sums changes no token, so answers can be compared.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from sink_attention_ext import CacheStep, PagedKVCache

VOCABULARY, HIDDEN, NUM_LAYERS = 512, 64, 4
NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM, WINDOW = 4, 2, 32, 24
TOKEN_BUDGET = 48  # tokens of one forward pass
NUM_PAGES, PAGE_SIZE, MAX_NUM_SEQS = {WINDOW - 1: 40, -1: 52}, 8, 6


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.qkv = nn.Linear(HIDDEN, (NUM_HEADS_Q + 2 * NUM_HEADS_KV) * HEAD_DIM, bias=False)
        self.out = nn.Linear(NUM_HEADS_Q * HEAD_DIM, HIDDEN, bias=False)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 256), nn.SiLU(), nn.Linear(256, HIDDEN))
        self.sinks = nn.Parameter(torch.randn(NUM_HEADS_Q))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], step: CacheStep) -> Tensor:
        qkv = self.qkv(rms_norm(x, (HIDDEN,))).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split([NUM_HEADS_Q, NUM_HEADS_KV, NUM_HEADS_KV], dim=1)
        q, k = rotate(q, *rotation), rotate(k, *rotation)  # keys are cached rotated
        attended = step.attend(self.index, q, k, v, s_aux=self.sinks)
        x = x + self.out(attended.flatten(1))
        return x + self.mlp(rms_norm(x, (HIDDEN,)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(i) for i in range(NUM_LAYERS))

    @torch.no_grad()
    def forward(self, tokens: list[int], step: CacheStep) -> list[int]:
        """The most likely next token of each sequence."""
        x, rotation = self.embedding(torch.tensor(tokens)), rotary(step.positions)
        for layer in self.layers:
            x = layer(x, rotation, step)
        last = x[step.cu_seqlens_q[1:].long() - 1]  # each sequence's last row in the batch
        return (rms_norm(last, (HIDDEN,)) @ self.embedding.weight.T).argmax(-1).tolist()


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    angle = (positions[:, None] * 1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))[:, None]
    return angle.cos().double(), angle.sin().double()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@dataclass(eq=False)
class Request:
    name: str
    prompt: list[int]  # without the system prompt
    limit: int  # new tokens
    arrival: int  # turn of the loop
    answer: list[int] = field(default_factory=list)
    seq_id: int | None = None
    num_cached: int = 0  # of prompt + answer

    def __post_init__(self) -> None:
        if not (self.prompt and self.limit > 0):  # no last token to go on from, or no end
            raise ValueError(f"{self.name}: prompt and limit must be at least one token each")

    def uncached(self) -> list[int]:
        return (self.prompt + self.answer)[self.num_cached :]


class Server:
    def __init__(self, model: Model, system_prompt: list[int]) -> None:
        self.model = model
        self.cache = PagedKVCache(
            [(WINDOW - 1, 0) if i % 2 == 0 else (-1, -1) for i in range(NUM_LAYERS)],
            num_heads_kv=NUM_HEADS_KV,
            head_dim=HEAD_DIM,
            page_size=PAGE_SIZE,
            num_pages=NUM_PAGES,
            max_num_seqs=MAX_NUM_SEQS,
            max_seqlen=512,
            max_num_batched_tokens=TOKEN_BUDGET,
            dtype=torch.float64,
        )
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_preempted = 0
        self.prefix = self.cache.allocate()
        for begin in range(0, len(system_prompt), TOKEN_BUDGET):
            chunk = system_prompt[begin : begin + TOKEN_BUDGET]
            model(chunk, self.cache.append([self.prefix], len(chunk)))

    def turn(self) -> list[Request]:
        """One forward pass; returns the requests that it finished."""
        if not (self.running or self.waiting):
            return []
        if not (batch := self.schedule()):
            raise RuntimeError("one request alone needs more pages than there are")
        chunks = {request: request.uncached()[:count] for request, count in batch.items()}
        step = self.cache.append([r.seq_id for r in batch], list(batch.values()))
        next_tokens = self.model([t for chunk in chunks.values() for t in chunk], step)
        for request, token in zip(chunks, next_tokens, strict=True):
            request.num_cached += len(chunks[request])
            if not request.uncached():  # not in the middle of a prompt
                request.answer.append(token)
        for request in (finished := [r for r in self.running if len(r.answer) == r.limit]):
            self.stop(request)
        return finished

    def schedule(self) -> dict[Request, int]:
        """How many tokens of which requests come next: decode, then prompts, then new requests."""
        batch: dict[Request, int] = {}
        num_preempted = self.num_preempted
        for request in sorted(self.running, key=lambda r: len(r.uncached()) > 1):
            while request in self.running and not self.add(batch, request):
                victim = self.running[-1]  # the youngest
                batch.pop(victim, None)
                self.stop(victim)  # it starts again later, its answer so far a part of its prompt
                self.waiting.appendleft(victim)
                self.num_preempted += 1
        while self.waiting and self.cache.num_seqs < MAX_NUM_SEQS:
            request = self.waiting[0]
            request.seq_id = self.cache.fork(self.prefix)  # pages of the system prompt are shared
            self.running.append(request)
            is_short = self.num_preempted > num_preempted  # of pages
            if is_short or not self.add(batch, request) or request not in batch:
                self.stop(request)
                break
            self.waiting.popleft()
        return batch

    def add(self, batch: dict[Request, int], request: Request) -> bool:
        """Puts what the budget allows of a request into the batch; False: pages do not suffice."""
        count = min(len(request.uncached()), TOKEN_BUDGET - sum(batch.values()))
        entries = batch | {request: count}
        fits = self.cache.can_append([r.seq_id for r in entries], list(entries.values()))
        if fits and count > 0:
            batch[request] = count
        return fits

    def stop(self, request: Request) -> None:
        self.cache.free(request.seq_id)
        self.running.remove(request)
        request.seq_id, request.num_cached = None, 0


def serve(model: Model, system_prompt: list[int], requests: list[Request]) -> Server:
    server = Server(model, system_prompt)
    for turn in itertools.count():
        server.waiting += [r for r in requests if r.arrival == turn]
        for request in server.turn():
            print(f"turn {turn:3}: {request.name} finished with {len(request.answer)} tokens")
        if all(len(r.answer) == r.limit for r in requests):
            return server


def main() -> None:
    torch.manual_seed(0)
    model, text = Model().double(), torch.randint(VOCABULARY, (1000,)).tolist()
    system_prompt = text[:70]
    requests = [
        Request(f"request {i}", text[90 * i : 90 * i + 3 + 29 * i % 90], 12 + i, 3 * i)
        for i in range(10)
    ]
    server = serve(model, system_prompt, requests)
    print(f"{server.num_preempted} times a request made room for an older one")
    for request in requests:
        alone = Request(f"{request.name} alone", request.prompt, request.limit, 0)
        serve(model, system_prompt, [alone])
        if alone.answer != request.answer:
            raise SystemExit(f"{request.name}: {request.answer}, but alone {alone.answer}")
    print("all answers equal those of each request alone")


if __name__ == "__main__":
    main()
