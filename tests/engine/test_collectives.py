"""Two ranks that disagree on what goes over an edge are told so, and nobody computes with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bireme.engine.pool import _environment
from bireme.parallel.segment_plan import SegmentPlan, create_segment

RANK = """
import sys
from pathlib import Path
import torch
from bireme.errors import EngineError
from bireme.parallel.collectives import join
from bireme.parallel.segment_plan import SegmentPlan
from bireme.trace import SpanRing

cpu = torch.device("cpu")
plan = SegmentPlan(widths=(1, 1), hidden_bytes=32, sampled_bytes=8)
segment = (sys.argv[3], plan) if sys.argv[3] else None
comm = join((1, 1), int(sys.argv[1]), Path(sys.argv[2]), cpu, 60.0, SpanRing.create(64), segment)
sent = torch.arange(8.0).view(2, 4)  # in step 3 of incarnation 0
for header, shape in [((0, 3), (2, 4)), ((0, 4), (2, 4)), ((0, 3), (3, 4)), ((0, 3), (2, 5)), ((1, 3), (2, 4))]:
    if comm.hidden_receiver is None:
        comm.hidden_sender.send((0, 3), sent)
        continue
    try:
        found = comm.hidden_receiver.receive(header, shape, torch.float32, cpu)
        print("taken" if torch.equal(found, sent) else "garbled")
    except EngineError as error:
        print(error)
comm.hidden_sender.drain()
comm.leave()
"""


@pytest.mark.parametrize("transport", ["shared memory", "gloo"])
def test_a_receiver_that_expects_another_step_or_size_names_both(
    transport: str, tmp_path: Path
) -> None:
    fd, segment = create_segment(SegmentPlan(widths=(1, 1), hidden_bytes=32, sampled_bytes=8))
    path = segment if transport == "shared memory" else ""
    sender, receiver = (
        subprocess.Popen(
            [sys.executable, "-c", RANK, rank, str(tmp_path / "store"), path],
            env=_environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    )
    lines = receiver.communicate(timeout=120)[0].splitlines()
    assert sender.communicate(timeout=120)[0] == ""
    assert (sender.returncode, receiver.returncode) == (0, 0)
    stated = (
        "rank 0 sent (step, rows, row bytes, incarnation) (3, 2, 16, 0) to rank 1, which expected "
    )
    expected = ["(4, 2, 16, 0)", "(3, 3, 16, 0)", "(3, 2, 20, 0)", "(3, 2, 16, 1)"]
    os.close(fd)
    assert lines == ["taken", *(stated + other for other in expected)]
