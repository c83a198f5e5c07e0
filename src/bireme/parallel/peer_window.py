"""Addresses that go on from one GPU's memory into another's, so that one product, which knows nothing of it, writes
each row to the rank that it is for."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from bireme.errors import EngineError
from bireme.parallel.attempts import made_by_all
from bireme.parallel.driver import call_driver

_INSTEAD = "for sums of prompts ranks read each other's rows, and do not write them"
_GRANULE = 2 << 20  # bytes that a GPU maps at once


def open_window(
    num_bytes: int,
    ranks: Sequence[int],
    rank: int,
    device: torch.device,
    store: Store,
    timeout_s: float,
) -> Window | None:
    """Made by two ranks together, with room for `num_bytes` in a part. None where the driver of one of them refuses,
    which its log tells: both do without then."""
    part_bytes = -(-num_bytes // _GRANULE) * _GRANULE
    index = list(ranks).index(rank)
    with ExitStack() as handles:  # what is mapped stays when its handle goes

        def allocate() -> tuple[Any, Any, int]:
            own, from_peer = (_allocate(part_bytes, device, handles) for _ in range(2))
            return own, from_peer, _exported(from_peer, handles)

        made = made_by_all(allocate, "allocated", _INSTEAD, ranks, rank, store)
        if made is None:
            return None
        own, from_peer, exported = made

        def window() -> Window:
            for_peer = _imported(swap(exported, index, store, timeout_s), handles)
            return Window(own, for_peer, from_peer, index, part_bytes, device)

        return made_by_all(window, "mapped", _INSTEAD, ranks, rank, store)


class Window:
    """Of one of two ranks: `memory`, uint8, whose first `part_bytes` are the first rank's and the others the second's,
    both to be filled by this rank; `sources` are the addresses here of what the first and what the second rank filled
    for this one. Valid for as long as this object lives."""

    def __init__(
        self,
        own: Any,
        for_peer: Any,
        from_peer: Any,
        index: int,
        part_bytes: int,
        device: torch.device,
    ) -> None:
        self.part_bytes = part_bytes
        parts = [own, for_peer] if index == 0 else [for_peer, own]
        start = _map([*parts, from_peer], part_bytes, device)
        weakref.finalize(self, _unmap, start, 3 * part_bytes, device).atexit = False
        storage = torch._C._construct_storage_from_data_pointer(start, device, 2 * part_bytes)
        self.memory = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        self.sources = [start + 2 * part_bytes] * 2
        self.sources[index] = start + index * part_bytes


def _allocate(num_bytes: int, device: torch.device, handles: ExitStack) -> Any:
    """A handle of memory of a GPU, which another process can be given."""
    from cuda.bindings import driver

    asked = driver.CUmemAllocationProp()
    asked.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    asked.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    asked.location.id = device.index
    asked.requestedHandleTypes = _shareable()
    handle = call_driver("cuMemCreate", num_bytes, asked, 0)
    handles.callback(call_driver, "cuMemRelease", handle)
    return handle


def _exported(handle: Any, handles: ExitStack) -> int:
    """An open file that another process can make a handle of."""
    fd = int(call_driver("cuMemExportToShareableHandle", handle, _shareable(), 0))
    handles.callback(os.close, fd)
    return fd


def _imported(fd: int, handles: ExitStack) -> Any:
    """A handle of what another rank exported; closes the file."""
    try:
        imported = call_driver("cuMemImportFromShareableHandle", fd, _shareable())
    finally:
        os.close(fd)
    handles.callback(call_driver, "cuMemRelease", imported)
    return imported


def swap(fd: int, index: int, store: Store, timeout_s: float) -> int:
    """Gives the other of two ranks of a host an open file for one of its own, which the caller closes."""
    try:
        with _connected(index, store, timeout_s) as link:
            socket.send_fds(link, [b"\0"], [fd])
            received = socket.recv_fds(link, 1, 1)[1]
    except OSError as error:
        raise EngineError(f"two GPUs' ranks cannot exchange memory for sums: {error}") from error
    if not received:
        raise EngineError("two GPUs' ranks cannot exchange memory for sums: one left before")
    return received[0]


def _connected(index: int, store: Store, timeout_s: float) -> socket.socket:
    """To the other rank, over a socket that no other user can reach; OSError on both where the first cannot listen."""
    if index:
        path = store.get("socket").decode()
        if not path:
            raise ConnectionRefusedError("the other rank cannot listen")
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(timeout_s)
        try:
            link.connect(path)
        except OSError:
            link.close()
            raise
        return link
    with ExitStack() as until_met:
        try:
            folder = until_met.enter_context(TemporaryDirectory(prefix="bireme-"))
            listening = until_met.enter_context(socket.socket(socket.AF_UNIX))
            path = str(Path(folder) / "window")
            listening.settimeout(timeout_s)
            listening.bind(path)
            listening.listen(1)
        except OSError:
            store.set("socket", "")
            raise
        store.set("socket", path)
        link = listening.accept()[0]
    link.settimeout(timeout_s)
    return link


def _map(parts: Sequence[Any], part_bytes: int, device: torch.device) -> int:
    """Where they lie, one behind the other."""
    from cuda.bindings import driver

    num_bytes = len(parts) * part_bytes
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device.index
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    with ExitStack() as undo:
        start = int(call_driver("cuMemAddressReserve", num_bytes, 0, 0, 0))
        undo.callback(call_driver, "cuMemAddressFree", start, num_bytes)
        for at, part in enumerate(parts):
            call_driver("cuMemMap", start + at * part_bytes, part_bytes, 0, part, 0)
            undo.callback(call_driver, "cuMemUnmap", start + at * part_bytes, part_bytes)
        call_driver("cuMemSetAccess", start, num_bytes, [access], 1)
        undo.pop_all()
    return start


def _unmap(start: int, num_bytes: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a product may be writing there
    call_driver("cuMemUnmap", start, num_bytes)
    call_driver("cuMemAddressFree", start, num_bytes)


def _shareable() -> Any:
    from cuda.bindings import driver

    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
