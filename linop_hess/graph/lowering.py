"""Fused operations as the parts they are made of: normalizations, whose parameters scale and shift, and sums over parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess.autograd.backward_graph import normalize, scale_shift
from linop_hess.graph.fusing import with_bias
from linop_hess.graph.grouping import Alike
from linop_hess.graph.norms import layer_norms
from linop_hess.graph.recording.movement import Ids, Strided, contiguous_strides
from linop_hess.graph.recording.node import Node, Trace
from linop_hess.graph.rules.elementwise import is_elementwise
from linop_hess.graph.rules.operation import named_arguments, out_of_place
from linop_hess.graph.rules.reductions import standardize

aten = torch.ops.aten


def lower(trace: Trace, sets: Sequence[Alike], target: np.ndarray) -> list[Node]:
    """The nodes of a trace as the rules take them; the very list where nothing changes.

    Parameters
    ----------
    trace : Trace
        Its number of elements grows.
    sets : sequence of Alike
        Its nodes.
    target : ndarray of int
        Elements that are read after all nodes.
    """
    return with_bias(_taken_apart(trace, sets), sets, target, trace.ids)


def _taken_apart(trace: Trace, sets: Sequence[Alike]) -> list[Node]:
    """The nodes, with each fused operation replaced by its parts; one is left as it is where more than its first output is used."""
    fused = [one for one in sets if one.nodes[0].func in _PARTS]
    if not fused:
        return trace.nodes
    read = np.zeros(trace.ids + 1, dtype=bool)
    if any(len(one.outputs) > 1 for one in fused):
        for one in sets:
            for argument in one.arguments:
                read[argument] = True
    whole: set[int] = set()
    for one in fused:
        side_outputs = [ids for (j, _), ids in zip(one.nodes[0].outputs, one.outputs, strict=True) if j > 0]
        if side_outputs:
            whole.update(one.members[np.any(read[np.concatenate(side_outputs, 1)], axis=1)].tolist())
    together: dict[int, list[Node]] = {}
    for one in fused:
        if one.nodes[0].func is aten.native_layer_norm.default and whole.isdisjoint(one.members.tolist()):
            together.update(zip(one.members.tolist(), layer_norms(trace, one.nodes), strict=False))
    nodes: list[Node] = []
    for k, node in enumerate(trace.nodes):
        parts = _PARTS.get(node.func)
        if parts is None or k in whole:
            nodes.append(node)
        else:
            nodes += together.get(k) or parts(trace, node) or [node]
    return nodes


def _derived(
    trace: Trace, node: Node, func: Any, args: tuple[Any, ...], ids: dict[int, Ids], output: Strided | None
) -> Node:
    """A node with the same place and name; without `output` one with new ids."""
    flat, spec = list(args), None  # none of them is nested
    active = [i for i, a in enumerate(flat) if isinstance(a, Tensor) and id(a) in ids]
    if output is None:
        value = args[0]
        output = Strided(trace.ids + 1, tuple(value.shape), contiguous_strides(tuple(value.shape)), 0)
        trace.ids += value.numel()
    return Node(
        func, flat, spec, active, [ids[id(flat[i])] for i in active], [(0, output)], node.path, node.in_loss, node.name
    )


def _then_affine(
    trace: Trace,
    node: Node,
    ids: dict[int, Ids],
    first: Node,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> list[Node]:
    """`first`, which computes `value`, and the scale and shift that follow it."""
    if weight is None and bias is None:
        first.outputs = [(0, node.outputs[0][1])]
        return [first]
    if first.active:
        ids[id(value)] = first.outputs[0][1]
    second = _derived(trace, node, scale_shift, (value, weight, bias), ids, node.outputs[0][1])
    return [first, second] if first.active else [second]


def _reader(node: Node) -> tuple[Callable[..., Any], dict[int, Ids]]:
    ids = {id(node.flat[i]): a for i, a in zip(node.active, node.arguments, strict=True)}
    arguments = named_arguments(node.func, node.flat, node.spec)
    return lambda *names: [arguments.get(name) for name in names], ids


def _layer_norm(trace: Trace, node: Node) -> list[Node]:
    get, ids = _reader(node)
    x, shape, weight, bias, eps = get("input", "normalized_shape", "weight", "bias", "eps")
    run = torch.Size(shape).numel()
    value = aten.native_layer_norm.default(x, shape, None, None, eps)[0]
    first = _derived(trace, node, normalize, (x, run, eps), ids, None)
    return _then_affine(trace, node, ids, first, value, weight, bias)


def _rms_norm(trace: Trace, node: Node) -> list[Node]:
    get, ids = _reader(node)
    x, shape, weight, eps = get("input", "normalized_shape", "weight", "eps")
    run, eps = torch.Size(shape).numel(), torch.finfo(x.dtype).eps if eps is None else eps
    value = normalize(x, run, eps, False)
    first = _derived(trace, node, normalize, (x, run, eps, False), ids, None)
    return _then_affine(trace, node, ids, first, value, weight, None)


def _group_norm(trace: Trace, node: Node) -> list[Node]:
    get, ids = _reader(node)
    x, weight, bias, groups, eps = get("input", "weight", "bias", "group", "eps")
    run = x[0].numel() // groups
    value = normalize(x, run, eps)
    first = _derived(trace, node, normalize, (x, run, eps), ids, None)
    return _then_affine(trace, node, ids, first, value, *_by_channel(ids, x, weight, bias))


def _by_channel(ids: dict[int, Ids], x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters of channels in a shape that is broadcast over x."""
    out: list[Tensor | None] = []
    for parameter in parameters:
        if parameter is None:
            out.append(None)
            continue
        viewed = parameter.view([-1] + [1] * (x.ndim - 2))
        if id(parameter) in ids:
            mine = ids[id(parameter)]
            flat = mine.ids() if isinstance(mine, Strided) else mine
            consecutive = bool((np.diff(flat) == 1).all())
            shape = tuple(viewed.shape)
            ids[id(viewed)] = Strided(int(flat[0]), shape, contiguous_strides(shape), 0) if consecutive else flat
        out.append(viewed)
    return out


def _batch_norm(trace: Trace, node: Node) -> list[Node]:
    get, ids = _reader(node)
    x, weight, bias, mean, var, training, eps = get(
        "input", "weight", "bias", "running_mean", "running_var", "training", "eps"
    )
    if training or mean is None or any(id(t) in ids for t in (mean, var)):
        return []
    value = standardize(x, mean, var, eps)
    first = _derived(trace, node, standardize, (x, mean, var, eps), ids, None)
    return _then_affine(trace, node, ids, first, value, *_by_channel(ids, x, weight, bias))


# Losses of two tensors, entry by entry where nothing is added up: their reductions as the operation that adds up.
LOSSES = (aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default)
_REDUCTIONS = {1: aten.mean.default, 2: aten.sum.default}


def opened(trace: Trace, nodes: Sequence[Node], outputs: np.ndarray) -> list[Node]:
    """The nodes, with sums over entries that a loss function takes of parameters alone as what is entry by entry, and its sum.

    These are x·x, ‖x‖², and losses between parameters and numbers.

    Parameters
    ----------
    trace : Trace
        Its number of elements grows.
    nodes : sequence of Node
    outputs : ndarray of int
        Elements that the model returned.
    """
    alone = np.zeros(trace.ids + 1, dtype=bool)
    alone[: trace.parameters + 1] = True
    alone[outputs[outputs > 0]] = False
    norms: dict[int, Node] = {}  # by the element that is the norm
    out: list[Node] = []
    for node in nodes:
        if not node.in_loss or len(node.outputs) != 1:
            out.append(node)
            continue
        mine = [ids.ids() if isinstance(ids, Strided) else ids for ids in node.arguments]
        if not all(bool(alone[ids].all()) for ids in mine):
            out.append(node)
            continue
        alone[node.outputs[0][1].ids()] = True
        if _is_norm(node):
            norms[int(node.outputs[0][1].ids()[0])] = node
        squared = norms.get(int(mine[0][0])) if _squares(node, mine) else None
        out += _opened(trace, node, squared)
    return out


def _is_norm(node: Node) -> bool:
    """Whether a node is the 2-norm of all entries of one tensor."""
    if node.func is not aten.linalg_vector_norm.default or node.active != [0]:
        return False
    order = named_arguments(node.func, node.flat, node.spec).get("ord", 2)
    return order == 2 and int(np.prod(node.outputs[0][1].shape, dtype=np.int64)) == 1


def _squares(node: Node, ids: Sequence[np.ndarray]) -> bool:
    """Whether a node squares one element."""
    if any(one.size != 1 for one in ids):
        return False
    if node.func is aten.pow.Tensor_Scalar:
        return bool(node.flat[1] == 2)
    return node.func is aten.mul.Tensor and len(ids) == 2 and bool(ids[0][0] == ids[1][0])


def _opened(trace: Trace, node: Node, norm: Node | None) -> list[Node]:
    if norm is not None:
        x, ids = norm.flat[0], norm.arguments[0]
        return _summed(trace, node, aten.mul.Tensor, (x, x), [(0, ids), (1, ids)], aten.sum.default)
    if node.func is aten.dot.default:
        places = list(zip(node.active, node.arguments, strict=True))
        return _summed(trace, node, aten.mul.Tensor, tuple(node.flat), places, aten.sum.default)
    if node.func in LOSSES:
        arguments = named_arguments(node.func, node.flat, node.spec)
        names = [a.name for a in node.func._schema.arguments]
        reduce = _REDUCTIONS.get(arguments.get("reduction", 1))
        if reduce is not None:
            given = {**{a.name: a.default_value for a in node.func._schema.arguments}, **arguments, "reduction": 0}
            args = tuple(given[name] for name in names)
            places = [
                (k, ids)
                for i, ids in zip(node.active, node.arguments, strict=True)
                for k, a in enumerate(args)
                if a is node.flat[i]
            ]
            return _summed(trace, node, node.func, args, places, reduce)
    return [node]


def _summed(
    trace: Trace, node: Node, func: Any, args: tuple[Any, ...], places: Sequence[tuple[int, Ids]], reduce: Any
) -> list[Node]:
    """`func` entry by entry, and `reduce` of what it gives, in the place of a node."""
    value = func(*args)
    shape = tuple(value.shape)
    each = Strided(trace.ids + 1, shape, contiguous_strides(shape), 0)
    trace.ids += value.numel()
    active, ids = [k for k, _ in places], [one for _, one in places]
    first = node.but(func=func, flat=list(args), spec=None, active=active, arguments=ids, outputs=[(0, each)])
    return [first, node.but(func=reduce, flat=[value], spec=None, active=[0], arguments=[each])]


_PARTS: dict[Any, Callable[[Trace, Node], list[Node]]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.native_batch_norm.default: _batch_norm,
}
for _name, _part in (
    ("_fused_rms_norm", _rms_norm),
    ("_native_batch_norm_legit", _batch_norm),
    ("_native_batch_norm_legit_no_training", _batch_norm),
    ("cudnn_batch_norm", _batch_norm),
):
    if hasattr(aten, _name):
        _PARTS[getattr(aten, _name).default] = _part


def split_late(nodes: Sequence[Node], ids: int) -> list[Node]:
    """Compute rows of products and elementwise operations when they are first read, where that keeps less alive.

    Recurrent layers project the inputs of all steps at once. Row by row, the weight is alive from step to step in place of all that it
    has projected.

    Parameters
    ----------
    nodes : sequence of Node
        In order.
    ids : int
        The largest element id.

    Returns
    -------
    list of Node
    """
    never = float(len(nodes))
    first = np.full(ids + 1, never)
    placed: list[tuple[float, int, Node]] = []
    for k in range(len(nodes) - 1, -1, -1):
        pieces = _pieces(nodes[k], first, never) or [(float(k), nodes[k])]
        for time, piece in pieces:
            placed.append((time, k, piece))
            for argument in piece.arguments:
                mine = argument.ids() if isinstance(argument, Strided) else argument
                first[mine] = np.minimum(first[mine], time)
    placed.sort(key=lambda entry: entry[:2])
    return [node for _, _, node in placed]


def may_be_split(sets: Sequence[Alike], ids: int, nodes: int) -> bool:
    """Whether `split_late` could split one of `nodes` nodes, told of all at once: one whose rows are first read at different times."""
    first = np.full(ids + 1, nodes, dtype=np.int64)
    for one in sets:
        for argument in one.arguments:
            np.minimum.at(first, argument.reshape(-1), np.repeat(one.members, argument.shape[1]))
    for one in sets:
        if not _could_be_split(one.nodes[0]):
            continue
        rows = one.nodes[0].outputs[0][1].shape[0]
        when = first[one.outputs[0]].reshape(len(one.nodes), rows, -1).min(2)
        if bool((when != when[:, :1]).any()):
            return True
    return False


def _could_be_split(node: Node) -> bool:
    """Whether a node has rows that are computed alike."""
    if len(node.outputs) != 1 or not _by_first_axis(node):
        return False
    output = node.outputs[0][1]
    return (
        bool(output.shape)
        and output.shape[0] > 1
        and output.stride == contiguous_strides(output.shape)
        and not output.offset
    )


# What rows read may be alive in place of what they compute: a little more, since what computed that may be split in turn.
_WORTH = 1.1


def _pieces(node: Node, first: np.ndarray, never: float) -> list[tuple[float, Node]] | None:
    """A node in runs of rows that are first read at one time, each with the time just before; None where it stays whole."""
    if not _could_be_split(node):
        return None
    output = node.outputs[0][1]
    rows = output.shape[0]
    each = int(np.prod(output.shape[1:], dtype=np.int64))
    when = first[output.start : output.start + rows * each].reshape(rows, each).min(1)
    edges = [0, *(np.flatnonzero(np.diff(when)) + 1).tolist(), rows]
    read = sum(int(np.prod(a.shape)) if isinstance(a, Strided) else a.size for a in node.arguments)
    # Where rows of one time lie between others there would be an operation for each row, and no sample by itself.
    interleaved = len(edges) - 1 > len(np.unique(when))
    if len(edges) < 3 or interleaved or bool((when >= never).any()) or read > _WORTH * rows * each:
        return None
    return [(when[a] - 0.5, _rows(node, output, a, b, each)) for a, b in pairwise(edges)]


def _by_first_axis(node: Node) -> bool:
    """Whether a node's rows, along the first axis, are computed alike from rows of its arguments or from all of them."""
    if node.func is aten.addmm.default:
        return node.flat[0].ndim == 1  # an addend of the same row for all
    if node.func is aten.mm.default:
        return True
    return is_elementwise(node.func)


def _rows(node: Node, output: Strided, a: int, b: int, each: int) -> Node:
    """Rows a..b of a node, as a node."""
    product = {aten.mm.default: (0,), aten.addmm.default: (1,)}.get(node.func)
    flat, arguments = list(node.flat), []
    sliced = []
    for i, value in enumerate(flat):
        if isinstance(value, Tensor):
            alike = value.ndim == len(output.shape) and value.shape[0] == output.shape[0]
            if i in product if product is not None else alike:
                flat[i] = value[a:b]
                sliced.append(i)
    for i, argument in zip(node.active, node.arguments, strict=True):
        if i not in sliced:
            arguments.append(argument)
        elif isinstance(argument, Strided):
            offset = argument.offset + a * argument.stride[0]
            arguments.append(Strided(argument.start, (b - a, *argument.shape[1:]), argument.stride, offset))
        else:
            arguments.append(argument.reshape(output.shape[0], -1)[a:b].reshape(-1))
    part = Strided(output.start + a * each, (b - a, *output.shape[1:]), output.stride, 0)
    func = out_of_place(node.func)
    return Node(func, flat, node.spec, node.active, arguments, [(0, part)], node.path, node.in_loss, node.operation)
