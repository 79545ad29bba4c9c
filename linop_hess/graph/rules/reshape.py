"""Layers that only rename the entries of the state."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor, nn

from linop_hess.graph.rules.base import Kind, Layer
from linop_hess.lq.stages.base import Stage

RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity)
"""Modules that change at most the shape (dropout in eval mode does the same)."""


class Reshape(Kind):
    """No stage: the flattened state before and after are the same."""

    reshapes_only = True

    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        return None

    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        raise AssertionError("a reshaping layer is no stage")
