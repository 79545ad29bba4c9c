"""A model, a loss and a batch as an LQ problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess.autograd.calling import constant, takes_parameters
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.capture import Capture, capture
from linop_hess.graph.layers import known_layers, linearize_layers
from linop_hess.graph.penalty import Penalty, without_penalty
from linop_hess.graph.recorded import Graph, build_graph
from linop_hess.graph.rules.loss import linearize_loss
from linop_hess.lq.problem import Problem


@dataclass(frozen=True)
class Chain:
    """A linearized network.

    Attributes
    ----------
    problem : Problem
        Its stages, the loss last.
    loss : float
    gradient : Tensor, shape (N,)
    names : tuple of str
        The parameters differentiated, in order.
    shapes : tuple of tuple of int
        Theirs.
    unverified : tuple of str
        Operations whose derivatives are torch's own second derivatives of whole operations.
    """

    problem: Problem
    loss: float
    gradient: Tensor
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    unverified: tuple[str, ...]


def build_chain(
    model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, names: Sequence[str]
) -> Chain:
    """Linearize a model at its current parameters.

    Parameters
    ----------
    model : nn.Module
    loss_fn : callable
        ``loss_fn(output, target)``, or ``loss_fn(output, target, params)`` with the dict of parameters.
    inputs : object
        A tuple is unpacked, ``model(*inputs)``.
    targets : object
    names : sequence of str
        The parameters to differentiate, in the model's order.

    Returns
    -------
    Chain

    Raises
    ------
    UnsupportedModelError
        If the model is random, changes its buffers, or has operations without a second derivative.
    ValueError
        If a value or derivative is NaN or Inf (the message names the layer), or the loss depends on no parameter.
    """
    named = dict(model.named_parameters())
    shapes = tuple(tuple(named[name].shape) for name in names)
    layers = None if takes_parameters(loss_fn) else known_layers(model, inputs, names)
    if layers is not None:
        try:
            chain = linearize_layers(layers, loss_fn, constant(inputs), targets)
            return Chain(chain.problem, chain.loss, chain.gradient, tuple(names), shapes, ())
        except UnsupportedModelError:  # a loss that reads more than the output: the recording knows what
            pass
    seen = capture(model, loss_fn, inputs, targets, names)
    parameter = named[names[0]]
    penalty = without_penalty(seen.trace, seen.loss_id, seen.output_ids)
    trace = seen.trace if penalty is None else penalty.trace
    of_output = seen.loss_of_output if penalty is not None or takes_parameters(loss_fn) else loss_fn
    if seen.reads_output_alone(trace):
        parts = linearize_loss(of_output, seen.output, targets, parameter.dtype)
        graph = build_graph(trace, seen.output_ids[parts.order.cpu().numpy()], parts.stage, parameter)
    else:
        graph = build_graph(trace, np.array([seen.loss_id]), None, parameter)
    if penalty is not None:
        graph = _with_penalty(graph, penalty)
    _compare_gradients(seen, graph.gradient, names)
    return Chain(graph.problem, seen.loss, graph.gradient, tuple(names), shapes, graph.generic)


def _with_penalty(graph: Graph, penalty: Penalty) -> Graph:
    """The chain with a separable penalty as its diagonal."""
    gradient, curvature = (part.to(graph.gradient) for part in (penalty.gradient, penalty.curvature))
    problem = graph.problem
    if bool(curvature.any()):
        problem = problem.with_curvature(problem.blocks, curvature)
    return replace(graph, problem=problem, gradient=graph.gradient + gradient)


def _compare_gradients(seen: Capture, ours: Tensor, names: Sequence[str]) -> None:
    """Raise unless the gradient through the stages is autograd's of the same run."""
    theirs = torch.cat([g.reshape(-1) for g in seen.gradient])
    gap = (ours - theirs).abs()
    bound = GRADIENTS_AGREE * torch.finfo(ours.dtype).eps ** 0.5 * float(theirs.abs().max())
    if bool((gap <= bound).all()):
        return
    parts = zip(names, gap.split([g.numel() for g in seen.gradient]), strict=True)
    wrong = [name for name, part in parts if not bool((part <= bound).all())]
    raise UnsupportedModelError(
        f"expected a gradient that follows from the model's operations, got another one of {', '.join(wrong[:5])}: remove hooks and "
        "custom backward functions that change gradients"
    )


# In √eps of the largest entry: by so much a gradient may differ from autograd's, where large terms cancel in it.
GRADIENTS_AGREE = 1.0
