"""Addresses that go on from one GPU's memory into another's, so that one product, which knows nothing of it, writes
each row to the rank that it is for."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from bireme.errors import EngineError

_GRANULE = 2 << 20  # bytes that a GPU maps at once


def all_can_map(ranks: Sequence[int], rank: int, store: Store) -> bool:
    """Whether all `ranks` can call the driver's memory mapping: torch's builds for CUDA bring what it takes."""
    try:
        from cuda.bindings import driver  # noqa: F401
    except ImportError:
        can = "0"
    else:
        can = "1"
    store.set(f"can/{rank}", can)
    return all(store.get(f"can/{peer}") == b"1" for peer in ranks)


class Window:
    """Of one of two ranks: `memory`, uint8, whose first `part_bytes` are the first rank's and the others the second's,
    both to be filled by this rank; `sources` are the addresses here of what the first and what the second rank filled
    for this one. Room for `num_bytes` in a part; valid for as long as this object lives. Both ranks make it together.
    """

    def __init__(
        self, num_bytes: int, index: int, device: torch.device, store: Store, timeout_s: float
    ) -> None:
        self.part_bytes = part_bytes = -(-num_bytes // _GRANULE) * _GRANULE
        own, from_peer = (_allocate(part_bytes, device) for _ in range(2))
        for_peer = _exchange(from_peer, index, store, timeout_s)
        parts = [own, for_peer] if index == 0 else [for_peer, own]
        start = _map([*parts, from_peer], part_bytes, device)
        weakref.finalize(self, _unmap, start, 3 * part_bytes, device).atexit = False
        storage = torch._C._construct_storage_from_data_pointer(start, device, 2 * part_bytes)
        self.memory = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        self.sources = [start + 2 * part_bytes] * 2
        self.sources[index] = start + index * part_bytes


def _allocate(num_bytes: int, device: torch.device) -> Any:
    """A handle of memory of a GPU, which another process can be given."""
    from cuda.bindings import driver

    asked = driver.CUmemAllocationProp()
    asked.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    asked.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    asked.location.id = device.index
    asked.requestedHandleTypes = _shareable()
    return _call("cuMemCreate", num_bytes, asked, 0)


def _exchange(handle: Any, index: int, store: Store, timeout_s: float) -> Any:
    """Gives the other rank a handle for its own."""
    own = int(_call("cuMemExportToShareableHandle", handle, _shareable(), 0))
    try:
        other = swap(own, index, store, timeout_s)
    finally:
        os.close(own)
    try:
        return _call("cuMemImportFromShareableHandle", other, _shareable())
    finally:
        os.close(other)


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
    """To the other rank, over a socket that no other user can reach."""
    if index:
        path = store.get("socket").decode()
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(timeout_s)
        try:
            link.connect(path)
        except OSError:
            link.close()
            raise
        return link
    with TemporaryDirectory(prefix="bireme-") as folder, socket.socket(socket.AF_UNIX) as listening:
        path = str(Path(folder) / "window")
        listening.settimeout(timeout_s)
        listening.bind(path)
        listening.listen(1)
        store.set("socket", path)
        link = listening.accept()[0]
    link.settimeout(timeout_s)
    return link


def _map(parts: Sequence[Any], part_bytes: int, device: torch.device) -> int:
    """Where they lie, one behind the other. What is mapped stays when its handle goes."""
    from cuda.bindings import driver

    num_bytes = len(parts) * part_bytes
    start = int(_call("cuMemAddressReserve", num_bytes, 0, 0, 0))
    for at, part in enumerate(parts):
        _call("cuMemMap", start + at * part_bytes, part_bytes, 0, part, 0)
        _call("cuMemRelease", part)
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device.index
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    _call("cuMemSetAccess", start, num_bytes, [access], 1)
    return start


def _unmap(start: int, num_bytes: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a product may be writing there
    _call("cuMemUnmap", start, num_bytes)
    _call("cuMemAddressFree", start, num_bytes)


def _shareable() -> Any:
    from cuda.bindings import driver

    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _call(name: str, *arguments: Any) -> Any:
    """What a function of the driver made; EngineError if it failed."""
    from cuda.bindings import driver

    error, *made = getattr(driver, name)(*arguments)
    if int(error):
        raise EngineError(f"memory for sums of two GPUs cannot be had: {name} says {error.name}")
    return made[0] if made else None
