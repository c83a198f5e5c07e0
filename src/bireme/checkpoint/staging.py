"""Tensors on their way to a GPU: what is read goes through pinned memory, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bireme.checkpoint.reader import Bits
from bireme.parallel.boxes import Box, as_slices, box_shape, relative, volume

BITS = {2: torch.uint16, 4: torch.uint32}
_PART_BYTES = 4 << 20


def parts(box: Box, most: int) -> Iterator[Box]:
    """Boxes of at most `most` elements, one behind the other, that together are the box."""
    if volume(box) <= most:
        yield box
        return
    dim = next(dim for dim, (start, stop) in enumerate(box) if stop - start > 1)
    start, stop = box[dim]
    step = max(1, most // volume(box[dim + 1 :]))
    for at in range(start, stop, step):
        yield from parts((*box[:dim], (at, min(stop, at + step)), *box[dim + 1 :]), most)


class Staging:
    """Of one thread: while one of its two buffers is copied to the device, the other is filled. What the device was
    told before it was made comes before all copies."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)  # of this thread
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.default_stream(device))
        self._buffers = [
            (torch.empty(_PART_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
            for _ in range(2)
        ]

    def fill(
        self, target: torch.Tensor, box: Box, dtype: torch.dtype, read: Callable[[Box, Bits], None]
    ) -> None:
        """`read` gives the bits of a part of the box, which are of `dtype`. The target is whole once the device has
        done all that it was told."""
        for part in parts(box, _PART_BYTES // dtype.itemsize):
            buffer, copied = self._buffers[0]
            self._buffers.reverse()
            copied.synchronize()
            here = buffer[: volume(part) * dtype.itemsize].view(dtype).view(box_shape(part))
            read(part, here.view(BITS[dtype.itemsize]).numpy())
            place = target[as_slices(relative(part, box))]
            with torch.cuda.stream(self._stream):
                given = here if place.dtype == dtype else here.to(place.device, non_blocking=True)
                place.copy_(given, non_blocking=True)
                copied.record(self._stream)
