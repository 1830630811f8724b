"""What each CUDA kernel takes of a multiprocessor, from what ptxas said when it was compiled.

    python tools/cuda_resources.py            the committed table is right, and no hot kernel spills
    python tools/cuda_resources.py --write    writes the table

`setup.py check_cuda` compiles the kernels and leaves ptxas' messages in build/check-cuda/ptxas.log;
`make check-cuda` and `make resources` do both.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "build" / "check-cuda" / "ptxas.log"
TABLE = ROOT / "benchmarks" / "results" / "resources.md"

# Kernels in whose inner loops the time goes: what they spill, they spill at every step.
HOT = re.compile(r"sm80::Flash(Fwd|Bwd)Kernel<")


class Limit(NamedTuple):
    """Bytes that a hot kernel may spill, stored or loaded, where it is not 0, and why."""

    bytes: dict[str, int]  # by architecture
    reason: str


# By the kernel's name without its element type. A limit above what is spilled fails too, so that
# this list stays true.
SPILL_LIMITS = {
    "sm80::FlashBwdKernel<FlashBwdTilesOf<32, 32>>": Limit(
        {"sm_80": 4}, "a word, on sm_80 only: ptxas has no register left at 255"
    ),
}


class Kernel(NamedTuple):
    """One instantiation for one architecture; memory in bytes."""

    name: str
    arch: str
    threads: int
    registers: int
    static_shared: int
    dynamic_shared: int
    spill_stores: int
    spill_loads: int
    stack: int

    @property
    def spills(self) -> int:
        return max(self.spill_stores, self.spill_loads)


def readable(demangled: str) -> tuple[str, int, int]:
    """Name, threads and dynamic shared memory out of kernel_entry<Kernel, threads, bytes>(...)."""
    match = re.search(r"kernel_entry<(.*), (\d+), (\d+)>\(", demangled)
    if match is None:
        raise ValueError(f"not an instantiation of kernel_entry: {demangled}")
    name = re.sub(r"sink_attention::(attention::|cuda::)?", "", match[1]).replace("> >", ">>")
    name = re.sub(r"(?<=[<\s])\w+::", "", name)  # of arguments; the kernel itself keeps its family
    return name, int(match[2]), int(match[3])


def demangle(symbols: list[str]) -> list[str]:
    command = ["c++filt", "--no-strip-underscore"]
    done = subprocess.run(
        command, input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def parse(log: str) -> tuple[str, list[Kernel]]:
    """nvcc's version, and what ptxas -v said of each kernel."""
    version = re.search(r"release [\d.]+, V([\d.]+)", log)
    symbols, facts = [], []
    for part in re.split(r"Compiling entry function ", log)[1:]:
        symbol, arch = re.match(r"'(\S+)' for '(sm_\w+)'", part).groups()
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        registers = re.search(r"Used (\d+) registers", part)
        if not frames or registers is None:
            raise ValueError(f"ptxas said too little of {symbol} for {arch}")
        static = re.search(r"(\d+) bytes smem", part)
        # More than one frame: functions that were not inlined, of which the largest counts.
        stack, stores, loads = (max(map(int, column)) for column in zip(*frames, strict=True))
        symbols.append(symbol)
        facts.append(
            (arch, int(registers[1]), int(static[1]) if static else 0, stores, loads, stack)
        )
    kernels = []
    for demangled, fact in zip(demangle(symbols), facts, strict=True):
        name, threads, dynamic = readable(demangled)
        arch, registers, static, *rest = fact
        kernels.append(Kernel(name, arch, threads, registers, static, dynamic, *rest))

    def order(kernel: Kernel) -> list:  # numbers by their value
        text = f"{kernel.name} {kernel.arch}"
        return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", text)]

    return version[1] if version else "unknown", sorted(kernels, key=order)


def row(kernel: Kernel) -> str:
    return f"| `{kernel.name}` | {' | '.join(map(str, kernel[1:]))} |"


def markdown(version: str, kernels: list[Kernel]) -> str:
    columns = [field.replace("_", " ") for field in Kernel._fields]
    lines = [
        "# Resources of the CUDA kernels",
        "",
        "Written by `make resources`, checked by `make check-cuda`. Memory in bytes; a block has",
        "the sum of both columns of shared memory. `sm80::` are the kernels on tensor cores",
        "(bfloat16 and float16), `simt::` those of float32 and float64.",
        "",
        f"nvcc {version}",
        "",
        f"| {' | '.join(['kernel', *columns[1:]])} |",
        f"|{'---|' * len(columns)}",
    ]
    return "\n".join([*lines, *map(row, kernels)]) + "\n"


def limited(kernel: Kernel) -> str:
    """Its name in SPILL_LIMITS."""
    return re.sub(r"<B?Float16, ", "<", kernel.name)


def broken_limits(kernels: list[Kernel], limits: dict[str, Limit]) -> list[str]:
    hot = [kernel for kernel in kernels if HOT.match(kernel.name)]
    if not hot:
        return [f"no kernel is hot: the pattern {HOT.pattern} is out of date"]
    found, spilled = [], {}
    for kernel in hot:
        place = (limited(kernel), kernel.arch)
        spilled[place] = max(kernel.spills, spilled.get(place, 0))
        limit = limits[place[0]].bytes.get(kernel.arch, 0) if place[0] in limits else 0
        if kernel.spills > limit:
            found.append(
                f"{kernel.name} spills {kernel.spills} bytes on {kernel.arch}; its limit is {limit}"
            )
    archs = {kernel.arch for kernel in hot}
    for name, limit in limits.items():
        for arch in limit.bytes.keys() & archs:
            most = spilled.get((name, arch), 0)
            if most < limit.bytes[arch]:
                found.append(f"{name} spills {most} bytes on {arch}: its limit is too high")
    return found


def differences(committed: str, kernels: list[Kernel]) -> list[str]:
    """Rows that the committed table lacks or has too many, of the architectures compiled."""
    archs = {kernel.arch for kernel in kernels}
    there = [line for line in committed.splitlines() if line.startswith("| `")]
    there = [line for line in there if line.split("|")[2].strip() in archs]
    wanted = [row(kernel) for kernel in kernels]
    missing = [f"+ {line}" for line in wanted if line not in set(there)]
    return missing + [f"- {line}" for line in there if line not in set(wanted)]


def check(committed: str, version: str, kernels: list[Kernel]) -> list[str]:
    """Why the kernels, or their table, are not right."""
    failures = broken_limits(kernels, SPILL_LIMITS)
    if f"nvcc {version}\n" not in committed and committed:
        print(f"check-cuda: limits and table are not of nvcc {version}, so nothing fails by them")
        print(*failures, sep="\n")
        return []
    if changed := differences(committed, kernels):
        print(*changed, sep="\n")
        failures.append(f"{TABLE.relative_to(ROOT)} is out of date: run `make resources`")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table")
    arguments = parser.parse_args()
    version, kernels = parse(LOG.read_text())
    if arguments.write:
        TABLE.write_text(markdown(version, kernels))
        print(f"{TABLE.relative_to(ROOT)}: {len(kernels)} rows")
    failures = check(TABLE.read_text() if TABLE.exists() else "", version, kernels)
    if failures:
        raise SystemExit("\n".join(f"check-cuda: {failure}" for failure in failures))
    archs = ", ".join(dict.fromkeys(kernel.arch for kernel in kernels))
    print(f"check-cuda: {len(kernels)} kernels compiled ({archs}), nvcc {version}: nothing spills")
    print(f"beyond {len(SPILL_LIMITS)} stated exceptions, and {TABLE.relative_to(ROOT)} is right")


if __name__ == "__main__":
    main()
