"""python -m sink_attention_ext, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import sink_attention_ext
from sink_attention_ext import __main__ as command
from sink_attention_ext import merge_attn_states, ops, selfcheck


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_command() -> None:
    result = run("-m", "sink_attention_ext")
    assert result.returncode == 0, result.stdout + result.stderr
    for fact in (
        sink_attention_ext.__version__,
        torch.__version__,
        f"backends            {', '.join(ops.BACKENDS)}",
        "in use: ",
        "all right",
    ):
        assert fact in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("ok ")]
    assert len(lines) == 16 * result.stdout.count("self-check on ")  # four dtypes, four checks
    assert "self-check on cpu" in result.stdout
    assert all(name in result.stdout for name in ("backward", "varlen", "paged", "merge", "ds_aux"))


def test_a_wrong_result_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A merge that forgets the sink."""
    monkeypatch.setattr(
        selfcheck, "merge_attn_states", lambda outs, lses, s_aux: merge_attn_states(outs, lses)
    )
    assert command.main() == 1
    printed = capsys.readouterr().out
    assert "FAILED merge" in printed and "ok     varlen" in printed


def test_nan_fails() -> None:
    result = selfcheck.Result("nan", torch.float32, {"out": torch.nan})
    assert not result.ok


def test_importing_is_light() -> None:
    heavy = ("transformers", "torch._dynamo", "torch._inductor", "numpy.testing")
    code = f"import sys, sink_attention_ext; print([m for m in {heavy} if m in sys.modules])"
    bare = f"import sys, torch; print([m for m in {heavy} if m in sys.modules])"
    assert run("-c", code).stdout == run("-c", bare).stdout


def test_public_names() -> None:
    assert all(hasattr(sink_attention_ext, name) for name in sink_attention_ext.__all__)
    for name in sink_attention_ext.__all__:
        value = getattr(sink_attention_ext, name)
        assert name.startswith("__") or value.__doc__
