"""What a rank's process holds, by kind: its own account of its memory, on its host and on its GPU.

A tensor of a CPU takes a page of memory when it is first written, and may lose it to the disk again: what is
resident is asked of the kernel (mincore, /proc/self), not computed.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from bireme.engine.messages import RankUsage

_SHARED = ("/memfd:bireme-world", "/memfd:bireme-steps")  # what ranks talk through
_KIB = 1024
_RESET_PEAK = "5"  # of /proc/self/clear_refs


def usage(
    device: torch.device,
    weights: Iterable[torch.Tensor],
    cache: Iterable[torch.Tensor],
    device_communication_bytes: int,
) -> RankUsage:
    """At rest: what the allocator keeps free is given back to the host first."""
    peak_bytes = _peak_bytes(device)
    if device.type == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
    rollup = _fields(Path("/proc/self/smaps_rollup"))
    is_cuda = device.type == "cuda"
    free, total = torch.cuda.mem_get_info(device) if is_cuda else (0, 0)
    counts = torch.cuda.memory_stats(device) if is_cuda else {}
    rest_bytes = torch.cuda.memory_allocated(device) if is_cuda else rollup.get("Rss", 0)
    return RankUsage(
        rss_bytes=rollup.get("Rss", 0),
        pss_bytes=rollup.get("Pss", 0),
        shared_bytes=rollup.get("Pss_Shmem", 0),
        swapped_bytes=rollup.get("Swap", 0),
        num_major_faults=resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        weight_resident_bytes=sum(map(resident_bytes, weights)),
        cache_resident_bytes=sum(map(resident_bytes, cache)),
        communication_bytes=device_communication_bytes if is_cuda else _mapped_bytes(_SHARED),
        beyond_rest_bytes=None if peak_bytes is None else max(0, peak_bytes - rest_bytes),
        device_used_bytes=total - free if is_cuda else None,
        reserved_bytes=torch.cuda.memory_reserved(device) if is_cuda else None,
        num_alloc_retries=counts.get("num_alloc_retries", 0) if is_cuda else None,
    )


def reset_peak(device: torch.device) -> None:
    """From here on `usage` says what was held beyond rest."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # a host that does not tell: `_peak_bytes` says so
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)


def _peak_bytes(device: torch.device) -> int | None:
    """Since `reset_peak`; None where it cannot be reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with Path("/proc/self/clear_refs").open("w"):
            return _fields(Path("/proc/self/status"))["VmHWM"]
    except (OSError, KeyError):
        return None


def resident_bytes(tensor: torch.Tensor) -> int:
    """Of a CPU's tensor, what of its pages is in memory; of a GPU's all."""
    num_bytes = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or not num_bytes:
        return num_bytes
    start = torch.ops.mkldnn.data_ptr(tensor) if tensor.is_mkldnn else tensor.data_ptr()
    first = start - start % mmap.PAGESIZE
    num_pages = -(-(start + num_bytes - first) // mmap.PAGESIZE)
    pages = np.zeros(num_pages, np.uint8)
    address, length = ctypes.c_void_p(first), ctypes.c_size_t(num_pages * mmap.PAGESIZE)
    if ctypes.CDLL(None).mincore(address, length, ctypes.c_void_p(pages.ctypes.data)):
        return num_bytes
    return min(num_bytes, int((pages & 1).sum(dtype=np.int64)) * mmap.PAGESIZE)


def _fields(path: Path) -> dict[str, int]:
    """Lines like 'Pss:  475 kB', in bytes."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {
        words[0].rstrip(":"): int(words[1]) * _KIB
        for words in lines
        if len(words) == 3 and words[2] == "kB"
    }


def _mapped_bytes(names: tuple[str, ...]) -> int:
    """This process's share of what is mapped under these names: pages in memory, over who shares them."""
    found, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            is_ours = len(words) > 5 and words[5].startswith(names)
        elif is_ours and words[0] == "Pss:":
            found += int(words[1]) * _KIB
    return found
