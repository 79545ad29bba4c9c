"""A model, a loss and a batch as an LQ problem."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.rules.affine import Embedding
from linop_hess.graph.rules.base import Layer
from linop_hess.graph.rules.generic import Generic
from linop_hess.graph.rules.loss import linearize_loss
from linop_hess.graph.rules.pointwise import Pointwise, is_elementwise
from linop_hess.graph.sequential import flatten, is_float
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import Stage


@dataclass(frozen=True)
class Chain:
    """A linearized network.

    Attributes
    ----------
    problem : Problem
        One stage per layer, the loss last.
    loss : float
    gradient : Tensor, shape (N,)
    names : tuple of str
        The parameters differentiated, in order.
    shapes : tuple of tuple of int
        Theirs.
    unverified : tuple of str
        Layers whose derivatives come from torch's own second derivatives of whole modules.
    """

    problem: Problem
    loss: float
    gradient: Tensor
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    unverified: tuple[str, ...]


def build_chain(
    model: nn.Module, loss_fn: Callable[[Tensor, Any], Tensor], inputs: Tensor, targets: Any, names: Sequence[str]
) -> Chain:
    """Linearize every layer of a model at its current parameters.

    Parameters
    ----------
    model : nn.Module
    loss_fn : callable
    inputs : Tensor
    targets : object
    names : sequence of str
        The parameters to differentiate, in the model's order.

    Returns
    -------
    Chain

    Raises
    ------
    UnsupportedModelError
        If the model is no chain of supported layers.
    ValueError
        If a value or derivative is NaN or Inf (the message names the layer), or the loss does not depend on a parameter.
    """
    layers = flatten(model, names)
    with torch.no_grad():
        layers, states, output = _forward(layers, inputs)
        if [f"{la.name}.{p}" if la.name else p for la in layers for p in la.params] != list(names):
            raise UnsupportedModelError(
                "the parameters do not lie in the order of the layers, or some belong to no layer; pass params= without "
                "those that the forward pass does not use"
            )
        loss, cost = linearize_loss(loss_fn, output, targets)
        stacks = _stack(layers, states)
        order = np.zeros((len(layers) + 1, 2), dtype=np.int64)
        blocks: list[Stage] = []
        for b, (members, Z) in enumerate(stacks):
            order[members] = np.column_stack([np.full(len(members), b), np.arange(len(members))])
            chosen = [layers[l] for l in members]
            blocks.append(chosen[0].kind.linearize(chosen, Z))
        order[-1] = len(blocks), 0
        stage_names = [f"{layer.name or '<model>'}: {type(layer.module).__name__}" for layer in layers] + ["loss"]
        slopes = Problem([*blocks, cost], order, stage_names)
        _check_finite(slopes, slopes.blocks)
        seed = torch.zeros(slopes.layout.size_out, 1, dtype=slopes.dtype, device=slopes.device)
        seed[-1] = 1.0
        adjoint = slopes.transition.substitute_adjoint(seed)
        gradient = slopes.apply_Gt(adjoint)[:, 0]
        curved = [
            layers[members[0]].kind.curve(block, [layers[l] for l in members], Z, slots.gather(adjoint)[..., 0])
            for block, slots, (members, Z) in zip(blocks, slopes.layout.out_slots[:-1], stacks, strict=True)
        ]
        problem = slopes.with_curvature([*curved, cost])
        _check_finite(problem, problem.blocks)
    unverified = tuple(layer.name for layer in layers if isinstance(layer.kind, Generic))
    named = dict(model.named_parameters())
    shapes = tuple(tuple(named[name].shape) for name in names)
    return Chain(problem, loss, gradient, tuple(names), shapes, unverified)


def _forward(layers: Sequence[Layer], inputs: Tensor) -> tuple[list[Layer], list[Tensor], Tensor]:
    """Run the chain; give its layers that are stages, the input of each, and the output."""
    z = inputs
    stages: list[Layer] = []
    states: list[Tensor] = []
    for layer in layers:
        if isinstance(layer.kind, Generic) and not layer.params and is_elementwise(layer.module, z):
            layer = replace(layer, kind=Pointwise())
        if isinstance(layer.kind, Embedding) and stages:
            raise UnsupportedModelError(
                f"layer {layer.name!r} (Embedding) must come first: its input has no derivative"
            )
        after = layer.kind.forward(layer, z)
        if not layer.kind.reshapes_only:
            stages.append(layer)
            states.append(z)
        z = after
    if not is_float(z):
        raise TypeError(f"the model's output has dtype {z.dtype}, expected float32 or float64")
    return stages, states, z


def _stack(layers: Sequence[Layer], states: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Group layers that can be computed together: (positions in the chain, stacked inputs)."""
    groups: dict[Hashable, list[int]] = {}
    for l, (layer, z) in enumerate(zip(layers, states, strict=True)):
        # The first layer's B and F play no part in any solve, but it is stacked like the others.
        groups.setdefault((type(layer.kind), layer.kind.signature(layer, z)), []).append(l)
    return [(members, torch.stack([states[l] for l in members])) for members in groups.values()]


def _check_finite(problem: Problem, blocks: Sequence[Stage]) -> None:
    for b, block in enumerate(blocks):
        bad = block.first_not_finite()
        if bad is not None:
            l = int(np.flatnonzero((problem.order[:, 0] == b) & (problem.order[:, 1] == bad))[0])
            raise ValueError(
                f"NaN or Inf in the derivatives of layer {problem.name(l)}: check inputs and parameters there"
            )
