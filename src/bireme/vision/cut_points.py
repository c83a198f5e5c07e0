"""Where a traced graph can be cut into blocks, and the marks that say so.

A block begins where an element of a ModuleList or Sequential is called and exactly one activation is
alive, so that nothing else has to be sent: inside a residual block there are two. It does not begin with
what convolutions take upon themselves (`fusing`). What depends on
sizes alone (a mask of ones, the batch size itself) is computed again in each block that needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from bireme.errors import ConfigError
from bireme.vision.flattening import changed_tensors, name_after_tensors
from bireme.vision.fusing import ABSORBED


@dataclass(frozen=True)
class BlockShape:
    """What lies between two cut points, and what it takes (bytes of one image).

    `aliases` are all names of its beginning; `out_shape` is of one image; `peak_bytes` is what lives
    at once while it runs.
    """

    name: str
    aliases: tuple[str, ...]
    out_shape: tuple[int, ...]
    out_dtype: torch.dtype
    peak_bytes: int

    @property
    def out_bytes(self) -> int:
        return torch.Size(self.out_shape).numel() * self.out_dtype.itemsize


class Cutter:
    """The split policy: it marks every legal cut point in the traced graph, and keeps what it found."""

    def __init__(self, module: nn.Module) -> None:
        self._containers = {
            name
            for name, child in module.named_modules()
            if isinstance(child, nn.ModuleList | nn.Sequential)
        }
        self.blocks: list[BlockShape] = []

    def split(self, traced: fx.GraphModule) -> fx.GraphModule:
        graph = traced.graph
        if changed := changed_tensors(graph):
            raise ConfigError(
                f"it changes its tensor {changed[0]} while it runs; what it makes of an image may "
                "depend on that image alone"
            )
        name_after_tensors(graph)
        nodes = list(graph.nodes)
        flow = Flow(nodes)
        first = next((at for at, node in enumerate(nodes) if flow.is_computed(node)), 0)
        points = _cut_points(nodes, flow, self._containers, first)
        starts = [_Point(first, _path(nodes[first]), ()), *points]
        stops = [*(point.index for point in points), len(nodes) - 1]
        self.blocks = [
            BlockShape(
                start.name,
                start.aliases,
                *flow.out_of(stop),
                flow.peak_bytes(start.index, stop),
            )
            for start, stop in zip(starts, stops, strict=True)
        ]
        for point, stop in zip(points, stops[1:], strict=True):
            (alive,) = flow.alive_at(point.index)
            _cut(graph, nodes[point.index : stop], alive, flow)
        traced.recompile()
        return traced


@dataclass(frozen=True)
class _Point:
    """Before graph node `index`; all its names say the same."""

    index: int
    name: str
    aliases: tuple[str, ...]


def _path(node: fx.Node) -> str:
    """The innermost module whose call the node belongs to."""
    return _paths(node)[-1] if _paths(node) else "input"


def _paths(node: fx.Node) -> list[str]:
    """The modules whose calls the node belongs to, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for key, (path, _) in stack.items() if path and "@" not in key]


def _cut_points(
    nodes: Sequence[fx.Node], flow: Flow, containers: set[str], first: int
) -> list[_Point]:
    """Behind the first computed node, where elements of `containers` begin with one activation alive;
    the name of a point is the innermost element of a container whose elements all begin like that."""
    begins = dict(_beginnings(nodes, flow, containers))
    legal = {index for index in begins.values() if flow.can_cut(index)}
    whole = {
        container
        for container in containers
        if all(at in legal for name, at in begins.items() if _parent(name) == container)
    }
    names: dict[int, list[str]] = {}
    for name, index in begins.items():
        if index in legal and index > first:
            names.setdefault(index, []).append(name)
    points = []
    for index, found in sorted(names.items()):
        blocks = [name for name in found if _parent(name) in whole]
        points.append(_Point(index, max(blocks or found, key=len), tuple(found)))
    return points


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _beginnings(
    nodes: Sequence[fx.Node], flow: Flow, containers: set[str]
) -> Iterator[tuple[str, int]]:
    """The first node of each called element of a container."""
    seen = set[str]()
    for index, node in enumerate(nodes):
        if not flow.is_computed(node):
            continue
        for path in _paths(node):
            if path not in seen and _parent(path) in containers:
                yield path, index
            seen.add(path)


class Flow:
    """What lives when in a graph. Parameters, and what depends on sizes alone, do not count."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._nodes = nodes
        self._at = {node: index for index, node in enumerate(nodes)}
        self._last_use = {
            node: max((self._at[user] for user in node.users), default=-1) for node in nodes
        }
        self._batch = next(node for node in nodes if node.op == "placeholder").meta["val"].shape[0]
        self._of_sizes: dict[fx.Node, bool] = {}
        for node in nodes:
            self._of_sizes[node] = self._depends_on_sizes(node)
        self._alive: list[tuple[fx.Node, ...]] = []
        alive: tuple[fx.Node, ...] = ()
        for index, node in enumerate(nodes):
            self._alive.append(alive)
            alive = tuple(it for it in (*alive, node) if self._lives(it, index + 1))

    def _depends_on_sizes(self, node: fx.Node) -> bool:
        if node.op != "call_function":
            return False
        if node.target == torch.ops.aten.sym_size.int:
            return self._is_batch(node.meta["val"])
        return all(self._of_sizes[given] for given in node.all_input_nodes)

    def _lives(self, node: fx.Node, index: int) -> bool:
        is_value = node.op == "placeholder" or self.is_computed(node)
        return is_value and self._last_use[node] >= index

    def is_computed(self, node: fx.Node) -> bool:
        return node.op == "call_function" and not self._of_sizes[node]

    def depends_on_sizes(self, node: fx.Node) -> bool:
        return self._of_sizes[node]

    def _is_batch(self, size: int | torch.SymInt) -> bool:
        return isinstance(size, torch.SymInt) and size.node.expr == self._batch.node.expr

    def can_cut(self, index: int) -> bool:
        """True where one value is alive at node `index`, of which each row is of one image, and `index`
        is no part of what made it."""
        alive = self._alive[index]
        return (
            len(alive) == 1
            and self._is_batch(alive[0].meta["val"].shape[0])
            and self._nodes[index].target not in ABSORBED
        )

    def alive_at(self, index: int) -> tuple[fx.Node, ...]:
        """What was there before node `index` and is needed from it on."""
        return self._alive[index]

    def out_of(self, stop: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape of one image and dtype of the one value alive at `stop`."""
        alive = self._alive[stop]
        if len(alive) != 1:
            raise ConfigError(f"its forward returns {len(alive)} tensors; return the logits alone")
        value = alive[0].meta["val"]
        return self._of_one_image(value)[1:], value.dtype

    def peak_bytes(self, start: int, stop: int) -> int:
        """Of one image, while nodes [start, stop) run: what is alive, and what each makes."""
        peak = 0
        for index in range(start, stop):
            living = {*self._alive[index], self._nodes[index]}
            peak = max(peak, sum(self._value_bytes(node) for node in living))
        return peak

    def _value_bytes(self, node: fx.Node) -> int:
        value = node.meta.get("val")
        if node.op == "get_attr" or not isinstance(value, torch.Tensor):
            return 0
        return torch.Size(self._of_one_image(value)).numel() * value.element_size()

    def _of_one_image(self, value: torch.Tensor) -> tuple[int, ...]:
        """The shape with a batch of one."""
        one = {self._batch.node.expr: 1}
        return tuple(
            int(size.node.expr.subs(one)) if isinstance(size, torch.SymInt) else size
            for size in value.shape
        )


def _cut(graph: fx.Graph, block: Sequence[fx.Node], alive: fx.Node, flow: Flow) -> None:
    """Marks the beginning of `block`, and computes there what it needs and depends on sizes alone."""
    copies: dict[fx.Node, fx.Node] = {}
    own = set(block)

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node.target == torch.ops.aten.sym_size.int:
                copy = graph.call_function(torch.ops.aten.sym_size.int, (alive, 0))
                copy.meta.update(node.meta)
            else:
                copy = graph.node_copy(node, copied)
            stack = node.meta.get("nn_module_stack") or {}
            copy.meta["nn_module_stack"] = dict(list(stack.items())[:1])  # of the root alone
            copies[node] = copy
        return copies[node]

    with graph.inserting_before(block[0]):
        graph.call_function(torch.ops.pippy._pipe_split.default)
        for node in block:
            for given in node.all_input_nodes:
                if flow.depends_on_sizes(given) and given not in own:
                    node.replace_input_with(given, copied(given))
