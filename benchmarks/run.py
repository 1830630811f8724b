"""Measures sink_attention_ext against its peers; prints tables, saves them with JSON and plots.

python benchmarks/run.py [--quick] [--only forward,decode] [--out DIR] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import backward
import cascade
import decode
import environment
import forward
import gpu.ceilings
import gpu.environment
import gpu.tables
import memory
import overhead
import report
import torch
import window
from cases import Record, Settings

try:
    import plots
except ImportError as error:
    plots = None
    print(f"no plots: {error}")

SECTIONS = {
    "forward": forward,
    "backward": backward,
    "window": window,
    "overhead": overhead,
    "decode": decode,
    "cascade": cascade,
    "memory": memory,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and turns; two minutes")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(SECTIONS),
        metavar="NAMES",
        help=f"comma-separated, of {','.join(SECTIONS)}",
    )
    parser.add_argument("--out", type=Path, help="default: build/benchmarks/<device>")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    unknown = set(arguments.only) - SECTIONS.keys()
    if unknown:
        parser.error(f"--only: no section {', '.join(sorted(unknown))}; there are {list(SECTIONS)}")
    return arguments


def settings_of(arguments: argparse.Namespace) -> Settings:
    on_cuda = arguments.device.type == "cuda"
    if arguments.quick:
        return Settings(arguments.device, True, (2048, 8192) if on_cuda else (512, 2048))
    lengths = (1024, 2048, 4096, 8192, 16384)
    return Settings(arguments.device, False, lengths if on_cuda else Settings.seqlens)


def save(folder: Path, described: dict, parts: list[str], records: list[Record]) -> None:
    """results.md, results.json and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    record_dicts = [record.as_dict() for record in records]
    drawn = plots.draw(record_dicts, folder) if plots else []
    images = [f"![{path.stem}]({path.name})\n" for path in drawn]
    text = "\n".join(["# Benchmark results\n", *parts, *images])
    (folder / "results.md").write_text(text.rstrip() + "\n")
    result = {"environment": described, "records": record_dicts}
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    arguments = parse_arguments()
    settings = settings_of(arguments)
    started = time.perf_counter()
    described = environment.describe(settings.device)
    tables = report.TABLES
    if settings.device.type == "cuda":
        ceilings = gpu.ceilings.measure(settings.device)
        described |= gpu.environment.describe() | gpu.ceilings.describe(ceilings)
        tables = gpu.tables.tables(ceilings)
    print(report.environment_markdown(described))
    root = environment.ROOT
    folder = arguments.out or root / "build" / "benchmarks" / settings.device.type

    records: list[Record] = []
    sections: list[str] = []
    for name in arguments.only:
        module = SECTIONS[name]
        new = module.run(settings)
        if not new:
            continue
        records += new
        sections.append(report.section_markdown(module.TITLE, module.__doc__, new, tables))
        print("\n" + sections[-1], flush=True)
        described["minutes taken"] = f"{(time.perf_counter() - started) / 60:.1f}"
        parts = [report.environment_markdown(described), *sections]
        if settings.device.type == "cpu":  # whose goals they are
            parts.insert(1, report.goals_markdown(records))
        save(folder, described, parts, records)  # what there is, should the run be ended

    if settings.device.type == "cpu":
        print(report.goals_markdown(records))
    print(f"saved in {folder}; {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
