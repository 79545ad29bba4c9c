"""A torch module as a list of layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess.graph.rules.affine import Embedding, Linear
from linop_hess.graph.rules.base import RESHAPES, Kind, Layer, Reshape, is_plain
from linop_hess.graph.rules.convolution import AVERAGE_POOLS, CONVOLUTIONS, AveragePool, Convolution
from linop_hess.graph.rules.normalization import NORMALIZATIONS
from linop_hess.graph.rules.pointwise import ELEMENTWISE, Pointwise

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm

_LINEAR, _POINTWISE, _RESHAPE = Linear(), Pointwise(), Reshape()
_CONVOLUTION, _AVERAGE_POOL, _EMBEDDING = Convolution(), AveragePool(), Embedding()


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


def is_float(tensor: torch.Tensor) -> bool:
    """Whether a tensor has one of the two supported dtypes."""
    return tensor.dtype in (torch.float32, torch.float64)
