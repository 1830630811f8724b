"""The built library, and the build: what it needs, what it refuses, what a changed file costs."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from sink_attention_ext import ops

try:  # the one that setup.py built with: another version finds everything changed
    from ninja import BIN_DIR

    NINJA = str(Path(BIN_DIR) / "ninja")
except ImportError:
    NINJA = "ninja"

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "ext"

OPERATORS = {
    "flash_attn_fwd",
    "flash_attn_bwd",
    "flash_attn_varlen_fwd",
    "flash_attn_varlen_bwd",
    "paged_attn",
    "paged_attn.out",
    "reshape_and_cache",
    "merge_attn_states",
}
SETTINGS = {
    "cpu_instruction_set",
    "cpu_instruction_sets",
    "set_cpu_instruction_set",
    "cuda_kernels",
    "set_cuda_kernels",
}

needs_binutils = pytest.mark.skipif(
    shutil.which("readelf") is None or shutil.which("nm") is None, reason="needs binutils"
)
needs_objects = pytest.mark.skipif(
    not (OBJECTS / "build.ninja").exists(), reason="the library was not built in this tree"
)


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)


def undefined_symbols(kinds: str = "Uwv") -> list[str]:
    """kinds: nm's letters; w and v are weak."""
    lines = run("nm", "-DC", "--undefined-only", ops.LIBRARY_PATH, check=True).stdout.splitlines()
    symbols = [line.split(maxsplit=1) for line in lines]
    return [symbol.split("@")[0] for kind, symbol in symbols if kind in kinds]


PYTHON_SYMBOLS = {"PyErr_SetString", "PyExc_TypeError"}


@needs_binutils
def test_library_uses_torch_through_its_stable_abi_only() -> None:
    symbols = undefined_symbols()
    shims = [s for s in symbols if re.match(r"(aoti_)?torch_", s)]
    assert "torch_call_dispatcher" in shims
    # C++ names of torch change between its versions.
    assert [s for s in symbols if re.match(r"(c10|at|torch|caffe2)::", s)] == []
    # Two names of Python's stable ABI, weak: a C++ program has none (torch/python_errors.h).
    assert [s for s in undefined_symbols("U") if re.match(r"_?Py[A-Z_]", s)] == []
    assert {s for s in symbols if re.match(r"_?Py[A-Z_]", s)} <= PYTHON_SYMBOLS


@needs_binutils
def test_library_uses_no_shim_newer_than_torch_2_10() -> None:
    headers = Path(include_paths()[0]) / "torch/csrc"
    newer = set()
    for header in (headers / "stable/c/shim.h", headers / "inductor/aoti_torch/c/shim.h"):
        guards: list[bool] = []
        for line in header.read_text().splitlines():
            if re.match(r"\s*#\s*if", line):
                version = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)_0", line)
                guards.append(version is not None and int(version.group(1)) > 10)
            elif re.match(r"\s*#\s*endif", line):
                guards.pop()
            elif any(guards):
                newer.update(re.findall(r"\b((?:aoti_)?torch_\w+)\(", line))
    if torch.__version__ >= "2.13":
        assert "torch_exception_get_what" in newer, "the headers were not understood"
    assert newer & set(undefined_symbols()) == set()


def test_sources_take_no_operator_newer_than_torch_2_10() -> None:
    """The headers guard functions by version, but not operators of their array references."""
    for source in (ROOT / "csrc" / "torch").iterdir():
        assert not re.search(r"(sizes|strides)\(\)\s*[!=]=", source.read_text()), source.name


@needs_binutils
def test_library_asks_for_libtorch_and_not_for_python() -> None:
    needed = re.findall(
        r"NEEDED.*\[(.*)\]", run("readelf", "-d", ops.LIBRARY_PATH, check=True).stdout
    )
    assert "libtorch.so" in needed  # through it a CUDA torch's own libraries are found
    assert not [name for name in needed if "python" in name or "cudart" in name]
    exported = run("nm", "-D", "--defined-only", ops.LIBRARY_PATH, check=True).stdout
    assert "PyInit" not in exported


def test_every_operator_is_registered_for_the_cpu() -> None:
    schemas = {
        schema.name.removeprefix("sink_attention_ext::")
        + "." * bool(schema.overload_name)
        + schema.overload_name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("sink_attention_ext::")
    }
    assert OPERATORS | SETTINGS <= schemas
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sink_attention_ext::{name}", "CPU")


def dirty_objects(folder: Path) -> set[str]:
    """What ninja would build there now."""
    output = run(NINJA, "-C", folder, "-n", "-d", "explain", check=True)
    return set(re.findall(r"explain: (\S+) is dirty", output.stdout + output.stderr)) | set(
        re.findall(r"(?:c\+\+|link) (\S+)$", output.stdout, re.MULTILINE)
    )


@needs_objects
@pytest.mark.parametrize(
    ("touched", "compiled"),
    [
        ("cpu/flash_fwd.cpp", {"cpu/flash_fwd.o"}),
        ("cpu/simd/kernels_portable.cpp", {"cpu/simd/kernels_portable.o"}),
        ("torch/make_params.cpp", {"torch/make_params.o"}),
        ("torch/executor.h", {"torch/ops_cpu.o"}),
    ],
)
def test_a_touched_file_compiles_alone(touched: str, compiled: set[str], tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    folder = tmp_path / "build" / "ext"
    shutil.copytree(OBJECTS, folder)
    if dirty_objects(folder):
        pytest.skip("sources changed since the last build: run make build")
    os.utime(tmp_path / "csrc" / touched)
    assert dirty_objects(folder) == compiled | {"_C.abi3.so"}


def build_with(**environment: str) -> subprocess.CompletedProcess[str]:
    return run(
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--inplace",
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_cuda_is_refused_where_it_cannot_be_built() -> None:
    if torch.version.cuda is not None and list((ROOT / "csrc").rglob("*.cu")):
        pytest.skip("CUDA kernels can be built here")
    build = build_with(SINK_CUDA="1")
    assert build.returncode != 0
    assert "SINK_CUDA=1, but CUDA kernels cannot be built: " in build.stderr


def test_unknown_cuda_setting_is_refused() -> None:
    build = build_with(SINK_CUDA="yes")
    assert build.returncode != 0
    assert "SINK_CUDA must be auto, 0 or 1, got 'yes'" in build.stderr


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, with nothing built."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("archs", "hopper"),
    [
        ("8.0;9.0+PTX;12.0", True),
        ("9.0", True),
        ("8.0;9.0a", True),
        ("9.0a+PTX", True),
        ("8.0;8.9;12.0", False),
        ("10.0a", False),
    ],
)
def test_hopper_s_files_are_for_hopper_only(
    setup_py: dict[str, Any], archs: str, hopper: bool
) -> None:
    sm90 = ROOT / "csrc/cuda/instantiations/sm90/flash_fwd_hdim64.cu"
    other = ROOT / "csrc/cuda/instantiations/sm80/flash_fwd_hdim64.cu"
    listed = archs.split(";")
    assert setup_py["archs_of"](sm90, listed) == (["9.0a"] if hopper else [])
    assert setup_py["archs_of"](other, listed) == listed


def test_a_build_without_hopper_lists_no_file_of_it(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: ROOT / "csrc/cuda" / name for name in ("flash_fwd.cu", "sm90/hdim64.cu")}
    lines_of = setup_py["NinjaBuild"].ninja_lines
    monkeypatch.setitem(lines_of.__globals__, "cuda_sources", lambda: list(files.values()))
    extension = SimpleNamespace(include_dirs=[], library_dirs=[])
    for archs in ("8.0;9.0", "8.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
        text = "\n".join(lines_of(None, extension, Path("/cuda")))
        objects = re.findall(r"^build (cuda/\S+): nvcc .*\n  flags = (.*)$", text, re.MULTILINE)
        flags = dict(objects)
        # What plans take the library to be built for.
        registry = re.search(r"^build cuda/registry.o: cxx .*\n  flags = (.*)$", text, re.MULTILINE)
        assert shlex.split(registry[1]) == [f'-DSINK_CUDA_ARCHS="{archs}"']
        if archs == "8.0":
            assert flags.keys() == {"cuda/flash_fwd.cu.o"}
        else:
            assert flags["cuda/sm90/hdim64.cu.o"] == "-gencode arch=compute_90a,code=sm_90a"
            assert "sm_90a" not in flags["cuda/flash_fwd.cu.o"]


def test_missing_torch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="pip install --no-build-isolation"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_nothing_that_is_installed_for_the_project_asks_for_torch() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "install_missing.py"))
    names = {
        re.split(r"[^\w-]", r)[0] for group in ("build", "dev") for r in tool["requirements"](group)
    }
    assert {"pytest", "transformers", "ruff", "setuptools"} <= names
    assert "torch" not in names


@pytest.mark.slow
@needs_objects
def test_wheel_serves_every_python(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w"]
    wheel = run(*command, tmp_path, ROOT)
    assert wheel.returncode == 0, wheel.stderr
    (path,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in path.name
    names = zipfile.ZipFile(path).namelist()
    assert "sink_attention_ext/_C.abi3.so" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
