"""Each family's checkpoint and what transformers computes with it, made once a session."""

from __future__ import annotations

import pytest
import transformers
from harness import Checkpoints
from local_world import LocalExecutor

import bireme.verify


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return Checkpoints(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` runs its ranks as threads of this process."""
    monkeypatch.setattr(bireme.verify, "WorkerExecutor", LocalExecutor)
