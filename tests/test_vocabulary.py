"""The words of the tree are the field's: none of those that they have replaced comes back.

RETIRED maps a retired word, as a regular expression, to what stands in its place. Who
knows FlashAttention, CUTLASS and BLIS needs no glossary; the few words of our own are defined once,
in csrc/README.md ("Words"). A word that is ordinary English too ("work", "place", "group") is
retired in its private uses only.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".md", ".txt", ".toml", ".sh", ""}
NOT_READ = ("CHANGELOG", "benchmarks/results/", "tests/test_vocabulary.py")

RETIRED = {
    # The softmax.
    r"\bsoften\w*": "online softmax",
    r"\bweigh\b": "online softmax",
    r"softmax's weights": "P, probabilities",
    r"\bkWeight\w*": "P",
    r"\bto_log2\b": "softmax_scale_log2",
    r"\bcapped\b|\bkCapped\b": "has_softcap",
    r"\b[Ss]ights?\b": "visible keys",
    r"\bhidden (scores?|keys?)\b": "masked",
    # Rows, tiles and their places.
    r"\bpacked_rows?\b|\bPackedRows?\b": "PackGQA",
    r"\bhead_dim class(es)?\b|\bHeadDimClass\b": "head-dim bucket",
    r"\b(of a|each|next|a) work\b(?! (tile|of))|\bworks ahead\b": "work tile",
    r"\bplaces? in the row\b": "logical position",
    # Copies.
    r"\bin_boxes\b|\w+_in_boxes\b": "use_tma",
    r"\bin_chunks\b|\w+_in_chunks\b|\brows_are_chunks\b": "is_vectorised",
    r"\bfillers?\b": "producer",
    r"\bowed\b|\bsettle\(|\bannounce\w*": "pending_mask, commit_stage, signal_stage",
    r"\bcarv(e|es|ed|er|ing)\b|\bCarver\b|\bcarve_\w+": "bump allocator",
    # Registers, barriers and the order of instructions.
    r"\b(give|take)_registers\b": "warpgroup_reg_dealloc, warpgroup_reg_alloc",
    r"\bwgmma_hold\b": "warpgroup_fence_operand",
    r"\bwgmma_fence\b": "warpgroup_arrive",
    r"\b(pass|wait_for)_turn\b|\btakes? turns\b": "scheduler barrier, dq semaphore",
    r"\bopaque\(|\banew\b|\b\w+_anew\b": "optimisation barrier, rematerialise, again",
    r"\b(leave|note)_[a-z]\w*": "store_, write_",
    # Elements.
    r"\bwiden(s|ed|ing)?\b|\bkWidens\b": "upcast, dequantise",
    r"\b(8-bit|16-bit|float8|bfloat16|float16|int8) numbers?\b": "elements, values",
    r"\bnumbers? of (float8|int8|bfloat16|float16)\b": "elements, values",
    # Structs.
    r"\b\w+Problem\b|\bkernel_problem\b": "Params, params",
    r"\bsm90/paged_attn\b|\bcuda/common\b": "sm90/decode, cuda/kernels, cuda/device",
    # Tests and bookkeeping.
    r"\btwins?\b": "emulation, portable version",
    r"\bplant(s|ed)?\b": "fault injection",
    r"\btests? of the grid\b|\bthe grid's tests?\b|\bwhole grid\b|\bpeer grid\b": "test matrix",
    r"\bbooks\b": "bookkeeping",
}


def text_files() -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in SUFFIXES and not name.startswith(NOT_READ) and path.is_file():
            yield path


@functools.cache
def text_of_tree() -> dict[str, str]:
    return {str(p.relative_to(ROOT)): p.read_text(errors="replace") for p in text_files()}


def uses_of(pattern: str) -> list[str]:
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in text_of_tree().items()
        for match in re.finditer(pattern, text)
    ]


@pytest.mark.parametrize("pattern", RETIRED)
def test_word_is_retired(pattern: str) -> None:
    assert uses_of(pattern) == [], f"the field says: {RETIRED[pattern]}"


def test_words_are_looked_for() -> None:
    """In more than a handful of files; a word that is there is found."""
    assert len(text_of_tree()) > 200
    assert uses_of(r"\bsoftmax_scale_log2\b")
