"""A traced block as one flat graph, which holds the tensors that it names and no others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

_CALL = re.compile(r"@\d+(?=\.|$)")  # torch.export's mark of a module that is called once more


def flatten(block: nn.Module) -> fx.GraphModule:
    """Of a graph that calls modules, which are graphs; tensors keep their names."""
    flat = fx.Graph()

    def inline(module: Any, prefix: str, given: Sequence[Any]) -> Any:
        made: dict[fx.Node, Any] = {}
        inputs = iter(given)
        for node in module.graph.nodes:
            if node.op == "placeholder" and prefix:
                made[node] = next(inputs)
            elif node.op == "get_attr":
                made[node] = flat.create_node("get_attr", f"{prefix}{node.target}")
            elif node.op == "call_module":
                called = module.get_submodule(node.target)
                given_to = fx.node.map_arg(node.args, made.__getitem__)
                made[node] = inline(called, f"{prefix}{node.target}.", given_to)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], made.__getitem__)
            else:
                made[node] = flat.node_copy(node, made.__getitem__)
        raise AssertionError("a graph without an output")

    flat.output(inline(block, "", ()))
    return fx.GraphModule(block, flat)


def own_name(name: str) -> str:
    """What the module calls a tensor that a traced block calls `name`."""
    return _CALL.sub("", name)


def name_after_tensors(graph: fx.Graph) -> None:
    """torch's splitter finds a tensor by its node's name: an operation of that name (`mean`) makes way."""
    named, alone = {node.name: node for node in graph.nodes}, fx.Graph()
    for node in graph.find_nodes(op="get_attr"):
        name = alone.create_node("get_attr", node.target).name
        if named.setdefault(name, node) is not node:
            named[name]._rename(f"{name}_made")
        node.name = name


def changed_tensors(graph: fx.Graph) -> list[str]:
    """The names of the module's tensors that a graph of operations writes to."""
    changed = (
        _origin(given)
        for node in graph.nodes
        for given, argument in _given(node)
        if argument.is_write and node.target is not torch.ops.aten.detach_.default  # of a constant
    )
    return [str(node.target) for node in changed if node.op == "get_attr"]


def _origin(node: fx.Node) -> fx.Node:
    """Whose memory a view is of."""
    base = next((given for given, _ in _given(node)), None)
    return node if base is None else _origin(base)


def _given(node: fx.Node) -> list[tuple[fx.Node, Any]]:
    """What an operation writes to, or makes views of."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    return [
        (given, argument)
        for given, argument in zip(node.args, node.target._schema.arguments, strict=False)
        if argument.alias_info is not None and isinstance(given, fx.Node)
    ]
