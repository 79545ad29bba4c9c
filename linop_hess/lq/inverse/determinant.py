"""log|det(H + εI)|: from a band LU where one fits, else from the block LDLᵀ or the Gram matrix."""

from __future__ import annotations

import torch

from linop_hess.lq.inverse.counting import CERTAIN, DENSE
from linop_hess.lq.inverse.factors import BlockLDL
from linop_hess.lq.inverse.gram_factors import GramFactors
from linop_hess.lq.inverse.solve import Solver
from linop_hess.lq.methods import banded
from linop_hess.lq.methods.dense import assemble

# What the elimination of hidden controls may add to the matrix, in terms of ‖H‖: rounding in it then moves eigenvalues by 1e-12‖H‖.
_GROWTH = 1e4


def logabsdet(factors: BlockLDL | GramFactors, solver: Solver) -> float:
    """Logarithm of |det(H + εI)| of `solver`'s problem, with `factors` of the same.

    The pivots of the block LDLᵀ lose about a digit more than those of a band LU, which is pivoted across stages.
    Where rounding is amplified in both, problems with few controls are looked at as dense matrices.
    """
    problem = factors.problem
    if isinstance(factors, BlockLDL) and problem.size <= DENSE and factors.doubt > CERTAIN:
        H = assemble(problem)
        H.diagonal().add_(solver.damping)
        return float(torch.linalg.slogdet(H)[1])
    if isinstance(factors, BlockLDL):
        problem = factors.split(_GROWTH)
    at_hand = solver.factorization
    if isinstance(at_hand, banded.BandedFactorization) and at_hand.problem is problem:
        return at_hand.logabsdet()
    costs = solver.plan.costs
    affordable = solver.plan.fits("banded", 2) and costs["banded"].seconds <= 100 * costs["riccati"].seconds
    if isinstance(factors, BlockLDL) and affordable:
        return banded.factor(problem, solver.damping).logabsdet()
    return factors.logabsdet()
