"""benchmarks/gpu_check.sh: its steps, its budget, what it reads from logs, and what it counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # behind tests/: both have a cases.py

from gpu import check, steps, summary, work  # noqa: E402
from gpu.steps import Step  # noqa: E402
from gpu.summary import Outcome  # noqa: E402


def harness(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(BENCHMARKS)])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )


# ---- what is computed ----


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_visible_pairs_are_those_of_the_mask(window: int | None) -> None:
    seqlen = 7
    pairs = [(i, j) for i in range(seqlen) for j in range(i + 1) if i - j < (window or seqlen)]
    assert work.visible_pairs(seqlen, window) == len(pairs)


def test_flops() -> None:
    forward = work.flops(2, 3, 5, None, "forward")  # 3 pairs, 3 heads, 2 products of 5
    assert forward == 2 * 3 * 3 * 2 * 5
    assert work.flops(2, 3, 5, None, "forward+backward") == forward * 7 // 2


def test_the_plan_names_shapes_and_peers() -> None:
    done = harness("gpu.plan", "--quick")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("forward ") for line in lines) == 8  # 2 layers, dtypes, lengths
    assert sum(line.startswith("window ") for line in lines) == 8  # 2 dtypes, directions, lengths
    assert sum(line.startswith("decode ") for line in lines) == 8
    kernels = [line for line in lines if line.startswith("kernel of ")]
    assert any("9.0 sm90::flash_fwd_hdim64, 12.0 sm80::flash_fwd_hdim64" in k for k in kernels)
    assert any("90::decode_hdim64" in k and k.startswith("kernel of decode") for k in kernels)
    for peer in ("flash-attn 2", "flash-attn 3", "flash-attn 4", "FlashInfer"):
        assert any(line.startswith(f"peers: {peer}: ") for line in lines)


@pytest.mark.slow
def test_peers_are_called_as_they_expect() -> None:
    done = harness("gpu.rehearsal")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every stand-in was called, and its result was right" in done.stdout


# ---- peers: in a process of their own, since benchmarks/ has modules of tests' names ----

FA3_STAND_IN = """
def load(folder):
    print("loaded from", folder)
def varlen(q, k, v, *, s_aux, window_size, cu_seqlens_q, **options):
    print(s_aux.dtype, window_size, cu_seqlens_q.tolist())
    return q, None
"""
CALL_FA3 = """
import torch
from types import SimpleNamespace
from gpu import peers
print(peers.importable()[peers.FA3])
if not isinstance(module := peers.load(peers.FA3), str):
    q = torch.ones(1, 3, 2, 64).bfloat16()
    layer = peers.Layer("a layer", 2, 2, 64, window=2)
    problem = SimpleNamespace(layer=layer, seqlen=3, device=q.device)
    out = peers.attend_library(peers.FA3, module, problem)(q, q, q, torch.ones(2))
    print(torch.equal(out, q))
"""
FORCE_SM80 = """
from types import SimpleNamespace
import torch
from gpu import peers
from sink_attention_ext import ops
layer = peers.Layer("a layer", 8, 2, 64)
for kernel in ("cuda/sm80", "cuda/sm90+sm80"):
    peers.supports = lambda **_: SimpleNamespace(kernel=kernel)
    call = peers.by_sm80(ops.cuda_kernels, layer, dtype=torch.bfloat16, device="cuda")
    print(call if isinstance(call, str) else "forced to " + call())
print(f"then {ops.cuda_kernels()!r}")
"""


def in_benchmarks(code: str, **environment: str) -> list[str]:
    paths = os.pathsep.join([str(ROOT), str(BENCHMARKS)])
    environment = {"SINK_FA3_PEER": "", **environment, "PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_flash_attention_3_is_taken_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "fa3_peer.py").write_text(FA3_STAND_IN)
    lines = in_benchmarks(CALL_FA3, SINK_FA3_PEER=str(tmp_path))
    called = "torch.bfloat16 (1, 0) [0, 3]"  # sinks in the only dtype that it takes
    assert lines == [f"loaded from {tmp_path}", "yes", called, "True"]


@pytest.mark.parametrize("there", [False, True])
def test_without_flash_attention_3_the_reason_is_said(there: bool, tmp_path: Path) -> None:
    folder = str(tmp_path) if there else ""  # one without it, or none
    (line,) = in_benchmarks(CALL_FA3, SINK_FA3_PEER=folder)
    assert line.startswith("FileNotFoundError" if there else "SINK_FA3_PEER is not set")


def test_our_kernels_for_all_cards_are_measured_where_others_run() -> None:
    lines = in_benchmarks(FORCE_SM80, SINK_ATTENTION_CUDA_KERNELS="sm90")
    assert lines == ["our call runs cuda/sm80 anyway", "forced to sm80", "then 'sm90'"]


# ---- steps ----


@pytest.mark.parametrize("quick", [False, True])
def test_a_dry_run_says_of_every_step_why_it_is_left_out(quick: bool, tmp_path: Path) -> None:
    names = [step.name for step in steps.card_steps(tmp_path, quick)]
    assert names[:4] == ["environment", "build", "self-check", "tests"]
    assert {f"sanitizer-{tool}" for tool in steps.SANITIZERS} | {"benchmarks"} < set(names)
    assert {f"sanitizer-{tool}-sm90" for tool in steps.SANITIZERS} < set(names)
    assert {"tests-sm80", "tests-sm90"} < set(names)
    dry = {step.name: step for step in steps.dry_steps(tmp_path, quick)}
    assert set(names) < dry.keys()
    for name in set(names) - {"environment", "build", "self-check"}:
        assert dry[name].reason
    assert dry["emulated-tests"].reason is None and dry["build"].environment == {"SINK_CUDA": "0"}


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0)])
def test_kernels_are_forced_where_a_card_has_a_choice(
    capability: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr(steps, "cuda_program", lambda name: "/bin/true")
    plan = {step.name: step for step in steps.card_steps(tmp_path, False)}
    reasons = {None: "needs a card", (8, 0): "compute capability 8.0 has one", (9, 0): ""}
    for name in ("tests-sm90", "tests-sm80", "sanitizer-memcheck-sm90"):
        assert (plan[name].reason or "").startswith(reasons[capability])
        assert bool(plan[name].reason) == (capability != (9, 0))
        usual, _, family = name.rpartition("-")
        variable = {"SINK_ATTENTION_CUDA_KERNELS": family}
        assert plan[name].environment == plan[usual].environment | variable
        assert f"--junitxml={tmp_path / name}.xml" in plan[name].command
        assert plan[usual].reason is None


FORCED_TEST = """
import pytest
@pytest.mark.parametrize("text", ["forces the sm90 kernels, but they do not take this", "other"])
def test_call(text):
    raise RuntimeError(text)
"""


@pytest.mark.parametrize("family", ["", "sm90"])
def test_what_a_forced_family_does_not_take_is_skipped(family: str, tmp_path: Path) -> None:
    (tmp_path / "test_forced.py").write_text(FORCED_TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest"]
    done = subprocess.run(
        [*command, str(tmp_path / "test_forced.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "SINK_ATTENTION_CUDA_KERNELS": family,
        },
    )
    assert ("1 failed, 1 skipped" if family else "2 failed") in done.stdout, done.stdout


def test_the_matrix_is_found() -> None:
    files = steps.matrix_files()
    assert {"tests/test_dense.py", "tests/test_gradients.py", "tests/test_paged.py"} <= set(files)
    graphs, of_models = "tests/test_cuda_graphs.py", "tests/test_transformers_kvcache.py"
    assert {graphs, of_models, "tests/test_gpu.py"} <= set(steps.gpu_files())
    assert not {graphs, "tests/test_gpu.py"} & set(files)
    assert set(steps.QUICK_SANITIZED) <= set(files)


@pytest.mark.parametrize("option", ["--kernel-name", "--kernel-regex"])
def test_sanitizers_that_complain_of_others_look_at_our_kernels(
    option: str, tmp_path: Path
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho '  {option} arg  only these kernels'\n")
    program.chmod(0o755)
    only_ours = [option, "kns=kernel_entry"]
    assert steps.sanitizer_filter(str(program), "initcheck") == only_ours
    assert steps.sanitizer_filter(str(program), "memcheck") == []


def test_what_a_step_needs_comes_before_it(tmp_path: Path) -> None:
    for plan in (steps.card_steps(tmp_path, False), steps.dry_steps(tmp_path, False)):
        names = [step.name for step in plan]
        assert len(names) == len(set(names))
        for step in plan:
            assert set(step.needs) <= set(names[: names.index(step.name)])


def test_a_step_is_left_out_with_the_reason() -> None:
    step = Step("tests", ["true"], 1, needs=("build",))
    assert check.why_not(step, [Outcome("build", "ok")], 100) is None
    assert check.why_not(step, [Outcome("build", "failed")], 100) == "build: failed"
    assert check.why_not(step, [], 100) == "build: not run"
    assert check.why_not(step, [Outcome("build", "ok")], 5) == "the time budget is spent"
    assert check.why_not(replace(step, reason="no card"), [], 100) == "no card"


def test_a_step_leaves_its_log_and_exit_code(tmp_path: Path) -> None:
    code = "print('tests of the matrix: 3 on cuda'); raise SystemExit(3)"
    outcome = check.run_step(Step("tests", steps.python("-c", code), 1), tmp_path, 60)
    assert (outcome.status, outcome.facts) == ("failed", {"matrix": "3 on cuda", "exit code": 3})
    assert "3 on cuda" in (tmp_path / "tests.log").read_text()


@pytest.mark.parametrize(("skipped", "status"), [(2, "failed"), (1, "ok")])
def test_a_step_whose_tests_are_all_skipped_has_failed(
    skipped: int, status: str, tmp_path: Path
) -> None:
    junit = f"<testsuites><testsuite tests='2' skipped='{skipped}'/></testsuites>"
    code = f"open({str(tmp_path / 'tests.xml')!r}, 'w').write({junit!r})"
    outcome = check.run_step(Step("tests", steps.python("-c", code), 1), tmp_path, 60)
    assert outcome.status == status


def test_a_step_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    step = Step("slow", ["sh", "-c", f"sleep 60 & echo $! > {child}; wait"], 1)
    started = time.monotonic()
    outcome = check.run_step(step, tmp_path, 0.5)
    assert outcome.status == "timed out" and time.monotonic() - started < 30
    status = Path("/proc", child.read_text().strip(), "status")
    for _ in range(100):  # a killed process is gone, or waits to be buried, soon
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.02)
    pytest.fail("its child is still running")


def test_only_the_harness_has_the_benchmarks_on_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/a", str(BENCHMARKS)]))
    plain = check.environment_of(Step("tests", ["python"], 1, {"X": "1"}))
    assert (plain["PYTHONPATH"], plain["X"]) == ("/a", "1")
    of_harness = check.environment_of(Step("plan", ["python", "-m", "gpu.plan"], 1))
    assert str(BENCHMARKS) in of_harness["PYTHONPATH"]


# ---- the summary ----

JUNIT = """<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1">
<testcase classname="test_a" name="x"><failure/></testcase>
<testcase classname="test_b" name="y"><error/></testcase>
<testcase classname="test_c" name="z"/></testsuite></testsuites>"""


def test_results_are_read_from_logs(tmp_path: Path) -> None:
    name = "sanitizer-racecheck"
    (tmp_path / f"{name}.xml").write_text(JUNIT)
    log = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert summary.facts_of(name, log, tmp_path) == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "first failures": "test_a::x; test_b::y",
        "errors": 2,
    }
    log = "========= ERROR SUMMARY: 0 errors\n========= ERROR SUMMARY: 1 error\n"
    assert summary.sanitizer_errors(log) == {"errors": 1}
    assert summary.facts_of("tests", "killed", tmp_path) == {}
    (tmp_path / "tests.xml").write_text(JUNIT[:40])
    assert summary.test_counts(tmp_path / "tests.xml") == {}


def test_the_summary_holds_what_there_is(tmp_path: Path) -> None:
    outcomes = [Outcome("build", "ok", 12.3), Outcome("tests", "skipped", reason="a | b")]
    summary.write(tmp_path, outcomes, {"quick": "True"})
    text = (tmp_path / "summary.md").read_text()
    assert "| build | ok | 12 |  |" in text and "| tests | skipped | 0 | a \\| b |" in text
    (tmp_path / "environment.json").write_text('{"card": "some"}')
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results.json").write_text('{"records": []}')
    summary.write(tmp_path, outcomes, {"quick": "True"})
    whole = json.loads((tmp_path / "summary.json").read_text())
    assert whole["environment"] == {"card": "some"} and whole["benchmarks"] == {"records": []}
    assert [step["status"] for step in whole["steps"]] == ["ok", "skipped"]
    assert "| card | some |" in (tmp_path / "summary.md").read_text()
