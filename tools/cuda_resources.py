"""The table of each CUDA kernel's registers, shared memory and spills, and of its machine code.

    python tools/cuda_resources.py            the committed table is right, ptxas warns of nothing,
                                              no hot kernel spills, Hopper's use its units, lanes of
                                              a warp come to its shuffles together
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

import cuda_sass

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "build" / "check-cuda" / "ptxas.log"
TABLE = ROOT / "benchmarks" / "results" / "resources.md"

# Kernels in whose inner loops the time goes: what they spill, they spill at every step.
HOT = re.compile(r"sm80::Flash(Fwd|Bwd)Kernel<|sm90::")
# ptxas numbers its advice: C7510, products of a warpgroup that wait for each other; C7508, register
# budgets that it ignores. None of it may stay.
ADVICE = re.compile(
    r"^.*(?:ptxas (?:info|warning)\s*:\s*\(C\d+\)|Potential Performance Loss).*$", re.MULTILINE
)
DISASSEMBLED = "sm_90a"
# Where it is looked whether lanes part before a shuffle: Hopper's kernels are compiled for this one
# only, and the code of all others says it most plainly for that one (cuda_sass.PARTED).
SHUFFLES = ("sm_90a", "sm_80")
# What the loops of Hopper's kernels must have, one of each group.
IN_LOOPS = {
    re.compile(r"sm90::Flash(Fwd|Bwd)"): (("HGMMA", "QGMMA"), ("UTMALDG",)),
    re.compile(r"sm90::(?!Flash)"): (("HMMA", "HGMMA"), ("UTMALDG", "UBLKCP", "LDGSTS")),
}
SOFTMAX_BESIDE = re.compile(r"sm90::FlashFwd")
REGISTERS = 65536  # of a multiprocessor
WARPGROUP = 128


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
    in_loops: str = ""  # "HGMMA 16, UTMALDG 4"; "?" where there was no disassembler
    setmaxnreg: str = ""  # "24, 240": what warpgroups give and take; "?" likewise

    @property
    def spills(self) -> int:
        return max(self.spill_stores, self.spill_loads)


FROM_CODE = ("in_loops", "setmaxnreg")  # the last columns


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


def objects(log: str) -> list[Path]:
    """Those that are disassembled."""
    found = re.findall(rf"^object (\S+\.(?:{'|'.join(SHUFFLES)})\.o)$", log, re.MULTILINE)
    return [LOG.parent / name for name in found]


def from_code(code: cuda_sass.Code | None) -> tuple[str, str]:
    """The last two columns."""
    if code is None:
        return "?", "?"
    counts = [f"{word} {code.in_loops[word]}" for word in cuda_sass.COUNTED if code.in_loops[word]]
    return ", ".join(counts), ", ".join(map(str, code.given + code.taken))


def parse(log: str, codes: dict[str, cuda_sass.Code]) -> tuple[str, list[Kernel]]:
    """nvcc's version, and what ptxas -v said of each kernel; codes: by symbol, those that are
    disassembled."""
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
    for symbol, demangled, fact in zip(symbols, demangle(symbols), facts, strict=True):
        name, threads, dynamic = readable(demangled)
        arch, registers, static, *rest = fact
        columns = from_code(codes.get(symbol)) if arch == DISASSEMBLED else ("", "")
        kernels.append(Kernel(name, arch, threads, registers, static, dynamic, *rest, *columns))

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
        "the sum of both columns of shared memory; registers are a thread's, at the launch.",
        "`sm80::` are the kernels on tensor cores (bfloat16 and float16), `sm90::` those for",
        "Hopper's, `simt::` those of float32 and float64.",
        "",
        "Of Hopper's, from the machine code: how many of these instructions are in loops",
        "(`HGMMA`: a warpgroup's product, `QGMMA`: of 8-bit elements, `HMMA`: a warp's, `UTMALDG`:",
        "a copy of a box, `UBLKCP` and `UBLKRED`: a copy and a sum of bytes in a row, `LDGSTS`:",
        "cp.async), and the registers a thread that the loading warpgroup keeps, others take.",
        "",
        f"nvcc {version}",
        "",
        f"| {' | '.join(['kernel', *columns[1:]])} |",
        f"|{'---|' * len(columns)}",
    ]
    return "\n".join([*lines, *map(row, kernels)]) + "\n"


def spilling(kernels: list[Kernel]) -> list[str]:
    """What hot kernels spill."""
    hot = [kernel for kernel in kernels if HOT.match(kernel.name)]
    if not hot:
        return [f"no kernel is hot: the pattern {HOT.pattern} is out of date"]
    return [
        f"{kernel.name} spills {kernel.spills} bytes on {kernel.arch}"
        for kernel in hot
        if kernel.spills > 0
    ]


def warnings(log: str) -> list[str]:
    """What ptxas advises, once each."""
    return [line.strip() for line in dict.fromkeys(ADVICE.findall(log))]


def unused_units(kernels: list[Kernel]) -> list[str]:
    """Hopper's kernels whose loops lack its products or copies."""
    found = []
    for kernel in kernels:
        words = set(re.findall(r"[A-Z]+", kernel.in_loops))
        for pattern, groups in IN_LOOPS.items():
            if kernel.in_loops == "?" or not pattern.match(kernel.name):
                continue
            lacking = [" or ".join(group) for group in groups if not words & set(group)]
            if lacking:
                found.append(f"{kernel.name} has no {' and no '.join(lacking)} in its loops")
    return found


def parted(symbols: list[str]) -> list[str]:
    """What kernels, by their symbols, are said to do: some lanes may branch around a shuffle that
    all are to reach, and the others would wait for ever."""
    return [f"{readable(name)[0]}: lanes part before a shuffle" for name in demangle(symbols)]


def alone(symbols: list[str]) -> list[str]:
    """What forwards of Hopper's, by their symbols, are said to do: their softmax is to run beside
    the product with the values of the block before."""
    names = [readable(name)[0] for name in demangle(symbols)]
    return [
        f"{name}: its softmax waits for all products"
        for name in names
        if SOFTMAX_BESIDE.match(name)
    ]


def over_budget(kernels: list[Kernel]) -> list[str]:
    """Kernels whose block cannot start, or whose warpgroups take more registers than others gave:
    they would wait for ever."""
    found = []
    for kernel in kernels:
        launched = kernel.threads * kernel.registers
        if launched > REGISTERS:
            found.append(f"{kernel.name} needs {launched} registers a block on {kernel.arch}")
        budget = [int(number) for number in re.findall(r"\d+", kernel.setmaxnreg)]
        # One warpgroup gives, all others take.
        wanted = WARPGROUP * min(budget, default=0)
        wanted += (kernel.threads - WARPGROUP) * max(budget, default=0)
        if wanted > launched:
            found.append(
                f"{kernel.name}: setmaxnreg to {kernel.setmaxnreg} is {wanted} registers a block, "
                f"which starts with {launched}"
            )
    return found


def comparable(line: str, exact: bool) -> str:
    """A row, without the columns of the machine code unless it was read."""
    return line if exact else " | ".join(line.split(" | ")[: -len(FROM_CODE)])


def differences(committed: str, kernels: list[Kernel]) -> list[str]:
    """Rows that the committed table lacks or has too many, of the architectures compiled."""
    archs = {kernel.arch for kernel in kernels}
    exact = all(kernel.in_loops != "?" for kernel in kernels)
    there = [line for line in committed.splitlines() if line.startswith("| `")]
    there = [line for line in there if line.split("|")[2].strip() in archs]
    there = [comparable(line, exact) for line in there]
    wanted = [comparable(row(kernel), exact) for kernel in kernels]
    missing = [f"+ {line}" for line in wanted if line not in set(there)]
    return missing + [f"- {line}" for line in there if line not in set(wanted)]


def check(committed: str, version: str, kernels: list[Kernel], advice: list[str]) -> list[str]:
    """Why the kernels, or their table, are not right; advice: what ptxas warned of."""
    failures = advice + spilling(kernels) + unused_units(kernels) + over_budget(kernels)
    if f"nvcc {version}\n" not in committed and committed:
        print(f"check-cuda: the table is not of nvcc {version}, so nothing fails by it")
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
    log = LOG.read_text()
    paths = objects(log)
    texts = cuda_sass.disassemble(paths)
    if texts is None:
        print("check-cuda: the machine code is not looked at: no cuobjdump and nvdisasm on PATH,")
        print('in CUDA_HOME or in the packages of the optional dependencies "sass"')
        if arguments.write:
            raise SystemExit("resources: the table cannot be written without them")
    codes: dict[str, cuda_sass.Code] = {}
    symbols: list[str] = []  # of kernels in which lanes part
    beside: set[str] = set()  # of those with a softmax beside products
    for path, text in zip(paths, texts or [], strict=texts is not None):
        if path.name.endswith(f".{DISASSEMBLED}.o"):
            codes |= cuda_sass.read(text)
            beside |= cuda_sass.exchanging_beside_products(text)
        symbols += cuda_sass.parted(text)
    version, kernels = parse(log, codes)
    if arguments.write:
        TABLE.write_text(markdown(version, kernels))
        print(f"{TABLE.relative_to(ROOT)}: {len(kernels)} rows")
    committed = TABLE.read_text() if TABLE.exists() else ""
    failures = check(committed, version, kernels, warnings(log)) + parted(symbols)
    failures += alone(sorted(codes.keys() - beside))
    if failures:
        raise SystemExit("\n".join(f"check-cuda: {failure}" for failure in failures))
    archs = ", ".join(dict.fromkeys(kernel.arch for kernel in kernels))
    print(f"check-cuda: {len(kernels)} kernels compiled ({archs}), nvcc {version}: no hot kernel")
    print(f"spills, ptxas advises nothing, and {TABLE.relative_to(ROOT)} is right")


if __name__ == "__main__":
    main()
