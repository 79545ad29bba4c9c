"""What a sketch may be asked for: how many directions, of how many samples, in what precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from linop_hess._validate import finite_real, whole
from linop_hess.lq.analysis import Analysis

# Directions that a sketch has at most where no number of them is given.
MOST_DIRECTIONS = 2048


@dataclass(frozen=True)
class SketchOptions:
    """What is asked of method "sketched"; None where it is left to the method.

    Attributes
    ----------
    rank : int or None
        Number of directions s, 1..N; None: as many as pay (`lq.iterative.sizing`).
    tol : float or None
        In place of a rank: directions are added until H on the newest is below this part of ‖H‖.
    core : int or None
        Number of samples, weighted, that the sketch is made of; None: all.
    dtype : torch.dtype or None
        Precision of the factors; None: float32, in which a sketch loses nothing that it has, unless its rank is given as N.
    least : int
        Directions to begin with at least where their number is left open: as many as a solve was seen to need. Nothing that is asked for.
    """

    rank: int | None = None
    tol: float | None = None
    core: int | None = None
    dtype: torch.dtype | None = None
    least: int = field(default=0, compare=False)

    @property
    def is_default(self) -> bool:
        """Whether nothing is asked for."""
        return self == SketchOptions()

    def in_precision(self, precision: str) -> SketchOptions:
        """Return the same with factors in "single" or "double" precision; "auto" leaves it open."""
        dtypes = {"single": torch.float32, "double": torch.float64}
        return replace(self, dtype=dtypes.get(precision, self.dtype))

    def for_problem(self, analysis: Analysis) -> SketchOptions:
        """Return the same with nothing left open but the rank."""
        problem = analysis.problem
        core = analysis.samples if self.core is None else self.core
        dtype = self.dtype or (torch.float32 if self.rank is None or self.rank < problem.size else problem.dtype)
        return replace(self, core=core, dtype=dtype)

    @property
    def is_open(self) -> bool:
        """Whether how many directions there are is left to the method."""
        return self.rank is None and self.tol is None

    @property
    def remedies(self) -> str:
        """What to try where GMRES does not end with such a sketch: a number that was left open is what pays already."""
        given = {"a larger rank": self.rank, "a smaller tol": self.tol, "a larger core": self.core}
        return ", ".join(
            [name for name, value in given.items() if value is not None] + ['a larger damping, or method "dense"']
        )


@dataclass(frozen=True)
class Asked:
    """What a plan is made for.

    Attributes
    ----------
    damping : float
    right_hand_sides : int
        How many solves.
    tolerance : float
        Residual to reach, relative to the right-hand side.
    sketch : SketchOptions
    """

    damping: float
    right_hand_sides: int = 1
    tolerance: float = 1.0
    sketch: SketchOptions = SketchOptions()

    @property
    def digits(self) -> float:
        """Natural logarithm of what residuals are to be reduced by, of all right-hand sides together."""
        return self.right_hand_sides * math.log(2.0 / self.tolerance)


def sketch_options(
    analysis: Analysis,
    rank: int | None = None,
    tol: float | None = None,
    core: int | None = None,
    method: str = "sketched",
) -> SketchOptions:
    """Check what is asked of a sketch.

    Raises
    ------
    ValueError
        If rank is none of 1..N, core none of 1..samples, tol not between 0 and 1, rank and tol are both given, or some of them are for
        a method that makes no sketch.
    TypeError
        If they are no numbers.
    """
    size, why_not = analysis.problem.size, analysis.problem.why_no_chain
    if why_not and (rank, tol, core) != (None, None, None):
        raise ValueError(f"expected no rank, tol or core, as nothing can be sketched here, got some: {why_not}")
    if rank is not None and tol is not None:
        raise ValueError(f"expected a rank or a tol, got rank={rank!r} and tol={tol!r}: leave one of them out")
    if rank is not None:
        rank = _among(rank, "rank", size, "parameters")
    if core is not None:
        core = _among(core, "core", analysis.samples, "samples")
    if tol is not None and not 0.0 < finite_real(tol, "tol") < 1.0:
        raise ValueError(f"expected tol between 0 and 1, a part of the norm of H, got {tol!r}: pass one such as 1e-2")
    options = SketchOptions(rank, None if tol is None else float(tol), core)
    if method not in ("sketched", "auto") and not options.is_default:
        raise ValueError(f'expected no rank, tol or core for method {method!r}: they are of method "sketched"')
    return options


def _among(value: int, name: str, most: int, what: str) -> int:
    count = whole(value, name, least=1)
    if count > most:
        raise ValueError(f"expected {name} of 1 to {most}, the number of {what}, got {count}: pass one in that range")
    return count
