"""Method "banded" as solves try it first: the band of the states."""

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.errors import SingularPivotError
from linop_hess.lq.methods import banded, state_band
from linop_hess.lq.methods.state_band import StateBand, StateLayout
from tests.lq.methods.conformance import DAMPINGS, Setting, SolveConformance, right_hand_side
from tests.lq.problems import backward_error, pendulum, random_blocks

# Chains whose controls reach their states, in one stage or in some.
SHAPES = {
    "equal": ([3, *[6] * 6], [7, *[6] * 5]),
    "hidden controls": ([3, *[4] * 5], [5, 9, 5, 8, 7]),
    "wide states between": ([3, 4, 8, 4, 8, 4, 7, 4, 2], [5, 4, 4, 4, 4, 4, 4, 3]),
    "stages without controls": ([2, 4, 3, 3, 5, 3, 2], [5, 0, 6, 0, 7, 5]),
    "one stage": ([3, 2], [4]),
    "nothing after the last": ([3, 4, 4, 0], [4, 5, 3]),
}


@pytest.fixture(autouse=True)
def _however_small(monkeypatch):
    monkeypatch.setattr(state_band, "_NARROWEST", 0)
    monkeypatch.setattr(state_band, "_FEWEST_FLOPS", 0.0)
    monkeypatch.setattr(state_band, "_GAIN", 0.0)


def made(shape, dtype=torch.float64) -> Setting:
    blocks = random_blocks(*SHAPES[shape], seed=7).rounded(dtype)
    H = blocks.hessian()
    return Setting(blocks.problem(dtype), H, np.linalg.eigvalsh(H))


class TestStateBand(SolveConformance):
    shapes = tuple(SHAPES)

    def factor(self, analysis, damping):
        return StateBand(analysis, damping)

    def setting(self, shape, dtype):
        return made(shape, dtype)

    def amplified(self, damping):
        return 1e-2 / abs(damping)


@pytest.mark.parametrize("shape", SHAPES)
def test_complex_damping(shape):
    truth, damping = made(shape), 0.1 + 0.3j
    g = right_hand_side(len(truth.H), 2) + 1j * right_hand_side(len(truth.H), 2, seed=6)
    x = StateBand(truth.analysis, damping).solve(torch.from_numpy(g)).numpy()
    assert np.abs(truth.H @ x + damping * x - g).max() <= 1e-11 * np.abs(g).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_unknowns_as_visible_controls(shape):
    analysis = made(shape).analysis
    layout = StateLayout(analysis)
    assert layout.order == layout.start[-1] == analysis.problem.size - analysis.hidden
    assert (layout.n_out <= layout.r).all() and layout.n_out[-1] == layout.n_in[0] == 0
    assert (layout.n_in + layout.r).max() == layout.bandwidth + 1


def test_a_solve_uses_it_and_falls_back_on_the_kkt_matrix(monkeypatch):
    truth, g = made("wide states between"), right_hand_side(len(made("wide states between").H))
    solver = lq.Solver(truth.problem, 0.01, "banded")
    assert isinstance(solver.factorization, StateBand)
    assert backward_error(truth.H, 0.01, solver.solve(g).x.numpy(), g) <= 1e-14
    monkeypatch.setattr(StateBand, "solve", lambda self, g: 1.01 * g)
    solver = lq.Solver(truth.problem, 0.01, "banded", escalate=False)
    found = solver.solve(g)
    assert found.method == "banded" and isinstance(solver.factorization, banded.BandedFactorization)
    assert backward_error(truth.H, 0.01, found.x.numpy(), g) <= 1e-14


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_determinant(shape, damping):
    truth = made(shape)
    found = StateBand(truth.analysis, damping)
    assert found.answers == {"solve", "determinant"}
    # What 1/ε takes off where controls are hidden is rounded in the matrix that is factored.
    lost = 1e-15 / abs(damping) if truth.analysis.hidden else 0.0
    doubt = truth.doubt(damping, 1e-13 + lost)
    assert doubt < 1e-2
    assert abs(found.logabsdet() - np.log(np.abs(truth.eigenvalues + damping)).sum()) <= doubt + 1e-13


def test_a_determinant_is_left_to_the_kkt_matrix_where_digits_are_lost(monkeypatch):
    truth = made("equal")
    monkeypatch.setattr(state_band, "GROWTH_DETERMINANT", 1e-3)
    inverse = lq.Inverse(truth.problem, 0.3, "banded")
    assert inverse.solver.factorization.answers == {"solve"}
    monkeypatch.setattr(StateBand, "logabsdet", lambda self: np.nan)
    exact = np.log(np.abs(truth.eigenvalues + 0.3)).sum()
    assert abs(inverse.slogdet()[1] - exact) <= truth.doubt(0.3, 1e-13) + 1e-13


@pytest.mark.parametrize("seed", [20, 24])
def test_determinants_are_as_good_where_controls_hardly_reach_a_state(seed):
    blocks = random_blocks([3, *[4] * 8], [4] * 8, seed=seed)
    H, problem = blocks.hessian(), blocks.problem()
    eigenvalues = np.linalg.eigvalsh(H)
    truth, damping = Setting(problem, H, eigenvalues), float(-eigenvalues[-1] - 1e-5)
    assert isinstance(lq.Solver(problem, damping, "banded").factorization, StateBand)
    exact = np.log(np.abs(eigenvalues + damping)).sum()
    assert abs(lq.Inverse(problem, damping, "banded").slogdet()[1] - exact) <= truth.doubt(damping, 1e-12)


def test_what_is_not_a_number_answers_no_determinant():
    found = StateBand(made("equal").analysis, 0.3)
    found._runs[0].K[-1, -1, -1] = np.nan
    assert found.answers == {"solve"}


def test_where_states_grow_solves_are_as_good_as_by_the_kkt_matrix():
    blocks, g, u, _ = pendulum(6)
    found = lq.Solver(blocks.problem(), 0.0, "banded").solve(g)
    assert np.abs(found.x.numpy() - u).max() <= 1e-11 * np.abs(u).max() and found.backward_error <= 1e-14


def test_what_it_does_not_apply_to():
    few = lq.Analysis(random_blocks([3, 9, 9, 9, 9, 9, 9, 9, 9, 1], [1] * 9, seed=3).problem())
    assert not few.once(StateLayout).runs
    with pytest.raises(SingularPivotError):
        StateBand(few, 0.1)
    assert isinstance(lq.Solver(few, 0.1, "banded").factorization, banded.BandedFactorization)
    with pytest.raises(SingularPivotError):
        StateBand(made("hidden controls").analysis, 0.0)


def test_controls_that_reach_states_in_the_first_of_like_runs_alone(monkeypatch):
    blocks = random_blocks([3, *[4] * 6], [4] * 6, seed=2)
    blocks.G[3][:, 0] = blocks.G[3][:, 1] = 0.0
    problem, H, g = blocks.problem(), blocks.hessian(), right_hand_side(24)
    assert backward_error(H, 0.1, lq.Solver(problem, 0.1, "banded").solve(g).x.numpy(), g) <= 1e-14


def test_estimate(monkeypatch):
    monkeypatch.undo()
    long = lq.Analysis(random_blocks([8] * 301, [9] * 300, seed=1).problem())
    assert long.once(StateLayout).runs
    mine, whole = state_band.estimate(long), banded.estimate(long)
    assert 0 < mine.flops < whole.flops and 0 < mine.seconds and mine.nbytes == whole.nbytes
    short = lq.Analysis(random_blocks([8] * 5, [9] * 4, seed=1).problem())
    assert not short.once(StateLayout).runs and state_band.estimate(short) == banded.estimate(short)
