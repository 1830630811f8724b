"""`make demo`, with a few steps of everything."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_demo_runs_and_passes_its_own_checks(tmp_path):
    picture = tmp_path / "new" / "demo.png"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, ROOT / "examples/train_and_serve.py", "--quick", "--picture", picture],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,  # it depends on no working directory
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all checks passed"
    assert sum(line.startswith("  ok ") for line in lines) == 4
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
