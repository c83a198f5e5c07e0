"""What `bireme probe` found, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bireme.cluster.topology import Cluster, Curve, Device, Node, Point
from bireme.config import format_bytes

_WIDTH = 220  # of what is no terminal: tables take what they need of it
_COLUMNS = 6  # numbers of tokens that are shown


def print_report(cluster: Cluster) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    (node,) = cluster.nodes
    console.print(f"{node.name}: {node.cpu}, {node.num_cores} cores", highlight=False)
    for table in (_devices(node), _products(node.devices), _messages(cluster)):
        if table is not None:
            console.print(table)
    console.print(_steps(node.empty_step), highlight=False)
    if cluster.measured and cluster.measured.is_quick:
        console.print("measured with --quick, at sizes that caches hold: no numbers to plan with")
    points = cluster.points
    if unsteady := sum(point.is_unsteady for point in points):
        console.print(
            f"{unsteady} of {len(points)} points are unsteady: their slowest tenth took over twice as "
            "long as their fastest; measure again while nothing else runs",
            highlight=False,
        )


def _steps(curve: Curve) -> str:
    told = ", ".join(f"{_us(point)} us with {point.size}" for point in curve)
    return f"empty step through the rank processes: {told}"


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _devices(node: Node) -> Table:
    names = ("device", "model", "threads", "memory", "read GB/s", "copy GB/s", "page cache GB/s")
    table = _table("devices, all at work at once", (*names, "launch us"))
    for device in node.devices:
        rates = (device.memory_read, device.memory_copy, device.page_cache_read)
        table.add_row(
            device.name,
            device.model,
            str(device.num_threads or ""),
            format_bytes(device.memory_bytes),
            *(f"{curve[-1].size_per_s / 1e9:.1f}" for curve in rates),
            _us(device.launch[0]),
        )
    return table


def _products(devices: Sequence[Device]) -> Table:
    """Of the slowest device at each shape."""
    sizes = sorted({p.size for device in devices for row in device.products for p in row.curve})
    shown = sizes[:: -(-len(sizes) // _COLUMNS)]
    shown += [] if shown[-1] == sizes[-1] else [sizes[-1]]
    heads = ("product", *(f"{size} tokens" if size > 1 else "1 token" for size in shown))
    of = "" if len(devices) == 1 else " of the slowest device"
    table = _table(f"products by a weight, Gflop/s{of}", heads)
    for rows in zip(*(device.products for device in devices), strict=True):
        first = rows[0]
        rates = {
            size: [row.flop_per_s(p) / 1e9 for row in rows for p in row.curve if p.size == size]
            for size in shown
        }
        table.add_row(
            f"{first.dtype} {first.out_features}x{first.in_features}",
            *(f"{min(rates[size]):.0f}" if rates[size] else "" for size in shown),
        )
    return table


def _messages(cluster: Cluster) -> Table | None:
    """Of the slowest group of a number of ranks, and the slowest pair."""
    if not cluster.links:
        return None
    widths = sorted({len(group.devices) for group in cluster.groups})
    columns = [
        _slowest([group.all_reduce for group in cluster.groups if len(group.devices) == width])
        for width in widths
    ]
    columns.append(_slowest([link.send for link in cluster.links]))
    names = [*(f"all-reduce of {width}" for width in widths), "send"]
    heads = [head for name in names for head in (f"{name}, us", "GB/s")]
    table = _table(f"between ranks, over {cluster.links[0].transport}", ("bytes", *heads))
    for points in zip(*columns, strict=True):
        cells = [cell for p in points for cell in (_us(p), f"{p.size_per_s / 1e9:.2f}")]
        table.add_row(format_bytes(points[0].size), *cells)
    return table


def _slowest(curves: Sequence[Curve]) -> list[Point]:
    return [max(points, key=lambda p: p.seconds) for points in zip(*curves, strict=True)]


def _us(point: Point) -> str:
    return f"{point.seconds * 1e6:.1f}"
