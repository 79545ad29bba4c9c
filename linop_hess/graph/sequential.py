"""A torch module as a list of layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.rules.affine import Embedding, Linear
from linop_hess.graph.rules.base import RESHAPES, Kind, Layer, Reshape, is_plain
from linop_hess.graph.rules.convolution import AVERAGE_POOLS, CONVOLUTIONS, AveragePool, Convolution
from linop_hess.graph.rules.generic import Generic
from linop_hess.graph.rules.normalization import NORMALIZATIONS
from linop_hess.graph.rules.pointwise import ELEMENTWISE, Pointwise

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm

_LINEAR, _POINTWISE, _GENERIC, _RESHAPE = Linear(), Pointwise(), Generic(), Reshape()
_CONVOLUTION, _AVERAGE_POOL, _EMBEDDING = Convolution(), AveragePool(), Embedding()


def flatten(model: nn.Module, params: Iterable[str]) -> list[Layer]:
    """Cut a model into layers: `nn.Sequential`, nested ones too, is flattened, every other module is one or two layers.

    Parameters
    ----------
    model : nn.Module
    params : iterable of str
        Names of the parameters to differentiate.

    Returns
    -------
    list of Layer

    Raises
    ------
    UnsupportedModelError
        If a module is random or depends on the batch, or a parameter is shared by two layers.
    """
    wanted = set(params)
    layers: list[Layer] = []
    memory: list[tuple[int, int, str, str]] = []
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        sequential = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        if sequential and is_plain(module):
            inside = [(f"{name}.{child}" if name else child, sub) for child, sub in module._modules.items()]
            pending.extend((path, sub) for path, sub in reversed(inside) if sub is not None)
            continue
        mine = []
        for key, parameter in module.named_parameters():
            memory.append((*_memory_of(parameter), name, key))
            if (f"{name}.{key}" if name else key) in wanted:
                mine.append(key)
        _refuse_random(name, module)
        layers += [Layer(name, module, kind, part) for kind, part in _parts(module, tuple(mine))]
    _refuse_shared(memory)
    return layers


def _refuse_shared(memory: list[tuple[int, int, str, str]]) -> None:
    """Raise if parameters (first byte, last, layer, key) of two layers overlap."""
    reach, owner = 0, ""
    for begin, end, name, key in sorted(memory):
        if begin < reach and name != owner:
            raise UnsupportedModelError(
                f"parameter {key!r} of layer {name!r} shares its storage with layer {owner!r}; a chain needs "
                "parameters of its own in every layer: untie them, or use linop_hess.Hessian"
            )
        if end > reach:
            reach, owner = end, name


def _memory_of(parameter: Tensor) -> tuple[int, int]:
    """First byte of a tensor and the one after its last; several may lie in one storage without touching."""
    if not parameter.numel():
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.data_ptr(), parameter.data_ptr() + (reach + 1) * parameter.element_size()


def _parts(module: nn.Module, params: tuple[str, ...]) -> list[tuple[Kind, tuple[str, ...]]]:
    """The kinds of layer a module falls into, and the parameters of each."""
    known = type(module)
    if not is_plain(module):
        return [(_GENERIC, params)]
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
    return [(_GENERIC, params)]


def _refuse_random(name: str, module: nn.Module) -> None:
    for path, part in module.named_modules():
        full = ".".join(piece for piece in (name, path) if piece)
        kind = type(part).__name__
        if part.training and (
            (isinstance(part, _DROPOUTS) and part.p > 0)
            or isinstance(part, nn.RReLU)
            or (isinstance(part, (nn.MultiheadAttention, nn.RNNBase)) and part.dropout > 0)
        ):
            raise UnsupportedModelError(
                f"layer {full!r} ({kind}) is in training mode and random: call model.eval() or {kind}.eval() first"
            )
        if isinstance(part, _BATCH_NORMS) and (part.training or part.running_mean is None):
            raise UnsupportedModelError(
                f"layer {full!r} ({kind}) depends on the statistics of its batch: call model.eval() first"
                + ("" if part.running_mean is not None else ", with track_running_stats=True")
            )
        if isinstance(part, nn.Embedding) and (part.max_norm is not None or part.scale_grad_by_freq):
            raise UnsupportedModelError(
                f"layer {full!r} (Embedding) uses max_norm or scale_grad_by_freq, which change the table or its gradient: "
                "construct it without them"
            )


def is_float(tensor: torch.Tensor) -> bool:
    """Whether a tensor has one of the two supported dtypes."""
    return tensor.dtype in (torch.float32, torch.float64)
