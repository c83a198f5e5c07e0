"""A block's graph with fewer, larger operations.

At inference a BatchNorm is a part of the convolution before it; cuDNN adds a residual and takes a ReLU
while it convolves.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.utils.fusion import fuse_conv_bn_weights

_aten = torch.ops.aten
_CONV = _aten.conv2d.default
_BATCH_NORM = _aten.batch_norm.default
_RELUS = (_aten.relu.default, _aten.relu_.default)
ABSORBED = (_BATCH_NORM, *_RELUS)
_ADDS = (_aten.add.Tensor, _aten.add_.Tensor)
_CONV_DEFAULTS = (None, (1, 1), (0, 0), (1, 1), 1)  # bias, stride, padding, dilation, groups


def fuse(flat: fx.GraphModule, example: torch.Tensor) -> fx.GraphModule:
    """Of a flat block with its weights, on its device, which it takes apart; `example` is an input."""
    for norm in flat.graph.find_nodes(op="call_function", target=_BATCH_NORM):
        _fold(flat, norm)
    if any(tensor.is_cuda for tensor in flat.parameters()):
        _use_cudnn(flat, example)
    flat.graph.eliminate_dead_code()
    return fx.GraphModule(flat, flat.graph)  # without the tensors that it no longer names


def _fold(flat: fx.GraphModule, norm: fx.Node) -> None:
    """A BatchNorm into the weights of the convolution before it, in float32."""
    args: tuple[Any, ...] = norm.args
    conv, scale, shift, mean, variance, is_training, _, eps, *_ = args
    if is_training or not _is_only_for(norm, conv, _CONV):
        return
    x, weight, bias, *rest = _conv_args(conv)
    if not all(map(_is_stored, (weight, bias, scale, shift, mean, variance))):
        return
    fused = fuse_conv_bn_weights(
        _float(flat, weight), _float(flat, bias), _float(flat, mean), _float(flat, variance), eps,
        _float(flat, scale), _float(flat, shift),
    )  # fmt: skip
    dtype = operator.attrgetter(weight.target)(flat).dtype
    given = []
    for kind, tensor in zip(("weight", "bias"), fused, strict=True):
        name = f"{norm.name}_{kind}"
        flat.register_parameter(name, nn.Parameter(tensor.to(dtype), requires_grad=False))
        with flat.graph.inserting_before(norm):
            given.append(flat.graph.get_attr(name))
    _replace((norm, conv), _CONV, (x, *given, *rest))


def _is_stored(node: Any) -> bool:
    """A tensor of the module, not one that it computes; or none."""
    return node is None or node.op == "get_attr"


def _float(flat: fx.GraphModule, node: Any) -> Any:
    return None if node is None else operator.attrgetter(node.target)(flat).float()


def _use_cudnn(flat: fx.GraphModule, example: torch.Tensor) -> None:
    FakeTensorProp(flat, FakeTensorMode(allow_non_fake_inputs=True)).propagate(example)
    for relu in [node for node in flat.graph.nodes if node.target in _RELUS]:
        before: Any = relu.args[0]
        if _is_only_for(relu, before, _CONV):
            x, weight, *rest = _conv_args(before)
            _replace((relu, before), _aten.cudnn_convolution_relu.default, (x, weight, *rest))
        elif any(_is_only_for(relu, before, add) for add in _ADDS) and not before.kwargs:
            _absorb_sum(relu, before)


def _absorb_sum(relu: fx.Node, add: fx.Node) -> None:
    """ReLU(convolution + residual), of equal shapes."""
    terms: tuple[Any, ...] = add.args
    for conv, residual in (terms, terms[::-1]):
        if _is_only_for(add, conv, _CONV) and _shape(residual) == _shape(conv):
            x, weight, *rest = _conv_args(conv)
            args = (x, weight, residual, 1, *rest)
            target = _aten.cudnn_convolution_add_relu.default
            return _replace((relu, add, conv), target, args)
    return None


def _shape(node: Any) -> Any:
    return node.meta["val"].shape if isinstance(node, fx.Node) else None


def _is_only_for(user: fx.Node, node: Any, target: Any) -> bool:
    """Nobody else needs what this operation makes."""
    return isinstance(node, fx.Node) and node.target is target and set(node.users) == {user}


def _conv_args(conv: fx.Node) -> tuple[Any, ...]:
    """All of them: the defaults of those that are not given."""
    given = conv.args[2:]
    return (*conv.args[:2], *given, *_CONV_DEFAULTS[len(given) :])


def _replace(nodes: tuple[fx.Node, ...], target: Any, args: tuple[Any, ...]) -> None:
    """The last operation of a chain, given first, and those that only it needs."""
    last = nodes[0]
    with last.graph.inserting_before(last):
        made = last.graph.call_function(target, args)
    last.replace_all_uses_with(made)
    for node in nodes:
        last.graph.erase_node(node)
