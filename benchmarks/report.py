"""Markdown from records: a table a section, a table of goals, and the environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cases import Record
from goals import verdicts
from peers import EAGER, FLEX, OURS, OURS_NO_SINK, OURS_PLAIN, READ, SDPA
from timing import paired_ratio

Row = dict[str, Record]  # the records of one shape, by peer


@dataclass
class Footnotes:
    """Numbers reasons and remarks in the order in which they first come up."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        return [f"[{number}] {text}  " for number, text in enumerate(self.texts, 1)]


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def cell(
    row: Row, peer: str, notes: Footnotes, show: Callable[[Record], str], remarks: bool = True
) -> str:
    record = row.get(peer)
    if record is None:
        return "-"
    if record.value is None:
        return "-" + notes.mark(record.reason or "not measured")
    detail = record.detail if remarks and record.detail != "enable_gqa" else None
    return show(record) + (notes.mark(detail) if detail else "")


def ratio(row: Row, numerator: str, denominator: str) -> str:
    top, bottom = row.get(numerator), row.get(denominator)
    if not (top and bottom and top.samples and bottom.samples):
        return "-"
    return f"{paired_ratio(top.samples, bottom.samples):.2f}x"


def milliseconds(record: Record) -> str:
    return f"{1e3 * record.value:.3g}" if record.value < 0.1 else f"{1e3 * record.value:.0f}"


def megabytes(record: Record) -> str:
    return f"{record.value / 1e6:.1f}"


def gigabytes_per_second(record: Record) -> str:
    rate = record.kv_bytes / record.value / 1e9
    return f"{rate:.1f}" if rate >= 1 else f"{rate:.2f}"


def rows_of(records: list[Record]) -> list[Row]:
    rows: dict[tuple, Row] = {}
    for record in records:
        rows.setdefault(record.shape, {})[record.peer] = record
    return list(rows.values())


def shape_cells(row: Row) -> list[str]:
    first = next(iter(row.values()))
    return [first.layer, first.dtype, first.direction, str(first.seqlen)]


SHAPE_COLUMNS = ["layer", "dtype", "direction", "tokens"]


def sweep_table(records: list[Record], notes: Footnotes) -> str:
    peers = [OURS, SDPA, EAGER, FLEX]
    columns = [*SHAPE_COLUMNS, *(f"{peer}, ms" for peer in peers)]
    columns += ["faster than SDPA", "than eager", "than Flex", "max error"]
    lines = []
    for row in rows_of(records):
        cells = shape_cells(row) + [cell(row, peer, notes, milliseconds) for peer in peers]
        cells += [ratio(row, peer, OURS) for peer in peers[1:]]
        error = row[OURS].error
        lines.append([*cells, "-" if error is None else f"{error:.0e}"])
    return markdown_table(columns, lines)


def overhead_table(records: list[Record], notes: Footnotes) -> str:
    columns = [*SHAPE_COLUMNS, "with s_aux, ms", "without, ms", "cost of the sink"]
    lines = []
    for row in rows_of(records):
        cells = [cell(row, peer, notes, milliseconds) for peer in (OURS, OURS_NO_SINK)]
        pair = [row[peer].samples for peer in (OURS, OURS_NO_SINK)]
        cost = f"{100 * (paired_ratio(*pair) - 1):+.1f}%" if all(pair) else "-"
        lines.append([*shape_cells(row), *cells, cost])
    return markdown_table(columns, lines)


def decode_table(records: list[Record], notes: Footnotes) -> str:
    columns = ["dtype", "sequences", "tokens each", "K+V, MB", "ours, ms", "ours, GB/s"]
    columns += ["memory read, GB/s", "share", "SDPA (no sink), GB/s", "eager, GB/s"]
    lines = []
    for row in rows_of(records):
        ours, read = row[OURS], row[READ]
        share = "-"
        if ours.samples:
            bytes_ratio = ours.kv_bytes / read.kv_bytes
            share = f"{100 * bytes_ratio * paired_ratio(read.samples, ours.samples):.0f}%"
        lines.append(
            [
                ours.dtype,
                str(ours.batch),
                str(ours.seqlen),
                f"{ours.kv_bytes / 1e6:.0f}",
                cell(row, OURS, notes, milliseconds),
                cell(row, OURS, notes, gigabytes_per_second),
                cell(row, READ, notes, gigabytes_per_second),
                share,
                cell(row, SDPA, notes, gigabytes_per_second),
                cell(row, EAGER, notes, gigabytes_per_second),
            ]
        )
    return markdown_table(columns, lines)


def cascade_table(records: list[Record], notes: Footnotes) -> str:
    columns = ["dtype", "sequences", "own tokens", "plain, ms", "cascade, ms", "faster"]
    columns += ["max error"]
    lines = []
    for row in rows_of(records):
        ours = row[OURS]
        cells = [ours.dtype, str(ours.batch), str(ours.seqlen)]
        cells += [cell(row, peer, notes, milliseconds) for peer in (OURS_PLAIN, OURS)]
        cells += [ratio(row, OURS_PLAIN, OURS)]
        lines.append([*cells, "-" if ours.error is None else f"{ours.error:.0e}"])
    return markdown_table(columns, lines)


def memory_table(records: list[Record], notes: Footnotes) -> str:
    peers = [OURS, SDPA, EAGER]
    columns = [*SHAPE_COLUMNS, *(f"{peer}, MB" for peer in peers), "ours / eager's"]
    lines = []
    for row in rows_of(records):
        cells = [cell(row, peer, notes, megabytes) for peer in peers]
        ours, eager = row[OURS].value, row[EAGER].value
        share = f"{100 * ours / eager:.1f}%" if eager and ours is not None else "-"
        lines.append([*shape_cells(row), *cells, share])
    return markdown_table(columns, lines)


TABLES = {
    "overhead": overhead_table,
    "decode": decode_table,
    "cascade": cascade_table,
    "memory": memory_table,
}


Table = Callable[[list[Record], Footnotes], str]


def section_markdown(
    title: str, question: str, records: list[Record], tables: dict[str, Table] = TABLES
) -> str:
    """A section: its question (the module's docstring), its table and the table's footnotes."""
    notes = Footnotes()
    table = tables.get(records[0].section, sweep_table)(records, notes)
    return "\n".join([f"## {title}", "", question.strip(), "", table, "", *notes.lines(), ""])


def goals_markdown(records: list[Record]) -> str:
    columns = ["goal", "target", "worst", "median", "best", "verdict"]
    rows = [[row.get(column, "-") for column in columns] for row in verdicts(records)]
    return "\n".join(["## Goals", "", markdown_table(columns, rows), ""])


def environment_markdown(environment: dict) -> str:
    rows = [[key, str(value)] for key, value in environment.items()]
    return markdown_table(["measured on", ""], rows) + "\n"
