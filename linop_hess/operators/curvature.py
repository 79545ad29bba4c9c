"""What the curvature operators of any torch model share: the snapshot, the checks, the sum over batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess.errors import UnsupportedModelError
from linop_hess.operators.algebra import damped
from linop_hess.operators.base import Operator
from linop_hess.operators.batches import Batches, to_device
from linop_hess.operators.snapshot import (
    buffers_of,
    changed_buffers,
    differentiating,
    frozen_copy,
    select_parameters,
)

Gradients = Sequence[Tensor | None]


class Curvature(Operator):
    """A symmetric curvature matrix of a model's empirical risk Σ_b w_b ℓ(f(x_b; θ), y_b), matrix-free.

    A subclass implements `_batch_products`. See `Hessian` for the parameters and what is raised.

    Attributes
    ----------
    loss : float
        The risk at the parameters.
    gradient : numpy.ndarray, shape (n,)
        Its gradient, in the order of `names`.
    names : tuple of str
        The parameters, in the order of the flat vectors.
    """

    symmetric = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        params: Iterable[str] | None = None,
        reduction: str | None = None,
        progress: bool = False,
        check_deterministic: bool = True,
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(
                f"loss_fn must be callable as loss_fn(output, target); got {type(loss_fn).__name__}."
            )
        self.names = tuple(select_parameters(model, params))
        self.batches = Batches(data, loss_fn, reduction, progress)
        with torch.inference_mode(False):
            self.model = frozen_copy(model)
        self.loss_fn = copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
        named = dict(self.model.named_parameters())
        self.parameters = [named[name].requires_grad_() for name in self.names]
        size = sum(parameter.numel() for parameter in self.parameters)
        super().__init__((size, size), self.parameters[0].dtype, self.parameters[0].device)
        originals = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = buffers_of(self.model)
        self.loss, self._gradient, scale = self._evaluate(foreign=originals)
        if check_deterministic:
            self._check_deterministic(before, scale)

    @property
    def gradient(self) -> np.ndarray:
        """The gradient of the risk, a fresh array of shape (n,)."""
        return self._gradient.cpu().numpy().copy()

    def damped(self, damping: float) -> Operator:
        """Return this operator plus ``damping`` times the identity.

        Parameters
        ----------
        damping : float
            ε, real and finite.

        Returns
        -------
        Operator, shape (n, n)

        Raises
        ------
        TypeError, ValueError
            If `damping` is not a finite real number.
        """
        return damped(self, damping)

    def _batch_products(self, inputs: Any, targets: Any, columns: list[list[Tensor]]) -> Iterator[Gradients]:
        """Yield, for each column (cut into the parameters' shapes), one batch's matrix times it."""
        raise NotImplementedError

    def _apply(self, X: Tensor) -> Tensor:
        total = torch.zeros_like(X)
        columns = [self._cut(column) for column in X.T]
        for inputs, targets, weight in self.batches.tracked(f"{type(self).__name__} @ {X.shape[1]} columns"):
            with self._differentiating():
                products = self._batch_products(*self._on_device(inputs, targets), columns)
                for k, product in enumerate(products):
                    total[:, k] += weight * self._flatten(product)
        self._require_finite(total.sum(1), "a product")
        return total

    def _output(self, inputs: Any) -> Any:
        return self.model(inputs)

    def _loss(self, output: Any, targets: Any) -> Tensor:
        loss = self.loss_fn(output, targets)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn must return a torch scalar; got {type(loss).__name__}. "
                "Return the tensor itself: .item() and float() cut it off from the parameters."
            )
        if loss.ndim:
            raise ValueError(
                f"loss_fn must return a scalar; got shape {tuple(loss.shape)}. "
                'Reduce it with .sum() or .mean(), or pass reduction="sum" to the loss.'
            )
        return loss

    def _check_deterministic(self, before: dict[str, Tensor], scale: float) -> None:
        """Raise where the first evaluation changed a buffer, or a second one gives other values."""
        changed = changed_buffers(self.model, before)
        if changed:
            raise UnsupportedModelError(
                f"evaluating the model changes its buffer {changed[0]!r}, so the loss is no fixed function "
                "of the parameters; BatchNorm in training mode does that. Call model.eval() first, or pass "
                "check_deterministic=False to take it as it is."
            )
        again, gradient, _ = self._evaluate()
        tolerance = torch.finfo(self.torch_dtype).eps ** 0.5
        moved = float(torch.linalg.vector_norm(gradient - self._gradient))
        if abs(self.loss - again) > tolerance * abs(self.loss) or moved > tolerance * scale:
            raise UnsupportedModelError(
                f"two evaluations gave losses {self.loss:.8g} and {again:.8g} and gradients that differ by "
                f"{moved:.3g}, so the loss is no fixed function of the parameters. Dropout in training mode "
                "does that (call model.eval() first), and so does a DataLoader that shuffles and drops the "
                "last batch."
            )

    def _evaluate(self, foreign: Sequence[Tensor] = ()) -> tuple[float, Tensor, float]:
        """Return the risk, its gradient (n,), and the sum of the norms of the batches' gradients.

        `foreign` are the parameters of the model that was copied, which the loss must not reach.
        """
        total, scale, used = 0.0, 0.0, False
        gradient = torch.zeros(self.shape[0], dtype=self.torch_dtype, device=self.device)
        for inputs, targets, weight in self.batches.tracked("loss and gradient"):
            with self._differentiating():
                inputs, targets = self._on_device(inputs, targets)
                loss = self._loss(self._output(inputs), targets)
                if any(g is not None for g in differentiate(loss, foreign, retain_graph=True)):
                    raise ValueError(
                        "loss_fn uses the model's parameters directly (a penalty on the weights?), which is "
                        "neither seen by the operator nor part of its snapshot. Leave the term out of "
                        "loss_fn and add its Hessian to the operator: c/2 * ||θ||² is .damped(c)."
                    )
                gradients = differentiate(loss, self.parameters)
            used = used or any(g is not None for g in gradients)
            part = weight * self._flatten(gradients)
            total += weight * float(loss.detach())
            gradient += part
            scale += float(torch.linalg.vector_norm(part))
        if not np.isfinite(total):
            raise ValueError(
                f"the loss is {total}; second derivatives need a finite one. Check data and parameters for "
                "NaN or Inf."
            )
        if not used:
            raise ValueError(
                f"the loss does not depend on any of the chosen parameters ({', '.join(self.names[:4])}, …). "
                "Check that neither the model nor the loss detaches its tensors, and that `params` names the "
                "right ones."
            )
        self._require_finite(gradient, "the gradient")
        return total, gradient, scale

    def _require_finite(self, flat: Tensor, what: str) -> None:
        if bool(torch.isfinite(flat).all()):
            return
        for name, part in zip(self.names, self._cut(flat), strict=True):
            if not bool(torch.isfinite(part).all()):
                raise ValueError(
                    f"{what} is NaN or Inf in the entries of parameter {name!r}. The loss is finite but not "
                    "twice differentiable here (a square root or logarithm at zero, an overflow): move the "
                    "parameters."
                )

    def _on_device(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        return to_device(inputs, self.device), to_device(targets, self.device)

    def _cut(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat vector (n,) into tensors of the parameters' shapes."""
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.reshape(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def _flatten(self, gradients: Gradients) -> Tensor:
        """Join tensors of the parameters' shapes to a flat vector (n,), with zeros for None."""
        pairs = zip(gradients, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).detach().reshape(-1) for g, p in pairs])

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        try:
            with differentiating(self.model, self.device):
                yield
        except RuntimeError as error:
            if any(hint in str(error) for hint in _NOT_TWICE):
                raise UnsupportedModelError(
                    f"the model or the loss has an operation without a second derivative: {error}. "
                    "Replace it by one built from differentiable operations."
                ) from error
            raise


_NOT_TWICE = (
    "is not implemented",
    "not currently support",
    "double backward",
    "once_differentiable",
    "create_graph",
)


def differentiate(
    output: Tensor,
    by: Sequence[Tensor],
    seed: Tensor | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> Gradients:
    """Return (∂output/∂by)ᵀ seed for each tensor of `by`, None where the output does not depend on it."""
    if not output.requires_grad or not by:
        return [None] * len(by)
    return torch.autograd.grad(
        output,
        by,
        seed,
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        allow_unused=True,
    )
