"""The search for λ: bracketed by inertia, by Newton's method on the secular equation, and by inverse iteration in the hard case."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from linop_hess.errors import FactorizationError
from linop_hess.lq.accuracy import CERTAIN, HARD_CASE, NARROW_BRACKET, SECULAR_LENGTH, SECULAR_NEAR
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.trust_region.certificate import Certificate, gap_in_region, gap_of_cubic
from linop_hess.trust_region.shifted import Lowest, Shifted
from linop_hess.trust_region.step import Kind, Step

# Values of λ tried; six are usual.
_MOST = 150


class Model(Protocol):
    """How long a step may be at λ, and the secular equation that says so."""

    def length(self, lam: float) -> float:
        """‖s‖ at the solution, if λ is its multiplier."""
        ...

    def newton(self, lam: float, size: float, slope: float) -> float:
        """Newton's next λ, from ‖s‖ and sᵀ(H + λI)⁻¹s."""
        ...

    def bracket(self, g: float, norm: float) -> tuple[float, float]:
        """Bounds of λ from ‖g‖ and ‖H‖."""
        ...

    def certificate(
        self, norm: float, g: np.ndarray, s: np.ndarray, Hs: np.ndarray, lam: float, inertia: Inertia
    ) -> Certificate:
        """Conditions at a step."""
        ...

    def value(self, quadratic: float, size: float) -> float:
        """The model from gᵀs + ½sᵀHs and ‖s‖."""
        ...


@dataclass(frozen=True)
class Region:
    """Steps no longer than a radius; 1/‖s(λ)‖ = 1/radius."""

    radius: float

    def length(self, lam: float) -> float:
        return self.radius

    def newton(self, lam: float, size: float, slope: float) -> float:
        return lam + (size / self.radius - 1.0) * size**2 / slope

    def bracket(self, g: float, norm: float) -> tuple[float, float]:
        return max(0.0, g / self.radius - 2.0 * norm), g / self.radius + 2.0 * norm

    def certificate(
        self, norm: float, g: np.ndarray, s: np.ndarray, Hs: np.ndarray, lam: float, inertia: Inertia
    ) -> Certificate:
        size = float(np.linalg.norm(s))
        residual = float(np.linalg.norm(g + Hs + lam * s))
        scale = (norm + lam) * size + float(np.linalg.norm(g))
        off = (abs(size - self.radius) if lam else max(0.0, size - self.radius)) / self.radius
        return Certificate(lam, inertia, residual / (scale or 1.0), off, gap_in_region(residual, s, lam, self.radius))

    def value(self, quadratic: float, size: float) -> float:
        return quadratic


@dataclass(frozen=True)
class Cubic:
    """Steps of any length, σ/3‖s‖³ added; 1/‖s(λ)‖ = σ/λ."""

    sigma: float

    def length(self, lam: float) -> float:
        return lam / self.sigma

    def newton(self, lam: float, size: float, slope: float) -> float:
        if lam == 0.0:
            return math.inf
        return lam - (1.0 / size - self.sigma / lam) / (slope / size**3 + self.sigma / lam**2)

    def bracket(self, g: float, norm: float) -> tuple[float, float]:
        low = math.sqrt(norm**2 + self.sigma * g) - norm  # λ(λ + 2‖H‖) ≥ σ‖g‖
        return low, norm + math.sqrt(norm**2 + self.sigma * g)

    def certificate(
        self, norm: float, g: np.ndarray, s: np.ndarray, Hs: np.ndarray, lam: float, inertia: Inertia
    ) -> Certificate:
        size = float(np.linalg.norm(s))
        residual = float(np.linalg.norm(g + Hs + self.sigma * size * s))
        scale = (norm + lam) * size + float(np.linalg.norm(g))
        off = abs(self.sigma * size - lam) / (lam or 1.0)
        return Certificate(lam, inertia, residual / (scale or 1.0), off, gap_of_cubic(residual, s, lam, self.sigma))

    def value(self, quadratic: float, size: float) -> float:
        return quadratic + self.sigma / 3.0 * size**3


class Search:
    """One search; `run` gives the step."""

    def __init__(self, shifted: Shifted, g: np.ndarray, model: Model) -> None:
        self.shifted, self.g, self.model = shifted, g, model
        self.low, self.high = model.bracket(float(np.linalg.norm(g)), shifted.norm)
        self.confirmed = False  # whether the upper end was factored
        self.best: Step | None = None
        self._lowest: Lowest | None = None

    @property
    def lowest(self) -> Lowest:
        """The lowest eigenvector known; looked for when it is first needed."""
        if self._lowest is None:
            self._lowest = self.shifted.lanczos()
            self.low = max(self.low, -self._lowest.value)
        return self._lowest

    def run(self) -> Step:
        """Search until the conditions hold, or the bracket is as narrow as rounding leaves it.

        Raises
        ------
        FactorizationError
            If no λ was found at which H + λI is positive definite.
        """
        lam = self.low
        for _ in range(_MOST):
            done, proposed = self._try(lam)
            if done is not None:
                return done
            narrow = self.high - self.low <= NARROW_BRACKET * (self.shifted.norm + self.high)
            if narrow and (self.confirmed or not math.isfinite(self.high)):
                break
            if proposed is None or not self.low < proposed < self.high:
                proposed = self._middle()
            lam = proposed
        if self.best is None:
            raise FactorizationError(
                f"no λ up to {self.high:g} was found at which H + λI is positive definite by inertia", damping=self.high
            )
        return self.best

    def _middle(self) -> float:
        """Inside the bracket; beyond it where its upper end is an estimate that is reached."""
        low, high = self.low, self.high
        if not self.confirmed and high - low <= CERTAIN * (self.shifted.norm + high):
            self.high = high = 4.0 * max(high, self.shifted.norm)
        geometric = math.sqrt(low * high) if low > 0.0 else 0.01 * high
        return geometric if low + 0.01 * (high - low) < geometric < high else 0.5 * (low + high)

    def _try(self, lam: float) -> tuple[Step | None, float | None]:
        """Factor at λ, move the bracket, and say the step where it is found, or which λ is next."""
        inverse, inertia = self.shifted.factor(lam)
        s = None
        if inverse is not None and inertia is not None and inertia.positive == self.g.size:
            s = self.shifted.solve(inverse, -self.g)
        if s is None or inverse is None or inertia is None:
            self.low = max(self.low, lam)
            pair = self.lowest
            self.low = max(self.low, -pair.value)
            return None, -pair.value + max(2.0 * pair.residual, CERTAIN * self.shifted.norm)
        size, length = float(np.linalg.norm(s)), self.model.length(lam)
        if lam == 0.0 and (size <= length or size == 0.0):
            return self._step(s, lam, "interior", inertia), None
        if abs(size - length) <= SECULAR_LENGTH * length:
            return self._step(s, lam, "boundary", inertia), None
        slope = 0.0
        if size > 0.0 and (t := self.shifted.solve(inverse, s)) is not None:
            slope = float(s @ t)
        proposed = self.model.newton(lam, size, slope) if slope > 0.0 else None
        near = abs(size - length) <= SECULAR_NEAR * length
        if size > length:
            self.low = max(self.low, lam)
            if not near:
                return None, proposed
        else:
            self.high, self.confirmed = min(self.high, lam), True
        self._lowest = pair = self.shifted.inverse_iteration(inverse, self.lowest)
        found = self._with_eigenvector(s, lam, pair, length, inertia)
        if found is not None:
            self.best = found if self.best is None or self._off(found) <= self._off(self.best) else self.best
            if self._off(found) <= HARD_CASE:
                return found, None
        if size < length:
            self.low = max(self.low, -pair.value)
            if proposed is None or not self.low < proposed < self.high:
                proposed = self.low + max(pair.residual, CERTAIN * self.shifted.norm)
        return None, proposed

    def _off(self, step: Step) -> float:
        return max(step.certificate.stationarity, step.certificate.complementarity)

    def _with_eigenvector(
        self, s: np.ndarray, lam: float, pair: Lowest, length: float, inertia: Inertia
    ) -> Step | None:
        """Return s + τv of the length asked for, with the τ of smaller size; none where no τ reaches it."""
        along, beyond = float(s @ pair.vector), float(s @ s) - length**2
        if along**2 < beyond:
            return None
        root = math.sqrt(along**2 - beyond)
        tau = -beyond / (along + math.copysign(root, along)) if along or root else 0.0
        return self._step(s + tau * pair.vector, lam, "hard", inertia)

    def _step(self, s: np.ndarray, lam: float, kind: Kind, inertia: Inertia) -> Step:
        shifted = self.shifted
        product = shifted @ s
        certificate = self.model.certificate(shifted.norm, self.g, s, product, lam, inertia)
        size = float(np.linalg.norm(s))
        value = self.model.value(float(self.g @ s + 0.5 * s @ product), size)
        return Step(s, lam, kind, -value, certificate, shifted.factorizations, shifted.solves, shifted.products)
