"""Libraries that decode from a paged cache on a GPU, beside SDPA on a contiguous one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from gpu.peers import FA2, FA3, FLASHINFER, HALF, load
from timing import Contender

if TYPE_CHECKING:
    from decode import PagedCache

FA2_PAGE_SIZE = 256  # flash-attn's pages are multiples of it
FLASHINFER_WORKSPACE_BYTES = 128 << 20

Check = Callable[[torch.Tensor], float]


def fa3(cache: PagedCache, q: torch.Tensor, s_aux: torch.Tensor) -> Callable[[], torch.Tensor]:
    module = load(FA3)
    starts = torch.arange(cache.batch + 1, dtype=torch.int32, device=q.device)

    def call() -> torch.Tensor:
        return module.varlen(
            q,
            cache.k_cache,
            cache.v_cache,
            cu_seqlens_q=starts,
            seqused_k=cache.cache_seqlens,
            block_table=cache.block_tables[0],
            max_seqlen_q=1,
            max_seqlen_k=cache.seqlen,
            softmax_scale=q.shape[-1] ** -0.5,
            causal=True,
            s_aux=s_aux.to(torch.bfloat16),
        )[0]

    return call


def flashinfer(cache: PagedCache, q: torch.Tensor, _) -> Callable[[], torch.Tensor]:
    """Its plan, which reads lengths on the host, is made before the timing."""
    module = load(FLASHINFER)
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    page_size, num_heads_kv = cache.k_cache.shape[1:3]
    pages = cache.seqlen // page_size
    starts = torch.arange(0, (cache.batch + 1) * pages, pages, dtype=torch.int32, device=q.device)
    last = torch.full((cache.batch,), page_size, dtype=torch.int32, device=q.device)
    wrapper.plan(
        starts,
        cache.block_tables[0].flatten(),
        last,
        q.shape[1],
        num_heads_kv,
        q.shape[2],
        page_size,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return lambda: wrapper.run(q, (cache.k_cache, cache.v_cache))


def fa2(cache: PagedCache, q: torch.Tensor, _) -> Callable[[], torch.Tensor]:
    """The same keys and values in larger pages, in order."""
    module = load(FA2)
    table = cache.block_tables[0]
    k, v = (
        cache.contiguous(c, table).transpose(1, 2).reshape(-1, FA2_PAGE_SIZE, *c.shape[2:])
        for c in (cache.k_cache, cache.v_cache)
    )
    pages = torch.arange(k.shape[0], dtype=torch.int32, device=q.device).view(cache.batch, -1)

    def call() -> torch.Tensor:
        return module.flash_attn_with_kvcache(
            q[:, None], k, v, cache_seqlens=cache.cache_seqlens, block_table=pages, causal=True
        )

    return call


MAKERS = {FA2: (fa2, False), FA3: (fa3, True), FLASHINFER: (flashinfer, False)}  # with the sink?


def contenders(
    cache: PagedCache, q: torch.Tensor, s_aux: torch.Tensor, with_sink: Check, without_sink: Check
) -> tuple[list[Contender], dict[str, str]]:
    """Those that can be measured, and the others with the reason. q is (batch, heads, head_dim)."""
    found, left_out = [], {}
    for peer, (make, has_sink) in MAKERS.items():
        if isinstance(module := load(peer), str):
            left_out[peer] = module
        elif q.dtype not in HALF:
            left_out[peer] = "bfloat16 and float16 only"
        else:
            try:
                call = make(cache, q, s_aux)
            except Exception as error:  # another version's plan
                text = (str(error).strip().splitlines() or ["no message"])[0]
                left_out[peer] = f"{type(error).__name__}: {text}"
                continue
            found.append(Contender(peer, call, with_sink if has_sink else without_sink))
    return found, left_out
