"""What is known of each step of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter

from linop_hess._display import Shown
from linop_hess.lq.pivots.inertia import Inertia


@dataclass(frozen=True, repr=False)
class StepRecord(Shown):
    """One step.

    Attributes
    ----------
    step : int
        Its number, from 1.
    loss : float
        Before the step, on its batch.
    new_loss : float
        After it on the same batch; equal to `loss` where the step was refused, NaN where it was not evaluated.
    accepted : bool
        Whether parameters were changed.
    gain_ratio : float
        What the loss fell by, in terms of what the quadratic model promised; NaN where there is no model.
    damping : float
        That of the last trial point.
    inertia : Inertia or None
        Of the damped curvature, where the damping strategy asked for it.
    method : str
        How the curvature was inverted: a method of the plan, "lanczos" for products alone.
    backward_error : float
        Of the first solve with the factors; NaN where there was none.
    seconds : float
    trials : int
        Points at which the loss was tried.
    factorizations, products : int
        Factorizations, and products with the curvature, a column each.
    reason : str
        Why the step was refused; empty where it was not.
    """

    step: int
    loss: float
    new_loss: float = math.nan
    accepted: bool = False
    gain_ratio: float = math.nan
    damping: float = math.nan
    inertia: Inertia | None = None
    method: str = ""
    backward_error: float = math.nan
    seconds: float = math.nan
    trials: int = 0
    factorizations: int = 0
    products: int = 0
    reason: str = ""

    def __str__(self) -> str:
        what = "accepted" if self.accepted else f"refused: {self.reason}"
        return (
            f"step {self.step}: loss {self.loss:.3e} -> {self.new_loss:.3e}, {what}; gain ratio {self.gain_ratio:.2f}, "
            f"damping {self.damping:.1e}, {self.factorizations} factorizations by {self.method or 'none'}, {self.seconds:.3f} s"
        )


@dataclass
class Tally:
    """Counts of one step, while it is made.

    Attributes
    ----------
    factorizations, products, trials : int
    backward_error : float
    method : str
    inertia : Inertia or None
    """

    factorizations: int = 0
    products: int = 0
    trials: int = 0
    backward_error: float = math.nan
    method: str = ""
    inertia: Inertia | None = None
    _start: float = field(default_factory=perf_counter)

    def completed(self, record: StepRecord) -> StepRecord:
        """Return a record with these counts and the seconds since this was made."""
        return replace(
            record,
            factorizations=self.factorizations,
            products=self.products,
            trials=self.trials,
            backward_error=self.backward_error,
            method=self.method,
            inertia=self.inertia,
            seconds=perf_counter() - self._start,
        )

    @contextmanager
    def factoring(self, method: str) -> Iterator[None]:
        """Count a factorization by a method, failed ones too."""
        self.factorizations += 1
        self.method = method
        yield
