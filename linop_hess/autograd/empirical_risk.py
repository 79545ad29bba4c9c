"""What the curvature operators of any torch model share: the snapshot, the checks, the sum over batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess.autograd.batches import Batches, to_device
from linop_hess.autograd.differentiate import (
    Gradients,
    differentiate,
    differentiating,
    refuse_once_differentiable,
)
from linop_hess.autograd.snapshot import (
    buffers_of,
    changed_buffers,
    frozen_copy,
    select_parameters,
)
from linop_hess.errors import UnsupportedModelError
from linop_hess.operators.convert import plain_arithmetic
from linop_hess.operators.operator import Operator, damped


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
        check_symmetric: bool = True,
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(output, target); got {type(loss_fn).__name__}.")
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
        with plain_arithmetic(self.device):
            before = buffers_of(self.model)
            self.loss, self._gradient, scale = self._evaluate(first=True, originals=originals)
            if check_deterministic:
                self._check_deterministic(before, scale)
            if check_symmetric:
                self._check_symmetric()

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
            with differentiating(self.model, self.device):
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

    def _check_symmetric(self) -> None:
        """Raise where uᵀHv and vᵀHu differ, for random u and v, by more than rounding explains."""
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(self.shape[0], 2, generator=generator, dtype=self.torch_dtype).to(self.device)
        products = self._apply(probes)
        asymmetry = float((probes[:, 0] @ products[:, 1] - probes[:, 1] @ products[:, 0]).abs())
        if asymmetry <= torch.finfo(self.torch_dtype).eps ** (2 / 3) * _crossed_norms(probes, products):
            return
        # A saturated network's Hessian is itself all rounding: see how far an ulp in the parameters moves it.
        noise = _crossed_norms(probes, self._apply_perturbed(probes, generator) - products)
        if asymmetry > 10 * noise:
            raise UnsupportedModelError(
                "torch's second derivatives of this model are wrong: uᵀHv and vᵀHu differ by "
                f"{asymmetry:.3g}, where rounding explains {noise:.1g}. torch.nn.utils.weight_norm and "
                "custom backward functions do that. Write the operation out in elementary ones, or restrict "
                "`params` to leave its parameters out."
            )

    def _apply_perturbed(self, X: Tensor, generator: torch.Generator) -> Tensor:
        """Return the product at parameters changed by a few units in the last place."""
        saved = [parameter.detach().clone() for parameter in self.parameters]
        ulp = torch.finfo(self.torch_dtype).eps
        try:
            for parameter in self.parameters:
                change = torch.randn(parameter.shape, generator=generator, dtype=self.torch_dtype)
                parameter.mul_(1 + 2 * ulp * change.to(self.device))
            return self._apply(X)
        finally:
            for parameter, value in zip(self.parameters, saved, strict=True):
                parameter.copy_(value)

    def _evaluate(self, *, first: bool = False, originals: Sequence[Tensor] = ()) -> tuple[float, Tensor, float]:
        """Return the risk, its gradient (n,), and the sum of the norms of the batches' gradients.

        The first time the graph of the loss is looked at: it must be twice differentiable and not reach the
        original parameters, those of the model that was copied.
        """
        total, scale, used = 0.0, 0.0, False
        gradient = torch.zeros(self.shape[0], dtype=self.torch_dtype, device=self.device)
        for inputs, targets, weight in self.batches.tracked("loss and gradient"):
            with differentiating(self.model, self.device):
                inputs, targets = self._on_device(inputs, targets)
                loss = self._loss(self._output(inputs), targets)
                if first:
                    refuse_once_differentiable(loss)
                if any(g is not None for g in differentiate([loss], originals, retain_graph=True)):
                    raise ValueError(
                        "loss_fn uses the model's parameters directly (a penalty on the weights?), which is "
                        "neither seen by the operator nor part of its snapshot. Leave the term out of "
                        "loss_fn and add its Hessian to the operator: c/2 * ||θ||² is .damped(c)."
                    )
                gradients = differentiate([loss], self.parameters)
            used = used or any(g is not None for g in gradients)
            part = weight * self._flatten(gradients)
            total += weight * float(loss.detach())
            gradient += part
            scale += float(torch.linalg.vector_norm(part))
        if not np.isfinite(total):
            raise ValueError(
                f"the loss is {total}; second derivatives need a finite one. Check data and parameters for NaN or Inf."
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


def _crossed_norms(probes: Tensor, products: Tensor) -> float:
    """Return ‖u‖‖Hv‖ + ‖v‖‖Hu‖ for columns u, v and their products."""
    lengths, images = torch.linalg.vector_norm(probes, dim=0), torch.linalg.vector_norm(products, dim=0)
    return float(lengths[0] * images[1] + lengths[1] * images[0])
