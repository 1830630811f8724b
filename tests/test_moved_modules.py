"""Modules that have moved are found under their old names, with a word about the new one."""

from __future__ import annotations

import importlib

import pytest

import sink_attention_ext


@pytest.mark.parametrize("name", sorted(sink_attention_ext._MOVED))
def test_moved_module(name: str) -> None:
    target = f"sink_attention_ext.{sink_attention_ext._MOVED[name]}"
    with pytest.warns(DeprecationWarning, match=f"{name} is {target} now"):
        module = getattr(sink_attention_ext, name)
    assert module is importlib.import_module(target)


def test_other_names_are_missing() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'no_such_module'"):
        sink_attention_ext.no_such_module  # noqa: B018
    with pytest.raises(ImportError):
        from sink_attention_ext import no_such_module  # noqa: F401
