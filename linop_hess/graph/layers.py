"""A plain chain of known layers as an LQ problem, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess.graph.rules.affine import Embedding
from linop_hess.graph.rules.base import Layer
from linop_hess.graph.rules.loss import linearize_loss
from linop_hess.graph.sequential import flatten, is_float
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import Stage
from linop_hess.tables import DOUBLE_BACKWARD, StageLabel


@dataclass(frozen=True)
class Layers:
    """A chain of known layers, linearized.

    Attributes
    ----------
    problem : Problem
        One stage per layer, the loss last.
    loss : float
    gradient : Tensor, shape (N,)
    samples : int
        That the loss is a sum over; 0: they interact in it.
    """

    problem: Problem
    loss: float
    gradient: Tensor
    samples: int


def known_layers(model: nn.Module, inputs: Any, names: Sequence[str]) -> list[Layer] | None:
    """The layers of a model that is a plain chain of layers which have rules of their own; None where it is not.

    Such a chain needs no recording: its layers are run one by one, and stacked before anything is differentiated.

    Parameters
    ----------
    model : nn.Module
    inputs : object
    names : sequence of str
        The parameters to differentiate, in the model's order.
    """
    if not isinstance(inputs, Tensor):
        return None
    layers = flatten(model, names)
    if layers is None or any(isinstance(la.kind, Embedding) for la in layers[1:]):
        return None
    starts_by_index = bool(layers) and isinstance(layers[0].kind, Embedding)
    dtype = model.get_parameter(names[0]).dtype
    if inputs.dtype != dtype and not starts_by_index or not inputs.numel():
        return None
    if any(p.dtype != dtype for la in layers for p in la.module._parameters.values() if p is not None):
        return None
    in_order = [f"{la.name}.{p}" if la.name else p for la in layers for p in la.params]
    return layers if in_order == list(names) else None


def linearize_layers(
    layers: Sequence[Layer], loss_fn: Callable[[Tensor, Any], Tensor], inputs: Tensor, targets: Any
) -> Layers:
    """Linearize a chain of layers at their current parameters.

    Parameters
    ----------
    layers : sequence of Layer
    loss_fn : callable
    inputs : Tensor
    targets : object

    Raises
    ------
    ValueError
        If a value or derivative is NaN or Inf (the message names the layer), or the loss is not a scalar.
    """
    with torch.no_grad():
        layers, states, output = _forward(layers, inputs)
        parts = linearize_loss(loss_fn, output, targets)
        loss, cost = parts.value, parts.stage
        stacks = _stack(layers, states)
        order = np.zeros((len(layers) + 1, 2), dtype=np.int64)
        blocks: list[Stage] = []
        for b, (members, Z) in enumerate(stacks):
            order[members] = np.column_stack([np.full(len(members), b), np.arange(len(members))])
            chosen = [layers[l] for l in members]
            blocks.append(chosen[0].kind.linearize(chosen, Z))
        order[-1] = len(blocks), 0
        labels = [StageLabel(layer.name or "<model>", type(layer.module).__name__) for layer in layers]
        slopes = Problem([*blocks, cost], order, [*labels, StageLabel("", "loss", DOUBLE_BACKWARD)])
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
    return Layers(problem, loss, gradient, parts.apart)


def _forward(layers: Sequence[Layer], inputs: Tensor) -> tuple[list[Layer], list[Tensor], Tensor]:
    """Run the chain; give its layers that are stages, the input of each, and the output."""
    z = inputs
    stages: list[Layer] = []
    states: list[Tensor] = []
    for layer in layers:
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
