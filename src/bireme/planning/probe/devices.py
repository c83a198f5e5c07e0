"""What each device does by itself, while all others do the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from bireme.cluster.topology import Curve, Device, Point, Product
from bireme.planning.probe.driver import ProbedWorld
from bireme.planning.probe.messages import (
    CopyMemory,
    Facts,
    Launch,
    Multiply,
    ReadMemory,
    ReadPageCache,
)
from bireme.planning.probe.plan import ProbePlan
from bireme.planning.probe.statistics import rounded

Advance = Callable[[int], None]  # takes how many more points are done


def measure_devices(
    world: ProbedWorld, plan: ProbePlan, devices: Sequence[str], folder: Path, advance: Advance
) -> tuple[Device, ...]:
    """`folder` takes a file that is read; a device is one of `devices`, as torch calls them."""
    facts = world.facts()
    launch = world.local(Launch(), 1, plan.budget_s)
    advance(1)
    read = world.local(ReadMemory(plan.memory_bytes), plan.memory_bytes, plan.budget_s)
    advance(1)
    copy = world.local(CopyMemory(plan.memory_bytes), 2 * plan.memory_bytes, plan.budget_s)
    advance(1)
    _write_checkpoint(folder, plan.file_bytes)
    cached = world.local(ReadPageCache(str(folder)), plan.file_bytes, plan.budget_s)
    advance(1)
    products = _measure_products(world, plan, advance)
    return tuple(
        Device(
            name=_name(device, rank),
            kind="cuda" if device.startswith("cuda") else "cpu",
            model=facts[rank].model,
            memory_bytes=_memory_bytes(device, facts, rank),
            num_threads=facts[rank].num_threads or None,
            flop_per_s=_best_rates(products[rank]),
            memory_bytes_per_s=rounded(read[rank].size_per_s),
            launch=(launch[rank],),
            memory_read=(read[rank],),
            memory_copy=(copy[rank],),
            page_cache_read=(cached[rank],),
            products=products[rank],
        )
        for rank, device in enumerate(devices)
    )


def _name(device: str, rank: int) -> str:
    return device.replace(":", "") if device.startswith("cuda") else f"cpu{rank}"


def _memory_bytes(device: str, facts: Sequence[Facts], rank: int) -> int:
    """Of a GPU all, of the host's its share."""
    num_sharing = 1 if device.startswith("cuda") else len(facts)
    return facts[rank].memory_bytes // num_sharing


def _write_checkpoint(folder: Path, num_bytes: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)
    (folder / "model.safetensors").write_bytes(save({"noise": noise}))


def _measure_products(
    world: ProbedWorld, plan: ProbePlan, advance: Advance
) -> list[tuple[Product, ...]]:
    """Of each rank, one product a dtype and weight."""
    found = [
        [
            Product(dtype=dtype, in_features=width, out_features=height, curve=curve)
            for curve in _product_curves(world, plan, dtype, (width, height), advance)
        ]
        for dtype in plan.dtypes
        for width, height in plan.weights
    ]
    return list(zip(*found, strict=True))


def _product_curves(
    world: ProbedWorld, plan: ProbePlan, dtype: str, weight: tuple[int, int], advance: Advance
) -> list[Curve]:
    """Of each rank; a curve ends before a product that would take longer than a point's budget."""
    rows: list[list[Point]] = []
    for num_tokens in plan.num_tokens:
        if not rows or _expected_s(rows[-1], num_tokens) <= plan.budget_s:
            rows.append(
                world.local(Multiply(dtype, num_tokens, *weight), num_tokens, plan.budget_s)
            )
        advance(1)
    return list(zip(*rows, strict=True))


def _expected_s(before: Sequence[Point], num_tokens: int) -> float:
    """In proportion to the tokens: as slow as it gets."""
    return max(point.seconds / point.size for point in before) * num_tokens


def _best_rates(products: Sequence[Product]) -> dict[str, float]:
    best: dict[str, float] = {}
    for product in products:
        rates = [product.flop_per_s(point) for point in product.curve]
        best[product.dtype] = rounded(max([best.get(product.dtype, 0.0), *rates]))
    return best
