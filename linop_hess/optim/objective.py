"""What a step is taken on: a batch, or what a closure returns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess._validate import checked_loss
from linop_hess.autograd.backward_graph import carefully
from linop_hess.autograd.calling import call_loss, call_model, takes_parameters
from linop_hess.autograd.differentiate import kept_apart, once_differentiable_graphs, twice_differentiable
from linop_hess.graph.build import AUTOGRAD
from linop_hess.graph.layers import known_layers
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.linearization import Linearization, Told, linearize_again

Loss = Callable[..., Tensor]


class Objective(ABC):
    """The loss of one step as a function of the model's parameters.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        Those that are optimized, by name, in the model's order.

    Attributes
    ----------
    shape : torch.Size or None
        Of the output when the loss was last computed; None if it is no tensor, or not told from the loss.
    data : tuple
        What is known of inputs and targets: two objectives with others are two.
    """

    shape: torch.Size | None = None

    def __init__(self, parameters: Mapping[str, nn.Parameter], data: tuple[Any, ...] = ()) -> None:
        self._parameters, self.data = dict(parameters), data

    @property
    def leaves(self) -> list[nn.Parameter]:
        """The parameters, in the order of flat vectors."""
        return list(self._parameters.values())

    @abstractmethod
    def _compute(self) -> Any:
        """The loss as the user's function gives it."""

    def output(self) -> Any:
        """The output of the model as it gives it.

        Raises
        ------
        TypeError
            If it is not told from the loss.
        """
        raise TypeError("expected a closure that returns (output, target), got one that returns the loss: return both")

    def _loss_of(self, output: Any, loss_fn: Loss, targets: Any) -> Any:
        self.shape = output.shape if isinstance(output, Tensor) else None
        return call_loss(loss_fn, output, targets, self._parameters)

    def loss(self) -> float:
        """The loss at the current parameters, which may be infinite or NaN.

        Raises
        ------
        TypeError, ValueError
            If it is no scalar tensor.
        """
        with once_differentiable_graphs(self.leaves[0].device):  # which models that differentiate need
            return number(self._compute())

    def gradient(self, products: bool = True) -> tuple[float, Tensor, Callable[[Tensor], Tensor]]:
        """Loss, gradient of shape (N,), and the product of the Hessian with the columns of (N, k), by double backward.

        Without `products` the graph is not kept for them.

        Raises
        ------
        TypeError, ValueError
            If the loss is no scalar tensor, or not differentiable by any parameter.
        """
        leaves = self.leaves
        apart = kept_apart(leaves) if products else nullcontext()
        with twice_differentiable("the closure", leaves[0].device), torch.enable_grad(), apart:
            loss, _ = carefully(self._compute, lambda found: found)
            value = number(loss)
            if not loss.requires_grad:
                raise ValueError(
                    "expected a loss that depends on the parameters, got one that does not: return the tensor itself, without detach()"
                )
            try:
                parts = torch.autograd.grad(
                    loss, leaves, create_graph=products, allow_unused=True, materialize_grads=True
                )
            except RuntimeError as error:
                if "second time" not in str(error):
                    raise
                raise ValueError(
                    "expected a closure that returns the loss with its graph, got one that was differentiated already: leave "
                    "backward() out, the optimizer differentiates"
                ) from error
            g = torch.cat([part.reshape(-1) for part in parts])

        def product(V: Tensor) -> Tensor:
            with twice_differentiable("the closure", leaves[0].device):
                columns = [self._product(g, leaves, v) for v in V.to(g.dtype).unbind(1)]
            return torch.stack(columns, 1).to(V.dtype)

        return value, g.detach(), product

    @staticmethod
    def _product(g: Tensor, leaves: Sequence[Tensor], v: Tensor) -> Tensor:
        if not g.requires_grad:  # linear
            return torch.zeros_like(v)
        parts = torch.autograd.grad(g, leaves, v, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    def gauss_newton(self) -> tuple[float, Tensor, Callable[[Tensor], Tensor]]:
        """Loss, gradient of shape (N,), and the product of Jᵀ(∇²ℓ)J with the columns of (N, k), by double backward.

        Raises
        ------
        TypeError
            If the output is not told from the loss, or is no tensor, or the loss depends on parameters in another way than by it.
        ValueError
            If the output does not depend on the parameters.
        """
        leaves = self.leaves
        with twice_differentiable("the model", leaves[0].device), torch.enable_grad(), kept_apart(leaves):
            (output, loss_of), _ = carefully(self.parts, lambda found: found[0])
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"expected a model whose output is one tensor, got {described(output)}: use GaussNewton, which takes nests"
                )
            if not output.requires_grad:
                raise ValueError(
                    "expected an output that depends on parameters, got one that does not: leave detach() out"
                )
            state, spread = output.detach().requires_grad_(), torch.zeros_like(output).requires_grad_()
            loss = loss_of(state)
            value = number(loss)
            slope = slope_by_output(loss, state, leaves)
            if slope is None:
                raise TypeError(
                    "expected a loss of the output alone, got one that depends on parameters in another way too, or on none: give the loss "
                    "the parameters as a third argument and use GaussNewton, or use SaddleFree"
                )
            pulled = torch.autograd.grad(output, leaves, spread, create_graph=True, materialize_grads=True)
            pullback = torch.cat([part.reshape(-1) for part in pulled])

        def pull(cotangent: Tensor) -> Tensor:
            parts = torch.autograd.grad(output, leaves, cotangent, retain_graph=True, materialize_grads=True)
            return torch.cat([part.reshape(-1) for part in parts])

        def product(V: Tensor) -> Tensor:
            columns = []
            with twice_differentiable("the model", leaves[0].device):
                for v in V.to(slope.dtype).unbind(1):
                    (pushed,) = torch.autograd.grad(pullback, spread, v, retain_graph=True, materialize_grads=True)
                    (curved,) = torch.autograd.grad(slope, state, pushed, retain_graph=True, materialize_grads=True)
                    columns.append(pull(curved))
            return torch.stack(columns, 1).to(V.dtype)

        return value, pull(slope.detach()), product

    @abstractmethod
    def parts(self) -> tuple[Any, Callable[[Any], Any]]:
        """The output of the model, and the loss as a function of it; a TypeError where one is not told from the other."""

    @abstractmethod
    def linearize(self, second: SecondDerivatives = AUTOGRAD, told: Told | None = None) -> Linearization:
        """First and second derivatives as a chain; `told` by that of an earlier step."""

    @property
    def has_output(self) -> bool:
        """Whether the model's output is told from the loss, as Gauss-Newton needs it."""
        return True

    @property
    def has_layers(self) -> bool:
        """Whether the model is a sequence of layers known by their formulas, so that `linearize` need not record it."""
        return False


class Batch(Objective):
    """loss_fn(model(inputs), targets)."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], model: nn.Module, loss_fn: Loss, inputs: Any, targets: Any
    ) -> None:
        super().__init__(parameters, (inputs, targets))
        self._model, self._loss_fn, self._inputs, self._targets = model, loss_fn, inputs, targets

    def _compute(self) -> Any:
        return self._loss_of(self.output(), self._loss_fn, self._targets)

    @property
    def has_layers(self) -> bool:
        return known_layers(self._model, self._inputs, list(self._parameters)) is not None

    def output(self) -> Any:
        return call_model(self._model, self._inputs)

    def parts(self) -> tuple[Any, Callable[[Any], Any]]:
        return self.output(), _of_output(self._loss_fn, self._targets)

    def linearize(self, second: SecondDerivatives = AUTOGRAD, told: Told | None = None) -> Linearization:
        names = list(self._parameters)
        return linearize_again(told, self._model, self._loss_fn, self._inputs, self._targets, names, second)


class _Called(nn.Module):
    """A closure as a model of nothing, whose parameters are the model's."""

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self._run = model, run

    def forward(self, nothing: Tensor) -> Any:
        return self._run()


class Closure(Objective):
    """loss_fn(*closure()), where the closure does more than call the model once."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        model: nn.Module,
        loss_fn: Loss,
        closure: Callable[[], Any],
        target: Any,
    ) -> None:
        super().__init__(parameters, (target,))
        self._called, self._loss_fn, self._closure, self._target = (
            _Called(model, self.output),
            loss_fn,
            closure,
            target,
        )

    def output(self) -> Any:
        return self._closure()[0]

    def _compute(self) -> Any:
        return self._loss_of(self.output(), self._loss_fn, self._target)

    def parts(self) -> tuple[Any, Callable[[Any], Any]]:
        return self.output(), _of_output(self._loss_fn, self._target)

    def linearize(self, second: SecondDerivatives = AUTOGRAD, told: Told | None = None) -> Linearization:
        names = [f"model.{name}" for name in self._parameters]
        first = next(iter(self._parameters.values()))
        nothing = torch.zeros(1, dtype=first.dtype, device=first.device)
        return linearize_again(told, self._called, self._loss_fn, nothing, self._target, names, second)


class Scalar(Objective):
    """A closure that returns the loss itself: products alone."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], closure: Callable[[], Any]) -> None:
        super().__init__(parameters)
        self._closure = closure

    def _compute(self) -> Any:
        return self._closure()

    def parts(self) -> tuple[Any, Callable[[Any], Any]]:
        raise TypeError(
            "expected a closure that returns (output, target) for a Gauss-Newton matrix, got one that returns the loss: it tells nothing "
            "of the output; use SaddleFree, or return both"
        )

    def linearize(self, second: SecondDerivatives = AUTOGRAD, told: Told | None = None) -> Linearization:
        raise TypeError(
            "expected a closure that returns (output, target) where the curvature is factored, got one that returns the loss: return both, "
            'or use SaddleFree with method="lanczos"'
        )

    @property
    def has_output(self) -> bool:
        return False


def slope_by_output(loss: Tensor, state: Tensor, leaves: Sequence[Tensor]) -> Tensor | None:
    """Derivatives of a loss by the output of which it was computed, with their graph; None where it depends on parameters past that.

    So does a penalty on weights that a loss takes from the model itself, or one on what a layer has left for it. None too where it does
    not depend on the output.
    """
    if not loss.requires_grad:
        return None
    slope, *past = torch.autograd.grad(loss, [state, *leaves], create_graph=True, allow_unused=True)
    return None if any(part is not None for part in past) else slope


def _of_output(loss_fn: Loss, targets: Any) -> Callable[[Any], Any]:
    if takes_parameters(loss_fn):
        raise TypeError(
            "expected a loss of (output, target) for products with its Gauss-Newton matrix, got one that takes the parameters too: use "
            "GaussNewton"
        )
    return lambda output: call_loss(loss_fn, output, targets, {})


def described(found: Any) -> str:
    """What a model or a closure returned, in words."""
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {len(found)}"
    return "nothing" if found is None else f"a {type(found).__name__}"


def number(loss: Any) -> float:
    """The loss as a float, NaN and infinity too; all else that is no scalar tensor is refused as everywhere."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and not bool(torch.isfinite(loss)):
        return math.nan if bool(torch.isnan(loss)) else float(loss.detach())
    return float(checked_loss(loss).detach())
