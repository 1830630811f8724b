"""Tables of a run on a GPU: one row a peer, with TFLOP/s or GB/s and the share of the ceiling."""

from __future__ import annotations

import functools

from cases import GPT_OSS_FULL, GPT_OSS_WINDOW, HEAD_DIM_128, Record
from gpu.work import flops
from peers import OURS, READ
from report import TABLES, Footnotes, Table, markdown_table, milliseconds, ratio, rows_of

LAYERS = {layer.name: layer for layer in (GPT_OSS_FULL, GPT_OSS_WINDOW, HEAD_DIM_128)}


def flops_of(record: Record) -> int:
    layer = LAYERS[record.layer]
    return flops(record.seqlen, layer.num_heads_q, layer.head_dim, layer.window, record.direction)


def remark(record: Record, notes: Footnotes) -> str:
    text = record.reason or record.detail
    return notes.mark(text).strip() if text else ""


def sweep_table(records: list[Record], notes: Footnotes, ceilings: dict[str, float]) -> str:
    columns = ["layer", "dtype", "direction", "tokens", "peer", "ms", "TFLOP/s", "of bf16 GEMM"]
    columns += ["our speed over it", "max error", "note"]
    lines = []
    for row in rows_of(records):
        for peer, record in row.items():
            cells = [record.layer, record.dtype, record.direction, str(record.seqlen), peer]
            if record.value is None:
                lines.append([*cells, "-", "-", "-", "-", "-", remark(record, notes)])
                continue
            rate = flops_of(record) / record.value
            cells += [milliseconds(record), f"{rate / 1e12:.1f}"]
            cells.append(f"{100 * rate / ceilings['gemm']:.0f}%")
            cells.append("" if peer == OURS else ratio(row, peer, OURS))
            cells.append("-" if record.error is None else f"{record.error:.0e}")
            lines.append([*cells, remark(record, notes)])
    return markdown_table(columns, lines)


def decode_table(records: list[Record], notes: Footnotes, ceilings: dict[str, float]) -> str:
    columns = ["dtype", "sequences", "tokens each", "K+V, MB", "peer", "ms", "GB/s", "of a copy"]
    columns += ["our speed over it", "max error", "note"]
    lines = []
    for row in rows_of(records):
        for peer, record in row.items():
            size = f"{(record.kv_bytes or 0) / 1e6:.0f}"
            cells = [record.dtype, str(record.batch), str(record.seqlen), size, peer]
            if record.value is None:
                lines.append([*cells, "-", "-", "-", "-", "-", remark(record, notes)])
                continue
            rate = record.kv_bytes / record.value
            cells += [milliseconds(record), f"{rate / 1e9:.0f}"]
            cells.append(f"{100 * rate / ceilings['copy']:.0f}%")
            cells.append("" if peer in (OURS, READ) else ratio(row, peer, OURS))
            cells.append("-" if record.error is None else f"{record.error:.0e}")
            lines.append([*cells, remark(record, notes)])
    return markdown_table(columns, lines)


def tables(ceilings: dict[str, float]) -> dict[str, Table]:
    """For report.section_markdown."""
    sweep = functools.partial(sweep_table, ceilings=ceilings)
    decode = functools.partial(decode_table, ceilings=ceilings)
    return TABLES | dict.fromkeys(("forward", "backward", "window"), sweep) | {"decode": decode}
