"""examples/server_loop.py, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "server_loop.py"


def test_server_loop_finishes_and_passes_its_own_check(tmp_path: Path) -> None:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, EXAMPLE],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all answers equal those of each request alone"
    assert sum(" finished with " in line for line in lines) == 20  # 10 together, 10 alone
    times = next(line for line in lines if "made room" in line).split()[0]
    assert int(times) > 0, "pages never ran out: putting back was not tried"


@pytest.mark.parametrize(("prompt", "limit"), [([], 5), ([1], 0)])
def test_a_request_that_could_not_run_is_refused_on_arrival(prompt: list[int], limit: int) -> None:
    sys.path.append(str(EXAMPLE.parent))
    from server_loop import Request

    with pytest.raises(ValueError, match="^r1: prompt and limit must be at least one token each"):
        Request("r1", prompt, limit, 0)


def test_it_is_short_enough_to_copy() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 200
