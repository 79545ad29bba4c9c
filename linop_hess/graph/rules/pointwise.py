"""Elementwise activations: F = diag φ'(u), C = diag(b ∘ φ''(u))."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from linop_hess.autograd.differentiate import graph_nodes, twice_differentiable
from linop_hess.graph.rules.base import Kind, Layer, is_plain
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

_ELEMENTWISE_NODES = frozenset(
    f"{name}Backward{n}"
    for name in (
        "Abs Acos Acosh Add Asin Asinh Atan Atanh Celu Clamp ClampMax ClampMin Clone Cos Cosh Div Elu Erf Erfc Erfinv "
        "Exp Exp2 Expm1 Gelu Hardshrink Hardsigmoid Hardswish Hardtanh LeakyRelu Lgamma Log Log10 Log1P Log2 "
        "LogSigmoid Logit Maximum Minimum Mish Mul Neg Pow Reciprocal Relu Rsqrt Rsub Sigmoid Sign Silu Sin Sinc Sinh "
        "Softplus Softshrink Sqrt Square Sub Tan Tanh Threshold Where Addcmul Addcdiv"
    ).split()
    for n in range(3)
)


class Pointwise(Kind):
    """A function applied to every entry by itself."""

    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        module = layer.module
        mark = module.extra_repr() if _is_known(module) else id(module)
        return (type(module), mark, z.shape)

    def forward(self, layer: Layer, z: Tensor) -> Tensor:
        return layer.module(z.clone() if getattr(layer.module, "inplace", False) else z)

    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        module = layers[0].module
        with twice_differentiable(f"layer {layers[0].name!r} ({type(module).__name__})", Z.device, module):
            u = Z.detach().clone().requires_grad_()
            # A module that is not known may look at the shape of its input.
            y = (
                self.forward(layers[0], u)
                if _is_known(module)
                else torch.stack([self.forward(layers[0], v) for v in u])
            )
            (first,) = torch.autograd.grad(y.sum(), u, create_graph=True)
            second = None
            if first.requires_grad and not (_is_known(module) and isinstance(module, _PIECEWISE_LINEAR)):
                (second,) = torch.autograd.grad(first.sum(), u, allow_unused=True)
        flat = first.detach().reshape(len(layers), -1)
        return DiagonalStage(flat, second=None if second is None else second.reshape(flat.shape))


def _is_known(module: nn.Module) -> bool:
    return type(module) in ELEMENTWISE and is_plain(module)


def is_elementwise(module: nn.Module, z: Tensor) -> bool:
    """Show that a module acts on every entry of z by itself.

    Known modules are known; of any other the recorded graph is walked: it must start at z alone, keep its shape, and
    consist of elementwise operations only.

    Parameters
    ----------
    module : nn.Module
    z : Tensor
        An input of the module.

    Returns
    -------
    bool
        False where it cannot be shown.
    """
    if _is_known(module):
        return True
    if any(True for _ in module.parameters()) or not z.is_floating_point():
        return False
    with torch.enable_grad():
        u = z.detach().clone().requires_grad_()
        y = module(u * 1.0)
    if not isinstance(y, Tensor) or y.shape != z.shape or y.dtype != z.dtype or y.grad_fn is None:
        return False
    for node in graph_nodes(y):
        name = node.name()
        if name == "torch::autograd::AccumulateGrad":
            if getattr(node, "variable", None) is not u:
                return False
        elif name not in _ELEMENTWISE_NODES:
            return False
    return True
