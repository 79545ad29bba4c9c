"""Sums over parts made one at a time, against dense matrices written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.errors import UnsupportedModelError
from linop_hess.lq.matrix.assembly import assemble
from linop_hess.lq.summed import SummedProblem
from linop_hess.processes import Processes
from tests.lq.problems import Blocks, random_blocks

WEIGHTS = [0.5, 0.5, 0.25]
PLACES = [None, np.array([2, 0, 1, 4, 3, 5, 6]), None]
EPS = np.finfo(np.float64).eps


def parts_of(dtype: torch.dtype = torch.float64) -> tuple[list[lq.Problem], np.ndarray]:
    """Problems of equal controls and unequal states, one in another order, one with a diagonal; and Σ w H."""
    sizes = [[3, 2, 4, 2], [1, 5, 3, 1], [2, 2, 2, 3]]
    blocks = [random_blocks(n, [2, 3, 2], seed, with_A="all") for seed, n in enumerate(sizes)]
    diagonal = torch.linspace(-1.0, 2.0, 7, dtype=torch.float64)
    problems, total = [], np.zeros((7, 7))
    for one, places, weight in zip(blocks, PLACES, WEIGHTS, strict=True):
        plain = one.problem(dtype)
        problems.append(lq.Problem(plain.blocks, plain.order, places=places, diagonal=diagonal.to(dtype)))
        order = np.arange(7) if places is None else np.argsort(places)
        H = _hessian(one, dtype)[np.ix_(order, order)]
        total += weight * (H + np.diag(diagonal.to(dtype).double().numpy()))
    return problems, total


def _hessian(blocks: Blocks, dtype: torch.dtype) -> np.ndarray:
    return (blocks if dtype == torch.float64 else blocks.rounded(dtype)).hessian()


class Made:
    """Makes parts one after the other and counts; no two exist at once."""

    def __init__(self, problems: list[lq.Problem]) -> None:
        self.problems, self.passes, self.made = problems, 0, 0

    def __call__(self):
        self.passes += 1
        for problem, weight in zip(self.problems, WEIGHTS, strict=True):
            self.made += 1
            yield problem, weight


def summed(make, dtype: torch.dtype = torch.float64, **keywords) -> SummedProblem:
    groups = [np.array([0, 3]), np.array([1, 2]), np.array([4, 5, 6])]
    return SummedProblem(make, 3, groups, dtype, torch.device("cpu"), **keywords)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_and_dense_matrix_are_the_sums(dtype):
    problems, H = parts_of(dtype)
    make = Made(problems)
    problem = summed(make, dtype)
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    bound = 50 * torch.finfo(dtype).eps * np.linalg.norm(H, 2)
    assert (
        np.abs(problem.hessian_product(x, 0.3).double().numpy() - (H + 0.3 * np.eye(7)) @ x.double().numpy()).max()
        < bound
    )
    assert make.passes == 1
    dense = assemble(problem)
    assert dense.dtype == dtype and torch.equal(dense, dense.T)
    assert np.abs(dense.double().numpy() - H).max() < bound
    assert np.abs(assemble(problem, torch.float32).double().numpy() - H).max() < 1e-5 * np.linalg.norm(H, 2)
    assert (make.passes, make.made) == (3, 9)


def test_inverse_answers_what_the_matrix_answers():
    problems, H = parts_of()
    inverse = lq.Inverse(summed(Made(problems)), 0.05)
    K = H + 0.05 * np.eye(7)
    values = np.linalg.eigvalsh(K)
    assert values[0] < 0 < values[-1]
    g = torch.ones(7, 1, dtype=torch.float64)
    solution = inverse.solve(g)
    residual = np.linalg.norm(K @ solution.x.numpy() - g.numpy())
    assert residual <= 10 * EPS * (np.linalg.norm(K, 2) * float(solution.x.norm()) + float(g.norm()))
    assert inverse.solver.method == "dense" and solution.backward_error < 1e-14
    assert (inverse.inertia.negative, inverse.inertia.zero) == (int((values < 0).sum()), 0)
    assert inverse.slogdet()[0] == np.prod(np.sign(values))
    assert inverse.slogdet()[1] == pytest.approx(np.log(np.abs(values)).sum(), abs=1e-12)
    exact = np.linalg.inv(K)
    bound = 1e-13 * np.linalg.cond(K) * np.abs(exact).max()
    assert np.abs(inverse.entries.diagonal.numpy() - np.diag(exact)).max() < bound
    for block, places in zip(inverse.blocks(), ([0, 3], [1, 2], [4, 5, 6]), strict=True):
        assert np.abs(block.numpy() - exact[np.ix_(places, places)]).max() < bound


def test_a_float32_sum_is_solved_and_counted_in_its_precision():
    problems, H = parts_of(torch.float32)
    inverse = lq.Inverse(summed(Made(problems), torch.float32), 0.05)
    values = np.linalg.eigvalsh(H + 0.05 * np.eye(7))
    assert inverse.solve(torch.ones(7, 1)).backward_error < 1e-6
    assert inverse.inertia.negative == int((values < 0).sum())


def test_gauss_newton_is_that_of_each_part():
    problems, _ = parts_of()
    mine = assemble(summed(Made(problems)).gauss_newton())
    theirs = sum(w * assemble(p.gauss_newton()) for p, w in zip(problems, WEIGHTS, strict=True))
    assert float((mine - theirs).abs().max()) < 1e-14 * float(theirs.abs().max())


def test_products_and_matrices_are_summed_over_processes():
    """Two halves of the parts, as two processes have them; the other's share is added in the place of messages."""
    problems, H = parts_of()
    halves = [list(zip(problems, WEIGHTS, strict=True))[:1], list(zip(problems, WEIGHTS, strict=True))[1:]]
    x, seen = torch.ones(7, 1, dtype=torch.float64), []
    shares = [summed(lambda half=half: iter(half)) for half in halves]

    class Two(Processes):
        def summed(self, doing, local, *, alike=None):
            seen.append(tuple(local().shape))
            return local() + shares[1].hessian_product(alike)

        def summed_symmetric(self, doing, local):
            seen.append(tuple(local().shape))
            return local() + assemble(shares[1], local().dtype)

    both = summed(lambda: iter(halves[0]), processes=Two())
    assert np.abs(both.hessian_product(x, 0.1).numpy()[:, 0] - (H + 0.1 * np.eye(7)).sum(1)).max() < 1e-13
    assert np.abs(assemble(both).numpy() - H).max() < 1e-13
    assert seen == [(7, 1), (7, 7)]  # of N, not of samples


def test_a_given_product_is_used_and_stages_are_refused():
    problems, H = parts_of()
    make = Made(problems)
    problem = summed(make, product=lambda x: torch.tensor(H) @ x, names=["a", "b", "c"])
    x = torch.ones(7, 1, dtype=torch.float64)
    assert np.abs(problem.hessian_product(x).numpy()[:, 0] - H.sum(1)).max() < 1e-13 and make.passes == 0
    assert problem.name(1) == "2 (b)" and problem.nbytes == 0
    for refused in (
        lambda: problem.blocks,
        lambda: problem.stages,
        lambda: lq.Analysis(problem).row_spaces,
        problem.__reduce__,
        lq.Inverse(problem, 1.0).report,
    ):
        with pytest.raises(UnsupportedModelError, match="a sum over batches"):
            refused()
    with pytest.raises(ValueError, match='method "riccati" cannot be used here: a sum over batches'):
        lq.Inverse(problem, 1.0, "riccati")
    small = parts_of()[0][0]
    other = SummedProblem(lambda: iter([(small, 1.0)]), 1, [np.arange(6)], torch.float64, torch.device("cpu"))
    with pytest.raises(ValueError, match="expected parts of 6 controls, got one of 7"):
        assemble(other)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = problem.nonsense
