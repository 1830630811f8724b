"""Reads the machine code of a CUDA kernel: instructions of its loops, warpgroups' registers, and
shuffles that lanes of a warp may reach apart.

Read with cuobjdump and nvdisasm, which are on PATH, in the CUDA toolkit, or in the packages of the
optional dependencies "sass".
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# By their first word: products of a warpgroup and of a warp, copies of boxes (TMA), of bytes in a
# row, reductions of bytes in a row, cp.async.
COUNTED = ("HGMMA", "QGMMA", "HMMA", "UTMALDG", "UBLKCP", "UBLKRED", "LDGSTS")
# How nvcc 13.0 compiles an exchange of all 32 lanes that, as far as it knows, some branch around.
# For compute capability 8.0 it looks whether the lanes are together, and else waits for them out of
# line. For 9.0 it does so in loops alone, and elsewhere waits at once: so it may where lanes are
# together again, too, but in none of Hopper's kernels.
PARTED = ("BRA.DIV ", "BRA.CONV ", "WARPSYNC.COLLECTIVE ")
WAITS_AT_ONCE = re.compile(  # before a shuffle or a vote, which is at most the second thing to come
    r"WARPSYNC\.ALL ;.*\n(?:\s*/\* 0x.*\n)*(?:.*\n(?:\s*/\* 0x.*\n)*)?.*\b(?:SHFL|VOTE)\."
)
# A wait that leaves products of the warpgroup under way, and what comes before the next wait.
BESIDE = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x[1-9](.*?)(?=WARPGROUP\.DEPBAR|\Z)", re.DOTALL)
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")


class Code(NamedTuple):
    """Of one kernel."""

    in_loops: Counter[str]  # instructions of COUNTED
    given: list[int]  # registers a thread that warpgroups keep
    taken: list[int]  # and that others have from then on


class Instruction(NamedTuple):
    address: int
    predicated: bool
    opcode: str
    operands: str


def find_tool(name: str) -> str | None:
    """The path of cuobjdump or nvdisasm, or None."""
    folders = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    spec = importlib.util.find_spec("nvidia")  # a namespace: all NVIDIA's packages are in it
    for folder in spec.submodule_search_locations or [] if spec else []:
        folders += sorted(Path(folder).glob("cu*/bin"))
    for folder in folders:
        if os.access(folder / name, os.X_OK):
            return str(folder / name)
    return shutil.which(name)


def disassemble(objects: list[Path]) -> Iterator[str] | None:
    """Each object's machine code as text, or None where there is no disassembler."""
    if not objects:
        return iter(())
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        return None
    path = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path}

    def text_of(item: Path) -> str:
        command = [cuobjdump, "-sass", str(item)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def texts() -> Iterator[str]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from pool.map(text_of, objects)

    return texts()


def parts_of(sass: str) -> Iterator[tuple[str, str]]:
    """Each kernel's symbol, and the text of its machine code."""
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        symbol, _, text = part.partition("\n")
        yield symbol.strip(), text


def parted(sass: str) -> list[str]:
    """The symbols of kernels in which lanes may part before a shuffle."""
    return [
        symbol
        for symbol, text in parts_of(sass)
        if any(word in text for word in PARTED) or WAITS_AT_ONCE.search(text)
    ]


def exchanging_beside_products(sass: str) -> set[str]:
    """The symbols of kernels whose warpgroups exchange values, as for a softmax's maxima, while a
    product that they started is under way. ptxas may move the wait for it in front of that."""
    return {
        symbol
        for symbol, text in parts_of(sass)
        if any(" SHFL." in between for between in BESIDE.findall(text))
    }


def functions(sass: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Each kernel's symbol and its instructions."""
    for symbol, text in parts_of(sass):
        found = (INSTRUCTION.match(line) for line in text.splitlines())
        code = [Instruction(int(m[1], 16), m[2] is not None, m[3], m[4]) for m in found if m]
        yield symbol, code


def successors(code: list[Instruction]) -> list[list[int]]:
    """For each instruction, by their indices, those that may come next."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    after: list[list[int]] = []
    for i, instruction in enumerate(code):
        following = [i + 1] if i + 1 < len(code) else []
        word = instruction.opcode.split(".")[0]
        target = re.search(r"\b0x([0-9a-f]+)$", instruction.operands)
        jump = index.get(int(target[1], 16)) if target else None
        if word == "BRA" and jump is not None:
            # .ANY: again for each value that lanes of the warp have. No loop of the source.
            again = ".ANY" in instruction.opcode
            conditional = instruction.predicated or again or "," in instruction.operands
            after.append((following if conditional else []) + ([] if again else [jump]))
        elif word in ("BSSY", "CALL") and jump is not None:
            after.append([*following, jump])
        elif word in ("EXIT", "RET") and not instruction.predicated:
            after.append([])
        else:
            after.append(following)
    return after


def in_loops(after: list[list[int]]) -> list[bool]:
    """Whether each instruction can come again: the strongly connected parts, by Tarjan, with a
    stack of its own, since kernels are longer than Python's."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    open_parts: list[int] = []
    is_open = [False] * len(after)
    looping = [False] * len(after)
    for root in range(len(after)):
        if root in order:
            continue
        work = [(root, 0)]
        while work:
            node, position = work.pop()
            if position == 0:
                order[node] = low[node] = len(order)
                open_parts.append(node)
                is_open[node] = True
            if position < len(after[node]):
                work.append((node, position + 1))
                if after[node][position] not in order:
                    work.append((after[node][position], 0))
                continue
            for target in after[node]:
                if is_open[target]:
                    low[node] = min(low[node], low[target])
            if low[node] == order[node]:
                alone = open_parts[-1] == node and node not in after[node]
                member = -1
                while member != node:
                    member = open_parts.pop()
                    is_open[member] = False
                    looping[member] = not alone
    return looping


def read(sass: str) -> dict[str, Code]:
    """What each kernel's machine code holds, by its symbol."""
    kernels = {}
    for symbol, code in functions(sass):
        counts: Counter[str] = Counter()
        budget: dict[str, list[int]] = {"DEALLOC": [], "TRY_ALLOC": []}
        for instruction, looping in zip(code, in_loops(successors(code)), strict=True):
            word, *modifiers = instruction.opcode.split(".")
            if looping and word in COUNTED:
                counts[word] += 1
            if word == "USETMAXREG":
                value = int(re.search(r"0x([0-9a-f]+)$", instruction.operands)[1], 16)
                budget[modifiers[0]].append(value)
        given, taken = (sorted(set(values)) for values in budget.values())
        kernels[symbol] = Code(counts, given, taken)
    return kernels
