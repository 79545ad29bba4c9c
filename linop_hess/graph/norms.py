"""Layer norms of one pattern as their parts, all at once: what normalizes, and the scale and shift that follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from linop_hess.autograd.backward_graph import normalize, scale_shift
from linop_hess.graph.recording.movement import Strided, contiguous_strides
from linop_hess.graph.recording.node import Node, Trace, signature_of
from linop_hess.graph.recording.template import Flats, Pattern, Repeat, View, repeats_of
from linop_hess.graph.rules.operation import named_arguments


def layer_norms(trace: Trace, nodes: Sequence[Node]) -> list[list[Node]]:
    """The parts of each node; none where they are no repeats of one pattern, or normalize constants.

    Parameters
    ----------
    trace : Trace
        Its number of elements grows.
    nodes : sequence of Node
        Of one signature, whose first outputs alone are used.
    """
    repeats = repeats_of(nodes)
    if not repeats:
        return []
    first, pattern = repeats[0], repeats[0].pattern
    at = named_arguments(first.func, range(len(first.flat)), first.spec)
    given = named_arguments(first.func, first.flat, first.spec)
    x, affine = at["input"], [at["weight"], at["bias"]]
    if x not in first.active:
        return []
    shape, eps = given["normalized_shape"], given["eps"]
    arguments = [None, torch.Size(shape).numel(), eps]
    if all(first.flat[i] is None for i in affine):
        alone = Node(normalize, arguments, None, [0], [], pattern.node.outputs[:1], "", first.in_loss, first.name)
        same = Pattern(alone, {0: pattern.tensors[x]})
        return [[node] for node in _made(same, repeats, [(n.operands, n.ids, n.before) for n in repeats])]
    stacked = Flats(repeats).stacked(x)
    values = torch.native_layer_norm(stacked, shape, None, None, eps)[0]
    size = values[0].numel()
    before = range(trace.ids, trace.ids + len(repeats) * size, size)
    trace.ids += len(repeats) * size
    sizes = tuple(values.shape[1:])
    between = Strided(1, sizes, contiguous_strides(sizes), 0)
    norm = Node(normalize, arguments, None, [0], [], [(0, between)], "", first.in_loss, first.name)
    norms = _made(
        Pattern(norm, {0: pattern.tensors[x]}),
        repeats,
        [(node.operands, node.ids, last) for node, last in zip(repeats, before, strict=True)],
    )
    value = View(len(first.operands), sizes, values.stride()[1:], 0, is_whole=True)
    tensors = {0: value} | {k: pattern.tensors[i] for k, i in enumerate(affine, 1) if i in pattern.tensors}
    active = [0, *(k for k, i in enumerate(affine, 1) if i in first.active)]
    scale = Node(scale_shift, [None] * 3, None, active, [], pattern.node.outputs[:1], "", first.in_loss, first.name)
    scales = _made(
        Pattern(scale, tensors),
        repeats,
        [
            ([*node.operands, one], [*node.ids, last + 1], node.before)
            for node, one, last in zip(repeats, values.unbind(), before, strict=True)
        ],
    )
    return [list(parts) for parts in zip(norms, scales, strict=True)]


def _made(
    pattern: Pattern, repeats: Sequence[Repeat], parts: Sequence[tuple[list[torch.Tensor], list[int], int]]
) -> list[Node]:
    """Nodes of a pattern in the places of others, with operands, their ids, and the last id before."""
    pattern.node.signature = signature_of(Repeat(pattern, *parts[0], repeats[0].path))
    return [Repeat(pattern, *of, node.path) for of, node in zip(parts, repeats, strict=True)]
