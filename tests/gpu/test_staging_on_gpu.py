"""What goes to a GPU through pinned memory is there, bit by bit, wherever it is put."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bireme.checkpoint.reader import Bits
from bireme.checkpoint.staging import BITS, Staging
from bireme.parallel.boxes import Box, as_slices, full_box

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda:0")


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("here", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((3000, 4096), full_box((3000, 4096))),  # more than its buffers hold
        ((700, 900), ((100, 650), (7, 800))),
        ((2, 5_000_000), ((1, 2), (3, 4_999_000))),  # a row of more than a buffer
        ((17,), ((2, 11),)),
        ((), ()),
    ],
    ids=str,
)
def test_a_box_is_what_the_source_has(
    there: torch.dtype, here: torch.dtype, shape: tuple[int, ...], box: Box
) -> None:
    """In a place within a larger tensor, behind what was done to it before."""
    whole = torch.randn(shape).to(there)
    bits = whole.view(BITS[there.itemsize]).numpy()
    size = tuple(stop - start for start, stop in box)
    larger = torch.full([edge + 3 for edge in size], torch.nan, device=DEVICE, dtype=here)
    larger.zero_()
    staging = Staging(DEVICE)
    place = tuple(slice(1, edge + 1) for edge in size)

    def read(part: Box, out: Bits) -> None:
        np.copyto(out, bits[as_slices(part)])

    for _ in range(2):
        staging.fill(larger[place], box, there, read)
    torch.cuda.synchronize(DEVICE)
    assert torch.equal(larger[place].cpu(), whole[as_slices(box)].to(here))
    assert int(larger.count_nonzero()) == int(whole[as_slices(box)].to(here).count_nonzero())
