"""How many iterations to expect, before any is made.

A polynomial of degree k that is 1 at 0 and small on the eigenvalues of H + εI bounds the residual of GMRES after k iterations, since the
matrix is symmetric. One with a root at each eigenvalue outside |λ − ε| ≤ cε and (1 − z/ε)^m for those inside gives

    k(c) = N(|λ(H)| > cε) + ln(1/τ) / ln(1/c),        0 < c < 1,

where roots far out do little harm to the rest; and where H + εI is positive definite the bound of conjugate gradients, ½ √κ ln(2/τ), stands
beside it. The number of eigenvalues beyond is that of Gauss quadrature from a short Lanczos run on a random vector, made once for all
dampings. Directions that a sketch has are taken off it. And that run is one of GMRES on that vector: the residual that it would have by
now, at any damping, tells how fast it falls. Where it goes on to fall as fast in fewer iterations than k, it is these. All this is an
estimate, and most often too many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative.gmres import LONGEST
from linop_hess.lq.iterative.lanczos import Probing, Spectrum
from linop_hess.lq.iterative.spans import product_flops
from linop_hess.lq.methods.base import Tally
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import Stage

# Products of the Lanczos run, and after how many it is looked at whether more can change the choice.
PROBES = 20
_LOOKS = (3, 5, 7, 10, 14)
# Iterations without which no solve ends.
LEAST = 3

_RADII = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99)
# Times that each number of a state is moved in a product; calls of torch in one where M is substituted as a band, beside those of stacks.
_MOVES = 8
_CALLS_BANDED = 40


def _probing(analysis: Analysis) -> Probing:
    return Probing(analysis.problem.hessian_product, analysis.probe[0][:, 0])


def spectrum_of(analysis: Analysis) -> Spectrum:
    """Return the quadrature of H, from `PROBES` products."""
    return analysis.once(_probing).after(PROBES)


def least_iterations(analysis: Analysis, damping: float, tolerance: float, most: float) -> float:
    """Return more than `most` where the first products of the Lanczos run tell that more iterations are to be expected; else `LEAST`.

    A small damping leaves so many eigenvalues beyond it that some products show it; then the others, and what they cost, are saved.

    Parameters
    ----------
    analysis : Analysis
    damping, tolerance
        As of `expected_iterations`.
    most : float
        Iterations from which on the choice is another one, however many there are.
    """
    if not math.isfinite(most) or not damping or analysis.has(spectrum_of):
        return float(LEAST)
    for found, is_least in looks(analysis):
        least = by_count(found.least_beyond, abs(damping), tolerance) if is_least else 0.0
        if least > most:
            return least
    return float(LEAST)


def looks(analysis: Analysis) -> Iterator[tuple[Spectrum, bool]]:
    """The quadrature after a few products and after more, and whether it is to be counted from below; the last is that of all."""
    if not analysis.has(spectrum_of):
        yield from ((analysis.once(_probing).after(steps), True) for steps in _LOOKS)
    yield analysis.once(spectrum_of), False


def by_count(beyond: Callable[[float], float], size: float, tolerance: float, directions: int = 0) -> float:
    """Return the least k(c) for a count of eigenvalues by radius, less so many directions."""
    digits = math.log(1.0 / tolerance)
    return min(max(0.0, beyond(c * size) - directions) + digits / math.log(1.0 / c) for c in _RADII)


def expected_iterations(analysis: Analysis, damping: float, tolerance: float) -> float:
    """Return about how many iterations GMRES takes at most, to a residual of that part of the right-hand side.

    Parameters
    ----------
    analysis : Analysis
    damping : float
    tolerance : float
    """
    N = analysis.problem.size
    found, size = analysis.once(spectrum_of), abs(damping)
    if not size or not found.nodes.numel():
        return float(N)
    digits = math.log(1.0 / tolerance)
    least = by_count(found.count_beyond, size, tolerance)
    least = min(least, _gone_on(found.residuals(damping), digits))
    lowest, highest = float(found.nodes.min()) + damping, float(found.nodes.max()) + damping
    if lowest > 0.0:
        least = min(least, 0.5 * math.sqrt(highest / lowest) * (digits + math.log(2.0)))
    return min(float(N), max(float(LEAST), least))


def _gone_on(residuals: np.ndarray, digits: float) -> float:
    """Iterations where residuals go on to fall as they did in the last half of these, by as many (natural) digits in all."""
    fallen = -np.log(np.maximum(residuals, math.exp(-digits)))
    made = fallen.size - 1
    if fallen[-1] >= digits:
        return float(np.argmax(fallen >= digits))
    half = made // 2
    rate = (fallen[-1] - fallen[half]) / max(1, made - half)
    return made + (digits - float(fallen[-1])) / rate if rate > 0.0 else math.inf


def looks_definite(analysis: Analysis, damping: float) -> bool:
    """Whether H + εI is positive definite, as far as the Lanczos run tells: an estimate, the ends of a spectrum coming first.

    Where no run was made it does not.
    """
    if not analysis.has(spectrum_of):
        return False
    nodes = analysis.once(spectrum_of).nodes
    return bool(nodes.numel()) and float(nodes.min()) + damping > 0.0


def orthogonalizing_seconds(analysis: Analysis, iterations: float) -> float:
    """Modelled time that GMRES takes for its own vectors: it reads all of a cycle four times an iteration."""
    tally, cycle = Tally(analysis.problem.dtype), min(iterations, LONGEST)
    tally.moved(4.0 * analysis.problem.size * analysis.problem.dtype.itemsize * iterations * cycle / 2.0)
    return float(analysis.problem.processes.from_first(tally.seconds))


class Product(NamedTuple):
    """What one product with H costs: flops, bytes of states moved and of stages read, calls; how wide states are, and of how many rows.

    A row is that of a sample: its matrices, as wide as the state of one, are multiplied with as many rows as there are samples.
    """

    flops: float
    moved: float
    read: float
    calls: float
    width: float
    rows: float


def product_of(analysis: Analysis) -> Product:
    """Count a product with H; of a sum over batches that of a typical one, so many times."""
    part, times = analysis.problem.typical_part()
    layout = part.layout
    states = layout.n_out[layout.first :].astype(float)
    multiplied = layout.p[layout.first :] > 0  # by matrices; other stages are mostly elementwise
    samples = np.array([stack.samples for stack in part.blocks])[part.order[layout.first :, 0]]
    moving, widths = float(states.sum()), (states / samples)[multiplied]
    together = max(1.0, float(widths.sum()))
    return Product(
        times * product_flops(part, by_stages=not part.transition.is_banded),
        times * _MOVES * moving * part.dtype.itemsize,
        times * float(part.nbytes),
        times * product_calls(part),
        max(1.0, together / max(1, widths.size)),
        float(states[multiplied].sum()) / together,
    )


def product_calls(problem: Problem) -> float:
    """Count the calls of torch in a product with H of one chain.

    They are those of every stage or, where M is substituted as a band, of every stack.
    """
    banded = problem.transition.is_banded
    of_stacks = np.array([_calls(stack, banded) for stack in problem.blocks])
    if banded:
        return _CALLS_BANDED + float(of_stacks.sum()) + problem.transition.calls
    return float(of_stacks[problem.order[problem.layout.first :, 0]].sum())


def _calls(stage: Stage, banded: bool) -> float:
    """Calls of a stage in a product: of its own products, and of what reads and writes vectors around them."""
    counts = [] if banded else [(2 * stage.calls("F"), 4)]
    if stage.p:
        counts += [(2 * stage.calls("G"), 10)]
        counts += [(2 * stage.calls("B"), 10)] if "B" in stage.nonzero else []
        counts += [(stage.calls("A"), 6)] if "A" in stage.nonzero else []
    counts += [(stage.calls("C"), 3)] if "C" in stage.nonzero else []
    return float(sum(own + around for own, around in counts))


def product_seconds(
    analysis: Analysis, share: float = 1.0, columns: int = 1, dtype: torch.dtype | None = None
) -> float:
    """Modelled time of a product with H on a share of the samples, in the precision of the problem or in another one."""
    own = analysis.problem.dtype
    one, tally = analysis.once(product_of), Tally(dtype or own)
    tally.calls(one.calls)
    rows, half = max(1.0, share * one.rows), 0.5 * share * columns * one.flops
    tally.thin(half, *sorted((one.width, rows * columns)))  # F: a column of the right-hand sides is more rows
    tally.thin(half, *sorted((one.width * columns, rows)))  # G: it is more columns
    tally.moved(share * (columns * one.moved + one.read) * (dtype or own).itemsize / own.itemsize)
    return float(analysis.problem.processes.from_first(tally.seconds))  # all must choose alike
