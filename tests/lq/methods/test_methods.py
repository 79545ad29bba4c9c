import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linop_hess import lq
from linop_hess.errors import FactorizationError
from linop_hess.lq.methods import banded, block_ldu, dense, riccati
from linop_hess.lq.pivots import rules
from tests.lq.problems import Blocks, backward_error, random_blocks

CERTIFIED = ["banded", "riccati", "dense"]
BOUND = {torch.float64: 1e-14, torch.float32: 1e-6}
DAMPINGS = [1.0, 1e-2, 1e-5, 1e-8, -0.37, -1e-4]

# State sizes n_0..n_L and controls p_1..p_L: equal, unequal, one wide among narrow ones, empty in every place.
SHAPES = {
    "one stage": ([3, 2], [4]),
    "equal": ([3, 3, 3, 3, 3], [3, 3, 3, 3]),
    "more controls than outputs": ([2, 2, 3, 2, 1], [8, 9, 7, 5]),
    "fewer controls than outputs": ([4, 5, 6, 5, 4], [1, 2, 1, 3]),
    "wildly varying": ([1, 17, 2, 9, 1, 12, 3], [3, 1, 20, 2, 11, 6]),
    "stages without controls": ([2, 4, 3, 5, 2, 1], [0, 6, 0, 0, 5]),
    "empty states inside": ([2, 3, 0, 4, 0, 2], [3, 4, 2, 5, 3]),
    "no state before the first and after the last": ([0, 3, 2, 0], [5, 0, 4]),
    "a stage with nothing": ([2, 3, 0, 0, 2, 2], [2, 3, 0, 0, 4]),
    "only one control": ([1, 1, 1, 1], [0, 1, 0]),
    "controls in the last stage only": ([2, 3, 2], [0, 3]),
}


def right_hand_side(size, columns=3, seed=5):
    return np.random.default_rng(seed).standard_normal((size, columns))


def solve(problem, damping, method, g, **options):
    solver = lq.Solver(problem, damping, method, **options)
    solution = solver.solve(torch.tensor(g, dtype=problem.dtype))
    assert solution.backward_error <= solver.tolerance
    return solution


def test_hessian_of_the_oracle_is_the_cost_as_written():
    """The oracle itself, against the cost function evaluated along a rollout."""
    blocks = random_blocks([2, 3, 1, 4], [3, 2, 5], seed=1)
    H = blocks.hessian()
    rng = np.random.default_rng(0)
    x = rng.standard_normal(10)
    cost, d = 0.0, np.zeros(2)
    for l, own in enumerate(np.split(x, [3, 5])):
        cost += own @ blocks.A[l] @ own / 2 + own @ blocks.B[l] @ d + d @ blocks.C[l] @ d / 2
        d = blocks.F[l] @ d + blocks.G[l] @ own
    np.testing.assert_allclose(x @ H @ x / 2, cost, rtol=1e-13)


@pytest.mark.parametrize("with_A", ["none", "some", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_the_dense_hessian(shape, with_A):
    blocks = random_blocks(*SHAPES[shape], seed=3, with_A=with_A)
    H = blocks.hessian()
    ours = blocks.problem().hessian_product(torch.eye(len(H), dtype=torch.float64), 0.25).numpy()
    np.testing.assert_allclose(ours, H + 0.25 * np.eye(len(H)), rtol=0, atol=1e-13 * np.abs(H).max())


@pytest.mark.parametrize("with_A", ["none", "some"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", CERTIFIED)
def test_backward_error(method, shape, with_A):
    blocks = random_blocks(*SHAPES[shape], seed=7, with_A=with_A)
    H, problem = blocks.hessian(), blocks.problem()
    g = right_hand_side(len(H))
    for damping in DAMPINGS:
        solution = solve(problem, damping, method, g)
        assert backward_error(H, damping, solution.x.numpy(), g) <= 1e-14, damping


@pytest.mark.parametrize("with_A", ["none", "some"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", CERTIFIED)
def test_solution_is_lapacks_and_no_other_method_stood_in(method, shape, with_A):
    blocks = random_blocks(*SHAPES[shape], seed=11, with_A=with_A)
    H, problem = blocks.hessian(), blocks.problem()
    g = right_hand_side(len(H))
    for damping in (0.3, -0.21):
        K = H + damping * np.eye(len(H))
        solution = solve(problem, damping, method, g)
        assert solution.method == method
        expected = np.linalg.solve(K, g)
        error = np.linalg.norm(solution.x.numpy() - expected) / np.linalg.norm(expected)
        assert error <= 1e-14 * np.linalg.cond(K)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", CERTIFIED)
def test_backward_error_in_float32(method, shape):
    blocks = random_blocks(*SHAPES[shape], seed=13).rounded(torch.float32)
    H, problem = blocks.hessian(), blocks.problem(torch.float32)
    g = right_hand_side(len(H)).astype(np.float32)
    for damping in (1.0, 1e-2, 1e-4, -0.37):
        solution = solve(problem, damping, method, g)
        assert solution.x.dtype == torch.float32
        assert backward_error(H, damping, solution.x.numpy(), g) <= 1e-6, damping


@pytest.mark.parametrize("shape", SHAPES)
def test_ldu_is_right_or_says_so(shape):
    """The paper's algorithm pivots within blocks only: it may lose digits, but never silently."""
    blocks = random_blocks(*SHAPES[shape], seed=17)
    H, problem = blocks.hessian(), blocks.problem()
    g = right_hand_side(len(H))
    right = 0
    for damping in DAMPINGS:
        try:
            solution = solve(problem, damping, "ldu", g, tolerance=1e-12)
        except FactorizationError:
            continue
        assert solution.method == "ldu"
        assert backward_error(H, damping, solution.x.numpy(), g) <= 1e-12
        right += 1
    assert right >= len(DAMPINGS) - 2


@pytest.mark.parametrize("with_A", ["none", "all"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "factor", [banded.factor, riccati.factor, riccati.factor_careful, dense.factor, block_ldu.factor]
)
def test_bare_factors_solve(factor, shape, with_A):
    """Without refinement, at a damping where nothing needs it."""
    blocks = random_blocks(*SHAPES[shape], seed=19, with_A=with_A)
    H, problem = blocks.hessian(), blocks.problem()
    g = right_hand_side(len(H))
    factors = factor(lq.Analysis(problem), 0.7)
    x = factors.solve(torch.from_numpy(g)).numpy()
    assert backward_error(H, 0.7, x, g) <= 1e-12
    assert factors.nbytes >= 0


@pytest.mark.parametrize("delay", [0.1, 10.0, 1e3])
@pytest.mark.parametrize("shape", SHAPES)
def test_delayed_pivots_change_nothing(shape, delay, monkeypatch):
    """However many directions are carried to the stage before, it is the same system."""
    blocks = random_blocks(*SHAPES[shape], seed=23)
    H, problem = blocks.hessian(), blocks.problem()
    g = right_hand_side(len(H))
    monkeypatch.setattr(rules, "PIVOT_DELAY", delay)
    monkeypatch.setattr(rules, "PIVOT_SMALL", 0.9)
    factors = riccati.factor_careful(lq.Analysis(problem), 0.04)
    x = factors.solve(torch.from_numpy(g)).numpy()
    assert backward_error(H, 0.04, x, g) <= 1e-12
    if delay == 1e3 and shape in ("equal", "wildly varying"):
        assert sum(factors.delayed.values()) >= 6


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
    H, problem = blocks.hessian(), blocks.problem()
    g = right_hand_side(len(H), 2)
    for method in CERTIFIED:
        for damping in (1e-1, 1e-6):
            x = solve(problem, damping, method, g).x
            assert backward_error(H, damping, x.numpy(), g) <= 1e-14, method


def test_columns_are_solved_independently():
    """Columns of very different size: each has its own backward error, and a zero column gives zero."""
    blocks = random_blocks([3, 4, 3, 2], [5, 6, 4], seed=31)
    H, problem = blocks.hessian(), blocks.problem()
    g = right_hand_side(len(H), 4)
    g[:, 0] *= 1e-12
    g[:, 1] = 0
    g[:, 3] *= 1e12
    for method in CERTIFIED:
        x = solve(problem, 1e-3, method, g).x.numpy()
        assert backward_error(H, 1e-3, x, g) <= 1e-14
        assert not x[:, 1].any()


def test_without_curvature_only_the_cost_remains():
    blocks = random_blocks([2, 3, 2, 1], [4, 3, 2], seed=37)
    problem = blocks.problem().gauss_newton()
    eye = torch.eye(9, dtype=torch.float64)
    assert not problem.hessian_product(eye).any()


def test_damping_zero_on_a_regular_problem():
    """Every control has curvature of its own: no damping is needed."""
    blocks = random_blocks([2, 3, 2, 2], [2, 2, 2], seed=41, with_A="all")
    H, problem = blocks.hessian(), blocks.problem()
    g = right_hand_side(len(H))
    for method in CERTIFIED:
        x = solve(problem, 0.0, method, g).x
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
    suggested = caught.value.suggested_damping
    x = solve(problem, suggested, "auto", g).x
    assert backward_error(blocks.hessian(), suggested, x.numpy(), g) <= 1e-14


@pytest.mark.parametrize("method", CERTIFIED)
def test_shift_onto_an_eigenvalue(method):
    """damping = −λ to rounding: an answer of small backward error, or an error."""
    blocks = random_blocks([2, 3, 3, 2], [4, 5, 3], seed=47)
    H, problem = blocks.hessian(), blocks.problem()
    g = right_hand_side(len(H))
    for eigenvalue in np.linalg.eigvalsh(H)[[0, 5, -1]]:
        try:
            x = solve(problem, -eigenvalue, method, g).x
        except FactorizationError:
            continue
        assert backward_error(H, -eigenvalue, x.numpy(), g) <= 2e-14


def test_plan_prints_every_method():
    plan = lq.make_plan(lq.Analysis(random_blocks([2, 3, 2], [3, 4], seed=0).problem()), 1e-3)
    text = str(plan)
    assert plan.choice in CERTIFIED and set(plan.costs) == {*CERTIFIED, "woodbury", "ldu"}
    assert text.count("<- chosen") == 1 and len(text.splitlines()) == 1 + len(plan.costs)
    for name, cost in plan.costs.items():
        assert name in text and cost.flops >= 0 and cost.nbytes >= 0 and cost.seconds > 0


def broken(**changes):
    blocks = random_blocks([2, 3, 2], [3, 4], seed=53)
    groups = {name: list(getattr(blocks, name)) for name in "ABCFG"}
    for name, value in changes.items():
        groups[name][1] = value(groups[name][1])
    return Blocks(**groups)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"A": lambda b: b[:-1]}, ValueError, "stage 2: A has shape"),
        ({"B": lambda b: b[:, :-1]}, ValueError, "stage 2: .* has shape"),
        ({"B": lambda b: b[0]}, ValueError, "stage 2: .* has shape"),
        ({"C": lambda b: b[:, :-1]}, ValueError, "stage 2: C has shape"),
        ({"F": lambda b: b[:, :-1]}, ValueError, "stage 2: F has shape"),
        ({"G": lambda b: b[:, :-1]}, ValueError, "stage 2: G has shape"),
        ({"A": lambda b: b + np.triu(np.ones_like(b), 1)}, ValueError, "stage 2: A is not symmetric"),
        ({"C": lambda b: b + np.triu(np.ones_like(b), 1)}, ValueError, "stage 2: C is not symmetric"),
        ({"F": lambda b: np.where(b == b.max(), np.nan, b)}, ValueError, "stage 2: F holds NaN or Inf"),
        ({"G": lambda b: np.where(b == b.max(), np.inf, b)}, ValueError, "stage 2: G holds NaN or Inf"),
        ({"A": lambda b: np.full_like(b, np.nan)}, ValueError, "stage 2: A holds NaN or Inf"),
    ],
)
def test_bad_blocks(changes, error, message):
    with pytest.raises(error, match=message):
        broken(**changes).problem()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.complex128, torch.bool])
def test_bad_dtype(dtype):
    blocks = broken(A=lambda b: 0 * b)
    groups = [[torch.tensor(b).to(dtype) for b in getattr(blocks, name)] for name in "ABCFG"]
    with pytest.raises(TypeError, match="float32 or float64"):
        lq.Problem.from_blocks(*groups)


def test_mixed_dtypes():
    blocks = broken()
    mixed = [
        [torch.tensor(b, dtype=(torch.float32, torch.float64)[l]) for l, b in enumerate(getattr(blocks, name))]
        for name in "ABCFG"
    ]
    with pytest.raises(TypeError, match="one dtype"):
        lq.Problem.from_blocks(*mixed)


def test_one_stage_of_two_dtypes():
    blocks = broken()
    groups = {name: [torch.tensor(b) for b in getattr(blocks, name)] for name in "ABCFG"}
    groups["G"] = [g.float() for g in groups["G"]]
    with pytest.raises(TypeError, match="dtype"):
        lq.Problem.from_blocks(*groups.values())


def test_neighbours_must_fit():
    blocks = random_blocks([2, 3, 2], [3, 4], seed=53)
    other = random_blocks([5, 2], [3], seed=53)
    both = Blocks(*(getattr(blocks, name) + getattr(other, name) for name in "ABCFG"))
    with pytest.raises(ValueError, match="stage 2 leaves a state of size 2, but stage 3 expects one of size 5"):
        both.problem()


def test_lists_of_unequal_length_and_empty_ones():
    blocks = random_blocks([2, 3, 2], [3, 4], seed=53)
    with pytest.raises(ValueError, match="one block per stage"):
        lq.Problem.from_blocks(blocks.A, blocks.B, blocks.C, blocks.F, blocks.G[:1])
    with pytest.raises(ValueError, match="at least one stage"):
        lq.Problem.from_blocks([], [], [], [], [])


def test_problem_is_a_snapshot():
    """Arrays written to after the problem was built."""
    blocks = random_blocks([2, 3, 2], [3, 4], seed=59)
    H = blocks.hessian()
    problem = lq.Problem.from_blocks(blocks.A, blocks.B, blocks.C, blocks.F, blocks.G)
    for name in "ABCFG":
        for block in getattr(blocks, name):
            block[:] = np.nan
    ours = problem.hessian_product(torch.eye(len(H), dtype=torch.float64)).numpy()
    np.testing.assert_allclose(ours, H, rtol=0, atol=1e-13 * np.abs(H).max())


def test_bad_solver_arguments():
    problem = random_blocks([2, 3, 2], [3, 4], seed=61).problem()
    with pytest.raises(ValueError, match="method must be one of .*banded"):
        lq.Solver(problem, 1e-3, "lu")
    for damping in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            lq.Solver(problem, damping)
    for damping in (1j, "1e-3", None, [1e-3]):
        with pytest.raises(TypeError, match="real number"):
            lq.Solver(problem, damping)
    for tolerance in (0.0, -1e-3, 1.0, np.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            lq.Solver(problem, 1e-3, tolerance=tolerance)
