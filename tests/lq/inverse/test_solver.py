"""Certified solves by every method, against dense Hessians."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linop_hess import lq
from linop_hess.errors import FactorizationError
from linop_hess.lq.inverse import solver as solve_module
from linop_hess.lq.inverse.counting import damping_that_works
from linop_hess.lq.inverse.solver import Solver
from linop_hess.lq.methods import plan as plan_module
from linop_hess.lq.methods import riccati
from tests.lq.methods.conformance import MIXED, SHAPES, right_hand_side, setting
from tests.lq.problems import backward_error, random_blocks

CERTIFIED = ["banded", "riccati", "dense"]
DAMPINGS = [1.0, 1e-2, 1e-5, 1e-8, -0.37, -1e-4]


def solve(problem, damping, method, g, **options):
    """By a solver of a problem or its analysis."""
    solver = Solver(problem, damping, method, **options)
    solution = solver.solve(torch.tensor(g, dtype=solver.analysis.problem.dtype))
    assert solution.backward_error <= solver.tolerance
    return solution


@pytest.mark.parametrize("with_A", ["none", "some"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", CERTIFIED)
def test_backward_error(method, shape, with_A):
    blocks = random_blocks(*SHAPES[shape], seed=7, with_A=with_A)
    H, analysis = blocks.hessian(), lq.Analysis(blocks.problem())
    g = right_hand_side(len(H))
    for damping in DAMPINGS:
        solution = solve(analysis, damping, method, g)
        assert backward_error(H, damping, solution.x.numpy(), g) <= 1e-14, damping


@pytest.mark.parametrize("with_A", ["none", "some"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", CERTIFIED)
def test_solution_is_lapacks_and_no_other_method_stood_in(method, shape, with_A):
    blocks = random_blocks(*SHAPES[shape], seed=11, with_A=with_A)
    H, analysis = blocks.hessian(), lq.Analysis(blocks.problem())
    g = right_hand_side(len(H))
    for damping in (0.3, -0.21):
        K = H + damping * np.eye(len(H))
        solution = solve(analysis, damping, method, g)
        assert solution.method == method
        expected = np.linalg.solve(K, g)
        error = np.linalg.norm(solution.x.numpy() - expected) / np.linalg.norm(expected)
        assert error <= 1e-14 * np.linalg.cond(K)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", CERTIFIED)
def test_backward_error_in_float32(method, shape):
    blocks = random_blocks(*SHAPES[shape], seed=13).rounded(torch.float32)
    H, analysis = blocks.hessian(), lq.Analysis(blocks.problem(torch.float32))
    g = right_hand_side(len(H)).astype(np.float32)
    for damping in (1.0, 1e-2, 1e-4, -0.37):
        solution = solve(analysis, damping, method, g)
        assert solution.x.dtype == torch.float32
        assert backward_error(H, damping, solution.x.numpy(), g) <= 1e-6, damping


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.lists(st.integers(0, 7), min_size=2, max_size=7),
    data=st.data(),
    seed=st.integers(0, 2**20),
    with_A=st.sampled_from(["none", "some", "all"]),
    damping=st.sampled_from([1e-8, 1e-6, 1e-4, 1e-2, 1.0, -1e-6, -1e-3, -0.5]),
    columns=st.integers(1, 4),
)
def test_any_problem(n, data, seed, with_A, damping, columns):
    p = data.draw(st.lists(st.integers(0, 9), min_size=len(n) - 1, max_size=len(n) - 1), label="p")
    blocks = random_blocks(n, p, seed, with_A=with_A)
    H, problem = blocks.hessian(), blocks.problem()
    g = right_hand_side(len(H), columns, seed)
    for method in CERTIFIED:
        x = solve(problem, damping, method, g).x
        assert tuple(x.shape) == g.shape
        assert backward_error(H, damping, x.numpy(), g) <= 1e-14, method
    for trial in ("ldu", "auto"):
        try:
            x = solve(problem, damping, trial, g).x
        except FactorizationError:
            assert trial == "ldu"
            continue
        assert backward_error(H, damping, x.numpy(), g) <= 1e-14, trial


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [*CERTIFIED, "ldu"])
def test_no_right_hand_side_at_all(method, shape):
    problem = random_blocks(*SHAPES[shape], seed=25).problem()
    assert solve(problem, 0.3, method, np.zeros((problem.size, 0))).x.shape == (problem.size, 0)


@pytest.mark.parametrize("method", [*CERTIFIED, "ldu", "auto"])
def test_no_controls_at_all(method):
    problem = random_blocks([2, 3, 2], [0, 0], seed=27).problem()
    assert solve(problem, 0.3, method, np.zeros((0, 2))).x.shape == (0, 2)


def test_many_stages_of_one_shape_and_other_shapes_between():
    n = [3] + [4, 4, 4, 2, 4] * 8
    p = [6, 3, 0, 9, 2] * 8
    blocks = random_blocks(n, p, seed=29)
    H, analysis = blocks.hessian(), lq.Analysis(blocks.problem())
    g = right_hand_side(len(H), 2)
    for method in CERTIFIED:
        for damping in (1e-1, 1e-6):
            x = solve(analysis, damping, method, g).x
            assert backward_error(H, damping, x.numpy(), g) <= 1e-14, method


def test_columns_are_solved_independently():
    """Columns of very different size: each has its own backward error, and a zero column gives zero."""
    blocks = random_blocks([3, 4, 3, 2], [5, 6, 4], seed=31)
    H, analysis = blocks.hessian(), lq.Analysis(blocks.problem())
    g = right_hand_side(len(H), 4)
    g[:, 0] *= 1e-12
    g[:, 1] = 0
    g[:, 3] *= 1e12
    for method in CERTIFIED:
        x = solve(analysis, 1e-3, method, g).x.numpy()
        assert backward_error(H, 1e-3, x, g) <= 1e-14
        assert not x[:, 1].any()


def test_damping_zero_on_a_regular_problem():
    """Every control has curvature of its own: no damping is needed."""
    blocks = random_blocks([2, 3, 2, 2], [2, 2, 2], seed=41, with_A="all")
    H, analysis = blocks.hessian(), lq.Analysis(blocks.problem())
    g = right_hand_side(len(H))
    for method in CERTIFIED:
        x = solve(analysis, 0.0, method, g).x
        assert backward_error(H, 0.0, x.numpy(), g) <= 1e-14


@pytest.mark.parametrize("method", [*CERTIFIED, "ldu", "auto"])
def test_singular_is_an_error_with_a_way_out(method):
    """The last stage's controls touch nothing: H has a null space."""
    blocks = random_blocks([2, 3, 2], [3, 4], seed=43, with_A="none")
    blocks.B[1][:] = 0
    problem = blocks.problem()
    g = right_hand_side(7)
    with pytest.raises(FactorizationError, match="damping") as caught:
        lq.Solver(problem, 0.0, method).solve(torch.from_numpy(g))
    assert caught.value.damping == 0.0
    assert "works" in str(pickle.loads(pickle.dumps(caught.value)))
    suggested = caught.value.suggested_damping
    x = solve(problem, suggested, "auto", g).x
    assert backward_error(blocks.hessian(), suggested, x.numpy(), g) <= 1e-14


def test_a_damping_that_works_is_looked_for_when_it_is_asked_for(monkeypatch):
    asked: list[float] = []
    monkeypatch.setattr(solve_module, "damping_that_works", lambda analysis, damping, *rest: asked.append(damping))
    blocks = random_blocks([2, 3, 2], [3, 4], seed=43, with_A="none")
    blocks.B[1][:] = 0
    with pytest.raises(FactorizationError) as caught:
        lq.Solver(blocks.problem(), 0.0).solve(torch.from_numpy(right_hand_side(7)))
    assert not asked and "no damping" in str(caught.value) and asked == [0.0]
    assert caught.value.suggested_damping is None and asked == [0.0]


@pytest.mark.parametrize("method", CERTIFIED)
def test_shift_onto_an_eigenvalue(method):
    """damping = −λ to rounding: an answer of small backward error, or an error."""
    blocks = random_blocks([2, 3, 3, 2], [4, 5, 3], seed=47)
    H, analysis = blocks.hessian(), lq.Analysis(blocks.problem())
    g = right_hand_side(len(H))
    for eigenvalue in np.linalg.eigvalsh(H)[[0, 5, -1]]:
        try:
            x = solve(analysis, -eigenvalue, method, g).x
        except FactorizationError:
            continue
        assert backward_error(H, -eigenvalue, x.numpy(), g) <= 2e-14


def test_bad_solver_arguments():
    problem = random_blocks([2, 3, 2], [3, 4], seed=61).problem()
    with pytest.raises(ValueError, match="method must be one of .*banded"):
        lq.Solver(problem, 1e-3, "lu")
    for damping in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            lq.Solver(problem, damping)
    for damping in ("1e-3", None, [1e-3]):
        with pytest.raises(TypeError, match="real number"):
            lq.Solver(problem, damping)
    for tolerance in (0.0, -1e-3, 1.0, np.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            lq.Solver(problem, 1e-3, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", MIXED)
@pytest.mark.parametrize("method", CERTIFIED)
def test_narrow_and_wide_segments(method, shape, dtype):
    truth = setting(shape, dtype)
    g = right_hand_side(len(truth.H), 2).astype(truth.problem.numpy_dtype)
    for damping in DAMPINGS if dtype == torch.float64 else (1.0, 1e-2, 1e-4, -0.37):
        x = solve(truth.analysis, damping, method, g).x
        assert backward_error(truth.H, damping, x.numpy(), g) <= (1e-14 if dtype == torch.float64 else 1e-6), damping


def wrong(name, monkeypatch, loss=0.01):
    """Let a method's factors answer a little wrongly."""
    known = plan_module.METHODS[name]

    class Wrong:
        method, answers = name, frozenset({"solve"})

        def __init__(self, analysis, damping):
            self.analysis, self.damping, self.inner = analysis, damping, known.factor(analysis, damping)
            self.nbytes = self.inner.nbytes

        def solve(self, g):
            return (1 + loss) * self.inner.solve(g)

    monkeypatch.setitem(plan_module.METHODS, name, replace(known, factor=Wrong))


@pytest.mark.parametrize("loss", [1e-4, -1e-2])
def test_refinement_mends_small_errors(loss, monkeypatch):
    truth, g = setting("equal"), right_hand_side(12)
    wrong("riccati", monkeypatch, loss)
    found = solve(truth.problem, 0.3, "riccati", g)
    assert found.method == "riccati" and found.refinement_steps >= 2
    assert backward_error(truth.H, 0.3, found.x.numpy(), g) <= 1e-14


def test_escalation_where_refinement_fails(monkeypatch):
    """Each step loses a tenth only of the error, which is more than `STALLED`: the next method is tried."""
    truth, g = setting("equal"), right_hand_side(12)
    wrong("riccati", monkeypatch, -0.9)
    found = solve(truth.problem, 0.3, "riccati", g)
    assert found.method in ("banded", "dense")
    assert backward_error(truth.H, 0.3, found.x.numpy(), g) <= 1e-14


def test_a_looser_tolerance_needs_no_refinement(monkeypatch):
    truth, g = setting("equal"), torch.from_numpy(right_hand_side(12))
    wrong("riccati", monkeypatch, 1e-5)
    solver = lq.Solver(truth.problem, 0.3, "riccati")
    loose = solver.solve(g, 1e-3)
    assert loose.refinement_steps == 0 and loose.backward_error <= 1e-4
    assert solver.solve(g).backward_error <= 1e-14


def test_what_a_solution_says():
    truth, g = setting("wildly varying"), right_hand_side(43)
    solution = solve(truth.problem, 0.3, "auto", g)
    residual = np.linalg.norm(g - truth.shifted(0.3) @ solution.x.numpy(), axis=0).max()
    rounding = 1e-14 * truth.norm * float(solution.x.norm())
    assert abs(solution.residual_norm - residual) <= rounding
    assert solution.backward_error >= 0.3 * backward_error(truth.H, 0.3, solution.x.numpy(), g) - 1e-15


def test_overflow_is_told():
    truth = setting("equal", torch.float32)
    solver = lq.Solver(truth.problem, 1e-3)
    with pytest.raises(ValueError, match="damping within the range of torch.float32, got 1e\\+39"):
        lq.Solver(truth.problem, 1e39)
    # What underflows is right to the smallest normal number.
    x = lq.Solver(truth.problem, 1e30).solve(torch.full((12, 1), 1e-10)).x
    assert torch.equal(x, torch.full((12, 1), 1e-40)) and not lq.Solver(truth.problem, 1e30).solve(x).x.any()
    smallest = np.abs(truth.eigenvalues + 1e-3).min()
    assert smallest < 0.9
    vector = np.linalg.eigh(truth.H)[1][:, np.abs(truth.eigenvalues + 1e-3).argmin()]
    g = torch.from_numpy(vector / np.abs(vector).max() * 3e38).float()[:, None]
    with pytest.raises(OverflowError, match="exceeds the range"):
        solver.solve(g)


def test_damping_that_works():
    blocks = random_blocks([2, 3, 2], [3, 4], seed=43, with_A="none")
    blocks.B[1][:] = 0
    analysis = lq.Analysis(blocks.problem())
    found = damping_that_works(analysis, 0.0, riccati.factor, 1e-14)
    assert found is not None and 0 < found < analysis.norm
    g = right_hand_side(7)
    assert backward_error(blocks.hessian(), found, solve(blocks.problem(), found, "riccati", g).x.numpy(), g) <= 1e-14

    class Useless(riccati.RiccatiFactorization):
        def solve(self, g):
            return torch.zeros_like(g)

    assert damping_that_works(analysis, 0.0, Useless, 1e-14) is None


def test_no_product_for_the_norm_where_a_refinement_reaches_the_tolerance():
    """A solve takes a product for its first residual and one after it is refined; without a refinement the norm is needed."""
    analysis = setting("wildly varying").new_analysis()
    g = torch.ones(analysis.problem.size, dtype=torch.float64)
    solvers = [Solver(analysis, 1e-2, "riccati", max_refinements=steps) for steps in (6, 0)]
    made, product = [], analysis.problem.hessian_product
    analysis.problem.hessian_product = lambda *args: made.append(1) or product(*args)
    found = solvers[0].solve(g)
    assert len(made) == 2 and found.refinement_steps == 1 and found.backward_error <= 1e-14
    solvers[1].solve(g)
    assert len(made) > 4  # the bound that is known for nothing would not do
