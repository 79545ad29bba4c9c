"""log|det(H + εI)|: from a band LU where one fits, else from the factors that answer it."""

from __future__ import annotations

from typing import cast

import torch

from linop_hess.lq.accuracy import CERTAIN, GROWTH_DETERMINANT, GROWTH_LITTLE, SPREAD_DETERMINANT
from linop_hess.lq.inverse.factors import Factors
from linop_hess.lq.inverse.inertia import DENSE_UP_TO
from linop_hess.lq.matrix.hessian import assembled
from linop_hess.lq.methods.banded import BandedFactorization
from linop_hess.lq.methods.plan import Plan
from linop_hess.lq.methods.state_band import StateBand

# A band LU is worth this many times the block LDLᵀ: its pivots are worth a digit more.
_WORTH = 100.0


def logabsdet(factors: Factors, plan: Plan) -> float:
    """Logarithm of |det(H + εI)|.

    The pivots of the block LDLᵀ lose about a digit more than those of a band LU, which is pivoted across stages.
    Where rounding is amplified in both, problems with few controls are formed as dense matrices.

    Parameters
    ----------
    factors : Factors
    plan : Plan
        Tells whether a band LU fits in memory, and is worth its time.

    Raises
    ------
    FactorizationError
        If |ε| is so small that pivots which are ε by themselves are lost in rounding.
    """
    analysis, damping = factors.analysis, factors.damping
    tame, costs = factors.hidden_growth <= GROWTH_DETERMINANT, plan.costs
    affordable = plan.fits("banded", 2) and costs["banded"].seconds <= _WORTH * costs["riccati"].seconds
    small = analysis.problem.size <= DENSE_UP_TO
    if not (small or factors.has_determinant) and tame and affordable:
        # Long chains: a band LU needs no block LDLᵀ beside it.
        factors.refuse_tiny_damping()
        if (banded := _banded(factors)) is not None:
            return banded
    found = factors.answering("inertia")
    if found.method != "riccati":
        return found.logabsdet()
    factors.refuse_tiny_damping()
    if small and not (tame and found.growth <= CERTAIN):
        H = assembled(analysis).clone()
        H.diagonal().add_(damping)
        return float(torch.linalg.slogdet(H)[1])
    if tame and affordable and (banded := _banded(factors)) is not None:
        return banded
    # Logarithms of pivots as small as ε see every rounding: with hidden controls delayed, with as little growth as can be.
    return found.logabsdet() if tame else factors.riccati(GROWTH_LITTLE).logabsdet()


def _banded(factors: Factors) -> float | None:
    """That of the band LU; None where its entries are too unequal for its pivots to be worth it."""
    band = cast("BandedFactorization | StateBand", factors.made("banded"))
    return band.logabsdet() if band.spread <= SPREAD_DETERMINANT else None
