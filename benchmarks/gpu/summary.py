"""What came of each step: read from its log, written to summary.json and summary.md."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Outcome:
    """status: ok, failed, timed out, skipped."""

    step: str
    status: str
    seconds: float = 0.0
    reason: str | None = None  # of a step that did not run
    command: str = ""
    facts: dict[str, int | str] = field(default_factory=dict)


def test_counts(junit: Path) -> dict[str, int | str]:
    """passed, failed, skipped of a pytest run, and the first tests that failed."""
    try:
        suites = ElementTree.parse(junit).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return {}  # killed before it wrote any
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for suite in suites:
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped = int(suite.get("skipped", 0))
        counts["failed"] += failed
        counts["skipped"] += skipped
        counts["passed"] += int(suite.get("tests", 0)) - failed - skipped
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failures.append(f"{case.get('classname')}::{case.get('name')}")
    return counts | ({"first failures": "; ".join(failures[:5])} if failures else {})


def sanitizer_errors(log: str) -> dict[str, int | str]:
    """The tool's own total: of errors, or of racecheck's hazards."""
    totals = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", log)
    return {"errors": sum(map(int, totals))} if totals else {}


def facts_of(step: str, log: str, out: Path) -> dict[str, int | str]:
    facts = test_counts(out / f"{step}.xml")
    if step.startswith("sanitizer-"):
        facts |= sanitizer_errors(log)
    matrix = re.search(r"^tests of the matrix: (.*)$", log, re.MULTILINE)
    if matrix:
        facts["matrix"] = matrix[1]
    return facts


def markdown(environment: dict, outcomes: list[Outcome], title: str) -> str:
    lines = [f"# {title}", ""]
    if environment:
        lines += ["| | |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in environment.items()]
        lines.append("")
    lines += ["| step | status | seconds | |", "|---|---|---|---|"]
    for outcome in outcomes:
        remarks = [outcome.reason or ""]
        remarks += [f"{key}: {value}" for key, value in outcome.facts.items()]
        text = "; ".join(filter(None, remarks)).replace("|", "\\|")
        lines.append(f"| {outcome.step} | {outcome.status} | {outcome.seconds:.0f} | {text} |")
    return "\n".join(lines) + "\n"


def write(out: Path, outcomes: list[Outcome], arguments: dict) -> None:
    """Both files, after each step: a run that is killed later keeps its results so far."""
    try:
        environment = json.loads((out / "environment.json").read_text())
    except (OSError, ValueError):
        environment = {}
    everything = {
        "arguments": arguments,
        "environment": environment,
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    try:
        everything["benchmarks"] = json.loads((out / "benchmarks" / "results.json").read_text())
    except (OSError, ValueError):
        pass
    for name, text in (
        ("summary.json", json.dumps(everything, indent=1) + "\n"),
        ("summary.md", markdown(environment, outcomes, "GPU check")),
    ):
        part = out / (name + ".part")
        part.write_text(text)
        part.replace(out / name)
