"""A model, a loss and a batch as an LQ problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess.autograd.calling import constant, takes_parameters
from linop_hess.autograd.snapshot import Contents
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.layers import known_layers, linearize_layers
from linop_hess.graph.penalty import Penalty, without_penalty
from linop_hess.graph.recorded import Graph, Structure, build_graph
from linop_hess.graph.recording.capture import Capture, capture, rounded_gradient, watched
from linop_hess.graph.rules.loss import LossParts, linearize_loss
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.lq.accuracy import ROUNDINGS, VERIFIED
from linop_hess.lq.layout import Layout
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
    samples : int
        Number of samples that the loss, a function of the output alone, is a sum over; 0: it is none.
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
    samples: int = 0


@dataclass(frozen=True)
class Known:
    """What an earlier linearization tells of one at other parameters.

    Attributes
    ----------
    layout : Layout
        Of its problem.
    structure : Structure or None
        Of a recorded run; of a chain of layers the layout is all.
    again : bool
        Whether it is of this very model and loss, so that both have been seen to give the same value each time.
    in_primitives : bool
        Whether functions of torch's had to be written in others; see `capture`.
    by_repeats : bool
        Whether functions showed all that was computed.
    norms : bool
        Whether norms had to be written in others too.
    """

    layout: Layout
    structure: Structure | None
    again: bool = True
    in_primitives: bool = False
    by_repeats: bool = True
    norms: bool = False


def build_chain(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    names: Sequence[str],
    second: SecondDerivatives = AUTOGRAD,
    known: Known | None = None,
    contents: Contents | None = None,
) -> tuple[Chain, Known]:
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
    known : Known, optional
        Of an earlier one. What numbers do not change is taken from it where the model still does the same on data of the same shapes.
    contents : Contents, optional
        The model's, where they are known.

    Returns
    -------
    chain : Chain
    known : Known
        What a later one may be told; its structure is that of `known` where that was taken over.

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
    contents = Contents.of(model) if contents is None else contents
    named = contents.parameters
    parameters = [named[name] for name in names]
    shapes = tuple(tuple(p.shape) for p in parameters)
    layers = None if takes_parameters(loss_fn) else known_layers(model, inputs, names)
    run = (model, loss_fn, inputs, targets, names)
    if layers is not None and not _has_surrogates(second, run):
        try:
            layout, again = (None, False) if known is None else (known.layout, known.again)
            run_of = linearize_layers(layers, loss_fn, constant(inputs), targets, layout, again)
            problem = run_of.problem
            cuts = Cuts(problem.names, problem.layout.n_out, problem.dtype.itemsize)
            plain = tuple(names), shapes, (), cuts
            chain = Chain(problem, run_of.loss, run_of.gradient, *plain, samples=run_of.samples)
            return chain, Known(problem.layout, None)
        except UnsupportedModelError:  # a loss that reads more than the output: the recording knows what
            pass
    structure = None if known is None else known.structure
    again = structure is not None and known is not None and known.again
    manner = (False, True, False) if known is None else (known.in_primitives, known.by_repeats, known.norms)
    seen = capture(*run, second.sharpness is not None, again, *manner, contents)
    if layers is None:
        _has_surrogates(second, run)
    at = dict(zip(names, parameters, strict=True))
    graph, samples = _recorded(seen, loss_fn, targets, at, second, structure)
    if again and graph.structure is not structure:  # it does something else, of which nothing is known
        return build_chain(*run, second, contents=contents)
    _compare_gradients(seen, graph.gradient, names, graph.terms, partial(rounded_gradient, *run, seen.norms))
    shape = tuple(names), shapes, graph.generic, graph.cuts, seen.looks_inside, graph.differenced
    chain = Chain(graph.problem, seen.loss, graph.gradient, *shape, samples)
    return chain, Known(graph.problem.layout, graph.structure, True, seen.in_primitives, seen.by_repeats, seen.norms)


def refuse_inside(chain: Chain) -> None:
    """Raise where no output tells model and loss apart, so that there is no Gauss-Newton matrix.

    Raises
    ------
    UnsupportedModelError
        Naming the operation of the loss that reads what the model computed before its output.
    """
    if chain.looks_inside:
        raise UnsupportedModelError(
            "expected a loss of the model's output and the parameters for a Gauss-Newton matrix, got one that reads what the model "
            f"computed before its output, in {chain.looks_inside}, as losses do that differentiate the output: use H, or "
            "return from the model what the loss needs"
        )


def _has_surrogates(second: SecondDerivatives, run: tuple[Any, ...]) -> bool:
    """Look at the kinks of model and loss, where that is asked for, and tell whether surrogates smooth some."""
    if second.nonsmooth == "generalized":
        return False
    watch, loss = watched(*run)
    if second.nonsmooth == "smooth":
        return watch.has_surrogates(loss)
    watch.refuse(loss)
    return False


def _recorded(
    seen: Capture,
    loss_fn: Callable[..., Tensor],
    targets: Any,
    parameters: dict[str, nn.Parameter],
    second: SecondDerivatives,
    known: Structure | None,
) -> tuple[Graph, int]:
    """A recorded run as a chain, what is separable in its loss as a diagonal; and of how many samples the loss is a sum, 0 of none."""
    parameter = next(iter(parameters.values()))
    sizes = {name: p.numel() for name, p in parameters.items()}
    penalty = without_penalty(seen.trace, seen.loss_id, seen.output_ids, second)
    trace = seen.trace if penalty is None else penalty.trace
    parts = None
    if seen.reads_output_alone(trace):
        of_output = seen.loss_of_output if penalty is not None or takes_parameters(loss_fn) else loss_fn
        parts = _whole_loss(seen, of_output, targets, parameter.dtype, second)
    if parts is not None:
        target = seen.output_ids[parts.order.cpu().numpy()]
        graph = build_graph(trace, target, parts.stage, parameter, sizes, second, known)
    else:
        graph = build_graph(trace, np.array([seen.loss_id]), None, parameter, sizes, second, known)
    if penalty is not None:
        return _with_penalty(graph, penalty), 0
    return graph, 0 if parts is None else parts.apart


def _whole_loss(
    seen: Capture,
    loss_fn: Callable[..., Tensor],
    targets: Any,
    dtype: torch.dtype,
    second: SecondDerivatives,
) -> LossParts | None:
    """The loss as one stage; None where it needs differences, which its operations have one by one."""
    try:
        # The run has been seen to give the same loss each time, and by which functions.
        return linearize_loss(
            loss_fn, seen.output, targets, dtype, second.sharpness, again=True, in_primitives=seen.in_primitives
        )
    except UnsupportedModelError:
        if not second.finite:
            raise
        return None


def _with_penalty(graph: Graph, penalty: Penalty) -> Graph:
    """The chain with a separable penalty as its diagonal."""
    gradient, curvature = (part.to(graph.gradient) for part in (penalty.gradient, penalty.curvature))
    problem = graph.problem
    if bool(curvature.any()):
        problem = problem.with_curvature(problem.blocks, curvature)
    return replace(graph, problem=problem, gradient=graph.gradient + gradient)


def _compare_gradients(
    seen: Capture, ours: Tensor, names: Sequence[str], terms: Callable[[], float], again: Callable[[int], Tensor]
) -> None:
    """Raise unless the gradient through the stages is autograd's of the same run, but for rounding.

    `terms`: size of what gradients are sums of; `again`: autograd's gradient with other rounding, by seed.
    """
    theirs = torch._utils._flatten_dense_tensors(seen.gradient)
    gap, size = (ours - theirs).abs_(), float(theirs.abs().max())
    largest = float(gap.max())  # NaN where one is, which is below no bound
    if largest <= GRADIENTS_AGREE * torch.finfo(ours.dtype).eps ** 0.5 * size:
        return
    eps = max(torch.finfo(dtype).eps for dtype in {ours.dtype, *seen.trace.dtypes()})
    bound = GRADIENTS_AGREE * eps**0.5 * size
    if largest <= bound:
        return
    bound = max(bound, TERMS_AGREE * eps * terms())
    if largest <= bound:
        return
    sizes, moved = [g.numel() for g in seen.gradient], torch.zeros_like(gap)
    for seed in range(ROUNDINGS):
        with suppress(torch.linalg.LinAlgError):  # at the edge of where it is differentiable
            moved = torch.maximum(moved, (again(seed) - theirs).abs().nan_to_num(0.0, 0.0))
    parts = zip(names, gap.split(sizes), moved.split(sizes), strict=True)
    wrong = [name for name, part, by in parts if not bool((part <= max(bound, VERIFIED * float(by.norm()))).all())]
    if not wrong:
        return
    raise UnsupportedModelError(
        f"expected a gradient that follows from the model's operations, got another one of {', '.join(wrong[:5])}: remove hooks and "
        "custom backward functions that change gradients, and write no place twice in one scatter, of which torch's gradient is wrong"
    )


# In √eps of the coarsest precision on the way, relative to the largest entry: by so much a gradient may differ from autograd's, where
# large terms cancel in it.
GRADIENTS_AGREE = 1.0

# The same in eps of the size of the terms, for gradients that are rounding altogether, as that of a shift of all logits.
TERMS_AGREE = 100.0
