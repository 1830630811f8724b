"""Runs the steps one after the other within a time budget. Started by benchmarks/gpu_check.sh."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu.steps import Step, card_steps, dry_steps
from gpu.summary import Outcome, facts_of, write

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 20.0  # with less left of the budget no step is started


def why_not(step: Step, outcomes: list[Outcome], seconds_left: float) -> str | None:
    """Why a step does not run."""
    if step.reason:
        return step.reason
    status = {outcome.step: outcome.status for outcome in outcomes}
    for needed in step.needs:
        if status.get(needed) != "ok":
            return f"{needed}: {status.get(needed, 'not run')}"
    if seconds_left < LEAST_SECONDS:
        return "the time budget is spent"
    return None


def environment_of(step: Step) -> dict[str, str]:
    """benchmarks/ is on Python's path, for this module; other programs are spared its names."""
    environment = os.environ | step.environment
    if not step.of_harness:
        paths = environment.get("PYTHONPATH", "").split(os.pathsep)
        kept = [path for path in paths if path and path != str(ROOT / "benchmarks")]
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    return environment


def run_step(step: Step, out: Path, seconds_left: float) -> Outcome:
    """Runs its command with a log of its own; a step that takes too long is ended with all it
    started."""
    log = out / f"{step.name}.log"
    limit = min(60 * step.most_minutes, seconds_left)
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment_of(step),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:  # also when this program is interrupted
            if process.poll() is None:
                end(process)
    prefix = " ".join(f"{key}={value}" for key, value in step.environment.items())
    command = f"{prefix} {shlex.join(step.command)}".strip()
    facts = facts_of(step.name, log.read_text(errors="replace"), out)
    if status == "failed":
        facts["exit code"] = process.returncode
    if status == "ok" and facts.get("passed") == 0:  # pytest is content with tests that all skip
        status = "failed"
    return Outcome(step.name, status, round(time.monotonic() - started, 1), None, command, facts)


def end(process: subprocess.Popen) -> None:
    """Asks the step's processes to stop, and kills those that do not."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGINT)
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def show(outcome: Outcome) -> None:
    remarks = [outcome.reason] if outcome.reason else []
    remarks += [f"{key} {value}" for key, value in outcome.facts.items()]
    print(f"{outcome.step:<26}{outcome.status:<10}{outcome.seconds:7.1f} s  {'; '.join(remarks)}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tests and fewer shapes")
    parser.add_argument("--dry-run", action="store_true", help="what needs no card")
    parser.add_argument("--minutes", type=float, default=240.0, help="time budget (default 240)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", metavar="DIR")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(f"gpu_check: {sys.executable} has no torch; set PYTHON to one that has")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.log"), *out.glob("*.xml"), *out.glob("*.json")):
        old.unlink()  # so that nothing of an earlier run is taken for this one's
    started = time.monotonic()
    plan = (dry_steps if arguments.dry_run else card_steps)(out, arguments.quick)
    outcomes: list[Outcome] = []
    said = {key: str(value) for key, value in vars(arguments).items()}
    for step in plan:
        seconds_left = 60 * arguments.minutes - (time.monotonic() - started)
        reason = why_not(step, outcomes, seconds_left)
        if reason is None:
            print(f"... {step.name}: {out / step.name}.log", flush=True)
            outcomes.append(run_step(step, out, seconds_left))
        else:
            outcomes.append(Outcome(step.name, "skipped", reason=reason))
        show(outcomes[-1])
        write(out, outcomes, said)
    print(f"\n{out / 'summary.md'}; {(time.monotonic() - started) / 60:.1f} minutes")
    bad = [outcome.step for outcome in outcomes if outcome.status in ("failed", "timed out")]
    if bad:
        print(f"not ok: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
