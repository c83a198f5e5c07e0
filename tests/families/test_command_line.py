"""Each family through `bireme generate`: token ids in, transformers' greedy continuation out."""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path

import pytest
import zoo
from harness import Checkpoints
from test_parity import FAMILIES

from bireme import LLM
from bireme.cli import run
from bireme.engine.pool import WorkerPool


@pytest.mark.parametrize("case", FAMILIES)
def test_the_command_line_continues_as_transformers_does(
    checkpoints: Checkpoints,
    case: str,
    pool: WorkerPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(LLM, "__init__", partialmethod(LLM.__init__, pool=pool))  # as they stay up
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt_token_ids": ids}) for ids in zoo.prompts()))
    model = checkpoints.model(case)
    status = run(
        ["generate", str(model.folder), "--prompts-file", str(prompts), "--json", "-tp", "2", "-pp", "2",
         "--dtype", "float32", "--max-tokens", str(zoo.NUM_DECODE), "--ignore-eos"]
    )  # fmt: skip
    lines = sorted(
        map(json.loads, capsys.readouterr().out.splitlines()), key=lambda line: line["index"]
    )
    assert status == 0
    found = [line["prompt_token_ids"] + line["token_ids"] for line in lines]
    assert found == checkpoints.reference(case).sequences.ids
