"""LQ problems: the products against the cost as written, and what is refused."""

import numpy as np
import pytest
import torch

from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.dense import DenseStage
from tests.lq.methods.conformance import SHAPES, WIRED, right_hand_side, setting
from tests.lq.problems import Blocks, diagonal_of_blocks, random_blocks


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


def test_without_curvature_only_the_cost_remains():
    blocks = random_blocks([2, 3, 2, 1], [4, 3, 2], seed=37)
    problem = blocks.problem().gauss_newton()
    eye = torch.eye(9, dtype=torch.float64)
    assert not problem.hessian_product(eye).any()


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
        Problem.from_blocks(*groups)


def test_mixed_dtypes():
    blocks = broken()
    mixed = [
        [torch.tensor(b, dtype=(torch.float32, torch.float64)[l]) for l, b in enumerate(getattr(blocks, name))]
        for name in "ABCFG"
    ]
    with pytest.raises(TypeError, match="one dtype"):
        Problem.from_blocks(*mixed)


def test_one_stage_of_two_dtypes():
    blocks = broken()
    groups = {name: [torch.tensor(b) for b in getattr(blocks, name)] for name in "ABCFG"}
    groups["G"] = [g.float() for g in groups["G"]]
    with pytest.raises(TypeError, match="dtype"):
        Problem.from_blocks(*groups.values())


def test_neighbours_must_fit():
    blocks = random_blocks([2, 3, 2], [3, 4], seed=53)
    other = random_blocks([5, 2], [3], seed=53)
    both = Blocks(*(getattr(blocks, name) + getattr(other, name) for name in "ABCFG"))
    with pytest.raises(ValueError, match="stage 2 leaves a state of size 2, but stage 3 expects one of size 5"):
        both.problem()


def test_lists_of_unequal_length_and_empty_ones():
    blocks = random_blocks([2, 3, 2], [3, 4], seed=53)
    with pytest.raises(ValueError, match="one block per stage"):
        Problem.from_blocks(blocks.A, blocks.B, blocks.C, blocks.F, blocks.G[:1])
    with pytest.raises(ValueError, match="at least one stage"):
        Problem.from_blocks([], [], [], [], [])


def test_problem_is_a_snapshot():
    """Arrays written to after the problem was built."""
    blocks = random_blocks([2, 3, 2], [3, 4], seed=59)
    H = blocks.hessian()
    problem = Problem.from_blocks(blocks.A, blocks.B, blocks.C, blocks.F, blocks.G)
    for name in "ABCFG":
        for block in getattr(blocks, name):
            block[:] = np.nan
    ours = problem.hessian_product(torch.eye(len(H), dtype=torch.float64)).numpy()
    np.testing.assert_allclose(ours, H, rtol=0, atol=1e-13 * np.abs(H).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_products_with_each_block(shape):
    blocks, problem = random_blocks(*SHAPES[shape], seed=3), setting(shape, seed=3).problem
    layout = problem.layout
    A, B, C, F, G = (diagonal_of_blocks(getattr(blocks, name)) for name in "ABCFG")
    x, d, y = (torch.from_numpy(right_hand_side(n)) for n in (layout.size, layout.size_in, layout.size_out))
    for ours, matrix, v in (
        (problem.apply_A, A, x),
        (problem.apply_B, B, d),
        (problem.apply_Bt, B.T, x),
        (problem.apply_C, C, d),
        (problem.apply_F, F, d),
        (problem.apply_Ft, F.T, y),
        (problem.apply_G, G, x),
        (problem.apply_Gt, G.T, y),
    ):
        np.testing.assert_allclose(ours(v).numpy(), matrix @ v.numpy(), rtol=0, atol=1e-13)


def test_gauss_newton_keeps_the_transition():
    problem = setting("equal").problem
    flat = problem.gauss_newton()
    assert flat.transition is problem.transition and flat.size == problem.size
    assert all(not stage.nonzero for stage in flat.blocks)


def test_other_precision_names_and_sizes():
    blocks = random_blocks([2, 3, 2], [3, 4], seed=53)
    stages = [
        DenseStage.from_arrays(l, *group)
        for l, group in enumerate(zip(*(getattr(blocks, n) for n in "ABCFG"), strict=True))
    ]
    problem = Problem.stacked(stages, ["first", "second"])
    single = problem.to(torch.float32)
    assert (single.dtype, single.numpy_dtype, single.names) == (torch.float32, np.float32, problem.names)
    assert problem.name(1) == "2 (second)" and blocks.problem().name(1) == "2"
    assert (problem.size, problem.length, problem.device.type) == (7, 2, "cpu")
    assert (
        single.nbytes * 2
        == problem.nbytes
        == 8 * sum(part.numel() for s in stages for part in (s.f, s.g, s.b, s.c, s.a) if part is not None)
    )
    with pytest.raises(ValueError, match=r"stage 1 \(first\) leaves a state of size 3, but stage 2 \(again\)"):
        Problem.stacked([stages[0], stages[0]], ["first", "again"])


def test_no_columns_where_stages_of_a_stack_are_not_evenly_spaced():
    F = torch.eye(2).double().repeat(3, 1, 1)
    alike = DenseStage.plain(F, F, None, None, F)
    other = DenseStage.plain(F[:1], F[:1], None, None, None)
    problem = Problem([alike, other], np.array([(0, 0), (0, 1), (1, 0), (0, 2)]))
    assert problem.hessian_product(torch.zeros(8, 0).double()).shape == (8, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", WIRED)
def test_wired_products_are_the_dense_hessian(shape, dtype):
    truth = setting(shape, dtype)
    N = len(truth.H)
    ours = truth.problem.hessian_product(torch.eye(N, dtype=dtype), 0.25).double().numpy()
    bound = 100 * torch.finfo(dtype).eps * max(1.0, np.abs(truth.H).max())
    np.testing.assert_allclose(ours, truth.H + 0.25 * np.eye(N), rtol=0, atol=bound)


def test_places_stay_with_the_problem():
    problem = setting("shared, places").problem
    places = problem.places
    assert places is not None and sorted(places) == list(range(problem.size))
    for other in (problem.to(torch.float32), problem.gauss_newton(), problem.with_curvature(problem.blocks)):
        assert np.array_equal(other.places, places)
    stage = DenseStage.plain(torch.ones(1, 1, 1), torch.ones(1, 1, 2), None, None, None)
    assert Problem.stacked([stage], places=np.array([1, 0])).layout.controls(0).tolist() == [1, 0]
    assert Problem.stacked([stage], places=np.array([0, 1])).places is None


@pytest.mark.parametrize("places", [[0, 0], [1, 2], [-1, 0], [0], [[0, 1]], [0.0, 1.0]])
def test_places_are_a_permutation(places):
    stage = DenseStage.plain(torch.ones(1, 1, 1), torch.ones(1, 1, 2), None, None, None)
    with pytest.raises(ValueError, match=r"expected places to be a permutation of 0\.\.1"):
        Problem.stacked([stage], places=np.array(places))
