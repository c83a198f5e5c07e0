"""Where kernels in Triton are chosen."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from bireme.kernels.choice import is_triton_there


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))


def test_without_a_compiler_triton_is_of_no_use(caplog: pytest.LogCaptureFixture) -> None:
    assert not is_triton_there.__wrapped__()
    assert "no C compiler for Triton" in caplog.text


def test_with_one_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc")
    assert is_triton_there.__wrapped__()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert not is_triton_there.__wrapped__()
