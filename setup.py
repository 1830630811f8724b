"""Builds sink_attention_ext/_C.abi3.so through ninja: one library for every Python, for torch from
2.10 on (through its stable ABI) and every CPU (the kernels of each instruction set are in it).

Environment:
    SINK_CUDA=auto|0|1        CUDA kernels: where nvcc and a CUDA torch are there (auto), never, or
                              an error if they cannot be built
    TORCH_CUDA_ARCH_LIST      what they are built for, as in torch ("8.0;9.0a+PTX"); default: the
                              cards found, or without one those of DEFAULT_ARCHS in
                              tools/cuda_toolkit.py. With 9.0 or 9.0a in it csrc/cuda/sm90 is
                              compiled too, for sm_90a
    SINK_SANITIZE=1           with AddressSanitizer and UBSan, into build/ext-sanitize
    CXX, MAX_JOBS             compiler, nvcc's too; how many files at once
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        f"""
sink_attention_ext is built against the torch of the environment that it is installed into, and this
Python finds none ({error}). pip's isolated build environment never has one. Install torch, then
build without isolation:
    pip install torch setuptools ninja
    pip install --no-build-isolation .
"""
    ) from None

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_toolkit  # noqa: E402  (it needs torch)

CSRC = ROOT / "csrc"
SANITIZE = os.environ.get("SINK_SANITIZE") == "1"
# Not setuptools' temporary folder: objects stay, so that one touched file compiles one file.
OBJECTS = ROOT / "build" / ("ext-sanitize" if SANITIZE else "ext")
SOURCE_DIR = "../../csrc"  # from a folder of build/: a copied or moved tree needs no rebuild
LIBRARY = "_C.abi3.so"

IS_X86_64 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
INSTRUCTION_SET_FLAGS = {  # of csrc/cpu/simd/<name>.cpp: the same headers, compiled once for each
    "kernels_portable": [],
    "kernels_avx2": AVX2,
    "kernels_avx512": AVX512,
    "kernels_avx512_bf16": [*AVX512, "-mavx512bf16"],
}
SANITIZE_FLAGS = [
    "-O1",  # at -O3 the checks take the compiler minutes for each file of kernels
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g1",
]
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that the library loads into
CHECKED_CUDA_ARCHS = ["8.0", "9.0", "12.0"]
# Hopper's kernels, whose instructions exist for HOPPER_ARCH only.
SM90 = [CSRC / "cuda" / "sm90", CSRC / "cuda" / "instantiations" / "sm90"]
HOPPER_ARCH = "9.0a"


def cpp_sources(with_cuda: bool) -> list[Path]:
    """csrc/torch, csrc/cpu with those instruction sets that this machine's compiler has, and what
    decides which CUDA kernel runs, so that a build without CUDA answers for one with it."""
    sources = sorted((CSRC / "torch").glob("*.cpp")) + sorted((CSRC / "cpu").glob("*.cpp"))
    sources += sorted((CSRC / "cpu" / "simd").glob("*.cpp"))
    return [
        source
        for source in sources + plan_sources()
        if (with_cuda or source.stem != "ops_cuda")
        and (IS_X86_64 or source.stem == "kernels_portable" or source.parent.name != "simd")
    ]


def plan_sources() -> list[Path]:
    """The host's part of csrc/cuda, which decides what runs: no nvcc needed."""
    return sorted((CSRC / "cuda").rglob("*.cpp"))


def cuda_sources() -> list[Path]:
    return sorted((CSRC / "cuda").rglob("*.cu"))


def archs_of(source: Path, archs: list[str]) -> list[str]:
    """What of the list a .cu file is compiled for: Hopper's files for HOPPER_ARCH where the list
    has it in whatever form, else not at all, and all other files for the whole list."""
    if not any(source.is_relative_to(folder) for folder in SM90):
        return archs
    return [HOPPER_ARCH] * any(arch.startswith("9.0") for arch in archs)


def choose_cuda() -> Path | None:
    """The toolkit to build the CUDA kernels with, or None; says what was chosen and why."""
    wish = os.environ.get("SINK_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"SINK_CUDA must be auto, 0 or 1, got {wish!r}")
    root = cuda_toolkit.nvcc_root()
    if wish == "0":
        missing = "SINK_CUDA=0"
    elif not cuda_sources():
        missing = "this version has no CUDA kernels"
    elif torch.version.cuda is None:
        missing = f"torch {torch.__version__} has no CUDA; make check-cuda compiles the kernels"
    elif root is None:
        missing = "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
    else:
        archs = ";".join(cuda_toolkit.choose_archs(root))
        print(f"sink_attention_ext: CPU and CUDA ({root}, for {archs})")
        doubt = cuda_toolkit.why_it_may_not_run(root)
        if doubt is not None:
            print(f"sink_attention_ext: WARNING: {doubt}", file=sys.stderr)
        return root
    if wish == "1":
        raise SystemExit(f"SINK_CUDA=1, but CUDA kernels cannot be built: {missing}")
    print(f"sink_attention_ext: CPU only ({missing})")
    return None


def from_build(source: Path) -> str:
    return f"{SOURCE_DIR}/{source.relative_to(CSRC)}"


def quoted(flags: list[str]) -> str:
    return shlex.join(str(flag) for flag in flags).replace("$", "$$")


def nvcc_rule(root: Path, keep_messages: bool = False) -> list[str]:
    """The rule "nvcc"; keep_messages puts what the compiler says into $out.log."""
    host = "-fPIC,-fvisibility=hidden"
    flags = ["-std=c++17", "-O3", "-Xcompiler", host, "-cudart", "static", f"-I{SOURCE_DIR}"]
    flags += cuda_toolkit.nvcc_host_flags()
    command = f"{root}/bin/nvcc -MD -MF $out.d {quoted(flags)} $flags -c $in -o $out"
    if keep_messages:
        command += " > $out.log 2>&1 || (cat $out.log; false)"
    return [
        "rule nvcc",
        f"  command = {command}",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $out",
    ]


def run_ninja(folder: Path, lines: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run([find_ninja(), "-C", str(folder), *jobs]).returncode != 0:
        raise SystemExit("sink_attention_ext: not built; the compiler's messages are above")


def find_ninja() -> str:
    try:
        from ninja import BIN_DIR  # the package's own, where the environment is not activated

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or "ninja"


def torch_flags(ext) -> tuple[list[str], list[str]]:
    """What a library on torch's stable ABI is compiled and linked with."""
    cxx_flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # GCC's own AVX-512 headers use undefined registers and warn about it (GCC bug 105593).
    cxx_flags.append("-Wno-maybe-uninitialized")
    cxx_flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-I{SOURCE_DIR}"]
    cxx_flags += [flag for folder in ext.include_dirs for flag in ("-isystem", folder)]
    # libtorch by name: the CUDA runtime's symbols are found only through it, and nothing else keeps
    # a library without a directly used symbol.
    link_flags = [f"-L{folder}" for folder in ext.library_dirs]
    link_flags += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"]
    return cxx_flags, link_flags


def cxx_rules(cxx_flags: list[str], link_flags: list[str]) -> list[str]:
    """The rules "cxx" and "link"."""
    return [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"cxx_flags = {quoted(cxx_flags)}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxx_flags $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $out",
        "rule link",
        f"  command = $cxx -shared $in -o $out {quoted(link_flags)}",
        "  description = link $out",
    ]


class NinjaBuild(BuildExtension):
    """The whole extension as one ninja file; torch's own has one set of flags for all sources."""

    def build_extension(self, ext) -> None:
        run_ninja(OBJECTS, self.ninja_lines(ext, choose_cuda()))
        command = [find_ninja(), "-C", str(OBJECTS), "-t", "compdb", "cxx"]
        database = subprocess.run(command, capture_output=True, text=True, check=True)
        (ROOT / "compile_commands.json").write_text(database.stdout)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(OBJECTS / LIBRARY), str(target))

    def ninja_lines(self, ext, cuda_root: Path | None) -> list[str]:
        cxx_flags, link_flags = torch_flags(ext)
        if SANITIZE:
            cxx_flags += SANITIZE_FLAGS
            link_flags += SANITIZE_FLAGS
        if cuda_root is not None:
            link_flags += cuda_toolkit.runtime_flags(cuda_root)
        lines = cxx_rules(cxx_flags, link_flags)
        objects = []
        for source in cpp_sources(with_cuda=cuda_root is not None):
            objects.append(source.relative_to(CSRC).with_suffix(".o"))
            flags = INSTRUCTION_SET_FLAGS.get(source.stem, [])
            if (
                source.stem == "registry" and cuda_root
            ):  # the plans' list of what there is machine code for
                archs = ";".join(cuda_toolkit.choose_archs(cuda_root))
                flags = [f'-DSINK_CUDA_ARCHS="{archs}"']
            lines += [
                f"build {objects[-1]}: cxx {from_build(source)}",
                f"  flags = {quoted(flags)}",
            ]
        if cuda_root is not None:
            lines += nvcc_rule(cuda_root)
            all_archs = cuda_toolkit.choose_archs(cuda_root)
            for source in cuda_sources():
                archs = archs_of(source, all_archs)
                if not archs:
                    continue
                objects.append(source.relative_to(CSRC).with_suffix(".cu.o"))
                flags = cuda_toolkit.gencode_flags(archs)
                lines += [
                    f"build {objects[-1]}: nvcc {from_build(source)}",
                    f"  flags = {quoted(flags)}",
                ]
        return [*lines, f"build {LIBRARY}: link {' '.join(map(str, objects))}"]


class PlainCommand(Command):
    """A command without options."""

    user_options = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass


class CheckCuda(PlainCommand):
    """Compiles every .cu file for each architecture; needs nvcc, but neither GPU nor CUDA torch."""

    description = "compile each CUDA kernel for each architecture into build/check-cuda"

    def run(self) -> None:
        root = cuda_toolkit.nvcc_root()
        if not cuda_sources():
            print("check-cuda: this version has no CUDA kernels; nothing to compile")
            return
        if root is None:
            raise SystemExit("check-cuda: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
        folder = ROOT / "build" / "check-cuda"
        archs = cuda_toolkit.asked_archs() or CHECKED_CUDA_ARCHS
        lines, targets = nvcc_rule(root, keep_messages=True), []
        for source in cuda_sources():
            for arch in archs_of(source, archs):
                name = arch.replace(".", "").replace("+", "_")
                targets.append(source.relative_to(CSRC / "cuda").with_suffix(f".sm_{name}.o"))
                flags = ["-Xptxas", "-v", *cuda_toolkit.gencode_flags([arch])]
                lines += [
                    f"build {targets[-1]}: nvcc {from_build(source)}",
                    f"  flags = {quoted(flags)}",
                ]
        run_ninja(folder, lines)
        # Of these targets only: objects of other architectures or of removed files may lie there.
        logs = [cuda_toolkit.ask_nvcc(root, "--version")]
        for target in targets:
            logs += [f"object {target}\n", (folder / f"{target}.log").read_text()]
        (folder / "ptxas.log").write_text("".join(logs))


class BuildEmulator(PlainCommand):
    """Compiles the CUDA kernels with the host's compiler, for the tests' emulator."""

    description = "compile the CUDA kernels for the emulator into build/emulator/_emulated.so"

    def run(self) -> None:
        cxx_flags, link_flags = torch_flags(self.distribution.ext_modules[0])
        cxx_flags += ["-DSA_EMULATE", "-DSA_OP_NAMESPACE=sink_attention_emulated", "-I../../tests"]
        sources = [s for s in (CSRC / "torch").glob("*.cpp") if not s.stem.startswith("ops_")]
        sources += plan_sources()
        sources += [s for s in cuda_sources() if s.stem != "device"]  # the emulator is the device
        emulator = ROOT / "tests" / "emulator"
        sources += [s for s in emulator.glob("*.cpp") if not s.stem.startswith("test_")]
        lines, objects = cxx_rules(cxx_flags, link_flags), []
        for source in sorted(sources):
            objects.append(source.relative_to(ROOT).with_suffix(".o"))
            lines += [
                f"build {objects[-1]}: cxx ../../{source.relative_to(ROOT)}",
                f"  flags = {'-x c++' if source.suffix == '.cu' else ''}",
            ]
        lines.append(f"build _emulated.so: link {' '.join(map(str, objects))}")
        run_ninja(ROOT / "build" / "emulator", lines)


class BuildBindings(PlainCommand):
    """Compiles what decides which kernel runs, without torch and kernels, for tests in Python."""

    description = "compile plans and masks for the tests into build/bindings/_bindings.so"

    def run(self) -> None:
        try:
            import pybind11
        except ImportError:
            raise SystemExit("build_bindings: pip install pybind11") from None
        cxx_flags = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", f"-I{SOURCE_DIR}"]
        for folder in (pybind11.get_include(), sysconfig.get_paths()["include"]):
            cxx_flags += ["-isystem", folder]
        lines, objects = cxx_rules(cxx_flags, []), []
        sources = [s for s in cpp_sources(with_cuda=False) if s.stem == "instruction_set"]
        sources += [s for s in cpp_sources(with_cuda=False) if s.parent.name == "simd"]
        sources += [*plan_sources(), *sorted((ROOT / "tests" / "bindings").glob("*.cpp"))]
        for source in sources:
            objects.append(source.relative_to(ROOT).with_suffix(".o"))
            flags = INSTRUCTION_SET_FLAGS.get(source.stem, [])
            lines += [
                f"build {objects[-1]}: cxx ../../{source.relative_to(ROOT)}",
                f"  flags = {quoted(flags)}",
            ]
        lines.append(f"build _bindings.so: link {' '.join(map(str, objects))}")
        run_ninja(ROOT / "build" / "bindings", lines)


setup(
    ext_modules=[
        CppExtension("sink_attention_ext._C", ["csrc/torch/schema.cpp"], py_limited_api=True)
    ],
    cmdclass={
        "build_ext": NinjaBuild,
        "build_bindings": BuildBindings,
        "build_emulator": BuildEmulator,
        "check_cuda": CheckCuda,
    },
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
