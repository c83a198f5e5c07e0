"""Messages between two stages through one another's memory, between two real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from bireme.errors import EngineError
from bireme.kernels.device_spans import DeviceSpans
from bireme.parallel.collectives import Communicator, join
from bireme.parallel.links import Receiver
from bireme.parallel.peer_memory import PeerReceiver, PeerSender
from bireme.parallel.peer_room import PeerRoom
from bireme.trace import SpanRing

pytestmark = pytest.mark.gpu
NUM_ROWS, WIDTH, NUM_SLOTS = 300, 4096, 33
NUM_STEPS = 40  # a ring of three slots many times over
PAUSE_CYCLES = 3_000_000  # over a millisecond


def rows(step: int, device: torch.device) -> torch.Tensor:
    """[T, D] of a step, of varying T."""
    generator = torch.Generator().manual_seed(step)
    count = 1 + (step * 37) % NUM_ROWS
    return torch.randn(count, WIDTH, generator=generator).bfloat16().to(device)


def ids(step: int, device: torch.device) -> torch.Tensor:
    return torch.arange(NUM_SLOTS, device=device) + 1000 * step


def first(comm: Communicator, device: torch.device) -> None:
    """Sends from memory that it overwrites right behind, and takes ids two steps later."""
    assert comm.sampled_receiver is not None
    place = torch.empty(NUM_ROWS, WIDTH, dtype=torch.bfloat16, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for step in range(NUM_STEPS):
        made = rows(step, device)
        place[: len(made)] = made
        comm.hidden_sender.send((0, step), place[: len(made)])
        place.fill_(torch.nan)
        if step >= 2:
            got = comm.sampled_receiver.receive((0, step - 2), (NUM_SLOTS,), torch.int64, device)
            wrong += (got != ids(step - 2, device)).sum()
    comm.hidden_sender.send((0, NUM_STEPS), place[:1])
    assert int(wrong) == 0
    comm.hidden_sender.drain()


def take_another_step(receiver: Receiver, device: torch.device) -> None:
    """Whether it is another shows at once, or at the end."""
    receiver.receive((0, NUM_STEPS + 1), (1, WIDTH), torch.bfloat16, device)
    receiver.finish()


def last(comm: Communicator, device: torch.device) -> None:
    """Is slow now and then, and at last expects another step than the one that comes."""
    assert comm.hidden_receiver is not None
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    place = torch.empty(NUM_SLOTS, dtype=torch.int64, device=device)
    for step in range(NUM_STEPS):
        if step % 5 == 0:
            torch.cuda._sleep(PAUSE_CYCLES)
        expected = rows(step, device)
        got = comm.hidden_receiver.receive((0, step), tuple(expected.shape), expected.dtype, device)
        wrong += (got != expected).sum()
        place.copy_(ids(step, device))
        comm.sampled_sender.send((0, step), place)
        place.fill_(-1)
    assert int(wrong) == 0
    comm.hidden_receiver.finish()
    with pytest.raises(EngineError, match="which expected"):
        take_another_step(comm.hidden_receiver, device)


def work(rank: int, meeting: str, devices: tuple[int, int]) -> None:
    device = torch.device("cuda", devices[rank])
    room = PeerRoom(hidden_bytes=2 * NUM_ROWS * WIDTH, sampled_bytes=8 * NUM_SLOTS)
    spans = DeviceSpans(SpanRing.create(1 << 12), device)
    comm = join((1, 1), rank, Path(meeting), device, 60.0, spans, room=room)
    for sender in (comm.hidden_sender, comm.sampled_sender):
        assert isinstance(sender, PeerSender)
    for receiver in (comm.hidden_receiver, comm.sampled_receiver):
        assert receiver is None or isinstance(receiver, PeerReceiver)
    (first, last)[rank](comm, device)
    torch.cuda.synchronize(device)
    comm.leave()


def test_both_ways_at_once_with_messages_overwritten_behind(
    tmp_path: Path, peers: tuple[int, int]
) -> None:
    multiprocessing.spawn(work, (str(tmp_path / "meeting"), peers), nprocs=2)
