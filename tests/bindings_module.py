"""The bindings of the torch-free C++ (tests/bindings): built where they are asked for first.

Plans and the kernel table, what a query sees, and the blocks of keys that a kernel visits.
"""

from __future__ import annotations

import fcntl
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def build(root: Path = ROOT) -> ModuleType:
    """The module of a tree. Processes that ask at the same time build it once."""
    folder = root / "build" / "bindings"
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(root)}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "setup.py", "--quiet", "build_bindings"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    path = str(folder / "_bindings.so")
    loader = importlib.machinery.ExtensionFileLoader("_bindings", path)
    spec = importlib.util.spec_from_file_location("_bindings", path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
