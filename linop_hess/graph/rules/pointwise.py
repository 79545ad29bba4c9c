"""Elementwise activations: F = diag φ'(u), C = diag(b ∘ φ''(u))."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from linop_hess.autograd.differentiate import differentiate, twice_differentiable
from linop_hess.graph.rules.base import Kind, Layer
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.diagonal import DiagonalStage

ELEMENTWISE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
"""The elementwise activations of `torch.nn` (kinked ones get the derivatives that hold almost everywhere)."""

_PIECEWISE_LINEAR = (
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.Softshrink,
    nn.Threshold,
)


class Pointwise(Kind):
    """A function applied to every entry by itself."""

    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        module = layer.module
        return (type(module), module.extra_repr(), z.shape)

    def forward(self, layer: Layer, z: Tensor) -> Tensor:
        return layer.module(z.clone() if getattr(layer.module, "inplace", False) else z)

    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        module = layers[0].module
        title = f"layer {layers[0].name!r} ({type(module).__name__})"
        with twice_differentiable(title, Z.device, module, in_primitives=False):
            u = Z.detach().clone().requires_grad_()
            y = self.forward(layers[0], u)
            (first,) = torch.autograd.grad(y.sum(), u, create_graph=True)
            second = None
            if first.requires_grad and not isinstance(module, _PIECEWISE_LINEAR):
                (second,) = differentiate([first.sum()], [u])
        flat = first.detach().reshape(len(layers), -1)
        return DiagonalStage(flat, second=None if second is None else second.reshape(flat.shape))
