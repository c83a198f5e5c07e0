"""What ranks made of each token, to be compared bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from bireme import LLM
from bireme.bench.step_log import logged
from bireme.verify.departure import read_capture

Rows = dict[tuple[tuple[int, ...], int], bytes]


def logit_rows(llm: LLM, run: Callable[[], object]) -> Rows:
    """Digests of the logits of all ranks of the last stage, by a request's prompt, which no two share, and by position.
    Nothing may be preempted meanwhile."""
    digests: dict[tuple[int, int], hashlib._Hash] = {}
    prompts: list[list[int]] = []
    owners: dict[int, int] = {}  # of slots
    with TemporaryDirectory() as folder, logged(llm.start()) as log:
        llm.executor.capture(Path(folder))
        run()
        llm.executor.capture(None)
        for (_, step_id), batch in sorted(log.batches.items()):
            for setup in batch.setups:
                owners[setup.slot] = len(prompts)
                prompts.append([])
            for piece in batch.pieces:
                prompts[owners[piece.slot]] += piece.token_ids or []
            places = [
                (owners[piece.slot], piece.start + at)
                for piece in batch.pieces
                for at in range(piece.num_tokens)
            ]
            for path in sorted(Path(folder).glob(f"step-{step_id:06d}-rank-*")):
                logits = read_capture(path).get("logits")  # the last stage's ranks have them
                if logits is not None:
                    for place, row in zip(places, logits, strict=True):
                        digest = digests.setdefault(place, hashlib.sha256())
                        digest.update(row.numpy().tobytes())
    return {
        (tuple(prompts[owner]), position): digest.digest()
        for (owner, position), digest in digests.items()
    }
