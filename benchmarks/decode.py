"""How much of the memory's read bandwidth does decoding from a paged KV cache reach?

One new token per sequence, GPT-OSS's heads (64 query, 8 kv, head_dim 64), pages of 16 tokens in
random order. A call reads every K and V of its sequences once, so its speed is those bytes over
its time. The yardstick is measured in the same turns: torch's multi-threaded sum over a buffer far
larger than the last-level cache, which does nothing but read. So that no call finds its keys in
that cache, one turn is a loop of calls over different sets of sequences (as a model's layers have),
together at least 8 times the cache; a call's time is the loop's average.

The peers get an easier task: contiguous (batch, heads, seqlen, head_dim) caches. SDPA gets the 8
query heads of a kv head as 8 query rows, which is several times faster than its enable_gqa here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import gpu.decode_peers
import torch
from cases import DTYPE_NAMES, GPT_OSS_FULL, Record, Settings
from check import TOLERANCE, relative_error
from environment import available_memory_bytes, last_level_cache_bytes
from peers import EAGER, OURS, READ, SDPA, eager_function
from sweep import record_of
from timing import Contender, Rounds, Timing, WrongResultError, interleave, progress
from torch.nn.functional import scaled_dot_product_attention

import sink_attention_ext

TITLE = "Decode over a paged cache"
PAGE_SIZE = 16
POOL_MIN_CACHES = 8
READ_BYTES = 1 << 30
EAGER_LIMIT_S = 1.5
LAYER = GPT_OSS_FULL


class PagedCache:
    """k_cache, v_cache `(num_pages, 16, 8, 64)` and one block table for each set of sequences."""

    def __init__(self, batch: int, seqlen: int, dtype: torch.dtype, device: torch.device) -> None:
        pages_per_sequence = seqlen // PAGE_SIZE
        token_bytes = 2 * LAYER.num_heads_kv * LAYER.head_dim * dtype.itemsize
        self.batch, self.seqlen = batch, seqlen
        self.kv_bytes = batch * seqlen * token_bytes
        # On a GPU the timing empties the cache before each turn.
        pool_bytes = 0 if device.type == "cuda" else POOL_MIN_CACHES * last_level_cache_bytes()
        self.num_sets = max(1, -(-pool_bytes // self.kv_bytes))
        num_pages = self.num_sets * batch * pages_per_sequence
        shape = (num_pages, PAGE_SIZE, LAYER.num_heads_kv, LAYER.head_dim)
        self.k_cache = tiled_normal(shape, dtype, device)
        self.v_cache = tiled_normal(shape, dtype, device)
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
        tables = order.to(device, torch.int32).view(self.num_sets, batch, pages_per_sequence)
        self.block_tables = list(tables)
        self.cache_seqlens = torch.full((batch,), seqlen, dtype=torch.int32, device=device)

    def contiguous(self, cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """`(batch, 8, seqlen, 64)`, a copy of one set's sequences."""
        pages = cache[table.long()].view(table.shape[0], self.seqlen, *cache.shape[2:])
        return pages.transpose(1, 2).contiguous()


def tiled_normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal numbers: those of 1021 pages, repeated, since drawing gigabytes takes a while."""
    tile = torch.randn(min(shape[0], 1021), *shape[1:], generator=torch.Generator().manual_seed(1))
    result = torch.empty(shape, dtype=dtype, device=device)
    for start in range(0, shape[0], tile.shape[0]):
        part = result[start : start + tile.shape[0]]
        part.copy_(tile[: part.shape[0]])
    return result


def make_check(
    cache: PagedCache, q: torch.Tensor, s_aux: torch.Tensor | None
) -> Callable[[torch.Tensor], float]:
    """Compares the first and the last sequence of a call on the first set with float64."""
    expected = []
    picked = sorted({0, cache.batch - 1})
    group = LAYER.num_heads_q // LAYER.num_heads_kv
    for b in picked:
        table = cache.block_tables[0][b : b + 1]
        k, v = (cache.contiguous(c, table)[0].double() for c in (cache.k_cache, cache.v_cache))
        q_b = q[b].double().view(LAYER.num_heads_kv, group, LAYER.head_dim)
        logits = (q_b @ k.transpose(1, 2) * LAYER.head_dim**-0.5).view(LAYER.num_heads_q, -1)
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.double()[:, None]], dim=-1)
        probs = logits.softmax(-1)[:, : cache.seqlen].view(LAYER.num_heads_kv, group, -1)
        expected.append((probs @ v).view(LAYER.num_heads_q, LAYER.head_dim))
    reference = torch.stack(expected)

    def check(out: torch.Tensor) -> float:
        error = relative_error(out.view(q.shape)[picked], reference)
        if not error <= TOLERANCE[q.dtype]:
            raise WrongResultError(f"out is off the float64 reference by {error:.1e}")
        return error

    return check


def looped(call: Callable[..., torch.Tensor], sets: list[tuple]) -> Callable[[], torch.Tensor]:
    """One turn: call(*arguments) for each set of sequences. Returns the first set's result."""

    def turn() -> torch.Tensor:
        first = call(*sets[0])
        for arguments in sets[1:]:
            call(*arguments)
        return first

    return turn


def contenders(
    cache: PagedCache, dtype: torch.dtype, device: torch.device, eager_seconds: float
) -> tuple[list[Contender], dict[str, str]]:
    """Ours, SDPA and eager, and why a peer is left out; eager_seconds is what eager should take."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(cache.batch, LAYER.num_heads_q, LAYER.head_dim, generator=generator)
    s_aux = torch.randn(LAYER.num_heads_q, generator=generator).to(device, dtype)
    q = q.to(device, dtype)
    with_sink, without_sink = make_check(cache, q, s_aux), make_check(cache, q, None)

    def ours(table: torch.Tensor) -> torch.Tensor:
        return sink_attention_ext.flash_attn_with_kvcache(
            q[:, None],
            cache.k_cache,
            cache.v_cache,
            cache_seqlens=cache.cache_seqlens,
            block_table=table,
            causal=True,
            s_aux=s_aux,
        )

    tables = [(table,) for table in cache.block_tables]
    result = [Contender(OURS, looped(ours, tables), with_sink)]
    left_out = {}
    if device.type == "cuda":
        checks = (with_sink, without_sink)
        others, left_out = gpu.decode_peers.contenders(cache, q, s_aux, *checks)
        facts = {"dtype": dtype, "device": device, "paged": True}
        older = gpu.peers.by_sm80(result[0].call, LAYER, **facts)
        if isinstance(older, str):
            left_out[gpu.peers.OURS_SM80] = older
        else:
            result.append(Contender(gpu.peers.OURS_SM80, older, with_sink))
        result += others
    if cache.num_sets * cache.kv_bytes > available_memory_bytes(device) * 6 // 10:
        no_copies = "no memory for contiguous copies of the cache"
        return result, left_out | dict.fromkeys((SDPA, EAGER), no_copies)
    copies = [
        (cache.contiguous(cache.k_cache, table), cache.contiguous(cache.v_cache, table))
        for table in cache.block_tables
    ]

    group = LAYER.num_heads_q // LAYER.num_heads_kv
    q_grouped = q.view(cache.batch, LAYER.num_heads_kv, group, LAYER.head_dim)

    def sdpa(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q_grouped, k, v)

    result.append(Contender(SDPA, looped(sdpa, copies), without_sink))
    if group * cache.kv_bytes > available_memory_bytes(device) * 6 // 10:
        return result, left_out | {EAGER: "no memory to repeat K and V for every query head"}
    if eager_seconds > EAGER_LIMIT_S:
        return result, left_out | {EAGER: f"would take about {eager_seconds:.0f} s a call"}
    eager_attention_forward = eager_function()
    if isinstance(eager_attention_forward, str):
        return result, left_out | {EAGER: eager_attention_forward}
    module = SimpleNamespace(num_key_value_groups=group, sinks=s_aux, training=False)

    def eager(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scaling = LAYER.head_dim**-0.5
        return eager_attention_forward(module, q[:, :, None], k, v, None, scaling)[0]

    # One set a turn: repeating K and V for every query head leaves nothing in the cache anyway.
    result.append(Contender(EAGER, looped(eager, copies[:1]), with_sink, most_turns=3))
    return result, left_out


def per_call(record: Record, calls: int) -> None:
    """Turns a record of loops of so many calls into one of a call."""
    record.samples = [seconds / calls for seconds in record.samples]
    record.value = record.value and record.value / calls
    record.best = record.best and record.best / calls


def shapes(settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of sequences, and their lengths."""
    if settings.quick:
        return (1, 8), (1024, 8192)
    return (1, 4, 32), (1024, 8192, 32768)


def run(settings: Settings) -> list[Record]:
    batches, seqlens = shapes(settings)
    rounds = Rounds(5, 9, 0.5) if settings.quick else Rounds(7, 25, 2.0)
    buffer = torch.ones(READ_BYTES // 4, device=settings.device)
    read = Contender(READ, buffer.sum)
    records, eager_seconds_per_byte = [], {}
    looped_peers = (OURS, gpu.peers.OURS_SM80, SDPA)
    for dtype, batch, seqlen in itertools.product(DTYPE_NAMES, batches, seqlens):
        progress(f"decode: {DTYPE_NAMES[dtype]}, {batch} sequences of {seqlen} tokens")
        cache = PagedCache(batch, seqlen, dtype, settings.device)
        eager_seconds = cache.kv_bytes * eager_seconds_per_byte.get(dtype, 0.0)
        with torch.no_grad():
            peers, left_out = contenders(cache, dtype, settings.device, eager_seconds)
            timings = interleave([*peers, read], rounds, settings.device)
        timings |= {name: Timing(reason=reason) for name, reason in left_out.items()}
        shape = SimpleNamespace(layer=LAYER, dtype=dtype, seqlen=seqlen)
        for name, timing in timings.items():
            record = record_of(timing, "decode", name, shape, "decode")
            record.batch = batch
            record.kv_bytes = READ_BYTES if name == READ else cache.kv_bytes
            per_call(record, cache.num_sets if name in looped_peers else 1)
            records.append(record)
            if name == EAGER and record.value:
                eager_seconds_per_byte[dtype] = record.value / cache.kv_bytes
        del cache, peers
    return records
