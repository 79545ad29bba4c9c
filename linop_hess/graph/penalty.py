"""Separable penalties on parameters, taken out of a recorded loss: Σ_i φ_i(p_i), of which only gradient and diagonal curvature are kept.

In the graph a penalty is a second use of every parameter, so that all of them would be carried as state, and pivots would be p × p. But
where the loss is a function of the output plus such a sum, H = H_c + diag(D). What is taken out is found by structure alone:

- the *tail*: operations of the loss function through which the loss is a linear function of their arguments, back from the loss;
- the *owner* of an element: the one parameter entry that it depends on, through operations that act entry by entry.

An argument of the tail that has an owner is a term of the penalty, and a constant to the rest of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from linop_hess.autograd.differentiate import twice_differentiable
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.grouping import live_nodes
from linop_hess.graph.lowering import LOSSES, opened
from linop_hess.graph.recording.movement import Ids, Strided
from linop_hess.graph.recording.node import Node, Trace
from linop_hess.graph.rules.elementwise import is_elementwise
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.graph.rules.operation import base_name, named_arguments, out_of_place
from linop_hess.graph.rules.primitive import in_double

_LINEAR = frozenset({"add", "sub", "rsub", "neg", "sum", "mean"})
_BILINEAR = frozenset({"mul", "dot", "mv", "mm"})  # linear where one argument is a constant

_MIXED = -1  # in place of an owner: of several parameters, or of none that is known


@dataclass(frozen=True)
class Penalty:
    """A separable penalty, and what is left of the graph.

    Attributes
    ----------
    trace : Trace
        The run without it.
    gradient, curvature : Tensor, shape (N,)
        Its first and second derivatives by each parameter entry, in float64.
    """

    trace: Trace
    gradient: Tensor
    curvature: Tensor


def without_penalty(trace: Trace, loss: int, outputs: np.ndarray, second: SecondDerivatives) -> Penalty | None:
    """Take what is separable in the parameters out of a loss; None where there is nothing, or nothing else.

    What has its second derivatives from surrogates stays in the graph, whose rules know of them, and so does everything where
    autograd has none.

    Parameters
    ----------
    trace : Trace
    loss : int
        Element id of the loss.
    outputs : ndarray of int
        Elements that the model returned: what is computed from them is no penalty.
    second : SecondDerivatives
        Where they come from.

    Raises
    ------
    ValueError
        If a derivative of the penalty is NaN or Inf.
    """
    if not any(_reads_parameters(node, trace.parameters) for node in trace.nodes if node.in_loss):
        return None
    trace = replace(trace)
    trace.nodes = opened(trace, trace.nodes, outputs)
    nodes = live_nodes(trace.nodes, np.array([loss]), trace.ids)
    in_loss = [node for node in nodes if node.in_loss]
    tail = _tail(nodes, loss, trace.ids)
    owners = _owners(in_loss, tail, trace, outputs, second)
    kept, terms, dropped = _cut(in_loss, tail, owners, trace.ids)
    if not terms.size or dropped[loss]:
        return None
    device = next(node.flat[node.active[0]] for node in in_loss).device
    try:
        with twice_differentiable("the penalty in loss_fn", device):
            slopes = _adjoints([node for node in in_loss if id(node) in tail], loss, trace.ids)[terms]
            derivatives = _derivatives([node for node in in_loss if id(node) not in tail], owners, trace)
    except UnsupportedModelError:  # rules may have what autograd has not, or take differences
        return None
    at = torch.from_numpy(owners[terms] - 1)
    gradient, curvature = (
        torch.zeros(trace.parameters, dtype=torch.float64, device="cpu").index_add_(0, at, slopes * of[terms])
        for of in derivatives
    )
    for what, values in (("gradient", gradient), ("curvature", curvature)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"NaN or Inf in the {what} of the penalty in loss_fn: check the parameters it is of")
    rest = [node for node in trace.nodes if not node.in_loss]
    left = live_nodes([*rest, *kept], np.array([loss]), trace.ids)
    remaining = Trace([*rest, *(node for node in left if node.in_loss)], trace.parameters, trace.ids)
    return Penalty(remaining, gradient, curvature)


def _flat(ids: Ids) -> np.ndarray:
    return ids.ids() if isinstance(ids, Strided) else ids


def _reads_parameters(node: Node, parameters: int) -> bool:
    return any(
        ids.start <= parameters if isinstance(ids, Strided) else bool(((ids > 0) & (ids <= parameters)).any())
        for ids in node.arguments
    )


def _is_linear(node: Node) -> bool:
    """Whether an operation is linear, but for a constant, in its arguments that depend on parameters."""
    name = base_name(node.func)
    if len(node.outputs) != 1:
        return False
    if name in ("div", "true_divide"):
        return node.active == [0] and "mode" not in node.func._overloadname
    return name in _LINEAR or (name in _BILINEAR and len(node.active) == 1)


def _tail(nodes: list[Node], loss: int, ids: int) -> set[int]:
    """`id` of the operations through which the loss is linear in their arguments: all that read their outputs are in the tail too."""
    elsewhere = np.zeros(ids + 1, dtype=bool)  # read by an operation that is not in the tail
    tail: set[int] = set()
    for node in reversed(nodes):
        if node.in_loss and _is_linear(node) and not elsewhere[node.outputs[0][1].ids()].any():
            tail.add(id(node))
            continue
        for argument in node.arguments:
            elsewhere[_flat(argument)] = True
    return tail


def _owners(
    in_loss: list[Node], tail: set[int], trace: Trace, outputs: np.ndarray, second: SecondDerivatives
) -> np.ndarray:
    """For each element the parameter entry that it alone depends on, 0 for a constant, `_MIXED` for all others."""
    owners = np.full(trace.ids + 1, _MIXED, dtype=np.int64)
    owners[: trace.parameters + 1] = np.arange(trace.parameters + 1)
    owners[outputs[outputs > 0]] = _MIXED
    for node in in_loss:
        if id(node) in tail or len(node.outputs) != 1 or not _is_entrywise(node):
            continue
        if second.smooths(node.func, node.flat, node.spec):
            continue
        output = node.outputs[0][1]
        mine = np.zeros(output.shape, dtype=np.int64)
        for i, argument in zip(node.active, node.arguments, strict=True):
            theirs = owners[_flat(argument)].reshape(tuple(node.flat[i].shape))
            theirs = np.broadcast_to(theirs, output.shape)
            agree = (mine == theirs) | (mine == 0) | (theirs == 0)
            mine = np.where(agree, np.where(mine == 0, theirs, mine), _MIXED)
        owners[output.ids()] = mine.reshape(-1)
    return owners


def _is_entrywise(node: Node) -> bool:
    if node.func in LOSSES:
        return named_arguments(node.func, node.flat, node.spec).get("reduction", 1) == 0
    return is_elementwise(node.func)


def _cut(
    in_loss: list[Node], tail: set[int], owners: np.ndarray, ids: int
) -> tuple[list[Node], np.ndarray, np.ndarray]:
    """The nodes with terms of the penalty as constants, the terms, and which elements are constants now."""
    constant = np.zeros(ids + 1, dtype=bool)
    terms = [np.zeros(0, dtype=np.int64)]
    kept: list[Node] = []
    for node in in_loss:
        if id(node) not in tail:
            kept.append(node)
            continue
        active, arguments = [], []
        for i, argument in zip(node.active, node.arguments, strict=True):
            mine = _flat(argument)
            is_term = owners[mine] > 0
            terms.append(mine[is_term])
            gone = is_term | constant[mine]
            if not gone.all():
                active.append(i)
                arguments.append(np.where(gone, 0, mine) if gone.any() else argument)
        if active:
            kept.append(node.but(active=active, arguments=arguments))
        else:
            constant[node.outputs[0][1].ids()] = True
    return kept, np.unique(np.concatenate(terms)), constant


def _adjoints(tail: list[Node], loss: int, ids: int) -> Tensor:
    """The derivative of the loss, through the tail, by each element, shape (ids + 1,)."""
    bars = torch.zeros(ids + 1, dtype=torch.float64, device="cpu")
    bars[loss] = 1.0
    for node in reversed(tail):
        leaves = {i: in_double(node.flat[i]).clone().requires_grad_() for i in node.active}
        with torch.enable_grad():
            out = _called(node, leaves)
        bar = bars[torch.from_numpy(node.outputs[0][1].ids())].view(out.shape).to(out)
        gradients = torch.autograd.grad(out, list(leaves.values()), bar)
        for argument, gradient in zip(node.arguments, gradients, strict=True):
            bars.index_add_(0, torch.from_numpy(_flat(argument)), gradient.reshape(-1).double().cpu())
    return bars


def _derivatives(nodes: list[Node], owners: np.ndarray, trace: Trace) -> tuple[Tensor, Tensor]:
    """First and second derivative of each element by its owner, both (ids + 1,).

    An entry is seen as a function of its owner's displacement s, a + a' s + ½ a'' s² in each argument: so each entry of an operation that
    acts entry by entry is a function of an s of its own, and differentiating the sum of all of them gives each by itself.
    """
    first, second = torch.zeros(2, trace.ids + 1, dtype=torch.float64, device="cpu")
    first[1 : trace.parameters + 1] = 1.0
    for node in nodes:
        if len(node.outputs) != 1 or not (owners[node.outputs[0][1].ids()] > 0).any():
            continue
        output = node.outputs[0][1]
        like = node.flat[node.active[0]]
        s = torch.zeros(output.shape, dtype=torch.float64, device=like.device, requires_grad=True)
        tensors = {}
        with torch.enable_grad():
            for i, argument in zip(node.active, node.arguments, strict=True):
                at = torch.from_numpy(_flat(argument))
                slope, bend = (of[at].view(node.flat[i].shape).to(s.device) for of in (first, second))
                tensors[i] = in_double(node.flat[i]) + slope * s + 0.5 * bend * s * s
            y = _called(node, tensors)
            (one,) = torch.autograd.grad(y.sum(), s, create_graph=True)
            two = torch.zeros_like(s)
            if one.requires_grad:
                (two,) = torch.autograd.grad(one.sum(), s, allow_unused=True, materialize_grads=True)
        at = torch.from_numpy(output.ids())
        known = torch.from_numpy(owners[output.ids()] > 0)
        for of, found in ((first, one), (second, two)):
            of[at] = torch.where(known, found.detach().reshape(-1).cpu(), 0.0)
    return first, second


def _called(node: Node, tensors: dict[int, Tensor]) -> Tensor:
    """Carry out an operation in float64 with other tensors in the place of some."""
    func: Callable[..., Any] = out_of_place(node.func)
    flat = [in_double(a) if isinstance(a, Tensor) else a for a in node.flat]
    for i, tensor in tensors.items():
        flat[i] = tensor
    args, kwargs = tree_unflatten(flat, node.spec) if node.spec is not None else (flat, {})
    kwargs = {name: value for name, value in kwargs.items() if name != "dtype"}
    results = func(*args, **kwargs)
    out = results[node.outputs[0][0]] if isinstance(results, (tuple, list)) else results
    assert isinstance(out, Tensor)
    return out
