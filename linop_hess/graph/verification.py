"""What `Linearization.verify` compares with: the model by autograd, as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from linop_hess.autograd.hessian import Hessian


class Reference:
    """A model with its data, and whether they have changed.

    Nothing is copied: versions of the tensors, and the mode of every module, tell whether the model still is what was linearized.

    Parameters
    ----------
    model : nn.Module
    loss_fn : callable
    inputs : Tensor
    targets : object
    names : sequence of str
        The parameters that are differentiated.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[Tensor, Any], Tensor], inputs: Tensor, targets: Any, names: Any
    ) -> None:
        self.model, self.loss_fn, self.inputs, self.targets, self.names = model, loss_fn, inputs, targets, names
        self.versions = self._versions()

    def _versions(self) -> list[tuple[int, ...]]:
        data = [t for t in (self.inputs, self.targets) if isinstance(t, Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *data]
        return [(t.data_ptr(), t._version) for t in tensors] + [(m.training,) for m in self.model.modules()]

    def hessian(self) -> Hessian:
        """Return the Hessian by double backward.

        Raises
        ------
        RuntimeError
            If the model changed since.
        """
        if self._versions() != self.versions:
            raise RuntimeError(
                "expected the model and data of linearize() to compare with, got some that changed since linearize(): the "
                "linearization is still right for what they were; verify before changing them"
            )
        return Hessian(
            self.model, self.loss_fn, (self.inputs, self.targets), params=self.names, check_deterministic=False
        )
