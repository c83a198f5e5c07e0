"""How much of a tensor group's sums hides behind the products of other rows, on two GPUs.

    python benchmarks/hidden_sums.py --name 2x-h200 [--rows 1024,2048,3584] [--models llama-2-7b llama-3-70b]

The products of a rank's layers, attention left out, with random weights, of as many layers as a 70B model has, so that
GPUs come to the limit of their power: alone; with the sums, residuals and norms that prompts have now (each rank a
share of the rows, by its multiprocessors); and with the rows in lanes, of which one is summed while another is
multiplied: a copy engine brings each rank's addends to the other, and a value in memory that the stream itself waits
for tells that they are there, so that no multiprocessor waits. What they make in the first layers is compared with
what plain sums do. Medians of milliseconds a layer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import record
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from gpu_floors import model_folder, numbers
from torch._C._distributed_c10d import PrefixStore, _SymmetricMemory
from torch.multiprocessing.spawn import spawn

from bireme.checkpoint.prepared import prepare_model
from bireme.kernels.device_spans import DeviceSpans
from bireme.kernels.functional import rms_norm_reference
from bireme.kernels.gpu.gated import silu_mul
from bireme.kernels.linear import linear
from bireme.model_config import ModelConfig
from bireme.parallel.collectives import join
from bireme.parallel.mesh import TensorGroup
from bireme.parallel.peer_group import PeerGroup
from bireme.parallel.peer_memory import mapped
from bireme.parallel.peer_room import PeerRoom
from bireme.trace import SpanRing

DTYPE, EPS = torch.bfloat16, 1e-5
NUM_LAYERS, NUM_CHECKED, ROUNDS, MOST_LANES = 80, 8, 5, 4
FLAG_BYTES = 512


@triton.jit
def add_two_norm_kernel(x, own, other, weight, out, eps, D: tl.constexpr, SIZE: tl.constexpr):
    """x += own + other, rounded as a separate sum is; out is its RMSNorm."""
    at = tl.program_id(0).to(tl.int64) * D + tl.arange(0, SIZE)
    inside = tl.arange(0, SIZE) < D
    dtype: tl.constexpr = x.dtype.element_ty
    added = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    kept = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    made = (kept + added.to(dtype).to(tl.float32)).to(dtype)
    tl.store(x + at, made, mask=inside)
    value = made.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    scale = tl.load(weight + tl.arange(0, SIZE), mask=inside, other=0.0)
    tl.store(out + at, value.to(dtype) * scale, mask=inside)


class Exchange:
    """Addends of two ranks, each brought to the other whole. Two places a lane: a rank fills one again when it has had
    what the other made of what lay there."""

    def __init__(
        self,
        memory: torch.Tensor,
        handle: _SymmetricMemory,
        lane_bytes: int,
        *,
        writes_flags: bool,
    ) -> None:
        self._own, peer = memory, 1 - handle.rank
        self._peer = handle.get_buffer(peer, memory.shape, torch.uint8)
        self._lane_bytes, self._writes_flags = lane_bytes, writes_flags
        self._counts = [0] * MOST_LANES
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._numbers = torch.arange(1 << 16, dtype=torch.int32, device=memory.device)
        self.stream = torch.cuda.Stream(memory.device, priority=-1)

    def send(self, lane: int, addend: torch.Tensor) -> None:
        self._counts[lane] += 1
        count, flat = self._counts[lane], addend.view(torch.uint8).flatten()
        self.stream.wait_stream(torch.cuda.current_stream())
        addend.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            start = self._place(lane)
            self._peer[start : start + len(flat)].copy_(flat, non_blocking=True)
            flag = self._peer[4 * lane : 4 * lane + 4].view(torch.int32)
            if self._writes_flags:
                self._tell("cuStreamWriteValue32_v2", self.stream, flag, count)
            else:
                flag.copy_(self._numbers[count : count + 1], non_blocking=True)

    def receive(self, lane: int, shape: tuple[int, int]) -> torch.Tensor:
        """What the other rank sent; the current stream waits for it."""
        flag = self._own[4 * lane : 4 * lane + 4]
        self._tell("cuStreamWaitValue32_v2", torch.cuda.current_stream(), flag, self._counts[lane])
        start = self._place(lane)
        num_bytes = shape[0] * shape[1] * DTYPE.itemsize
        return self._own[start : start + num_bytes].view(DTYPE).view(shape)

    def _place(self, lane: int) -> int:
        return FLAG_BYTES + (2 * lane + self._counts[lane] % 2) * self._lane_bytes

    def _tell(self, name: str, stream: torch.cuda.Stream, flag: torch.Tensor, count: int) -> None:
        error = getattr(self._driver, name)(
            ctypes.c_void_p(stream.cuda_stream), ctypes.c_uint64(flag.data_ptr()),
            ctypes.c_uint32(count), ctypes.c_uint(0),
        )  # fmt: skip
        if error:
            raise RuntimeError(f"{name} failed with the driver's error {error}")


@dataclass(frozen=True)
class Phase:
    """The products between two sums: attention's without attention itself, or the MLP's, whose halves are gated."""

    first: torch.Tensor
    second: torch.Tensor

    def __call__(self, x: torch.Tensor, group: TensorGroup | None = None) -> torch.Tensor:
        """Addends [T, D] of rows [T, D], where the group has them best."""
        middle, width = linear(x, self.first), self.second.shape[1]
        is_gated = self.first.shape[0] == 2 * width
        middle = silu_mul(middle) if is_gated else middle[:, :width]
        shape = len(middle), len(self.second)
        place = None if group is None else group.place_of_addends(*shape, DTYPE)
        return torch.mm(middle, self.second.T, out=place)


@dataclass(frozen=True)
class Layers:
    """A rank's; two sets of weights, in turn, so that none is in a cache."""

    phases: list[Phase]
    norm: torch.Tensor

    @classmethod
    def of(cls, config: ModelConfig, device: torch.device) -> Layers:
        hidden, width = config.hidden_size, config.intermediate_size // 2
        heads, kv = (
            count * config.head_dim // 2 for count in (config.num_heads, config.num_kv_heads)
        )

        def weight(rows: int, columns: int) -> torch.Tensor:
            drawn = torch.randn(rows, columns, device=device)
            return drawn.mul_(columns**-0.5).to(DTYPE)

        phases = [
            Phase(weight(rows, hidden), weight(hidden, columns))
            for _ in range(2)
            for rows, columns in ((heads + 2 * kv, heads), (2 * width, width))
        ]
        norm = torch.ones(hidden, device=device, dtype=DTYPE)
        return cls(phases * (NUM_LAYERS // 2), norm)

    def first(self) -> Layers:
        """Few enough that roundings stay small."""
        return Layers(self.phases[: 2 * NUM_CHECKED], self.norm)


def alone(layers: Layers, x: torch.Tensor) -> None:
    for phase in layers.phases:
        phase(x)


def as_now(layers: Layers, group: TensorGroup, x: torch.Tensor) -> torch.Tensor:
    normed = x
    for phase in layers.phases:
        addend = phase(normed, group)
        x, normed = group.all_reduce_add_norm(addend, x, layers.norm, EPS)
    return normed


def in_lanes(layers: Layers, exchange: Exchange, x: torch.Tensor, num_lanes: int) -> torch.Tensor:
    parts = list(x.clone().chunk(num_lanes))
    rows, addends = [*parts], [*parts]
    for at, phase in enumerate(layers.phases):
        for lane in range(num_lanes):
            if at:
                rows[lane] = summed(layers, exchange, lane, parts[lane], addends[lane])
            addends[lane] = phase(rows[lane])
            exchange.send(lane, addends[lane])
    return torch.cat(
        [summed(layers, exchange, lane, parts[lane], addends[lane]) for lane in range(num_lanes)]
    )


def summed(
    layers: Layers, exchange: Exchange, lane: int, x: torch.Tensor, addend: torch.Tensor
) -> torch.Tensor:
    other, out = exchange.receive(lane, (x.shape[0], x.shape[1])), torch.empty_like(x)
    width = x.shape[1]
    size = triton.next_power_of_2(width)
    add_two_norm_kernel[(len(x),)](
        x, addend, other, layers.norm, out, EPS, D=width, SIZE=size,
        num_warps=max(1, min(16, size // 512)),
    )  # fmt: skip
    return out


def milliseconds(run: Callable[[], object], group: TensorGroup, device: torch.device) -> float:
    """A layer, the median of some rounds; the host is ahead of the device."""
    found = []
    for at in range(ROUNDS + 1):
        group.all_reduce(torch.zeros(1, 1024, device=device, dtype=DTYPE))
        torch.cuda._sleep(120_000_000)  # some 60 ms, in which the host tells all that follows
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        run()
        marks[1].record()
        torch.cuda.synchronize(device)
        found += [float(marks[0].elapsed_time(marks[1])) / NUM_LAYERS] if at else []
    return statistics.median(found)


def plainly(layers: Layers, group: TensorGroup, x: torch.Tensor, num_lanes: int) -> torch.Tensor:
    """The same one thing after another."""
    expected, normed = x, x
    for phase in layers.phases:
        parts = [phase(part) for part in normed.chunk(num_lanes)]
        expected = expected + group.all_reduce(torch.cat(parts))
        normed = rms_norm_reference(expected, layers.norm, EPS)
    return normed


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, which is of roundings."""
    difference = float((found.float() - expected.float()).abs().max())
    if not difference < 0.1 * float(expected.float().abs().max()):
        raise AssertionError(f"{name} differ by {difference}")
    return difference


def measure(
    rank: int, meeting: str, asked: argparse.Namespace, config: ModelConfig
) -> list[dict[str, Any]]:
    """Of one model's layers."""
    device, counts = torch.device(f"cuda:{rank}"), numbers(asked.rows)
    row_bytes = config.hidden_size * DTYPE.itemsize
    comm = join(
        (2,), rank, Path(meeting), device, 60.0, DeviceSpans(SpanRing.create(1 << 12), device),
        room=PeerRoom(row_bytes=row_bytes, sum_bytes=max(counts) * row_bytes),
    )  # fmt: skip
    group = comm.mesh.tensor
    assert isinstance(group, PeerGroup)
    lane_bytes = -(-max(counts) // 2) * row_bytes
    store = PrefixStore("exchange", dist.distributed_c10d._get_default_store())
    world = dist.group.WORLD
    assert world is not None
    memory, handle = mapped(
        FLAG_BYTES + 2 * MOST_LANES * lane_bytes, (0, 1), world, rank, device, store
    )
    memory.zero_()
    torch.cuda.synchronize(device)
    dist.barrier()
    exchange = Exchange(memory, handle, lane_bytes, writes_flags=asked.write_flags)
    layers, found = Layers.of(config, device), []
    first = layers.first()
    for num_rows in counts:
        generator = torch.Generator(device).manual_seed(num_rows)
        drawn = torch.randn(num_rows, config.hidden_size, device=device, generator=generator)
        x = drawn.to(DTYPE)
        times = {
            "products": milliseconds(partial(alone, layers, x), group, device),
            "as now": milliseconds(partial(as_now, layers, group, x), group, device),
        }
        now = as_now(first, group, x).clone()
        differences = {"as now": check("sums now", now, plainly(first, group, x, 1))}
        for num_lanes in (2, MOST_LANES):
            run, name = partial(in_lanes, layers, exchange, x, num_lanes), f"{num_lanes} lanes"
            times[name] = milliseconds(run, group, device)
            for at in range(
                ROUNDS
            ):  # other rows each time: what a place still has of before is seen
                other = x.roll(at + 1, 0)
                expected = plainly(first, group, other, num_lanes)
                made = in_lanes(first, exchange, other, num_lanes)
                differences[name] = check(name, made, expected)
        found.append({"rows": num_rows, "largest_difference": differences, "ms": times})
        if not rank:
            print(found[-1], flush=True)
    comm.leave()
    return found


def work(rank: int, meeting: str, asked: argparse.Namespace, kept: str) -> None:
    torch.cuda.set_device(rank)
    found = []
    for model in asked.models:
        config = prepare_model(model_folder(model), needs_weights=False).config
        of_model = measure(rank, f"{meeting}-{model}", asked, config)
        found += [{"model": model, **one} for one in of_model]
    if not rank:
        Path(kept).write_text(json.dumps(found))


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """In Markdown."""
    names = list(found[0]["ms"])
    lines = ["| ms a layer | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for one in found:
        times = " | ".join(f"{one['ms'][name]:.3f}" for name in names)
        lines.append(f"| {one['model']}, {one['rows']} rows | {times} |")
    return lines


def main() -> None:
    parser = command_line.parser_of(__doc__)
    command_line.add_name(parser)
    parser.add_argument(
        "--models", nargs="+", type=command_line.shape, default=["llama-2-7b", "llama-3-70b"]
    )
    parser.add_argument("--rows", type=command_line.counts, default="1024,2048,3584")
    parser.add_argument("--write-flags", action="store_true", help="by the stream, not by a copy")
    asked = parser.parse_args()
    if any(count % MOST_LANES for count in numbers(asked.rows)):
        parser.error(f"--rows {asked.rows}: numbers of rows are multiples of {MOST_LANES}")
    command_line.need_gpus(parser, 2)
    with tempfile.TemporaryDirectory() as folder:
        kept = f"{folder}/found.json"
        spawn(work, (f"{folder}/meeting", asked, kept), nprocs=2)
        found = json.loads(Path(kept).read_text())
    print("\n".join(table(found)))
    record.write(
        f"hidden-sums-{asked.name}", ["torch", "triton"],
        {"rows": found, "table": table(found)},
    )  # fmt: skip


if __name__ == "__main__":
    main()
