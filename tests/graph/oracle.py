"""Independent truths for the zoo: loss, gradient and Hessian by double backward, and the Hessian's products by differences."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

import linop_hess as lh
from tests.graph.case import Case, positional
from tests.graph.zoo import CASES
from tests.graph.zoo_operations import OPERATIONS, between
from tests.helpers import dense_hessian, double_backward


@cache
def made(name: str, samples: int, dtype: torch.dtype = torch.float64) -> Case:
    """Return a case of the zoo, or of its operations, the same object each time."""
    return (between(name) if name in OPERATIONS else CASES[name](samples)).to(dtype)


@cache
def truth(name: str, samples: int, dtype: torch.dtype = torch.float64) -> tuple[float, np.ndarray, np.ndarray]:
    """Return `hessian` of a case of the zoo, computed once."""
    return hessian(made(name, samples, dtype))


def hessian(case: Case) -> tuple[float, np.ndarray, np.ndarray]:
    """Return loss, gradient (N,) and Hessian (N, N) in float64, whatever the precision of the case, by double backward.

    Parameters
    ----------
    case : Case
        Its parameters are flattened in the order of `Case.chosen`.

    Returns
    -------
    tuple of (float, ndarray, ndarray)
        The Hessian is not symmetrized.
    """
    case = case.to(torch.float64)
    with primitive_operations(), formulas():
        leaves, loss, gradient = _gradient(case, _values(case), create_graph=True)
        H = double_backward(gradient, leaves)
    return loss.item(), gradient.detach().numpy(), H.detach().numpy()


def gauss_newton(case: Case) -> np.ndarray:
    """Return JᵀCJ in float64, (N, N): C the Hessian of the loss by (output, parameters), J their derivative, both dense by autograd."""
    case = case.to(torch.float64)
    theta = _flat(_values(case).values())
    count = positional(case.loss_fn)

    def output(flat: Tensor) -> tuple[list[object], object]:
        values = _unflatten(case, flat)
        if not isinstance(case.model, nn.Module):
            return tree_flatten(case.model(values, case.inputs))
        state = {name: buffer.clone() for name, buffer in case.model.named_buffers()} | values
        arguments = case.inputs if isinstance(case.inputs, tuple) else (case.inputs,)
        return tree_flatten(torch.func.functional_call(case.model, state, arguments))

    leaves, nest = output(theta)
    real = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    sizes = [leaves[k].numel() for k in real]

    def outputs(flat: Tensor) -> Tensor:
        found = output(flat)[0]
        return _flat(found[k] for k in real)

    def loss(z: Tensor) -> Tensor:
        *parts, flat = z.split([*sizes, theta.numel()])
        filled = list(leaves)
        for k, part in zip(real, parts, strict=True):
            filled[k] = part.view(leaves[k].shape)
        extra = (_unflatten(case, flat),) if count == 3 else ()
        return case.loss_fn(tree_unflatten(filled, nest), case.targets, *extra)

    with primitive_operations(), formulas():
        leaf = theta.clone().requires_grad_()
        J = torch.cat([double_backward(outputs(leaf), [leaf]), torch.eye(theta.numel(), dtype=theta.dtype)])
        C = dense_hessian(loss, torch.cat([outputs(theta).detach(), theta]))
    return (J.T @ C @ J).numpy()


def differenced_product(case: Case, v: np.ndarray, step: float = 3e-4) -> np.ndarray:
    """Return H v by central differences of fourth order of the gradient, torch's operations as they are.

    With H v = D'(0) for D(t) = ∇ℓ(θ + t v), the error is h⁴ D⁽⁵⁾/30 + 1.5 eps ‖∇ℓ‖/h for a step of h.
    """
    case = case.to(torch.float64)
    theta, direction = _flat(_values(case).values()), torch.from_numpy(v)
    with primitive_operations():
        up, down, far_up, far_down = (
            _gradient(case, _unflatten(case, theta + t * step * direction))[2] for t in (1, -1, 2, -2)
        )
    return ((8 * (up - down) - (far_up - far_down)) / (12 * step)).detach().numpy()


def inertia(H: np.ndarray, damping: float) -> lh.Inertia:
    """Count the signs of LAPACK's eigenvalues of H + εI."""
    values = np.linalg.eigvalsh((H + H.T) / 2) + damping
    return lh.Inertia(int((values < 0).sum()), int((values == 0).sum()), int((values > 0).sum()))


def distance_to_singular(H: np.ndarray, damping: float) -> float:
    """Return the eigenvalue of H + εI nearest to zero, relative to ‖H + εI‖₂."""
    values = np.abs(np.linalg.eigvalsh((H + H.T) / 2) + damping)
    return float(values.min() / values.max())


@contextmanager
def primitive_operations() -> Iterator[None]:
    """No fused attention and no oneDNN, whose operations have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        yield


@contextmanager
def formulas() -> Iterator[None]:
    """The operations whose double backward is wrong in torch replaced by their formulas: weight norm."""
    deprecated = sys.modules["torch.nn.utils.weight_norm"]  # a module hidden by the function of the same name
    with (
        mock.patch.object(torch, "_weight_norm", _weight_norm),
        mock.patch.object(deprecated, "_weight_norm", _weight_norm),
    ):
        yield


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [axis for axis in range(v.dim()) if axis != dim]
    return g * v / v.square().sum(others, keepdim=True).sqrt()


def _values(case: Case) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in case.chosen().items()}


def _unflatten(case: Case, flat: Tensor) -> dict[str, Tensor]:
    values = _values(case)
    parts = flat.split([value.numel() for value in values.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}


def _gradient(case: Case, values: dict[str, Tensor], create_graph: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    loss = case.loss(leaves)
    parts = torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph, materialize_grads=True)
    return list(leaves.values()), loss, _flat(parts)


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
