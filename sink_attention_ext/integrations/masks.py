"""What a query row may see, in forms that the kernels compute without a mask tensor.

transformers calls our mask function once per forward and kind of layer, and hands what it returns
to every such layer. It returns one of these objects instead of a (batch, 1, q_length, kv_length)
tensor:

    UnpaddedMask   the same keys [0, key_end) for every sequence of the batch
    PaddedMask     keys [key_start[b], key_stop[b]) for sequence b: padding on the left or the right
    GatheredMask   any set of keys per sequence (holes in the padding mask), without a window
    PackedMask     several sequences in one row of the batch, by cu_seqlens

Each has ``attend(q, k, v, ...)``, which picks the kernel. In all of them rows stand bottom-right:
the last row of a sequence stands at its last key. ``q`` is (batch, num_heads_q, q_length,
head_dim), ``k`` and ``v`` are (batch, num_heads_kv, kv_length, head_dim), as transformers lays
them out; the result is (batch, q_length, num_heads_q, head_dim_v).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sink_attention_ext.cache.functions import flash_attn_with_kvcache
from sink_attention_ext.integrations.mask_object import AttentionMask
from sink_attention_ext.interface import flash_attn_func, flash_attn_varlen_func

# Up to so many new rows, and without gradients, the cache is read where it lies (split over its
# keys and never copied); with more rows the kernels for long queries are faster.
DECODE_ROWS = 16


def is_tracing() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is looking: values cannot be read."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def reads_cache(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> bool:
    return q.shape[2] <= DECODE_ROWS and not needs_gradient(q, k, v, options["s_aux"])


class UnpaddedMask(AttentionMask):
    """Every sequence sees keys [0, key_end), the last row standing at key_end - 1.

    key_end is an int, or a 0-d int32 tensor where the length is known on the device only (a static
    cache: what lies behind key_end is not yet written).
    """

    def __init__(self, *shape: Any, key_end: int | Tensor, is_packed: Tensor | None = None) -> None:
        super().__init__(*shape)
        self.key_end = key_end
        self.is_packed = is_packed  # under torch.compile: 0-d bool, the mask function packs

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, deterministic: bool, options: dict[str, Any]
    ) -> Tensor:
        batch = q.shape[0]
        is_tensor = isinstance(self.key_end, Tensor)
        gradient = needs_gradient(q, k, v, options["s_aux"])
        if not gradient and (is_tensor or q.shape[2] <= DECODE_ROWS):
            length = self.key_end.expand(batch).contiguous() if is_tensor else self.key_end
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return flash_attn_with_kvcache(
                q, k, v, cache_seqlens=length, **self._visible(), **options
            )
        if is_tensor:
            return self._attend_varlen(q, k, v, deterministic, options)
        q = q.transpose(1, 2)
        k, v = (t[:, :, : self.key_end].transpose(1, 2) for t in (k, v))
        return flash_attn_func(q, k, v, **self._visible(), deterministic=deterministic, **options)

    def _attend_varlen(
        self, q: Tensor, k: Tensor, v: Tensor, deterministic: bool, options: dict[str, Any]
    ) -> Tensor:
        """With gradient, and a length that only the device knows."""
        batch, _, q_length, _ = q.shape
        kv_length = k.shape[2]
        row = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        out = flash_attn_varlen_func(
            *(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)),
            row * q_length,
            row * kv_length,
            q_length,
            kv_length,
            seqused_k=self.key_end.expand(batch).contiguous(),
            **self._visible(),
            deterministic=deterministic,
            **options,
        )
        return out.unflatten(0, (batch, q_length))


class PaddedMask(AttentionMask):
    """Sequence b sees keys [key_start[b], key_stop[b]); rows that are padding themselves give 0.

    Rows are at key positions row_begin, row_begin + 1, ...; key_start, key_stop (batch,) int32;
    row_begin an int or a 0-d int32 tensor. key_mask (batch, kv_length) bool are the keys that are
    no padding; None of a mask that the user has written out, in which position_ids change nothing.
    """

    def __init__(
        self,
        *shape: Any,
        key_start: Tensor,
        key_stop: Tensor,
        row_begin: int | Tensor,
        key_mask: Tensor | None,
    ) -> None:
        super().__init__(*shape)
        self.key_start = key_start
        self.row_begin = row_begin
        self.key_mask = key_mask
        batch, dtype = key_start.shape[0], torch.int32
        row_end = row_begin + self.q_length
        if self.causal or self.window_size != (-1, -1):
            row_stop = (key_stop - row_begin).clamp(0, self.q_length)
            row_start = torch.minimum((key_start - row_begin).clamp(min=0), row_stop)
        else:
            row_stop = torch.full_like(key_stop, self.q_length)
            row_start = torch.zeros_like(key_stop)
        # Of the keys behind a row none is visible, so reading the cache needs no look at padding on
        # the right: it only has to align the last row, padding or not, with its key.
        last = torch.zeros_like(key_stop) + row_end if self.causal else key_stop
        self.cache_length = (last - key_start).clamp(min=0).to(dtype)

        # For the varlen kernel each row of the batch is three sequences: padding, real tokens,
        # padding. Padding has no key. Nothing is gathered, and no size depends on data.
        first = torch.arange(batch, dtype=dtype, device=key_start.device)
        self.cu_seqlens_q = _bounds(row_start, row_stop, first, self.q_length)
        self.cu_seqlens_k = _bounds(key_start, key_stop, first, self.kv_length)
        nothing = torch.zeros_like(key_start)
        seqlens = (key_stop - key_start).clamp(min=0)
        self.seqused_k = torch.stack([nothing, seqlens, nothing], -1).flatten()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, deterministic: bool, options: dict[str, Any]
    ) -> Tensor:
        has_window = self.window_size != (-1, -1)
        if reads_cache(q, k, v, options) and (self.causal or not has_window):
            return self._attend_cache(q, k, v, options)
        batch, _, q_length, _ = q.shape
        out = flash_attn_varlen_func(
            *(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)),
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            q_length,
            k.shape[2],
            seqused_k=self.seqused_k,
            **self._visible(),
            deterministic=deterministic,
            **options,
        )
        return out.unflatten(0, (batch, q_length))

    def _attend_cache(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """Reads k and v as pages of one token each, so that a sequence can begin anywhere."""
        (k_pages, k_stride), (v_pages, v_stride) = _token_pages(k), _token_pages(v)
        if k_stride != v_stride:
            (k_pages, k_stride), (v_pages, _) = (_token_pages(t.contiguous()) for t in (k, v))
        batch, _, kv_length, _ = k.shape
        tensor = {"dtype": torch.int32, "device": k.device}
        first_page = torch.arange(batch, **tensor) * k_stride + self.key_start
        block_table = first_page[:, None] + torch.arange(kv_length, **tensor)
        return flash_attn_with_kvcache(
            q.transpose(1, 2),
            k_pages,
            v_pages,
            cache_seqlens=self.cache_length,
            block_table=block_table,
            **self._visible(),
            **options,
        )


class GatheredMask(AttentionMask):
    """Sequence b sees the keys where key_mask[b]; rows outside row_mask give 0.

    Keys and rows are gathered without the gaps. That keeps their order, so causal stays causal. A
    window would become wider, so one that does not hold all of the first key_end keys is refused
    (when it is attended to: padding between packed sequences makes no gap in any of them).
    """

    def __init__(
        self, *shape: Any, row_begin: int, key_end: int, key_mask: Tensor, row_mask: Tensor
    ) -> None:
        super().__init__(*shape)
        self.row_begin = row_begin
        self.key_end = key_end
        self.key_mask = key_mask
        self.key_index = torch.stack(key_mask.nonzero(as_tuple=True))
        self.row_index = torch.stack(row_mask.nonzero(as_tuple=True))
        self.cu_seqlens_k = _cumulative(key_mask.sum(-1))
        self.cu_seqlens_q = _cumulative(row_mask.sum(-1))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, deterministic: bool, options: dict[str, Any]
    ) -> Tensor:
        window = self.window_size[0]
        has_window = 0 <= window < self.key_end - 1 if self.causal else self.window_size != (-1, -1)
        if has_window:
            raise ValueError(
                "sink_attention cannot compute an attention_mask with zeros between ones together "
                f"with a sliding window of {window + 1} tokens over {self.key_end} keys: pad on "
                "one side (tokenizer.padding_side), or use attn_implementation='eager'"
            )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        rows, keys = tuple(self.row_index), tuple(self.key_index)
        out = flash_attn_varlen_func(
            q[rows],
            k[keys],
            v[keys],
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.q_length,
            self.kv_length,
            causal=self.causal,
            deterministic=deterministic,
            **options,
        )
        return out.new_zeros(*q.shape[:3], out.shape[-1]).index_put(rows, out)


class PackedMask(AttentionMask):
    """Several sequences one after the other in the rows of the batch, which are read as one row.

    seqused_k (sequences,) int32: of a sequence only so many keys count, 0 where it is padding.
    """

    def __init__(
        self,
        *shape: Any,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int | Tensor,
        max_seqlen_k: int | Tensor,
        seqused_k: Tensor | None = None,
    ) -> None:
        super().__init__(*shape)
        self.cu_seqlens_q = cu_seqlens_q.to(torch.int32)
        self.cu_seqlens_k = cu_seqlens_k.to(torch.int32)
        self.max_seqlen_q = max_seqlen_q
        self.max_seqlen_k = max_seqlen_k
        self.seqused_k = seqused_k

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, deterministic: bool, options: dict[str, Any]
    ) -> Tensor:
        batch, _, q_length, _ = q.shape
        out = flash_attn_varlen_func(
            *(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)),
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.max_seqlen_q,
            self.max_seqlen_k,
            seqused_k=self.seqused_k,
            **self._visible(),
            deterministic=deterministic,
            **options,
        )
        return out.unflatten(0, (batch, q_length))


def _bounds(start: Tensor, stop: Tensor, row: Tensor, length: int) -> Tensor:
    """cu_seqlens of 3 * batch sequences: of each row what is before start, before stop, and behind.

    start, stop, row: (batch,); row counts the batch's rows.
    """
    bounds = torch.stack([start, stop, torch.full_like(stop, length)], -1) + row[:, None] * length
    return F.pad(bounds.flatten(), (1, 0)).to(torch.int32)


def _cumulative(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _token_pages(cache: Tensor) -> tuple[Tensor, int]:
    """A view (num_pages, 1, num_heads, head_dim) of cache (batch, num_heads, seqlen, head_dim).

    Page ``b * stride + j`` holds token j of sequence b. Pages in between interleave with other
    heads' tokens; no table leads there.
    """
    batch, num_heads, seqlen, head_dim = cache.shape
    row, token = cache.stride(0), cache.stride(2)
    if token == 0 or row % token != 0 or cache.stride(3) != 1:
        cache = cache.contiguous()
        row, token = cache.stride(0), cache.stride(2)
    stride = row // token if batch > 1 else 0
    pages = cache.as_strided(
        ((batch - 1) * stride + seqlen, 1, num_heads, head_dim),
        (token, token, cache.stride(1), 1),
    )
    return pages, stride
