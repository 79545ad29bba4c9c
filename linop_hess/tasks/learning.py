"""What an optimizer is tried on: a model at its initial point, its loss, and one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Measure = Callable[[nn.Module], float]
"""Tells of a model what its loss does not, as an error against a known solution."""


@dataclass(frozen=True)
class LearningTask:
    """A model to train, at its initial point.

    Attributes
    ----------
    name : str
        Of the task.
    model : torch.nn.Module
        In double precision.
    loss_fn : callable
        Of ``(output, target)``, as `linop_hess.linearize` takes it.
    inputs, targets
        The one batch it is trained on.
    measures : dict of str to callable
        What else is asked of the model, by name: test error, error against a reference. Smaller is better.
    """

    name: str
    model: nn.Module
    loss_fn: Callable[..., Tensor]
    inputs: Any
    targets: Any
    measures: dict[str, Measure] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def loss(self) -> Tensor:
        """Return the loss of the model as it is, with its graph."""
        return self.loss_fn(self.model(self.inputs), self.targets)

    def measured(self) -> dict[str, float]:
        """Return what `measures` say of the model as it is."""
        with torch.no_grad():
            return {name: measure(self.model) for name, measure in self.measures.items()}
