"""Spans on CUDA: of the device's time on the host's clock, and NVTX ranges of the same names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bireme.kernels.device_spans import MOST_BEGUN, SAMPLED_EVERY, DeviceSpans
from bireme.trace import Span, SpanKind, SpanRing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda:0")
CYCLES = 40_000_000  # of about 1.5 to 2 GHz: some 20 ms
LOOK_NS = 1_000_000  # as an empty event takes to come back where other processes use the GPU too


@pytest.fixture
def ring() -> Iterator[SpanRing]:
    made = SpanRing.create()
    yield made
    made.close()


def of_kind(ring: SpanRing, kind: SpanKind) -> list[Span]:
    return [span for span in ring.read() if span.kind is kind]


def test_spans_are_when_the_device_worked_not_when_the_host_said_so(ring: SpanRing) -> None:
    spans = DeviceSpans(ring, DEVICE)
    torch.cuda._sleep(1000)
    torch.cuda.synchronize(DEVICE)
    begun_ns = time.monotonic_ns()
    for step_id in (1, 2):
        spans.set_step(step_id, 0)
        with spans.span(SpanKind.STEP), spans.span(SpanKind.COMPUTE):
            torch.cuda._sleep(CYCLES)
    issued_ns = time.monotonic_ns()
    spans.flush()
    over_ns = time.monotonic_ns()
    first, second = of_kind(ring, SpanKind.COMPUTE)
    assert issued_ns - begun_ns < first.end_ns - first.start_ns, "the host did not wait"
    begun_ns, over_ns = begun_ns - LOOK_NS, over_ns + LOOK_NS
    assert begun_ns <= first.start_ns < first.end_ns <= second.start_ns < second.end_ns <= over_ns
    steps = of_kind(ring, SpanKind.STEP)
    assert [step.step_id for step in steps] == [1, 2]
    assert all(
        step.start_ns <= work.start_ns and work.end_ns <= step.end_ns
        for step, work in zip(steps, (first, second), strict=True)
    )
    assert ring.totals()[SpanKind.COMPUTE].ns == sum(
        span.end_ns - span.start_ns for span in (first, second)
    )


def test_what_runs_beside_a_step_may_outlast_it(ring: SpanRing) -> None:
    spans, beside = DeviceSpans(ring, DEVICE), torch.cuda.Stream(DEVICE)
    spans.set_step(1, 0)
    with spans.span(SpanKind.STEP), torch.cuda.stream(beside), spans.aside(SpanKind.SEND, 8):
        torch.cuda._sleep(CYCLES)
    spans.flush()
    (step,), (send,) = of_kind(ring, SpanKind.STEP), of_kind(ring, SpanKind.SEND)
    assert send.end_ns - send.start_ns > step.end_ns - step.start_ns
    assert (send.step_id, send.num_bytes) == (1, 8)


def test_collectives_are_marked_in_some_steps_and_counted_in_all(ring: SpanRing) -> None:
    spans = DeviceSpans(ring, DEVICE)
    for step_id in range(2 * SAMPLED_EVERY):
        spans.set_step(step_id, 0)
        with spans.span(SpanKind.STEP), spans.span(SpanKind.ALL_REDUCE, 100):
            torch.cuda._sleep(CYCLES // 100)
    spans.flush()
    marked = of_kind(ring, SpanKind.ALL_REDUCE)
    assert len(marked) == 2
    total = ring.totals()[SpanKind.ALL_REDUCE]
    assert (total.num_bytes, total.num_spans) == (100 * 2 * SAMPLED_EVERY, 2 * SAMPLED_EVERY)
    assert total.ns == SAMPLED_EVERY * sum(span.end_ns - span.start_ns for span in marked)


def test_a_graphs_collectives_are_when_its_replays_came_to_them(ring: SpanRing) -> None:
    spans, graph = DeviceSpans(ring, DEVICE), torch.cuda.CUDAGraph()
    with spans.capturing() as captured, torch.cuda.graph(graph):
        torch.cuda._sleep(CYCLES)
        with spans.span(SpanKind.ALL_GATHER, 100):
            torch.cuda._sleep(2 * CYCLES)
    for step_id in range(SAMPLED_EVERY + 1):  # nothing is collected in between but at steps' starts
        spans.set_step(step_id, 0)
        with spans.span(SpanKind.STEP):
            graph.replay()
            spans.replayed(captured)
    spans.flush()
    steps, gathers = of_kind(ring, SpanKind.STEP), of_kind(ring, SpanKind.ALL_GATHER)
    assert [span.step_id for span in gathers] == [0, SAMPLED_EVERY]
    for step, span in zip((steps[0], steps[-1]), gathers, strict=True):
        step_ns = step.end_ns - step.start_ns
        assert abs(span.end_ns - step.end_ns) < step_ns / 20
        assert span.end_ns - span.start_ns == pytest.approx(2 / 3 * step_ns, rel=0.05)
    total = ring.totals()[SpanKind.ALL_GATHER]
    assert (total.num_bytes, total.num_spans) == (100 * (SAMPLED_EVERY + 1), SAMPLED_EVERY + 1)


def test_a_span_since_a_graph_begins_when_the_device_comes_to_it(ring: SpanRing) -> None:
    spans, graph = DeviceSpans(ring, DEVICE), torch.cuda.CUDAGraph()
    with spans.capturing(notes_begin=True) as captured, torch.cuda.graph(graph):
        spans.note_begin()
        torch.cuda._sleep(CYCLES // 4)
    num_steps = MOST_BEGUN + 2  # each place is used, and two anew
    for step_id in range(num_steps):
        spans.set_step(step_id, 0)
        with spans.span(SpanKind.STEP), spans.span_since_graph(SpanKind.COMPUTE):
            torch.cuda._sleep(CYCLES // 4)  # as if the graph's launch took so long
            graph.replay()
            spans.replayed(captured)
        torch.cuda.synchronize(DEVICE)
    spans.flush()
    steps, works = of_kind(ring, SpanKind.STEP), of_kind(ring, SpanKind.COMPUTE)
    assert [span.step_id for span in works] == list(range(num_steps))
    kilohertz = torch.cuda.get_device_properties(DEVICE).clock_rate  # at most
    half_ns = 1_000_000 * (CYCLES // 4) / kilohertz - LOOK_NS  # at least, whoever else is there
    for step, work in zip(steps, works, strict=True):
        assert step.start_ns + half_ns < work.start_ns < work.end_ns - half_ns
        assert work.end_ns <= step.end_ns


def test_a_span_in_which_no_graph_is_launched_is_none(ring: SpanRing) -> None:
    spans, graph = DeviceSpans(ring, DEVICE), torch.cuda.CUDAGraph()
    with spans.capturing(notes_begin=True), torch.cuda.graph(graph):
        spans.note_begin()
    with pytest.raises(OSError, match="lost"), spans.span_since_graph(SpanKind.COMPUTE):
        raise OSError("lost")
    with spans.span(SpanKind.STEP):
        torch.cuda._sleep(CYCLES // 8)
    spans.flush()
    assert [span.kind for span in ring.read()] == [SpanKind.STEP]


def test_nvtx_ranges_bear_the_names_of_spans(tmp_path: Path) -> None:
    compiler, headers = shutil.which("cc"), nvtx_headers()
    if compiler is None or headers is None:
        pytest.skip("needs a C compiler and the headers of NVTX")
    library, names = tmp_path / "names.so", tmp_path / "names"
    source = Path(__file__).with_name("nvtx_names.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-I{headers}", str(source), "-o", str(library)], check=True
    )
    code = (
        "from bireme import LLM, SamplingParams; import json\n"
        "with LLM('demo', device='cuda') as llm:\n"
        "    llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4))\n"
        "    print(json.dumps(sorted({s.kind.name.lower() for it in llm.spans().values() for s in it})))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NVTX_INJECTION64_PATH": str(library), "NVTX_NAMES": str(names)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    pushed = set(names.read_text().split())
    assert {"step", "compute", "sample"} <= pushed
    assert pushed >= set(json.loads(found.stdout.splitlines()[-1]))


def nvtx_headers() -> Path | None:
    """Of the CUDA toolkit, or of the packages that torch came with."""
    roots = [Path(torch.__file__).parents[1] / "nvidia", Path("/usr/local/cuda/include")]
    found = (path for root in roots for path in root.rglob("nvtx3/nvToolsExt.h"))
    path = next(found, None)
    return None if path is None else path.parents[1]
