"""Every question to an inverse by every method, against dense eigenvalues and inverses; and nothing is factored twice."""

from collections import Counter

import numpy as np
import pytest
import torch

from linop_hess.errors import FactorizationError, NotPositiveDefiniteError
from linop_hess.lq.inverse import entries
from linop_hess.lq.inverse.inverse import Inverse
from linop_hess.lq.methods import block_ldu, riccati
from linop_hess.lq.methods.banded import BandedFactorization
from linop_hess.lq.methods.dense import DenseFactorization
from linop_hess.lq.methods.woodbury import WoodburyFactorization
from linop_hess.lq.pivots.inertia import Inertia
from tests.lq.methods.conformance import DTYPES, MIXED, SHAPES, WIRED, Setting, eye, right_hand_side, setting
from tests.lq.methods.test_woodbury import GAUSS_NEWTON
from tests.lq.problems import backward_error, gauss_newton_blocks

METHODS = ("banded", "riccati", "dense", "ldu")
DAMPINGS = (0.5, 1e-2, 1e-5, -0.3)
RELATIVE = {torch.float64: 1e-11, torch.float32: 1e-5}


def check(truth: Setting, damping: float, method: str, seed: int = 0) -> None:
    """Ask everything, in an order of its own: what is asked first must not change what comes after."""
    N, dtype, K = len(truth.H), truth.problem.dtype, truth.shifted(damping)
    values = truth.eigenvalues + damping
    if np.abs(values).min(initial=np.inf) <= 1e-9 * truth.norm:
        return
    inverse = Inverse(truth.analysis, damping, method)
    condition = np.linalg.cond(K) if N else 1.0
    g = right_hand_side(N).astype(truth.problem.numpy_dtype)

    def solve():
        solution = inverse.solve(torch.from_numpy(g))
        bound = 1.2 * inverse.solver.tolerance
        assert backward_error(truth.H, damping, solution.x.numpy(), g) <= bound

    def inertia():
        found = inverse.inertia
        assert (found.negative, found.zero, found.positive) == ((values < 0).sum(), 0, (values > 0).sum())
        assert inverse.is_positive_definite == (values > 0).all()

    def determinant():
        sign, logabsdet = inverse.slogdet()
        expected = np.log(np.abs(values)).sum()
        assert sign == (-1) ** int((values < 0).sum())
        assert abs(logabsdet - expected) <= 1e-11 * (abs(expected) + N) + truth.doubt(damping)

    def positive():
        P = inverse.positive()(eye(N, dtype)).double().numpy()
        PK, lost = P @ K, np.linalg.norm(P, 2) * np.linalg.norm(K, 2) if N else 1.0
        tolerance = 1e-2 * RELATIVE[dtype] * max(N, 1) * lost * max(1.0, np.linalg.norm(PK, 2) if N else 1.0)
        assert np.linalg.eigvalsh((P + P.T) / 2).min(initial=np.inf) > -1e-6 * np.abs(P).max(initial=1.0)
        np.testing.assert_allclose(PK @ PK, np.eye(N), rtol=0, atol=tolerance)

    def diagonal():
        expected = np.linalg.inv(K)
        atol = 1e-13 * (100 + condition) * np.abs(expected).max(initial=0.0)
        np.testing.assert_allclose(inverse.entries.diagonal.numpy(), np.diag(expected), rtol=0, atol=atol)
        blocks = iter(inverse.blocks())
        for own in truth.controls():
            np.testing.assert_allclose(next(blocks), expected[np.ix_(own, own)], rtol=0, atol=3 * atol)
        assert next(blocks, None) is None

    def sample():
        if (values > 0).all():
            drawn = inverse.sample(5, torch.Generator().manual_seed(0))
            assert drawn.shape == (N, 5) and drawn.dtype == torch.float64 and bool(torch.isfinite(drawn).all())
            assert torch.equal(drawn, inverse.sample(5, torch.Generator().manual_seed(0)))
            assert inverse.sample(0, None).shape == (N, 0)

    def report():
        rows = inverse.report()
        assert sum(row.pivots + row.hidden for row in rows) == N and rows[:1] == [] or rows[0].delayed == 0

    questions = [solve, inertia, determinant, positive, diagonal, sample, report]
    for q in np.random.default_rng(seed).permutation(len(questions)):
        questions[q]()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *WIRED])
def test_every_question(shape, dtype, method):
    truth = setting(shape, dtype)
    for seed, damping in enumerate(DAMPINGS):
        if dtype == torch.float32 and (seed + METHODS.index(method)) % 2:
            continue  # all but solves is answered in float64: two dampings, others with the next method
        if method == "ldu":
            try:
                Inverse(truth.analysis, damping, method).solve(torch.ones(len(truth.H), 1, dtype=dtype))
            except FactorizationError:
                continue
        if method == "ldu" and dtype == torch.float32:
            continue  # solves may fail there, and nothing else is its own
        check(truth, damping, method, seed)


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("shape", MIXED)
def test_narrow_and_wide_segments(shape, method):
    for seed, damping in enumerate(DAMPINGS):
        check(setting(shape), damping, method, seed)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GAUSS_NEWTON)
def test_woodbury(shape, dtype, convex):
    blocks = gauss_newton_blocks(*GAUSS_NEWTON[shape], seed=3, convex=convex).rounded(dtype)
    truth = Setting(blocks.problem(dtype), blocks.hessian(), np.linalg.eigvalsh(blocks.hessian()))
    for seed, damping in enumerate((0.5, 1e-2, -0.3)):
        check(truth, damping, "woodbury", seed)


@pytest.fixture
def made(monkeypatch):
    """How often each kind of factorization was made."""
    count: Counter[str] = Counter()
    for kind in (
        BandedFactorization,
        riccati.RiccatiFactorization,
        DenseFactorization,
        WoodburyFactorization,
        block_ldu.BlockLdu,
    ):

        def counted(self, *args, _init=kind.__init__, _name=kind.method, **options):
            count[_name] += 1
            _init(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", counted)
    return count


def ask_everything(inverse: Inverse) -> None:
    N, dtype = inverse.analysis.problem.size, inverse.analysis.problem.dtype
    inverse.solve(torch.ones(N, 2, dtype=dtype))
    _ = inverse.inertia, inverse.slogdet(), inverse.entries.diagonal
    inverse.positive()(torch.ones(N, 1, dtype=dtype))
    inverse.blocks()
    if inverse.is_positive_definite:
        inverse.sample(2, None)


@pytest.mark.parametrize("damping", [1e-2, 1e-5, -0.3, 40.0])
@pytest.mark.parametrize("shape", ["equal", "more controls than outputs", "narrow, wide, narrow"])
def test_dense_factors_answer_everything(shape, damping, made):
    inverse = Inverse(setting(shape).problem, damping, "dense")
    ask_everything(inverse)
    assert made == {"dense": 1}


@pytest.mark.parametrize("damping", [1e-2, 1e-5, -0.3, 40.0])
@pytest.mark.parametrize("shape", ["equal", "more controls than outputs", "narrow, wide, narrow"])
def test_riccati_is_factored_three_times_at_most(shape, damping, made):
    """For solves, with bounded growth, with bounded multipliers; at damping 1e-2 the first mostly does for all."""
    inverse = Inverse(setting(shape).problem, damping, "riccati")
    ask_everything(inverse)
    before = dict(made)
    assert before["riccati"] <= 3 and before.get("banded", 0) <= 1 and not before.get("dense")
    ask_everything(inverse)
    assert made == before, "asked twice"


@pytest.mark.parametrize("damping", [1e-2, 40.0])
@pytest.mark.parametrize("method", ["banded", "ldu", "iterative"])
@pytest.mark.parametrize("shape", ["equal", "more controls than outputs", "narrow, wide, narrow"])
def test_factors_made_for_one_question_answer_the_next(shape, method, damping, made):
    """Of methods whose own factors have no signs."""
    inverse = Inverse(setting(shape).problem, damping, method)
    solves = Counter(made)
    assert inverse.inertia.zero == 0
    for_signs = Counter(made) - solves
    assert sum(for_signs.values()) == 1
    inverse.factors.answering("inertia")
    assert Counter(made) - solves == for_signs, "factored twice"


def test_entries_from_both_ends_use_the_same_factors(made, monkeypatch):
    monkeypatch.setattr(entries, "SOLVED_UP_TO", 0)
    inverse = Inverse(setting("equal").problem, 0.5, "riccati")
    ask_everything(inverse)
    assert made["riccati"] <= 3


def test_woodbury_factors_answer_everything_of_a_convex_cost(made):
    problem = gauss_newton_blocks(*GAUSS_NEWTON["equal"], seed=3).problem()
    ask_everything(Inverse(problem, 0.3, "woodbury"))
    assert made == {"woodbury": 1}


@pytest.mark.parametrize("damping", [1e-2, -0.3])
def test_an_analysis_is_shared(damping, made):
    analysis = setting("equal").new_analysis()
    first, second = (Inverse(analysis, damping, "banded") for _ in range(2))
    assert first.analysis is second.analysis is analysis and first.damping == damping
    assert made["banded"] == 2


def test_samples_of_an_indefinite_matrix():
    truth = setting("equal")
    with pytest.raises(NotPositiveDefiniteError, match="negative .*damping=.* works") as caught:
        Inverse(truth.problem, 1e-3).sample(1, None)
    damping = float(str(caught.value).split("damping=")[-1].split()[0])
    assert truth.eigenvalues[0] + damping > 0
    Inverse(truth.problem, damping).sample(1, None)


def test_a_zero_eigenvalue_has_no_determinant():
    inverse = Inverse(setting("equal").problem, 0.5)
    inverse.inertia = Inertia(0, 1, 11)
    with pytest.raises(FactorizationError, match="determinant is zero to rounding"):
        inverse.slogdet()


@pytest.mark.parametrize("method", ["riccati", "banded", "dense", "auto"])
def test_questions_at_no_damping(method):
    """Where nothing is hidden they are answered, where something is the error tells."""
    check(setting("equal", with_A="all"), 0.0, method)
    with pytest.raises(FactorizationError):
        inverse = Inverse(setting("more controls than outputs").problem, 0.0, method)
        inverse.solve(torch.ones(29, 1).double())
