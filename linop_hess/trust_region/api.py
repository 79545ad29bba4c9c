"""`solve` and `cubic`: what users call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from linop_hess._validate import finite_real
from linop_hess.operators.convert import as_tensor, to_numpy
from linop_hess.spectrum.extremes import HasSpectrum, analysis_of
from linop_hess.trust_region.search import Cubic, Model, Region, Search
from linop_hess.trust_region.shifted import Shifted
from linop_hess.trust_region.step import Step


def solve(lin: HasSpectrum, radius: float, *, gradient: Any = None) -> Step:
    """Minimize gᵀs + ½sᵀHs over ‖s‖ ≤ radius, globally, with a certificate.

    The multiplier λ is bracketed by the inertia of H + λI and found by Newton's method on 1/‖s(λ)‖ = 1/radius (Moré & Sorensen,
    SIAM J. Sci. Stat. Comput. 4, 1983); in the hard case, where g has no part in the lowest eigenspace, an eigenvector from inverse
    iteration is added. All in float64.

    Parameters
    ----------
    lin : Linearization or ChainCurvature
        A linearization, its H or its `gauss_newton()`.
    radius : float
        Positive.
    gradient : array_like or Tensor, shape (N,), optional
        g; by default that of the linearization. A curvature by itself needs it.

    Returns
    -------
    Step
        With ``step.certificate.holds`` true, or saying what rounding left open.

    Raises
    ------
    ValueError, TypeError
        If `radius` is not positive and finite, `lin` has no curvature, or there is no gradient of shape (N,).
    FactorizationError
        If no λ was found at which H + λI is positive definite by inertia.

    Examples
    --------
    >>> import torch, linop_hess as lh
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    >>> x, y = torch.randn(5, 2).double(), torch.randn(5, 1).double()
    >>> lin = lh.linearize(model, torch.nn.functional.mse_loss, x, y)
    >>> step = lh.trust_region.solve(lin, radius=0.1)
    >>> step.kind, step.certificate.holds
    ('boundary', True)
    """
    return _run(lin, Region(_positive(radius, "radius")), gradient)


def cubic(lin: HasSpectrum, sigma: float, *, gradient: Any = None) -> Step:
    """Minimize gᵀs + ½sᵀHs + σ/3‖s‖³ globally, with a certificate.

    As `solve`, on 1/‖s(λ)‖ = σ/λ (Nesterov & Polyak, Math. Program. 108, 2006; Cartis, Gould & Toint, Math. Program. 127, 2011).

    Parameters
    ----------
    lin : Linearization or ChainCurvature
    sigma : float
        σ, positive.
    gradient : array_like or Tensor, shape (N,), optional
        g; by default that of the linearization.

    Returns
    -------
    Step

    Raises
    ------
    ValueError, TypeError, FactorizationError
        As `solve`.
    """
    return _run(lin, Cubic(_positive(sigma, "sigma")), gradient)


def _positive(value: float, name: str) -> float:
    if not (number := finite_real(value, name)) > 0.0:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return number


def gradient_of(lin: Any, gradient: Any) -> np.ndarray:
    """Return the gradient given, or that of a linearization, in float64.

    Raises
    ------
    TypeError
        If there is neither.
    """
    analysis = analysis_of(lin)
    if gradient is None and (gradient := getattr(lin, "gradient", None)) is None:
        raise TypeError(f"a {type(lin).__name__} has no gradient by itself: pass gradient=")
    problem = analysis.problem
    g = as_tensor(gradient, problem.size, ndims=(1,), dtype=torch.float64, device=problem.device, who="the gradient")
    return np.array(to_numpy(g), dtype=np.float64)


def _run(lin: Any, model: Model, gradient: Any) -> Step:
    g = gradient_of(lin, gradient)
    with torch.no_grad():
        return Search(Shifted(analysis_of(lin)), g, model).run()
