"""A plain chain of known layers as an LQ problem, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess.errors import NotFiniteError
from linop_hess.graph.rules.affine import Embedding, Linear
from linop_hess.graph.rules.base import RESHAPES, Kind, Layer, Reshape, is_plain
from linop_hess.graph.rules.convolution import AVERAGE_POOLS, CONVOLUTIONS, AveragePool, Convolution
from linop_hess.graph.rules.loss import linearize_loss
from linop_hess.graph.rules.normalization import NORMALIZATIONS
from linop_hess.graph.rules.pointwise import ELEMENTWISE, Pointwise
from linop_hess.lq.layout import Layout, sizes_of
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import Stage
from linop_hess.tables import DOUBLE_BACKWARD, StageLabel

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm

_LINEAR, _POINTWISE, _RESHAPE = Linear(), Pointwise(), Reshape()
_CONVOLUTION, _AVERAGE_POOL, _EMBEDDING = Convolution(), AveragePool(), Embedding()


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
    layers: Sequence[Layer],
    loss_fn: Callable[[Tensor, Any], Tensor],
    inputs: Tensor,
    targets: Any,
    known: Layout | None = None,
    again: bool = False,
) -> Layers:
    """Linearize a chain of layers at their current parameters.

    Parameters
    ----------
    layers : sequence of Layer
    loss_fn : callable
    inputs : Tensor
    targets : object
    known : Layout, optional
        Of an earlier one, which is taken over where layers have the same sizes.
    again : bool
        Whether this loss function has been seen to give the same value each time.

    Raises
    ------
    ValueError
        If a value or derivative is NaN or Inf (the message names the layer), or the loss is not a scalar.
    """
    with torch.no_grad():
        layers, states, output = _forward(layers, inputs)
        parts = linearize_loss(loss_fn, output, targets, again=again)
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
        slopes = _problem([*blocks, cost], order, [*labels, StageLabel("", "loss", DOUBLE_BACKWARD)], known)
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


def _problem(blocks: list[Stage], order: np.ndarray, labels: list[StageLabel], known: Layout | None) -> Problem:
    if known is not None and np.array_equal(known.order, order) and known.sizes == sizes_of(blocks):
        return Problem.laid_out(known, blocks, labels)
    return Problem(blocks, order, labels)


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
    if not _is_float(z):
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
            raise NotFiniteError(
                f"NaN or Inf in the derivatives of layer {problem.name(l)}: check inputs and parameters there"
            )


def flatten(model: nn.Module, params: Iterable[str]) -> list[Layer] | None:
    """Cut a model into layers: `nn.Sequential`, nested ones too, is flattened, every other module is one or two layers.

    Parameters
    ----------
    model : nn.Module
    params : iterable of str
        Names of the parameters to differentiate.

    Returns
    -------
    list of Layer or None
        None where the model is no chain of modules that are known and plain, or where two of them share a parameter.
    """
    wanted = set(params)
    layers: list[Layer] = []
    memory: list[tuple[int, int, str]] = []
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        sequential = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        if sequential and is_plain(module):
            inside = [(f"{name}.{child}" if name else child, sub) for child, sub in module._modules.items()]
            pending.extend((path, sub) for path, sub in reversed(inside) if sub is not None)
            continue
        mine = []
        if module._modules and not isinstance(module, nn.Sequential):
            return None
        for key, parameter in module._parameters.items():
            if parameter is not None:
                memory.append((*_memory_of(parameter), name))
                if (f"{name}.{key}" if name else key) in wanted:
                    mine.append(key)
        parts = _parts(module, tuple(mine))
        if parts is None:
            return None
        layers += [Layer(name, module, kind, part) for kind, part in parts]
    return None if _overlap(memory) else layers


def _overlap(memory: list[tuple[int, int, str]]) -> bool:
    """Whether parameters (first byte, last, layer) of two layers overlap."""
    reach, owner = 0, ""
    for begin, end, name in sorted(memory):
        if begin < reach and name != owner:
            return True
        if end > reach:
            reach, owner = end, name
    return False


def _memory_of(parameter: Tensor) -> tuple[int, int]:
    """First byte of a tensor and the one after its last; several may lie in one storage without touching."""
    if not parameter.numel():
        return 0, 0
    if parameter.is_contiguous():
        return parameter.data_ptr(), parameter.data_ptr() + parameter.numel() * parameter.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.data_ptr(), parameter.data_ptr() + (reach + 1) * parameter.element_size()


def _parts(module: nn.Module, params: tuple[str, ...]) -> list[tuple[Kind, tuple[str, ...]]] | None:
    """The kinds of layer a module falls into, and the parameters of each; None where it is not known."""
    known = type(module)
    if not is_plain(module) or _changes_or_draws(module):
        return None
    if known is nn.Linear:
        return [(_LINEAR, params)]
    if known in ELEMENTWISE:
        return [(_POINTWISE, ())]
    if known in RESHAPES or isinstance(module, _DROPOUTS):
        return [(_RESHAPE, ())]
    if known in CONVOLUTIONS and module.groups == 1:
        return [(_CONVOLUTION, params)]
    if known in AVERAGE_POOLS:
        return [(_AVERAGE_POOL, ())]
    if known is nn.Embedding:
        return [(_EMBEDDING, params)]
    if known in NORMALIZATIONS:
        kinds = NORMALIZATIONS[known]
        if len(kinds) == 2 and module.weight is None:
            kinds = kinds[:1]
        return [(kind, params if kind is kinds[-1] else ()) for kind in kinds]
    return None


def _changes_or_draws(module: Any) -> bool:
    """Whether a known module is random, reads or moves statistics of its batch, or changes its table."""
    if isinstance(module, _DROPOUTS):
        return module.training and module.p > 0
    if isinstance(module, nn.RReLU):
        return module.training
    if isinstance(module, _BATCH_NORMS):
        return module.training or module.running_mean is None
    return isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq)


def _is_float(tensor: Tensor) -> bool:
    """Whether a tensor has one of the two supported dtypes."""
    return tensor.dtype in (torch.float32, torch.float64)
