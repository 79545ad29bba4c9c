"""Operations that are one affine map as one: a product of matrices, and the bias that is added to its rows.

`torch.nn.functional.linear` computes x Wᵀ + b in one operation or in two as the strides of x will have it, and `x @ W + b` always in two.
As one it is one stage, of which weight and bias are the controls, for two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from linop_hess.graph.grouping import Alike
from linop_hess.graph.recording.movement import Ids, Strided, contiguous_strides
from linop_hess.graph.recording.node import Node

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.add_.Tensor)


def with_bias(nodes: list[Node], sets: Sequence[Alike], target: np.ndarray, ids: int) -> list[Node]:
    """The nodes, with each product that only a sum with a bias reads left to that sum; the very list where there is none.

    Parameters
    ----------
    nodes : list of Node
    sets : sequence of Alike
        The nodes, or what these were before some of them were taken apart, by signature.
    target : ndarray of int
        Elements that are read after all nodes.
    ids : int
        The largest element id.
    """
    made = {
        node.outputs[0][1].start: node for one in sets if one.nodes[0].func is aten.mm.default for node in one.nodes
    }
    found = [
        (node, product, place)
        for one in sets
        if made and one.nodes[0].func in _SUMS
        for node in one.nodes
        for product, place in _products_of(node, made)
    ]
    if not found:
        return nodes
    alone = _read_once([product for _, product, _ in found], sets, target, ids)
    whole = {id(node): (product, 1 - place) for (node, product, place), one in zip(found, alone, strict=True) if one}
    gone = {id(product) for product, _ in whole.values()}
    return [_affine(node, *whole[id(node)]) if id(node) in whole else node for node in nodes if id(node) not in gone]


def _products_of(node: Node, made: dict[int, Node]) -> Iterable[tuple[Node, int]]:
    """The product that a sum adds a bias to, if it does, and its place among the arguments."""
    if len(node.flat) != 2 or node.spec is not None:  # with a factor
        return
    for place, bias in ((0, node.flat[1]), (1, node.flat[0])):
        value = node.flat[place]
        if place not in node.active or not (isinstance(value, Tensor) and isinstance(bias, Tensor)):
            continue
        ids = node.arguments[node.active.index(place)]
        product = made.get(ids.start) if isinstance(ids, Strided) else None
        if product is None or bias.shape != value.shape[-1:] or not value.numel():
            continue
        rows = product.outputs[0][1]
        is_whole = product.spec is None and _is_plain(ids) and _is_plain(rows) and np.prod(rows.shape) == value.numel()
        if is_whole and rows.shape[1:] == bias.shape and product.flat[0].dtype == value.dtype == bias.dtype:
            yield product, place
            return


def _is_plain(ids: Ids) -> bool:
    return isinstance(ids, Strided) and ids.offset == 0 and ids.stride == contiguous_strides(ids.shape)


def _read_once(products: Sequence[Node], sets: Sequence[Alike], target: np.ndarray, ids: int) -> list[bool]:
    """Whether one node alone reads each of some products."""
    owner = np.full(ids + 1, -1, dtype=np.int64)
    for k, product in enumerate(products):
        owner[product.outputs[0][1].ids()] = k
    readers = np.zeros(len(products) + 1, dtype=np.int64)  # the last is that of all else
    for read in (target[None], *(argument for one in sets for argument in one.arguments)):
        of_node = np.sort(owner[read], axis=1)
        first = np.ones_like(of_node, dtype=bool)
        first[:, 1:] = of_node[:, 1:] != of_node[:, :-1]
        np.add.at(readers, of_node[first], 1)
    return (readers[:-1] == 1).tolist()


def _affine(node: Node, product: Node, bias: int) -> Node:
    """The sum as an affine map of the rows of what the product takes."""
    rows, output = product.outputs[0][1], node.outputs[0][1]
    active, arguments = [place + 1 for place in product.active], list(product.arguments)
    if bias in node.active:
        active, arguments = [0, *active], [node.arguments[node.active.index(bias)], *arguments]
    written = Strided(output.start, rows.shape, rows.stride, 0)
    return node.but(
        func=aten.addmm.default,
        flat=[node.flat[bias], *product.flat],
        spec=None,
        active=active,
        arguments=arguments,
        outputs=[(0, written)],
    )
