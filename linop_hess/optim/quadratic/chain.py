"""The quadratic model of a chain, and what linearizes objectives step after step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from linop_hess._validate import Nonsmooth
from linop_hess.autograd.kinks.surrogates import checked_sharpness
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.linearization import Linearization, Told
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.counting import smallest_convex_damping
from linop_hess.lq.inverse.inertia import inertia
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.optim.objective import Objective
from linop_hess.optim.quadratic.products import ProductModel
from linop_hess.optim.record import Tally


class Linearizer:
    """Linearizes the objectives of one step after the other, each with what the last one told.

    Parameters
    ----------
    nonsmooth, sharpness
        As of `linop_hess.linearize`.

    Raises
    ------
    ValueError
        If they are not usable.
    """

    def __init__(self, nonsmooth: Nonsmooth, sharpness: float | None) -> None:
        self._second = SecondDerivatives.of(nonsmooth, sharpness, "autograd")
        self.nonsmooth, self.sharpness = nonsmooth, checked_sharpness(nonsmooth, sharpness)
        self._told: Told | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what was told, which is a graph: it is recorded anew."""
        return {**vars(self), "_told": None}

    def __call__(self, objective: Objective) -> Linearization:
        """Linearize one; what it raises is what `linop_hess.linearize` does."""
        lin = objective.linearize(self._second, self._told)
        self._told = lin.told
        return lin


class ChainModel(ProductModel):
    """loss + gᵀs + ½ sᵀHs of a chain, in float64.

    Parameters
    ----------
    analysis : Analysis
        Of H, or of Gauss-Newton.
    loss : float
    gradient : Tensor, shape (N,)
    tally : Tally
        Where products and factorizations are counted.
    """

    def __init__(self, analysis: Analysis, loss: float, gradient: Tensor, tally: Tally) -> None:
        super().__init__(loss, gradient, analysis.in_float64.problem.hessian_product, tally)
        self.analysis = analysis

    def norm(self) -> float:
        """‖H‖."""
        return self.analysis.norm

    def smallest_convex_damping(self) -> float:
        """The least damping that makes H positive definite, 0 where a negligible one does."""
        found = smallest_convex_damping(self.analysis, 1e-2)
        return 0.0 if found <= 1e-6 * self.norm() else found

    def inertia(self, damping: float) -> Inertia:
        """Signs of the eigenvalues of H + λI."""
        self.tally.factorizations += 1
        return inertia(self.analysis, damping)
