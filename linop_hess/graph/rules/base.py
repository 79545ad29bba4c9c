"""What a kind of layer must tell: its value, its Jacobians, and its curvature against an adjoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from linop_hess.lq.stages.base import Stage


@dataclass(frozen=True)
class Layer:
    """One layer of a chain: a module, or one of the parts a module falls into.

    Attributes
    ----------
    name : str
        Path of the module in the model.
    module : nn.Module
    kind : Kind
    params : tuple of str
        The module's own names of the parameters to differentiate, in registration order.
    """

    name: str
    module: Any
    kind: Kind
    params: tuple[str, ...]


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its class says: no hooks, no parametrizations, no forward of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooked or hasattr(module, "parametrizations") or "forward" in vars(module))


class Kind(ABC):
    """A kind of layer. Layers of equal `signature` are linearized together, as one stack of stages."""

    reshapes_only: bool = False
    """Whether the layer only renames entries of the state, so that it is no stage at all."""

    @abstractmethod
    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        """What must agree for two layers to be stacked."""

    def forward(self, layer: Layer, z: Tensor) -> Tensor:
        """The layer's output for input z, of any shape; must not change z."""
        return layer.module(z)

    @abstractmethod
    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        """Stages with F and G at the inputs Z, shape (K, *z.shape); curvature may be left out."""

    def curve(self, stages: Stage, layers: Sequence[Layer], Z: Tensor, beta: Tensor) -> Stage:
        """The same stages with A, B and C for adjoints `beta` of the outputs, shape (K, n_out).

        For kinds of stage that do not know their own curvature against an adjoint.
        """
        return stages.with_adjoint(beta)


RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity)
"""Modules that change at most the shape (dropout in eval mode does the same)."""


class Reshape(Kind):
    """No stage: the flattened state before and after are the same."""

    reshapes_only = True

    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        return None

    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        raise AssertionError("a reshaping layer is no stage")
