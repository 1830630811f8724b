"""The GPU benchmarks' peers and tables on a CPU, with stand-ins for libraries that need a card.

python -m gpu.rehearsal

A stand-in has the library's signature and computes by our CPU kernels: what is rehearsed is that
each peer gets its inputs in the right layout, is compared with the right reference (with or without
the sink), and finds its way into the tables.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from cases import GPT_OSS_FULL, GPT_OSS_WINDOW, Layer, Problem
from decode import PagedCache, make_check
from gpu import decode_peers, peers, tables
from peers import ours
from report import section_markdown
from sweep import record_of
from timing import Contender, Rounds, interleave

import sink_attention_ext as ext

CPU = torch.device("cpu")
ONCE = Rounds(least=1, most=1, budget_s=0.0)
CEILINGS = {"copy": 1e12, "gemm": 1e15}
SEQLEN = 256


class FlashAttention2:
    """`flash_attn`, and `flash_attn.cute` with its results' and its windows' other form."""

    @staticmethod
    def flash_attn_func(q, k, v, *, causal, window_size, learnable_sink=None):
        left, right = window_size
        window = (-1 if left is None else left, -1 if right is None else right)
        out, lse = ext.flash_attn_func(
            q, k, v, causal=causal, window_size=window, s_aux=learnable_sink, return_lse=True
        )
        return out if learnable_sink is None else (out, lse)

    @staticmethod
    def flash_attn_with_kvcache(q, k, v, *, cache_seqlens, block_table, causal):
        return ext.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=cache_seqlens, block_table=block_table, causal=causal
        )


class FlashAttention3:
    @staticmethod
    def varlen(
        q, k, v, *, cu_seqlens_q, max_seqlen_q, max_seqlen_k, softmax_scale, causal, s_aux,
        cu_seqlens_k=None, seqused_k=None, block_table=None, window_size=(-1, -1),
    ):  # fmt: skip
        options = {"softmax_scale": softmax_scale, "causal": causal, "s_aux": s_aux}
        options |= {"window_size": window_size, "return_lse": True}
        if block_table is None:
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return ext.flash_attn_varlen_func(q, k, v, *lengths, **options)
        options |= {"cache_seqlens": seqused_k, "block_table": block_table}
        return ext.flash_attn_with_kvcache(q, k, v, cu_seqlens_q=cu_seqlens_q, **options)


class FlashInfer:
    @staticmethod
    def single_prefill_with_kv_cache(q, k, v, *, causal, window_left):
        window = (window_left, -1)
        return ext.flash_attn_func(q[None], k[None], v[None], causal=causal, window_size=window)[0]

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, workspace, layout, *, use_tensor_cores):
            assert layout == "NHD" and use_tensor_cores

        def plan(self, starts, pages, last, heads_q, heads_kv, dim, page_size, **dtypes):
            self.lengths = (starts.diff() - 1) * page_size + last
            self.table = pages.view(len(last), -1)

        def run(self, q, caches):
            return ext.flash_attn_with_kvcache(
                q[:, None], *caches, cache_seqlens=self.lengths, block_table=self.table
            )[:, 0]


STAND_INS = {
    peers.FA2: FlashAttention2,
    peers.FA3: FlashAttention3,
    peers.FA4: FlashAttention2,
    peers.FLASHINFER: FlashInfer,
}


def measure(section: str, contenders: list[Contender], left_out: dict, shape, direction: str):
    """Records of all; a wrong result or a failed call ends the rehearsal."""
    timings = interleave(contenders, ONCE, CPU)
    records = []
    for name, timing in timings.items():
        # Which of torch's SDPA backends run, the device decides.
        if timing.reason and not name.startswith("SDPA"):
            raise SystemExit(f"rehearsal: {section}, {direction}: {name}: {timing.reason}")
        records.append(record_of(timing, section, name, shape, direction))
    for name, reason in left_out.items():
        record = record_of(timings[contenders[0].name], section, name, shape, direction)
        record.value, record.samples, record.error, record.reason = None, [], None, reason
        records.append(record)
    return records


def rehearse_sweep(layer: Layer, backward: bool):
    problem = Problem(layer, SEQLEN, torch.bfloat16, CPU)
    others, left_out = peers.contenders(problem, backward=backward)
    direction = "forward+backward" if backward else "forward"
    contenders = [ours(problem, backward=backward), *others]
    return measure("window", contenders, left_out, problem, direction)


def rehearse_decode():
    cache = PagedCache(2, 512, torch.bfloat16, CPU)
    q = torch.randn(2, GPT_OSS_FULL.num_heads_q, GPT_OSS_FULL.head_dim).bfloat16()
    s_aux = torch.randn(GPT_OSS_FULL.num_heads_q).bfloat16()
    checks = (make_check(cache, q, s_aux), make_check(cache, q, None))
    others, left_out = decode_peers.contenders(cache, q, s_aux, *checks)
    shape = SimpleNamespace(layer=GPT_OSS_FULL, dtype=torch.bfloat16, seqlen=512)
    records = measure("decode", others, left_out, shape, "decode")
    for record in records:
        record.kv_bytes, record.batch = cache.kv_bytes, 2
    return records


def main() -> None:
    peers.load = decode_peers.load = STAND_INS.__getitem__
    peers.supports = lambda **facts: ext.Support(True, "cuda/sm90", None)  # as on a Hopper card
    for title, records in {
        "window": [
            record
            for layer in (GPT_OSS_FULL, GPT_OSS_WINDOW)
            for backward in (False, True)
            for record in rehearse_sweep(layer, backward)
        ],
        "decode": rehearse_decode(),
    }.items():
        print(section_markdown(title, "Times are a CPU's.", records, tables.tables(CEILINGS)))
    print("rehearsal: every stand-in was called, and its result was right")


if __name__ == "__main__":
    main()
