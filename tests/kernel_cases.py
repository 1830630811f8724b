"""The calls of the table of kernel choices (tests/kernel_choice.txt)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

# Cards: compute capability, and the multiprocessors of one of them.
CARDS = {80: 108, 86: 84, 90: 132, 100: 148, 120: 170}
BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "int8": 8}
HEAD_DIMS = (
    (8, 8), (32, 32), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (160, 160), (192, 128),
    (128, 192), (192, 192), (256, 256), (576 // 3, 64), (60, 60), (64, 20),
)  # fmt: skip


class CallCase(NamedTuple):
    """One call on contiguous tensors; lengths in tokens, `unaligned` names a tensor that begins in
    the middle of 16 bytes."""

    op: str = "flash_fwd"
    dtype: str = "bfloat16"
    kv_dtype: str = ""  # "": dtype
    head_dim: int = 64
    head_dim_v: int = 64
    heads_q: int = 8
    heads_kv: int = 2
    batch: int = 1
    seqlen_q: int = 300
    seqlen_k: int = 4096
    paged: bool = False
    num_splits: int = 0
    tree: bool = False
    window: int = -1
    unaligned: str = ""

    def name(self) -> str:
        """The op and what differs from its usual call."""
        usual = CallCase(op=self.op)
        parts = [self.op]
        for field, value, default in zip(self._fields, self, usual, strict=True):
            if field != "op" and value != default:
                parts.append(field if value is True else f"{field}={value}")
        return " ".join(parts)

    def shape(self, bindings: ModuleType) -> Any:
        shape = bindings.CallShape()
        kv_dtype = self.kv_dtype or self.dtype
        shape.dtype = getattr(bindings.DataType, self.dtype)
        shape.kv_dtype = getattr(bindings.DataType, kv_dtype)
        shape.is_paged, shape.has_tree_mask = self.paged, self.tree
        shape.batch, shape.seqlen_q, shape.seqlen_k = self.batch, self.seqlen_q, self.seqlen_k
        shape.total_q = self.batch * self.seqlen_q
        shape.total_k = 0 if self.paged else self.batch * self.seqlen_k
        shape.num_heads_q, shape.num_heads_kv = self.heads_q, self.heads_kv
        shape.head_dim, shape.head_dim_v = self.head_dim, self.head_dim_v
        if self.paged:
            shape.page_size, shape.num_pages = 16, self.batch * self.seqlen_k // 16
        shape.num_splits, shape.window_left = self.num_splits, self.window
        if self.window >= 0:
            shape.window_right = 0

        def layout(name: str, length: int, heads: int, dim: int) -> Any:
            row = heads * dim
            return bindings.RowLayout(name != self.unaligned, length * row, row, dim)

        keys = 16 if self.paged else self.seqlen_k
        for name in ("q", "out", "dout"):
            dim = self.head_dim if name == "q" else self.head_dim_v
            setattr(shape, name, layout(name, self.seqlen_q, self.heads_q, dim))
        for name in ("k", "v", "dk", "dv"):
            dim = self.head_dim if name.endswith("k") else self.head_dim_v
            setattr(shape, name, layout(name, keys, self.heads_kv, dim))
        return shape


def decode(**changes: Any) -> CallCase:
    return CallCase(paged=True, seqlen_q=1)._replace(**changes)


def cases() -> Iterator[CallCase]:
    dims = [{"head_dim": dim, "head_dim_v": dim_v} for dim, dim_v in HEAD_DIMS]
    for dtype, dim in itertools.product(("bfloat16", "float16", "float32", "float64"), dims):
        yield CallCase(dtype=dtype, **dim)
        yield CallCase(op="flash_bwd", dtype=dtype, **dim)
        yield decode(dtype=dtype, **dim)
    for dtype, kv_dtype, dim in itertools.product(
        ("bfloat16", "float16", "float32"), ("float8_e4m3fn", "int8"), dims
    ):
        yield decode(dtype=dtype, kv_dtype=kv_dtype, **dim)
    for kv_dtype, seqlen_q, num_splits in itertools.product(
        ("", "int8"), (1, 2, 4, 5, 16, 17, 300), (0, 1, 2, 64)
    ):
        yield decode(kv_dtype=kv_dtype, seqlen_q=seqlen_q, num_splits=num_splits)
        yield decode(kv_dtype=kv_dtype, seqlen_q=seqlen_q, num_splits=num_splits, tree=True)
    for heads_q, heads_kv in ((1, 1), (8, 8), (64, 8), (40, 1), (6, 2), (128, 1)):
        heads = {"heads_q": heads_q, "heads_kv": heads_kv}
        yield CallCase(**heads)
        yield CallCase(op="flash_bwd", **heads)
        for batch, seqlen_k in itertools.product((1, 7, 64, 300), (256, 8192, 131072)):
            yield decode(batch=batch, seqlen_k=seqlen_k, **heads)
            yield decode(batch=batch, seqlen_k=seqlen_k, head_dim=256, head_dim_v=256, **heads)
    for window, seqlen_k in itertools.product((0, 127, 4095), (256, 131072)):
        yield decode(window=window, seqlen_k=seqlen_k)
        yield decode(window=window, seqlen_k=seqlen_k, seqlen_q=300, num_splits=8)
    for tensor in ("q", "k", "v", "out"):
        yield CallCase(unaligned=tensor)
        yield decode(unaligned=tensor)
        yield decode(unaligned=tensor, seqlen_q=300)
    for tensor in ("q", "k", "v", "out", "dout", "dk", "dv"):
        yield CallCase(op="flash_bwd", unaligned=tensor)
    yield decode(seqlen_k=2**29)  # a cache of more than 64 GiB
    yield decode(seqlen_k=2**29, seqlen_q=300)
    for seqlen_q, seqlen_k in ((0, 10), (10, 0), (1, 1), (100_000, 100_000)):
        yield CallCase(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        yield CallCase(op="flash_bwd", seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    for dim in (16, 40, 64, 128, 256):
        fp8 = CallCase(op="flash_fwd_fp8", dtype="float8_e4m3fn", head_dim=dim, head_dim_v=dim)
        yield fp8
        yield fp8._replace(unaligned="k")
