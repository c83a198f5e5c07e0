"""Each family's checkpoint and what transformers computes with it, made once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from harness import Checkpoints
from local_world import LocalExecutor

import bireme.verify.comparison


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Ranks in threads share the cores, and these matrices are too small to be shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return Checkpoints(tmp_path_factory.mktemp("zoo"))


_WORST = pytest.StashKey[dict[str, float]]()


@pytest.fixture(scope="session")
def worst(pytestconfig: pytest.Config) -> dict[str, float]:
    """The largest difference of logits that any layout of a case showed; printed at the end."""
    return pytestconfig.stash.setdefault(_WORST, {})


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    worst = config.stash.get(_WORST, {})
    if worst:
        terminalreporter.section("largest |logit difference| over all layouts, in deviations")
    for case, difference in worst.items():
        terminalreporter.line(f"{case:16} {difference:.1e}")


@pytest.fixture
def local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` runs its ranks as threads of this process."""
    monkeypatch.setattr(bireme.verify.comparison, "WorkerExecutor", LocalExecutor)
