"""How two ranks of a host exchange what they map of each other."""

from __future__ import annotations

import os
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from bireme.errors import EngineError
from bireme.parallel.peer_window import open_window, swap

TIMEOUT_S = 20.0


def test_each_gets_the_file_of_the_other(tmp_path: Path) -> None:
    store = HashStore()

    def exchanged(index: int) -> str:
        own = tmp_path / f"of {index}"
        own.write_text(own.name)
        with own.open() as file:
            received = swap(file.fileno(), index, store, TIMEOUT_S)
        with os.fdopen(received) as other:
            return other.read()

    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(exchanged, (0, 1))) == ["of 1", "of 0"]
    assert not Path(store.get("socket").decode()).exists()


def test_a_rank_that_does_not_come_is_waited_for_no_longer() -> None:
    with pytest.raises(EngineError, match="cannot exchange memory for sums: timed out"):
        swap(0, 0, HashStore(), 0.1)


def test_both_end_at_once_where_one_cannot_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_long = tmp_path / ("long" * 30)  # for the address of a socket
    too_long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(too_long))
    store = HashStore()
    with ThreadPoolExecutor(2) as ranks:
        first, second = (ranks.submit(swap, 0, index, store, TIMEOUT_S) for index in (0, 1))
        with pytest.raises(EngineError, match="AF_UNIX path too long"):
            first.result()
        with pytest.raises(EngineError, match="the other rank cannot listen"):
            second.result()


def test_a_rank_that_leaves_before_it_gives_anything(tmp_path: Path) -> None:
    store = HashStore()
    with socket.socket(socket.AF_UNIX) as listening, ThreadPoolExecutor(1) as rank:
        listening.bind(str(tmp_path / "socket"))
        listening.listen(1)
        store.set("socket", str(tmp_path / "socket"))
        left = rank.submit(swap, 0, 1, store, TIMEOUT_S)
        link = listening.accept()[0]
        assert link.recv(1) == b"\0"
        link.close()
        with pytest.raises(EngineError, match="one left before"):
            left.result()


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of a GPU could be had")
def test_both_do_without_where_one_has_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    store = HashStore()
    store.set("allocated/1", "1")
    device = torch.device("cuda:0")
    assert open_window(1, (0, 1), 0, device, store, TIMEOUT_S) is None
    assert store.get("allocated/0") == b"0"
    assert "ranks read each other's rows, and do not write them" in caplog.text
