"""H + λI as the search for λ needs it: is it positive definite, solve with it, and count what that took."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from linop_hess.errors import FactorizationError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.operators.inverse import HessianInverse
from linop_hess.operators.pieces import ChainHessian

# Products of the Lanczos iteration that looks for the lowest eigenvector.
_PRODUCTS = 30


@dataclass
class Lowest:
    """The lowest eigenvector known: the lowest eigenvalue is at most `value`, and some eigenvalue within `residual` of it."""

    vector: np.ndarray
    product: np.ndarray
    value: float
    residual: float


class Shifted:
    """Curvature with counters.

    Attributes
    ----------
    factorizations, solves, products : int
    norm : float
        ‖H‖, estimated from below.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.H = ChainHessian(analysis.problem)
        self.norm = analysis.norm
        self.factorizations = self.solves = self.products = 0

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        self.products += 1
        return np.asarray(self.H @ x)

    def factor(self, lam: float) -> tuple[HessianInverse | None, Inertia | None]:
        """Factors and inertia of H + λI; None where it is singular, or rounding leaves its inertia open."""
        self.factorizations += 1
        inverse: HessianInverse | None = None
        with suppress(FactorizationError):
            inverse = HessianInverse(self.analysis, lam)
            return inverse, inverse.inertia()
        return inverse, None

    def solve(self, inverse: HessianInverse, b: np.ndarray) -> np.ndarray | None:
        """(H + λI)⁻¹b; None where no method reaches its tolerance."""
        self.solves += 1
        with suppress(FactorizationError):
            return np.asarray(inverse.solve(b).x)
        return None

    def pair(self, vector: np.ndarray) -> Lowest:
        """Rayleigh quotient and residual."""
        v = vector / np.linalg.norm(vector)
        product = self @ v
        value = float(v @ product)
        return Lowest(v, product, value, float(np.linalg.norm(product - value * v)))

    def lanczos(self) -> Lowest:
        """Lowest Ritz pair of a few products from a random vector, reorthogonalized."""
        size = self.analysis.problem.size
        q = np.random.default_rng(0).standard_normal(size)
        basis: list[np.ndarray] = [q / np.linalg.norm(q)]
        images: list[np.ndarray] = []
        for _ in range(min(_PRODUCTS, size)):
            images.append(self @ basis[-1])
            Q, q = np.stack(basis, 1), images[-1]
            for _ in range(2):
                q = q - Q @ (Q.T @ q)
            length = float(np.linalg.norm(q))
            if length <= 1e-10 * self.norm or len(basis) == size:
                break
            basis.append(q / length)
        Q = np.stack(basis[: len(images)], 1)
        small = Q.T @ np.stack(images, 1)
        return self.pair(Q @ np.linalg.eigh((small + small.T) / 2)[1][:, 0])

    def inverse_iteration(self, inverse: HessianInverse, known: Lowest) -> Lowest:
        """Two steps with the factors of H + λI; the lower of what is found and what was known."""
        vector = known.vector
        for _ in range(2):
            found = self.solve(inverse, vector)
            if found is None or not np.isfinite(found).all():
                return known
            vector = found / np.linalg.norm(found)
        found_pair = self.pair(vector)
        better = found_pair.value < known.value or found_pair.residual < known.residual
        return found_pair if better and found_pair.value <= known.value + known.residual else known
