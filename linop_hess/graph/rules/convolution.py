"""Convolutions and average pooling. A convolution is a linear layer on gathered patches."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess.graph.rules.base import Kind, Layer
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.convolution import Arrangement, ConvolutionStage
from linop_hess.lq.stages.dense import DenseStage

CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
"""Convolution modules and their number of spatial axes."""

AVERAGE_POOLS: dict[type[nn.Module], int] = {
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.AvgPool3d: 3,
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
}
"""Average pooling modules and their number of spatial axes."""


class Convolution(Kind):
    """`nn.Conv1d`, `Conv2d` and `Conv3d` with one group, any stride, dilation and padding."""

    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        return (type(layer.module), layer.module.extra_repr(), z.shape, layer.params)

    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        module, K = layers[0].module, len(layers)
        spatial = CONVOLUTIONS[type(module)]
        shape = Z.shape[Z.ndim - spatial - 1 :]
        gather = patch_sources(module, shape)
        source = shape.numel()
        samples = Z[0].numel() // source
        arrangement = Arrangement(samples, source, gather.reshape(-1), gather.shape[0], module.out_channels)
        W = torch.stack([layer.module.weight.detach() for layer in layers]).flatten(2)
        rows = arrangement.unfold(Z.reshape(K, -1, 1)).reshape(K, samples * gather.shape[0], -1)
        params = layers[0].params
        return ConvolutionStage(W, rows, None, "weight" in params, "bias" in params, arrangement)


def patch_sources(module: Any, shape: torch.Size) -> Tensor:
    """Which input entry each patch entry of a convolution reads.

    Parameters
    ----------
    module : nn.Conv1d, nn.Conv2d or nn.Conv3d
    shape : torch.Size
        (channels, *spatial) of one sample.

    Returns
    -------
    Tensor of int, shape (positions, channels · kernel size)
        Flat indices into a sample; its number of entries stands for zero padding.
    """
    device = module.weight.device
    entries = shape.numel()
    index = torch.arange(1, entries + 1, dtype=torch.float64, device=device).view(1, *shape)
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(index, padding, mode=mode)[0]
    spatial = len(shape) - 1
    for axis in range(spatial):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        padded = padded.unfold(1 + axis, reach, module.stride[axis])[..., :: module.dilation[axis]]
    # (channels, *positions, *kernel) to (positions, channels · kernel)
    order = [*range(1, 1 + spatial), 0, *range(1 + spatial, 1 + 2 * spatial)]
    patches = padded.permute(order).reshape(-1, shape[0] * module.weight[0, 0].numel()).long()
    return torch.where(patches == 0, entries, patches - 1)


class AveragePool(Kind):
    """Average pooling: the same linear map for every sample."""

    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        return (type(layer.module), layer.module.extra_repr(), z.shape)

    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        module = layers[0].module
        shape = Z.shape[Z.ndim - AVERAGE_POOLS[type(module)] - 1 :]
        n = shape.numel()
        F = module(torch.eye(n, dtype=Z.dtype, device=Z.device).view(n, *shape)).reshape(n, -1).mT
        return DenseStage(F.expand(len(layers), 1, *F.shape), samples=Z[0].numel() // n)
