"""What the driver tells all ranks at once: in order, of any length, and no slow rank goes unnamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bireme.engine.channel import QueueSteps, RingSteps, Steps, open_channel, open_source
from bireme.engine.messages import Execute, Masks, encode
from bireme.engine.worker import Commands
from bireme.errors import EngineError, PeerLost
from bireme.parallel import broadcast
from bireme.parallel.broadcast import RingPlan
from bireme.parallel.counters import create_memory
from bireme.parallel.shm_helper import load_helper
from bireme.request import ScheduledBatch, StepMasks

KINDS = ["compiled ring", "ring from Python", "queues"]


@contextmanager
def steps_of(kind: str, num_ranks: int, capacity: int = 1 << 12) -> Iterator[Steps]:
    if kind == "queues":
        with TemporaryDirectory() as folder:
            yield QueueSteps(tuple(f"ipc://{folder}/{rank}" for rank in range(num_ranks)))
        return
    is_compiled = kind == "compiled ring"
    if is_compiled and load_helper() is None:
        pytest.skip("no C compiler here")
    plan = RingPlan(num_readers=num_ranks, capacity=capacity, is_compiled=is_compiled)
    fd, path = create_memory(plan.num_bytes, "steps")
    yield RingSteps(path, plan)
    os.close(fd)


def no_wait(rank: int) -> None:
    """The readers are there, and will take what there is."""


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 300) | st.integers(0, 20_000), max_size=30),
    num_ranks=st.integers(1, 4),
    capacity=st.sampled_from([64, 1 << 10, 1 << 16]),
)
def test_every_rank_gets_every_frame_in_order(
    kind: str, sizes: list[int], num_ranks: int, capacity: int
) -> None:
    frames = [bytes([at % 251]) * size for at, size in enumerate(sizes)]
    with steps_of(kind, num_ranks, capacity) as steps, ThreadPoolExecutor(num_ranks) as threads:
        channel = open_channel(steps)

        def read(rank: int) -> list[bytes]:
            source = open_source(steps, rank)
            found = [bytes(source.receive() or b"") for _ in frames]
            assert source.receive(0.001) is None
            source.close()
            return found

        readers = [threads.submit(read, rank) for rank in range(num_ranks)]
        for frame in frames:
            channel.send(frame, no_wait)
        for reader in readers:
            assert reader.result(timeout=60) == frames
        channel.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_takes_nothing_is_the_one_that_is_watched(kind: str) -> None:
    class Enough(Exception):
        pass

    def watch(rank: int) -> None:
        raise Enough(rank)

    with steps_of(kind, 3) as steps:
        channel = open_channel(steps)
        sources = [open_source(steps, rank) for rank in range(3)]

        def send_many() -> None:
            for _ in range(1000):
                channel.send(bytes(1000), watch)
                for rank in (0, 2):
                    sources[rank].receive()

        with pytest.raises(Enough, match="1"):
            send_many()
        for end in (channel, *sources):
            end.close()


@pytest.mark.parametrize("kind", KINDS)
def test_no_frame_is_longer_than_the_limit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "MAX_FRAME_BYTES", 10)
    with steps_of(kind, 1) as steps:
        channel = open_channel(steps)
        with pytest.raises(EngineError, match="11 bytes exceeds the limit of 10"):
            channel.send(bytes(11), no_wait)
        channel.close()


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_taken_out_of_turn_and_early_ones_are_kept(kind: str) -> None:
    batches = [ScheduledBatch(0, step, [], []) for step in range(3)]
    masks = {step: StepMasks(0, step, [step], [bytes([step])]) for step in (0, 1)}
    with steps_of(kind, 1) as steps:
        channel, commands = open_channel(steps), Commands()
        commands.follow(open_source(steps, 0))
        for command in (
            Execute(batches[0]), Execute(batches[1]), Masks(masks[1]), Execute(batches[2]), Masks(masks[0]),
        ):  # fmt: skip
            channel.send(encode(command), no_wait)
        assert commands.next() == Execute(batches[0])
        assert commands.await_masks((0, 0), 10.0) == masks[0]
        assert commands.next() == Execute(batches[1])
        assert commands.await_masks((0, 1), 10.0) == masks[1]
        assert commands.next() == Execute(batches[2])
        with pytest.raises(PeerLost, match="masks of step 2"):
            commands.await_masks((0, 2), 0.01)
        commands.follow(None)
        channel.close()


def test_nothing_is_left_of_a_ring(tmp_path: Path) -> None:
    with steps_of("ring from Python", 1) as steps:
        assert isinstance(steps, RingSteps)
        assert Path(steps.path).exists()
    assert not Path(steps.path).exists()
