"""benchmarks/kv_cache_accuracy.py on a model that was not trained: its errors and its table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))  # behind tests/: both have a cases.py

import kv_cache_accuracy as accuracy  # noqa: E402


@pytest.fixture(scope="module")
def layers() -> list[accuracy.Layer]:
    model = accuracy.small.make_model()
    return accuracy.record(model, torch.arange(2 * 70).view(2, 70) % 256)


@pytest.fixture(scope="module")
def records(layers: list[accuracy.Layer]) -> list[dict[str, Any]]:
    return accuracy.measure(layers, layers)


def test_every_layer_is_recorded(layers: list[accuracy.Layer]) -> None:
    assert [layer.kind for layer in layers] == ["sliding", "full"] * 2
    for layer in layers:
        assert layer.q.shape == (2, 70, 8, 32) and layer.k.shape == (2, 70, 2, 32)
        assert layer.window_left == (accuracy.small.WINDOW - 1 if layer.kind == "sliding" else -1)


def test_errors_are_those_of_the_formats(records: list[dict[str, Any]]) -> None:
    """Two layers of each kind; 16 bits are the most exact, and 8 bits within their rounding."""
    by_cache: dict[str, list[dict[str, Any]]] = {}
    for row in records:
        assert row["rows"] == 2 * 2 * 70 * 8 and 0 < row["rms"] <= row["max"]
        by_cache.setdefault(row["cache"], []).append(row)
    assert len(by_cache) == 7
    rms = {name: max(row["rms"] for row in rows) for name, rows in by_cache.items()}
    assert rms["bfloat16"] < 2**-8
    for name, value in rms.items():
        if name != "bfloat16":
            assert rms["bfloat16"] < value < (2**-4 if name.startswith("float8") else 2**-5)
    assert rms["int8, per token"] < rms["int8, per tensor"]


def test_a_wrong_scale_shows(layers: list[accuracy.Layer]) -> None:
    layer, cache = layers[0], accuracy.Cache(torch.int8, "tensor")
    smaller = accuracy.Layer(**vars(layer) | {"k": layer.k / 8, "v": layer.v / 8})
    errors = [
        accuracy.row_errors(accuracy.attend(layer, cache, seen), accuracy.exact(layer)).max()
        for seen in (layer, smaller)
    ]
    assert errors[1] > 10 * errors[0]


def test_bytes_per_token() -> None:
    sizes = {cache.name: cache.bytes_per_token(8, 64) for cache in accuracy.CACHES}
    assert sizes["bfloat16"] == 2048 and sizes["int8, per head"] == 1024
    assert sizes["float8_e4m3, per token"] == 1024 + 64


def test_row_errors() -> None:
    expected: Tensor = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).double()
    errors = accuracy.row_errors(torch.tensor([[3.0, 4.5], [0.0, 2.0]]), expected)
    assert errors.tolist() == [0.1, 0.0]


def test_table(records: list[dict[str, Any]]) -> None:
    text = accuracy.markdown(records, {"commit": "0123456789ab", "torch": torch.__version__})
    rows = [x for x in text.splitlines() if x.startswith("| ") and "---" not in x]
    assert len(rows) == 1 + len(accuracy.CACHES)
    assert "full layers, RMS" in rows[0] and "sliding layers, max" in rows[0]
    assert "- commit: 0123456789ab" in text and f"- torch: {torch.__version__}" in text
