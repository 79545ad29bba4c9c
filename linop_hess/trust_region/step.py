"""A step with its certificate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from linop_hess._display import Shown
from linop_hess.trust_region.certificate import Certificate

Kind = Literal["interior", "boundary", "hard"]


@dataclass(frozen=True, repr=False)
class Step(Shown):
    """The global minimizer of a model gᵀs + ½sᵀHs within a radius, or with σ/3‖s‖³ added.

    Attributes
    ----------
    s : ndarray, shape (N,)
    multiplier : float
        λ with (H + λI)s = −g.
    kind : {"interior", "boundary", "hard"}
        "hard": the solution of (H + λI)s = −g is too short for the least λ that makes H + λI semidefinite, or cannot be told from one
        that is, and an eigenvector of the lowest eigenvalue was added.
    decrease : float
        By how much the model falls, m(0) − m(s).
    certificate : Certificate
    factorizations, solves, products : int
        What it took: values of λ that were factored, right-hand sides solved for, products with H.
    """

    s: np.ndarray
    multiplier: float
    kind: Kind
    decrease: float
    certificate: Certificate
    factorizations: int
    solves: int
    products: int

    @property
    def length(self) -> float:
        """‖s‖."""
        return float(np.linalg.norm(self.s))

    def __str__(self) -> str:
        """Return the step in a few lines."""
        return "\n".join([self._head(), str(self.certificate), *self._notes()])

    def _head(self) -> str:
        return f"{self.kind} step: length {self.length:.6g}, λ = {self.multiplier:.6g}, the model falls by {self.decrease:.6g}"

    def _cells(self) -> list[tuple[str, str, str]]:
        return self.certificate._cells()

    def _notes(self) -> list[str]:
        return [f"{self.factorizations} factorizations, {self.solves} solves, {self.products} products"]
