"""What `Linearization.verify` compares with: the model by autograd, as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linop_hess.autograd.hessian import Hessian
from linop_hess.graph.rules.nonsmooth import SecondDerivatives


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
    second : SecondDerivatives
        At kinks; and whether differences of the gradient are compared with.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Any], Tensor],
        inputs: Tensor,
        targets: Any,
        names: Any,
        second: SecondDerivatives,
    ) -> None:
        self.second = second
        self.model, self.loss_fn, self.inputs, self.targets, self.names = model, loss_fn, inputs, targets, names
        self.versions = self._versions()

    def _versions(self) -> list[tuple[int, ...]]:
        data = [t for t in pytree.tree_leaves((self.inputs, self.targets)) if isinstance(t, Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *data]
        return [(_place(t), _version(t)) for t in tensors] + [(m.training,) for m in self.model.modules()]

    def hessian(self) -> Hessian:
        """Return the Hessian by double backward, or by differences where autograd has none.

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
            self.model,
            self.loss_fn,
            (self.inputs, self.targets),
            params=self.names,
            check_deterministic=False,
            nonsmooth=self.second.nonsmooth,
            sharpness=self.second.sharpness,
            differentiation="finite" if self.second.finite else "autograd",
        )


def _place(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)


def _version(tensor: Tensor) -> int:
    """What changes when a tensor is changed in place; those of inference mode do not count it, so it is their contents."""
    if not tensor.is_inference():
        return tensor._version
    return hash(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
