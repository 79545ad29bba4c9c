"""Factors whose pivots the blocks of a problem determine although H + εI, as a matrix, is singular to working precision.

Where states grow along the chain the pivots of the block LDLᵀ may all be of one size, and right to the last digits, while ‖H‖ exceeds them
by more than 1/eps: a sign cannot be told from the matrix, but it can from the stages. It is believed where pivots hardly move when
all blocks are moved by random errors much larger than rounding, and their product is that of a band LU, which shares nothing with it.
"""

from __future__ import annotations

import math

import torch

from linop_hess.errors import SingularPivotError
from linop_hess.lq.accuracy import ASSEMBLED, BLOCKS_MOVED, DETERMINANTS_DIFFER, DETERMINED_CONDITION, PIVOTS_MOVED
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.methods.banded import BandedFactorization
from linop_hess.lq.methods.base import Factorization
from linop_hess.lq.methods.plan import Plan
from linop_hess.lq.methods.riccati import RiccatiFactorization

_TRIALS = 3


def looks_singular(factors: Factorization) -> bool:
    """Whether H + εI as a matrix is close to singular in working precision, by a solve with a random right-hand side."""
    analysis = factors.analysis
    v, _ = analysis.probe
    x = factors.solve(v)
    condition = max(analysis.norm, abs(factors.damping)) * float(x.double().norm())
    scale = max(analysis.norm, abs(factors.damping))
    is_rounding = analysis.rounding > ASSEMBLED * torch.finfo(analysis.problem.dtype).eps * scale
    return is_rounding or not condition <= DETERMINED_CONDITION


def determined(analysis: Analysis, damping: float, plan: Plan) -> RiccatiFactorization | None:
    """Return the block LDLᵀ in float64 if its pivots are determined by the blocks; else None, also where that cannot be told.

    Parameters
    ----------
    analysis : Analysis
        In any precision.
    damping : float
    plan : Plan
    """
    analysis = analysis.in_float64
    # Only condensed blocks can be moved.
    if not (analysis.is_narrow and plan.fits("riccati", 3) and plan.fits("banded", 2)):
        return None
    try:
        found = RiccatiFactorization(analysis, damping)
        if not all(_agree(found, analysis.moved(damping, BLOCKS_MOVED, seed)) for seed in range(_TRIALS)):
            return None
        gap = found.logabsdet() - BandedFactorization(analysis, damping).logabsdet()
    except SingularPivotError:
        return None
    return found if abs(gap) <= DETERMINANTS_DIFFER * math.sqrt(analysis.problem.size) else None


def _agree(found: RiccatiFactorization, moved: Analysis) -> bool:
    """Whether the pivots, segment by segment, hardly differ from those of moved blocks."""
    for mine, other in zip(
        found.segment_pivots, RiccatiFactorization(moved, found.damping).segment_pivots, strict=True
    ):
        if mine.shape != other.shape:
            return False
        mine, other = mine.sort().values, other.sort().values
        if not bool(((mine - other).abs() <= PIVOTS_MOVED * mine.abs()).all()) or not bool(mine.all()):
            return False
    return True
