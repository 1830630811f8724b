"""What a GPU check does, step by step, and what of it runs without a card."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# The reduced grid: tests marked as small and of every kind.
REDUCED = ["-m", "sanitize and not slow"]
FAMILIES = ("sm90", "sm80")  # of kernels on tensor cores, between which a Hopper card chooses
QUICK_SANITIZED = ["tests/test_dense.py", "tests/test_gradients.py", "tests/test_paged.py"]


@dataclass(frozen=True)
class Step:
    """A command, or the reason why it does not run here."""

    name: str
    command: list[str]
    most_minutes: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # steps without whose success it is pointless
    reason: str | None = None

    @property
    def of_harness(self) -> bool:
        """Whether it is a module of this folder, so that benchmarks/ must be on Python's path."""
        return any(argument.startswith("gpu.") for argument in self.command)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def pytest(out: Path, name: str, *arguments: str) -> list[str]:
    return python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors",
        "--durations=10", f"--junitxml={out / name}.xml", *arguments,
    )  # fmt: skip


def cuda_program(name: str) -> str | None:
    """A program of the toolkit: on PATH, or in its folder of programs."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/bin" for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def files_with(text: str) -> list[str]:
    """Test files that hold it, without those that import what is not installed."""
    named = {"test_fuzz.py": "hypothesis"}
    files = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        is_of_models = path.name.startswith("test_transformers_")
        needs = "transformers" if is_of_models else named.get(path.name)
        is_missing = needs is not None and importlib.util.find_spec(needs) is None
        if text in path.read_text() and not is_missing:
            files.append(str(path.relative_to(ROOT)))
    return files


def gpu_files() -> list[str]:
    """Files with tests that only a GPU runs: graphs, streams, devices."""
    return files_with("mark.gpu")


def matrix_files() -> list[str]:
    """Files with tests that run on each backend."""
    only_gpu = [name for name in gpu_files() if "pytestmark" in (ROOT / name).read_text()]
    return [name for name in files_with("backend: Backend") if name not in only_gpu]


def sanitizer_filter(program: str, tool: str) -> list[str]:
    """These two also complain of torch's kernels: they look at ours only, if they can be told."""
    if tool not in ("racecheck", "initcheck"):
        return []
    asked = subprocess.run([program, "--help"], capture_output=True, text=True)
    said = asked.stdout + asked.stderr
    for name in ("--kernel-name", "--kernel-regex"):  # the second in older ones
        if name in said:
            return [name, "kns=kernel_entry"]
    return []


def why_no_choice() -> str | None:
    """Why there is nothing to force: on other cards than Hopper only one family runs."""
    import torch  # takes seconds, and most of this module does without

    if not torch.cuda.is_available():
        return "needs a card"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) == (9, 0):
        return None
    return f"compute capability {major}.{minor} has one family of kernels only"


def suffix(family: str | None) -> str:
    return "" if family is None else f"-{family}"


def forced(family: str | None) -> dict[str, str]:
    """The environment in which attention runs this family's kernels or, where they do not take a
    call, nothing: tests/conftest.py skips such tests."""
    return {} if family is None else {"SINK_ATTENTION_CUDA_KERNELS": family}


def tests_step(out: Path, quick: bool, family: str | None = None) -> Step:
    name = f"tests{suffix(family)}"
    selected = REDUCED if quick else ["-m", "not slow"]
    return Step(
        name,
        pytest(out, name, *matrix_files(), "-k", "cuda", *selected),
        10 if quick else 40,
        forced(family),
        needs=("build",),
        reason=family and why_no_choice(),
    )


def sanitizer_step(tool: str, out: Path, quick: bool, family: str | None = None) -> Step:
    name = f"sanitizer-{tool}{suffix(family)}"
    program = cuda_program("compute-sanitizer")
    if program is None:
        return Step(name, [], 0, reason="no compute-sanitizer on PATH or in CUDA_HOME")
    tests = QUICK_SANITIZED if quick else matrix_files()
    # torch's own allocator would hide reads of memory that nobody wrote or that was given back.
    return Step(
        name,
        # Failing calls are no error: libraries probe for what may not be there, and of others both
        # torch and we throw.
        [program, "--tool", tool, "--error-exitcode", "99", "--report-api-errors", "no"]
        + sanitizer_filter(program, tool)
        + pytest(out, name, *tests, "-k", "cuda", *REDUCED),
        8 if quick else 25,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | forced(family),
        needs=("build", "self-check"),
        reason=family and why_no_choice(),
    )


def card_steps(out: Path, quick: bool) -> list[Step]:
    build = python("setup.py", "build_ext", "--inplace")
    benchmark = python("benchmarks/run.py", "--device", "cuda", "--out", str(out / "benchmarks"))
    after = ("build", "self-check")
    return [
        Step("environment", python("-m", "gpu.environment", str(out)), 3),
        Step("build", build, 15, {"SINK_CUDA": "1"}),
        Step("self-check", python("-m", "sink_attention_ext"), 5, needs=("build",)),
        *(tests_step(out, quick, family) for family in (None, *FAMILIES)),
        Step("gpu-only", pytest(out, "gpu-only", *gpu_files(), "-m", "gpu"), 10, needs=after),
        *(sanitizer_step(tool, out, quick) for tool in SANITIZERS),
        *(sanitizer_step(tool, out, True, "sm90") for tool in SANITIZERS),
        Step(
            "benchmarks",
            benchmark + (["--quick"] if quick else []),
            20 if quick else 90,
            needs=after,
        ),
    ]


def dry_steps(out: Path, quick: bool) -> list[Step]:
    """The same list; steps that need a card are replaced by ones that do not, if there are any."""
    emulated = pytest(out, "emulated-tests", *matrix_files(), "-k", "emulated", *REDUCED)
    plan = python("-m", "gpu.plan") + (["--quick"] if quick else [])
    no_nvcc = None if cuda_program("nvcc") else "no nvcc on PATH or in CUDA_HOME"
    without_card = {
        "build": [
            Step("build", python("setup.py", "build_ext", "--inplace"), 15, {"SINK_CUDA": "0"}),
            Step("kernels", python("setup.py", "--quiet", "check_cuda"), 20, reason=no_nvcc),
            Step("resources", python("tools/cuda_resources.py"), 1, needs=("kernels",)),
            Step("emulator", python("setup.py", "--quiet", "build_emulator"), 15),
        ],
        "tests": [Step("emulated-tests", emulated, 20, needs=("build", "emulator"))],
        "benchmarks": [
            Step("benchmark-plan", plan, 3, needs=("build",)),
            Step("rehearsal", python("-m", "gpu.rehearsal"), 5, needs=("build",)),
        ],
    }
    steps = []
    for step in card_steps(out, quick):
        if step.name in ("environment", "self-check"):
            steps.append(step)
        elif step.name in without_card:
            steps += without_card[step.name]
        if step.name not in ("environment", "build", "self-check"):
            steps.append(Step(step.name, [], 0, reason=step.reason or "needs a card"))
    return steps
