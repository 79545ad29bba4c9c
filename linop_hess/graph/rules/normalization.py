"""Normalizations, in two parts: ẑ = (z − μ)/σ, without parameters, and scale and shift, affine in them.

The second derivative of ẑ is written out: torch's own is wrong for the fused layer norm under `torch.func` (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess import _memory
from linop_hess.graph.rules.base import Kind, Layer
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.dense import DenseStage
from linop_hess.lq.stages.scale_shift import Features, ScaleShiftStage

# Arrays of the size of F that exist at once while C is computed.
_COPIES = 6


class Normalize(Kind):
    """ẑ = (z − mean z)/√(mean (z − mean z)² + eps) within runs of d consecutive entries, or without the means.

    With m = bᵀẑ/d and q = P b − m ẑ, P the projection off the mean (or I):

        F = (P − ẑẑᵀ/d)/σ,        C = −(q ẑᵀ + ẑ qᵀ)/(d σ²) − (m/σ) F.

    Parameters
    ----------
    run : callable
        Length d of a run, from the module and the shape of its input.
    centred : bool
        Whether the mean is subtracted (RMSNorm does not).
    """

    def __init__(self, run: Callable[[Any, torch.Size], int], centred: bool = True) -> None:
        self._run = run
        self._centred = centred

    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        return (type(layer.module), _epsilon(layer.module, z.dtype), self._run(layer.module, z.shape), z.shape)

    def _parts(self, layer: Layer, Z: Tensor, d: int) -> tuple[Tensor, Tensor]:
        rows = Z.reshape(-1, d)
        if self._centred:
            rows = rows - rows.mean(1, keepdim=True)
        sigma = (rows.square().mean(1, keepdim=True) + _epsilon(layer.module, Z.dtype)).sqrt()
        return rows / sigma, sigma

    def forward(self, layer: Layer, z: Tensor) -> Tensor:
        return self._parts(layer, z, self._run(layer.module, z.shape))[0].reshape(z.shape)

    def _jacobian(self, normal: Tensor, sigma: Tensor) -> Tensor:
        """F of each run, shape (runs, d, d)."""
        d = normal.shape[1]
        P = torch.eye(d, dtype=normal.dtype, device=normal.device)
        if self._centred:
            P = P - 1.0 / d
        return (P - normal[:, :, None] * normal[:, None, :] / d) / sigma[:, :, None]

    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        K, d = len(layers), self._run(layers[0].module, Z.shape[1:])
        _memory.require_on(
            Z.device,
            _COPIES * Z.numel() * d * Z.element_size(),
            f"layer {layers[0].name!r} ({type(layers[0].module).__name__}), which normalizes {Z.numel() // d} runs of {d} entries,",
        )
        F = self._jacobian(*self._parts(layers[0], Z, d))
        return DenseStage(F.reshape(K, -1, d, d), samples=Z[0].numel() // d)

    def curve(self, stages: Stage, layers: Sequence[Layer], Z: Tensor, beta: Tensor) -> Stage:
        K, d = len(layers), self._run(layers[0].module, Z.shape[1:])
        normal, sigma = self._parts(layers[0], Z, d)
        F = self._jacobian(normal, sigma)
        b = beta.reshape(-1, d)
        m = (b * normal).mean(1, keepdim=True)
        q = (b - b.mean(1, keepdim=True) if self._centred else b) - m * normal
        outer = q[:, :, None] * normal[:, None, :]
        C = -(outer + outer.mT) / (d * sigma**2)[:, :, None] - (m / sigma)[:, :, None] * F
        return DenseStage(F.reshape(K, -1, d, d), c=C.reshape(K, -1, d, d), samples=stages.samples)


class ScaleShift(Kind):
    """y = w ẑ + w₀ per feature, with ẑ the input (layer, group and RMS norm) or its fixed standardization (batch norm).

    Parameters
    ----------
    axis_of_features : callable
        From module and input shape, the index of each entry's feature, as a tensor of the input's shape.
    standardize : bool
        Whether the running statistics of a batch norm are applied first.
    """

    def __init__(self, feature_index: Callable[[Any, torch.Size], Tensor], *, standardize: bool = False) -> None:
        self._feature_index = feature_index
        self._standardize = standardize

    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        return (type(layer.module), layer.module.extra_repr(), z.shape, layer.params)

    def _fixed(self, module: Any, index: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized entries and dẑ/dz, both of z's shape."""
        if not self._standardize:
            return z, torch.ones_like(z)
        slope = (module.running_var + module.eps).rsqrt()[index]
        return (z - module.running_mean[index]) * slope, slope

    def forward(self, layer: Layer, z: Tensor) -> Tensor:
        module = layer.module
        index = self._feature_index(module, z.shape).to(z.device)
        y = self._fixed(module, index, z)[0]
        weight, bias = module.weight, getattr(module, "bias", None)
        if weight is not None:
            y = y * weight.reshape(-1)[index]
        return y if bias is None else y + bias.reshape(-1)[index]

    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        first, K = layers[0].module, len(layers)
        index = self._feature_index(first, Z.shape[1:]).to(Z.device)
        parts = [self._fixed(layer.module, index, z) for layer, z in zip(layers, Z, strict=True)]
        flat = index.reshape(-1)
        scale = torch.ones(K, flat.numel(), dtype=Z.dtype, device=Z.device)
        if first.weight is not None:
            scale = torch.stack([layer.module.weight.detach().reshape(-1)[flat] for layer in layers])
        params = layers[0].params
        return ScaleShiftStage(
            torch.stack([part[0].reshape(-1) for part in parts]),
            torch.stack([part[1].reshape(-1) for part in parts]),
            scale,
            None,
            Features(flat, int(flat.max()) + 1),
            "weight" in params,
            "bias" in params,
        )


def _epsilon(module: Any, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if module.eps is None else module.eps


def _last_axes(module: Any, shape: torch.Size) -> Tensor:
    size = torch.Size(module.normalized_shape)
    return torch.arange(size.numel(), device="cpu").reshape(size).expand(shape)


def _channels(module: Any, shape: torch.Size) -> Tensor:
    return torch.arange(shape[1], device="cpu").reshape(-1, *[1] * (len(shape) - 2)).expand(shape)


NORMALIZATIONS: dict[type[nn.Module], tuple[Kind, ...]] = {
    nn.LayerNorm: (
        Normalize(lambda module, shape: torch.Size(module.normalized_shape).numel()),
        ScaleShift(_last_axes),
    ),
    nn.GroupNorm: (
        Normalize(lambda module, shape: shape[1:].numel() // module.num_groups),
        ScaleShift(_channels),
    ),
    nn.BatchNorm1d: (ScaleShift(_channels, standardize=True),),
    nn.BatchNorm2d: (ScaleShift(_channels, standardize=True),),
    nn.BatchNorm3d: (ScaleShift(_channels, standardize=True),),
}
"""The parts each normalization falls into."""

if hasattr(nn, "RMSNorm"):
    NORMALIZATIONS[nn.RMSNorm] = (
        Normalize(lambda module, shape: torch.Size(module.normalized_shape).numel(), centred=False),
        ScaleShift(_last_axes),
    )
