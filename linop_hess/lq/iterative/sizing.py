"""How many directions a sketch should have: as many as take less time than the iterations that they save.

Where M is right on s directions, GMRES sees of H about what is left beyond them. With ρ₊ and ρ₋ the largest and the smallest of that in
terms of ε, the bound of MINRES for an indefinite matrix is

    k = √((1 + ρ₊) max(1, ρ₋ − 1)) ln(2/τ)

iterations to a residual τ. Both ρ fall about as 1/s, so that one direction more saves k/s of them, or half as many where but one of the ρ
counts.

What a sketch takes by its rank is counted; of what is left the block Lanczos run tells as it goes, and before it the quadrature of
`lq.iterative.convergence`. That is where a sketch begins. While it is used, residuals tell more (`Patience`): once what is left at their
rate takes far longer than a larger sketch, one is made, of as many directions as pay if iterations are as many times the bound as they
were seen to be; and GMRES, being flexible, goes on with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from linop_hess._memory import available_bytes
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative.convergence import LEAST, by_count, product_seconds
from linop_hess.lq.iterative.lanczos import OPEN_BLOCK, Seen, Spectrum
from linop_hess.lq.iterative.options import MOST_DIRECTIONS, Asked, SketchOptions
from linop_hess.lq.iterative.spans import SWEEPS_A_DIRECTION, Cut, cut, product_flops
from linop_hess.lq.methods.base import Tally

# What a product with M⁻¹ takes, in modelled products with H in its precision on the samples that it is made of: three sweeps forward and
# three back, of which some are of few stages. Beside it are its pivots, substituted with four times: L and its transpose in either half.
_APPLIED, _SUBSTITUTED = 2.0, 4.0
# Substitutions with few columns go at the rate of products with matrices as wide as this.
_FEW = 32.0
# Directions from which on it is asked whether that is enough, and at most before any iteration tells.
LEAST_DIRECTIONS, MOST_AT_FIRST = 2 * OPEN_BLOCK, 256
# As many times the iterations of the bound at most are believed: of a residual that does not fall at all no number is told.
LARGEST_FACTOR = 4.0
# Iterations after which a rate is believed.
_SETTLED = 5


@dataclass(frozen=True)
class Outlay:
    """What it takes to make a sketch, and what it holds at most."""

    flops: float
    seconds: float
    nbytes: float


class Sizing:
    """Costs of sketches of an analysis by share of the samples, rank and precision, each counted once."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._cuts: dict[tuple[float, int], Cut] = {}
        self._outlays: dict[tuple[float, int, torch.dtype], Outlay] = {}

    def outlay(self, options: SketchOptions, rank: int) -> Outlay:
        """What a sketch of that rank takes; options of which nothing but that is open."""
        assert options.core is not None and options.dtype is not None
        share = options.core / self._analysis.samples
        if (share, rank, options.dtype) not in self._outlays:
            self._outlays[share, rank, options.dtype] = self._counted(share, rank, options.dtype)
        return self._outlays[share, rank, options.dtype]

    def iteration(self, options: SketchOptions, rank: int, columns: int = 1) -> tuple[float, float]:
        """Flops and seconds of an iteration of GMRES: a product with H, and one with M⁻¹."""
        assert options.core is not None and options.dtype is not None
        share, tally = options.core / self._analysis.samples, Tally(options.dtype)
        squares = _squares(self._cut(share, rank))
        tally.kernel("substitution", _SUBSTITUTED * columns * squares, max(_FEW, float(columns)))
        applied = _APPLIED * product_seconds(self._analysis, share, columns, options.dtype) + tally.seconds
        flops = columns * (1.0 + _APPLIED * share) * product_flops(self._analysis.problem) + tally.flops
        return flops, product_seconds(self._analysis, 1.0, columns) + applied

    def _cut(self, share: float, rank: int) -> Cut:
        if (share, rank) not in self._cuts:
            self._cuts[share, rank] = cut(self._analysis.problem, self._analysis.samples, share, rank)
        return self._cuts[share, rank]

    def _counted(self, share: float, rank: int, dtype: torch.dtype) -> Outlay:
        problem, samples, plan = self._analysis.problem, self._analysis.samples, self._cut(share, rank)
        tally, item = Tally(dtype), dtype.itemsize
        squares, p = _squares(plan), float(plan.controls.max())
        tally.kernel("gemm", plan.assembly + 4.0 * problem.size * rank**2, p)
        tally.kernel("ldl", plan.elimination, p)
        tally.kernel("substitution", 4.0 * rank * squares, min(p, rank))
        seconds = tally.seconds + SWEEPS_A_DIRECTION * product_seconds(self._analysis, share, rank, dtype)
        state = share * float(problem.layout.n_out.max())
        states = [problem.layout.n_out[start - 1] for start, _ in plan.bounds[1:]]
        width = problem.layout.n_out.max() / samples
        nbytes = item * (
            squares + 3.0 * p**2 + 3.0 * problem.size * rank + share * float(sum(states)) * (width + rank) + 4.0 * state * rank
        )  # fmt: skip
        return Outlay(plan.assembly + plan.elimination + plan.sweeps, seconds, nbytes)


def _squares(plan: Cut) -> float:
    """Numbers in the pivot blocks."""
    return float((plan.controls.astype(float) ** 2).sum())


@dataclass(frozen=True)
class Left:
    """What is left of H beyond the directions of a sketch, in terms of ε.

    Attributes
    ----------
    above, below : float
        ρ₊ and ρ₋, not negative.
    """

    above: float
    below: float

    @classmethod
    def of(cls, lowest: float, highest: float, damping: float) -> Left:
        """Return it for eigenvalues between these."""
        if not damping:
            return cls(math.inf, math.inf)
        ends = lowest / damping, highest / damping
        return cls(max(0.0, *ends), max(0.0, *(-end for end in ends)))

    def iterations(self, digits: float) -> float:
        """k, for the logarithm of what residuals are to be reduced by."""
        return math.sqrt((1.0 + self.above) * max(1.0, self.below - 1.0)) * digits

    def expected(self, digits: float) -> float:
        """The same where H + εI is definite on what is left by the rate of Chebyshev polynomials, which has no limit as ρ falls.

        Directions are not chosen by it: that they leave no more than was seen of H on the newest is not known.
        """
        if not self.below < 1.0:
            return self.iterations(digits)
        root = math.sqrt((1.0 + self.above) / (1.0 - self.below))
        rate = (root - 1.0) / (root + 1.0)
        return min(self.iterations(digits), digits / -math.log(max(rate, math.exp(-digits))))

    def saved(self, digits: float) -> float:
        """Iterations that one direction more saves, times the number of directions."""
        return (1.0 if self.above > 1.0 and self.below > 2.0 else 0.5) * self.iterations(digits)


class Enough:
    """Whether a number of directions is enough: another costs more than it saves.

    Parameters
    ----------
    analysis : Analysis
    asked : Asked
    options : SketchOptions
        With nothing but the rank left open.
    least, most : int
        Directions at least and at most, whatever is saved.
    times : float
        Iterations that are made, in terms of those of the bound.
    """

    def __init__(
        self,
        analysis: Analysis,
        asked: Asked,
        options: SketchOptions,
        least: int = LEAST_DIRECTIONS,
        most: int = MOST_AT_FIRST,
        times: float = 1.0,
    ) -> None:
        self._sizing, self._options, self._damping = analysis.once(Sizing), options, asked.damping
        self._least = max(least, options.least)
        self._most = max(most, self._least)
        self._digits = times * asked.digits

    def __call__(self, seen: Seen) -> bool:
        have = seen.have
        if have < self._least:
            return False
        twice = self._sizing.outlay(self._options, 2 * have)
        if have >= self._most or twice.nbytes > available_bytes():
            return True
        more = twice.seconds - self._sizing.outlay(self._options, have).seconds
        _, each = self._sizing.iteration(self._options, have)
        return Left.of(seen.lowest, seen.highest, self._damping).saved(self._digits) * each <= more


def at_best(
    analysis: Analysis, asked: Asked, options: SketchOptions, found: Spectrum, *, least: bool
) -> tuple[int, float]:
    """The rank that takes the least time by what a quadrature tells of the spectrum, and the iterations of all right-hand sides then.

    Parameters
    ----------
    analysis : Analysis
    asked : Asked
    options : SketchOptions
        With nothing but the rank left open.
    found : Spectrum
    least : bool
        Whether eigenvalues are counted from below.

    Returns
    -------
    rank : int
    iterations : float
        At most N for each right-hand side, which is all that is told without damping.
    """
    sizing, size = analysis.once(Sizing), analysis.problem.size
    ranks = [options.rank] if options.rank is not None else _ranks(size)
    expected = [min(float(size), _expected(found, rank, asked, least=least)) for rank in ranks]
    told = [max(float(LEAST), its) * asked.right_hand_sides for its in expected]
    takes = [
        sizing.outlay(options, rank).seconds + its * sizing.iteration(options, rank)[1]
        for rank, its in zip(ranks, told, strict=True)
    ]
    best = int(np.argmin(takes))
    return ranks[best], told[best]


def _expected(found: Spectrum, rank: int, asked: Asked, *, least: bool) -> float:
    """Iterations by what a quadrature tells of what so many directions leave: the lower of the bounds by size and by number."""
    size, nodes, damping = found.size_of(rank, least=least), found.nodes, asked.damping
    lowest, highest = (float(nodes.min()), float(nodes.max())) if nodes.numel() else (0.0, 0.0)
    by_size = Left.of(max(lowest, -size), min(highest, size), damping).expected(asked.digits / asked.right_hand_sides)
    count = found.least_beyond if least else found.count_beyond
    return min(by_size, by_count(count, abs(damping), asked.tolerance, rank)) if damping else by_size


def _ranks(size: int) -> list[int]:
    """Ranks to choose from, a half more each."""
    ranks = [LEAST_DIRECTIONS]
    while ranks[-1] < min(MOST_AT_FIRST, size):
        ranks.append(min(ranks[-1] + max(1, ranks[-1] // 2), MOST_AT_FIRST, size))
    return [rank for rank in ranks if rank <= size] or [size]


class Patience:
    """Whether it takes less to go on with a sketch, or to make a larger one, by how residuals fall.

    A larger one is taken to leave a third of the iterations.

    Parameters
    ----------
    worth : float
        Iterations that take as long as making a sketch of twice the directions.
    """

    def __init__(self, worth: float) -> None:
        self._worth = worth
        self._left: list[float] = []
        self.rate = 0.0
        """What an iteration reduces residuals by, as a logarithm."""

    def is_over(self, left: float) -> bool:
        """Whether to make it; `left` is the logarithm of what the residual is to be reduced by still, told after every iteration."""
        self._left.append(left)
        made = len(self._left) - 1
        if made < max(_SETTLED, self._worth / 6.0):
            return False
        lately = max(_SETTLED, made // 2)
        self.rate = (self._left[-1 - lately] - left) / lately
        sure = 1.0 + self._worth / (4.0 * made)  # early residuals tell less: GMRES is faster later
        return left > 1.5 * self._worth * sure * self.rate


def most_directions(analysis: Analysis) -> int:
    """Directions that a sketch has at most where no number of them is given."""
    return min(MOST_DIRECTIONS, analysis.problem.size)
