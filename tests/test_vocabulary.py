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
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="reads what git has")
NOT_READ = ("CHANGELOG", "benchmarks/results/", "tests/test_vocabulary.py")

RETIRED = {
    # The softmax.
    r"\bsoften\w*": "online softmax",
    r"\bweigh\b": "online softmax",
    r"softmax's weights|\b(scores and|rounded|largest|small|few|unnormalised) weights?\b": "P",
    r"\bkWeight\w*": "P",
    r"\bto_log2\b": "softmax_scale_log2",
    r"\bcapped\b|\bkCapped\b|\bto_capped\w*": "has_softcap",
    r"\b[Ss]ights?\b": "visible keys",
    r"\bhidden (scores?|keys?)\b|\bhide_(scores|keys|unseen|drafts)\b|\bkHidden\b": "masked",
    r"\bunseen (keys?|rows?)\b|\b(is|are) (not )?seen by\b|\bkeys seen\b": "visible, masked",
    # Rows, tiles and their places.
    r"\bPackedRows?\b|\btile/packed_rows\b|\bpacked_rows_of\b|\bplan_packed_rows\b": "PackGQA",
    r"\bhead_dim class(es)?\b|\bHeadDimClass\b": "head-dim bucket",
    r"\b(of a|each|next|a) work\b(?! (tile|of))|\bworks (ahead|than)\b": "work tile",
    r"\b(all|many|two|three|more|through) works\b|\bnum_works\b|\w+_works\b": "work tiles",
    r"\bWork(Place|Queue|Slots)\b|\bkWorkSlots\b|\bBlockPlace\b": "WorkTileInfo, tile coord",
    r"\bplaces? in the row\b|\bplaces j\b": "logical position",
    r"\bplace_of_block\b|\bblock's rank\b|\btiles of one rank\b": "tile index, tile coord",
    r"\bDecodeWalk\b|\b(find|key|block)_walk\b|\bstruct Walk\b|\bwalks? over\b": "key-block range",
    r"\bRowExchange\b|\b(leave_in_|row_)exchange\b": "smem reduction buffer",
    r"\bdescribe_(problem|rows|block)\b": "init, make, store",
    # Copies.
    r"\bin_boxes\b|\w+_in_boxes\b": "use_tma",
    r"\b(in|as|of whole|whole) boxes\b|\bbox by box\b": "TMA boxes, by TMA",
    r"\bin_chunks\b|\w+_in_chunks\b|\brows_are_chunks\b": "is_vectorised",
    r"\bfillers?\b|\bwait_for_users\b|\bkUsers\b|\bint users\b": "producer, consumer",
    r"\bowed\b|\bsettle\(|\bannounce\w*": "pending_mask, commit_stage, signal_stage",
    r"\bcarv(e|es|ed|er|ing)\b|\w*Carver\b|\bcarve_\w+": "bump allocator",
    # Registers, barriers and the order of instructions.
    r"\b(give|take)_registers\b": "warpgroup_reg_dealloc, warpgroup_reg_alloc",
    r"\bwgmma_hold\b": "warpgroup_fence_operand",
    r"\bwgmma_fence\b": "warpgroup_arrive",
    r"\b(pass|wait_for|note)_turn\b|\b[Tt]ak(e|es|ing) turns\b|\bkTakeTurns\b": "semaphore",
    r"\bopaque\(|\b[Aa]new\b|\b\w+_anew\b": "optimisation barrier, rematerialise, again",
    r"\b(leave|note)_(?!out_)[a-z]\w*": "store_, write_",
    # Elements.
    r"\b[Ww]iden(s|ed|ing)?\b|\bkWidens\b|\bwiden_\w+": "upcast, dequantise",
    r"\b(8-bit|16-bit|narrow|wider|float\w+|bfloat16|int8) numbers?\b": "elements, values",
    r"\b(dequantised|quantised|stored|rounded|same) numbers\b": "elements, values, bits",
    r"\b(load|store|write|bits_of)_numbers?\b|\b(dk|dv|row)_numbers\b": "elements, values",
    r"\btile/number\.cuh|\bkNumbersStride\b|\bstruct Numbers\b": "elements, values",
    r"\bnumbers? of (float8|int8|bfloat16|float16)\b": "elements, values",
    # Structs.
    r"\b\w+Problem\b|\b(kernel|make|describe)_problem\b|\bmake_\w+_problem\b": "Params, params",
    r"\bsm90/paged_attn\b|\bcommon/\w+\.(cuh?|h)\b|\bcuda/common\b": "sm90/decode, cuda/kernels",
    # Tests and bookkeeping.
    r"\btwins?\b": "emulation, portable version",
    r"\bplant(s|ed)?\b": "fault injection",
    r"\b(tests?|half|cases?|rest) of the grid\b|\b[Tt]he grid's \w+": "test matrix",
    r"\b(whole|peer|same) grid\b|\b[Tt]he grid (holds|notices|passes|runs on|can)\b": "test matrix",
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
    """file:line of each; a space of the pattern may be the end of a line, within a comment too."""
    pattern = pattern.replace(" ", r"(?: |\n[ \t]*(?:(?://|#|\*|\|)[ \t]*)?)")
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in text_of_tree().items()
        for match in re.finditer(pattern, text)
    ]


@pytest.mark.parametrize("pattern", RETIRED)
def test_word_is_retired(pattern: str) -> None:
    assert uses_of(pattern) == [], f"the field says: {RETIRED[pattern]}"


def test_words_are_looked_for() -> None:
    """In all folders; a word that is there is found, with its file and line."""
    folders = {name.partition("/")[0] for name in text_of_tree()}
    assert folders >= {"csrc", "sink_attention_ext", "tests", "benchmarks", "examples", "tools"}
    assert folders >= {"README.md", "Makefile", "CMakeLists.txt", "setup.py", "pyproject.toml"}
    assert len(text_of_tree()) > 200
    found = uses_of(r"\bsoftmax_scale_log2\b")
    assert found and all(re.fullmatch(r"[\w./-]+:\d+: softmax_scale_log2", use) for use in found)


# One use of each rule, and what looks like it and is allowed.
RETIRED_USES = (
    "soften(s)", "softened rows", "weigh V", "the softmax's weights", "scores and weights",
    "kWeightShift", "to_log2", "capped", "in sight", "a hidden score", "hide_unseen()",
    "a key is seen by all", "unseen keys", "tile/packed_rows.cuh", "packed_rows_of(", "PackedRows",
    "head_dim class", "HeadDimClass",
    "takes a work", "works ahead", "num_works", "more works than", "WorkQueue", "BlockPlace",
    "its place in the row", "place_of_block", "walks over blocks", "RowExchange", "describe_rows(",
    "k_in_boxes", "comes in boxes", "rows_are_chunks", "out_in_chunks",
    "fillers", "kUsers", "settle()", "carve_tile", "Carver", "give_registers", "wgmma_hold",
    "wgmma_fence", "pass_turn", "taking turns", "opaque(x)", "lane_idx_anew", "start anew",
    "leave_scores", "note_bounds", "widen_chunk", "widened to float16", "8-bit numbers",
    "wider numbers", "dequantised numbers", "load_number", "tile/number.cuh", "FlashFwdProblem",
    "make_dense_problem", "sm90/paged_attn", "common/combine.cuh", "its twin", "planted faults",
    "tests of the grid", "the whole grid", "the books", "leave_in_exchange", "note_turn",
    "ScratchCarver", "numbers of float8",
)  # fmt: skip
ALLOWED_USES = (
    "model weights", "attention weights", "weights_only=False", "this works", "the work of a block",
    "a work tile", "a group of ranks", "hidden_states", "hidden_size", "the number of keys",
    "random numbers", "grid.x", "launches the grid", "a wider head_dim", "problem size",
    "the CUDA grid's second dimension", "in place", "chunked prefill", "TMA box", "std::exchange",
    "box_rows", "opaque handle", "bookkeeping", "in turn",
)  # fmt: skip


@pytest.mark.parametrize("use", RETIRED_USES)
def test_a_retired_use_is_found(use: str) -> None:
    assert [pattern for pattern in RETIRED if re.search(pattern, use)]


@pytest.mark.parametrize("pattern", RETIRED)
def test_a_rule_has_a_use_that_it_finds(pattern: str) -> None:
    assert [use for use in RETIRED_USES if re.search(pattern, use)]


@pytest.mark.parametrize("use", ALLOWED_USES)
def test_an_ordinary_use_is_allowed(use: str) -> None:
    assert not [pattern for pattern in RETIRED if re.search(pattern, use)]
