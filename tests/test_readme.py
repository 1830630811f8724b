"""README.md: each Python example runs as it stands; each link and each make target exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FOLDERS = (".", "csrc", "benchmarks", "benchmarks/results/*")
PAGES = [page for folder in FOLDERS for page in sorted(ROOT.glob(f"{folder}/*.md"))]


def python_blocks() -> dict[str, str]:
    """Each Python block by the heading above it; empty lines in front make line numbers right."""
    blocks, heading = {}, ""
    text = README.read_text()
    for match in re.finditer(r"^#+ (.*)$|^```python\n((?:.*\n)*?)```$", text, re.MULTILINE):
        if match[1] is not None:
            heading = match[1]
            continue
        assert heading not in blocks, f"two examples under {heading!r}"
        blocks[heading] = "\n" * text.count("\n", 0, match.start(2)) + match[2]
    return blocks


BLOCKS = python_blocks()


def test_every_function_has_an_example() -> None:
    functions = re.search(r"^## The functions$(.*?)^## ", README.read_text(), re.M | re.S)[1]
    headings = set(re.findall(r"^### (.*)$", functions, re.MULTILINE))
    assert len(headings) == 12
    assert headings < BLOCKS.keys()


@pytest.mark.parametrize("heading", BLOCKS)
def test_example_runs(heading: str) -> None:
    code = BLOCKS[heading]
    if "transformers" in code:
        pytest.importorskip("transformers")
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})


def test_slots_of_the_cache_example(capsys: pytest.CaptureFixture[str]) -> None:
    """Its comment says which page and tokens the slots are; what it prints says so too."""
    exec(BLOCKS["reshape_and_cache"], {})
    assert capsys.readouterr().out == "tensor(True)\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [link for link in links if not re.match(r"https?://", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_make_targets_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+) +#", README.read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "sanitize"} <= named <= targets
