"""Installs what a group of pyproject.toml asks for and this interpreter lacks, and nothing else.

    python tools/install_missing.py test demo     (groups: the optional dependencies, and "build")

A package that is there stays as it is, whatever its version; one other than the pinned version is
reported. torch is never installed, upgraded or replaced: its version is a constraint for pip.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

# Only files of these are used; what they themselves ask for is of no use here.
WITHOUT_DEPENDENCIES = {"nvidia-cutlass", "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"}
PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(group: str) -> list[str]:
    """The group's requirements, with this project's own extras resolved."""
    config = tomllib.loads(PYPROJECT.read_text())
    if group == "build":
        return config["build-system"]["requires"]
    found: list[str] = []
    for requirement in config["project"]["optional-dependencies"][group]:
        own = re.fullmatch(config["project"]["name"] + r"\[(.*)\]", requirement)
        if own:
            for extra in own.group(1).split(","):
                found += requirements(extra.strip())
        else:
            found.append(requirement)
    return list(dict.fromkeys(found))


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(groups: list[str]) -> int:
    missing = []
    for requirement in [r for group in groups for r in requirements(group)]:
        name, pin = re.fullmatch(r"([\w.-]+)(?:==([\w.]+))?.*", requirement).groups()
        present = installed(name)
        if present is None:
            missing.append(requirement)
        elif pin and present != pin:
            print(f"note: {name} {present} is installed and stays; the tests are run with {pin}")
    if not missing:
        return 0
    print(f"installing for {', '.join(groups)} into {sys.prefix}: {', '.join(missing)}", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        if installed("torch"):
            constraints.write(f"torch=={version('torch')}\n")
            constraints.flush()
        bare = [r for r in missing if re.split(r"[^\w.-]", r)[0] in WITHOUT_DEPENDENCIES]
        whole = [r for r in missing if r not in bare]
        install = [sys.executable, "-m", "pip", "install", "--quiet", "-c", constraints.name]
        for group, options in ((whole, []), (bare, ["--no-deps"])):
            if group:
                status = subprocess.run([*install, *options, *group]).returncode
                if status != 0:
                    return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
