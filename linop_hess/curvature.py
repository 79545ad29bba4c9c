"""The Hessian of a chain and its Gauss-Newton matrix, as one operator class: damping, inverses, and questions to their spectrum."""

from __future__ import annotations

from typing import Any

import torch

from linop_hess._validate import finite_real, whole
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.counting import count_up_to, smallest_convex_damping
from linop_hess.lq.inverse.inertia import inertia
from linop_hess.lq.methods.plan import make_plan
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.operators import pieces
from linop_hess.operators.block import NamedOperator
from linop_hess.operators.inverse import HessianInverse, MethodName, PrecisionName
from linop_hess.operators.operator import Operator, damped
from linop_hess.operators.parameters import ParameterTable
from linop_hess.spectrum.extremes import condition_number, extreme_eigenvalues
from linop_hess.tables import Cuts, NetworkPlan


class ChainCurvature(NamedOperator, pieces.ChainHessian):
    """A symmetric curvature matrix H of a chain, of shape (N, N): `Linearization.H`, or `Linearization.gauss_newton()`.

    Parameters
    ----------
    analysis : Analysis
        Of the LQ problem that H belongs to.
    table : ParameterTable, optional
        Names of the parameters; without, those of the stages' controls (`ParameterTable.of_stages`).
    cuts : Cuts, optional
        What lives in the states.

    Attributes
    ----------
    analysis : Analysis
    parameter_table : ParameterTable
    """

    def __init__(self, analysis: Analysis, table: ParameterTable | None = None, cuts: Cuts | None = None) -> None:
        super().__init__(analysis.problem)
        problem = analysis.problem
        self._cuts = cuts or Cuts(problem.names, problem.layout.n_out, problem.dtype.itemsize)
        self.analysis = analysis
        self.parameter_table = table or ParameterTable.of_stages(analysis.problem)

    def damped(self, damping: float) -> Operator:
        """H + damping·I.

        Raises
        ------
        ValueError, TypeError
            If damping is not a finite real number.
        """
        return damped(self, finite_real(damping, "damping"))

    def plan(self, damping: float = 1.0, *, right_hand_sides: int = 1, tolerance: float | None = None) -> NetworkPlan:
        """Flops, bytes and modelled time of each method, the choice of ``method="auto"``, and the widest cuts; print it.

        Only iterations depend on the damping, and are estimated: see docs/batches.md.

        Parameters
        ----------
        damping : float
        right_hand_sides : int
            How many solves are to be made.
        tolerance : float, optional
            Backward error that they must reach; default 1e-14 in float64 and 1e-6 in float32.

        Raises
        ------
        ValueError, TypeError
            If damping is not a finite real number, or `right_hand_sides` no positive integer.
        """
        damping, count = finite_real(damping, "damping"), whole(right_hand_sides, "right_hand_sides", least=1)
        with torch.no_grad():
            return NetworkPlan.of(make_plan(self.analysis, damping, count, tolerance), self._cuts)

    def inverse(
        self,
        damping: float,
        method: MethodName = "auto",
        *,
        tolerance: float | None = None,
        rank: int | None = None,
        tol: float | None = None,
        core: int | None = None,
        right_hand_sides: int = 1,
        precision: PrecisionName = "auto",
    ) -> HessianInverse:
        """(H + damping·I)⁻¹, exactly; see `HessianInverse` for parameters and errors."""
        sketch: dict[str, Any] = {"rank": rank, "tol": tol, "core": core}
        how: dict[str, Any] = {"tolerance": tolerance, "precision": precision, "right_hand_sides": right_hand_sides}
        with self._cuts.told():
            return HessianInverse(self.analysis, damping, method, table=self.parameter_table, **how, **sketch)

    def inertia(self, damping: float) -> Inertia:
        """Numbers of negative, zero and positive eigenvalues of H + damping·I, as `HessianInverse.inertia` without an inverse.

        Raises
        ------
        ValueError, TypeError
            If damping is not a finite real number.
        FactorizationError
            If H + damping·I is singular to working precision, or rounding leaves its inertia open.
        """
        damping = finite_real(damping, "damping")
        with torch.no_grad(), self._cuts.told():
            return inertia(self.analysis, damping)

    def count_eigenvalues(self, a: float, b: float) -> int:
        """Count the eigenvalues of H in (a, b], from two inertias.

        Parameters
        ----------
        a, b : float
            An end that is an eigenvalue to rounding is moved up by 1e-7‖H‖, so that it is counted at b and not at a.

        Raises
        ------
        ValueError, TypeError
            If an end is no finite real number, or a > b.
        FactorizationError
            If rounding leaves it open how many lie below an end.
        """
        a, b = finite_real(a, "a"), finite_real(b, "b")
        if a > b:
            raise ValueError(f"an interval (a, b] needs a <= b, got a={a!r}, b={b!r}")
        with torch.no_grad(), self._cuts.told():
            return count_up_to(self.analysis, b) - count_up_to(self.analysis, a) if a < b else 0

    def smallest_convex_damping(self, margin: float = 0.0, rtol: float = 1e-3) -> float:
        """Return the least damping ε for which H + εI is positive definite, by bisection on inertia.

        Parameters
        ----------
        margin : float
            What to add, relatively.
        rtol : float
            The result is above the least damping by at most this, relatively.

        Returns
        -------
        float
            Where H is positive semidefinite, 1e-7‖H‖; where it is zero, 1.

        Raises
        ------
        ValueError, TypeError
            If `margin` is negative, or `rtol` not between 0 and 1.
        FactorizationError
            If no damping up to 1e8‖H‖ makes H + εI positive definite.
        """
        margin, rtol = finite_real(margin, "margin"), finite_real(rtol, "rtol")
        if not (margin >= 0.0 and 0.0 < rtol < 1.0):
            raise ValueError(
                f"margin must be at least 0 and rtol between 0 and 1, got margin={margin!r}, rtol={rtol!r}"
            )
        with torch.no_grad(), self._cuts.told():
            return (1.0 + margin) * smallest_convex_damping(self.analysis, rtol)

    def extreme_eigenvalues(self, rtol: float = 1e-8) -> tuple[float, float]:
        """Smallest and largest eigenvalue of H, by Lanczos or bisection; that none lies outside is verified by inertia.

        Parameters
        ----------
        rtol : float
            How well, in terms of ‖H‖.

        Returns
        -------
        tuple of float

        Raises
        ------
        ValueError, TypeError
            If `rtol` is not between 0 and 1.
        FactorizationError
            If rounding leaves it open whether an eigenvalue lies beyond an end.
        """
        if not 0.0 < finite_real(rtol, "rtol") < 1.0:
            raise ValueError(f"rtol must be between 0 and 1, got {rtol!r}")
        return extreme_eigenvalues(self.analysis, rtol)

    def condition_number(self, damping: float) -> float:
        """‖H + εI‖·‖(H + εI)⁻¹‖ in the 2-norm, by Lanczos on both or bisection, to about 1e-6.

        Raises
        ------
        ValueError, TypeError
            If damping is not a finite real number.
        FactorizationError
            If H + εI is singular to working precision.
        """
        return condition_number(self.analysis, finite_real(damping, "damping"))


class HasHessian:
    """What has a Hessian `H`, and answers questions put to it."""

    @property
    def H(self) -> ChainCurvature:
        """The Hessian, shape (N, N)."""
        raise NotImplementedError

    def damped(self, damping: float) -> Operator:
        """H + damping·I; see `ChainCurvature.damped`."""
        return self.H.damped(damping)

    def plan(self, damping: float = 1.0, *, right_hand_sides: int = 1, tolerance: float | None = None) -> NetworkPlan:
        """Cost of each method, the widest cuts and what lives there; see `ChainCurvature.plan`."""
        return self.H.plan(damping, right_hand_sides=right_hand_sides, tolerance=tolerance)

    def inverse(
        self,
        damping: float,
        method: MethodName = "auto",
        *,
        tolerance: float | None = None,
        rank: int | None = None,
        tol: float | None = None,
        core: int | None = None,
        right_hand_sides: int = 1,
        precision: PrecisionName = "auto",
    ) -> HessianInverse:
        """(H + damping·I)⁻¹, exactly; see `HessianInverse` for parameters and errors."""
        sketch: dict[str, Any] = {"rank": rank, "tol": tol, "core": core}
        how: dict[str, Any] = {"tolerance": tolerance, "precision": precision, "right_hand_sides": right_hand_sides}
        return self.H.inverse(damping, method, **how, **sketch)

    def inertia(self, damping: float) -> Inertia:
        """Signs of the eigenvalues of H + damping·I; see `ChainCurvature.inertia`."""
        return self.H.inertia(damping)

    def count_eigenvalues(self, a: float, b: float) -> int:
        """Count the eigenvalues of H in (a, b]; see `ChainCurvature.count_eigenvalues`."""
        return self.H.count_eigenvalues(a, b)

    def smallest_convex_damping(self, margin: float = 0.0, rtol: float = 1e-3) -> float:
        """Return the least damping that makes H + damping·I positive definite; see `ChainCurvature.smallest_convex_damping`."""
        return self.H.smallest_convex_damping(margin, rtol)

    def extreme_eigenvalues(self, rtol: float = 1e-8) -> tuple[float, float]:
        """Smallest and largest eigenvalue of H; see `ChainCurvature.extreme_eigenvalues`."""
        return self.H.extreme_eigenvalues(rtol)

    def condition_number(self, damping: float) -> float:
        """‖H + damping·I‖·‖(H + damping·I)⁻¹‖; see `ChainCurvature.condition_number`."""
        return self.H.condition_number(damping)
