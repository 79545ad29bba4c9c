"""A model, a loss and a batch as an LQ problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess.autograd.calling import constant, takes_parameters
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.capture import Capture, capture, watched
from linop_hess.graph.layers import known_layers, linearize_layers
from linop_hess.graph.recorded import build_graph
from linop_hess.graph.rules.loss import LossParts, linearize_loss
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.lq.problem import Problem
from linop_hess.tables import Cuts

AUTOGRAD = SecondDerivatives()
"""Autograd's alone, at kinks those that hold almost everywhere."""


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
    cuts : Cuts
        What lives in the states.
    looks_inside : str
        An operation of the loss that reads what the model computed before its output; empty if none does.
    differenced : tuple of str
        Operations whose second derivatives are differences of first ones.
    """

    problem: Problem
    loss: float
    gradient: Tensor
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    unverified: tuple[str, ...]
    cuts: Cuts
    looks_inside: str = ""
    differenced: tuple[str, ...] = ()


def build_chain(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    names: Sequence[str],
    second: SecondDerivatives = AUTOGRAD,
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
    second : SecondDerivatives, optional
        Where those come from that autograd does not have, or that kinks hide.

    Returns
    -------
    Chain

    Raises
    ------
    UnsupportedModelError
        If the model is random, changes its buffers, or has operations without a second derivative; if there are kinks that are
        forbidden or have no surrogate.
    ValueError
        If a value or derivative is NaN or Inf (the message names the layer), or the loss depends on no parameter.
    MemoryError
        If derivatives or states do not fit in memory.
    """
    parameters = [model.get_parameter(name) for name in names]
    shapes = tuple(tuple(p.shape) for p in parameters)
    layers = None if takes_parameters(loss_fn) else known_layers(model, inputs, names)
    run = (model, loss_fn, inputs, targets, names)
    if layers is not None and not _has_surrogates(second, run):
        try:
            chain = linearize_layers(layers, loss_fn, constant(inputs), targets)
            problem = chain.problem
            cuts = Cuts(problem.names, problem.layout.n_out, problem.dtype.itemsize)
            return Chain(problem, chain.loss, chain.gradient, tuple(names), shapes, (), cuts)
        except UnsupportedModelError:  # a loss that reads more than the output: the recording knows what
            pass
    seen = capture(*run, second.sharpness is not None)
    if layers is None:
        _has_surrogates(second, run)
    parameter = parameters[0]
    sizes = {name: p.numel() for name, p in zip(names, parameters, strict=True)}
    parts = _whole_loss(seen, loss_fn, targets, parameter.dtype, second) if seen.reads_output_alone else None
    if parts is not None:
        target = seen.output_ids[parts.order.cpu().numpy()]
        graph = build_graph(seen.trace, target, parts.stage, parameter, sizes, second)
    else:
        graph = build_graph(seen.trace, np.array([seen.loss_id]), None, parameter, sizes, second)
    _compare_gradients(seen, graph.gradient, names, graph.terms)
    shape = tuple(names), shapes, graph.generic, graph.cuts, seen.looks_inside, graph.differenced
    return Chain(graph.problem, seen.loss, graph.gradient, *shape)


def _has_surrogates(second: SecondDerivatives, run: tuple[Any, ...]) -> bool:
    """Look at the kinks of model and loss, where that is asked for, and tell whether surrogates smooth some."""
    if second.nonsmooth == "generalized":
        return False
    watch, loss = watched(*run)
    if second.nonsmooth == "smooth":
        return watch.has_surrogates(loss)
    watch.refuse(loss)
    return False


def _whole_loss(
    seen: Capture, loss_fn: Callable[..., Tensor], targets: Any, dtype: torch.dtype, second: SecondDerivatives
) -> LossParts | None:
    """The loss as one stage; None where it needs differences, which its operations have one by one."""
    try:
        return linearize_loss(loss_fn, seen.output, targets, dtype, second.sharpness)
    except UnsupportedModelError:
        if not second.finite:
            raise
        return None


def _compare_gradients(seen: Capture, ours: Tensor, names: Sequence[str], terms: float) -> None:
    """Raise unless the gradient through the stages is autograd's of the same run; `terms`: size of what gradients are sums of."""
    theirs = torch.cat([g.reshape(-1) for g in seen.gradient])
    gap = (ours - theirs).abs()
    eps = max(torch.finfo(dtype).eps for dtype in {ours.dtype, *seen.trace.dtypes()})
    bound = max(GRADIENTS_AGREE * eps**0.5 * float(theirs.abs().max()), TERMS_AGREE * eps * terms)
    if bool((gap <= bound).all()):
        return
    parts = zip(names, gap.split([g.numel() for g in seen.gradient]), strict=True)
    wrong = [name for name, part in parts if not bool((part <= bound).all())]
    raise UnsupportedModelError(
        f"expected a gradient that follows from the model's operations, got another one of {', '.join(wrong[:5])}: remove hooks and "
        "custom backward functions that change gradients, and write no place twice in one scatter, of which torch's gradient is wrong"
    )


# In √eps of the coarsest precision on the way, relative to the largest entry: by so much a gradient may differ from autograd's, where
# large terms cancel in it.
GRADIENTS_AGREE = 1.0

# The same in eps of the size of the terms, for gradients that are rounding altogether, as that of a shift of all logits.
TERMS_AGREE = 100.0
