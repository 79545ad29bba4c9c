"""How many directions a sketch has, against iterations that are made, and what it takes."""

import math

import pytest
import torch

from linop_hess.errors import SingularPivotError
from linop_hess.lq.iterative.convergence import spectrum_of
from linop_hess.lq.iterative.gmres import gmres
from linop_hess.lq.iterative.lanczos import Seen, Spectrum
from linop_hess.lq.iterative.options import Asked, SketchOptions
from linop_hess.lq.iterative.sizing import Enough, Left, Patience, Sizing, at_best, most_directions
from linop_hess.lq.iterative.spans import cut
from linop_hess.lq.methods.plan import make_plan
from linop_hess.lq.methods.sketched import SketchedFactorization, Watch, forecast
from tests.lq.sketches import DAMPING, analyses, damped

F64 = torch.float64


class Replaced:
    """Watches a solve, and goes on with other factors once `when(left, iterations)`."""

    def __init__(self, factors, later, when):
        self.factors, self.later, self.when, self.iterations = factors, later, when, 0

    def solve(self, v):
        return getattr(self.factors, "solve", self.factors)(v)

    def begin(self, columns):
        pass

    def after(self, left):
        self.iterations += 1
        self.factors = self.later if self.when(left, self.iterations) else self.factors


def begun(factors):
    watch = Watch(factors)
    watch.begin(1)
    return watch


def told_of(watch, residuals):
    """The factors after each of these."""
    found = []
    for left in residuals:
        watch.after(left)
        found.append(watch.factors)
    return found


@pytest.mark.parametrize("damping", [0.5, -0.5])
@pytest.mark.parametrize(("lowest", "highest"), [(-4.0, 9.0), (-0.4, 30.0), (-20.0, 20.0), (0.0, 0.0)])
def test_gmres_takes_no_more_than_the_bound(lowest, highest, damping):
    """Eigenvalues of H between these that leave those of H + εI at least |ε| away from zero."""
    values = torch.linspace(lowest, highest, 400, dtype=F64) * (1 if damping > 0 else -1)
    shifted = values + damping
    shifted = shifted[shifted.abs() >= abs(damping)]
    g = torch.randn(len(shifted), 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    made = gmres(lambda X: shifted[:, None] * X, lambda v: v, g, lambda _, of_g: 1e-6 * of_g, 400).iterations
    left = Left.of(float(values.min()), float(values.max()), damping)
    assert made <= left.iterations(Asked(damping, 1, 1e-6).digits) + 5  # looked at every five iterations


def test_without_damping_no_number_is_enough():
    analysis = analyses()[0]
    asked, options = Asked(0.0, 1, 1e-6), SketchOptions().for_problem(analysis)
    enough = Enough(analysis, asked, options, 16, 64)
    assert [enough(Seen(have, 1.0, 1.0, -1.0, 1.0)) for have in (8, 16, 63, 64)] == [False, False, False, True]


def test_more_directions_where_more_is_saved():
    analysis = analyses()[0]
    options = SketchOptions().for_problem(analysis)

    def enough(size, count=1):
        return Enough(analysis, Asked(1e-2, count, 1e-6), options)(Seen(64, size, size, -size, size))

    told = [enough(size) for size in (1e9, 1e3, 1.0, 1e-3)]
    assert told == sorted(told) and not told[0] and not (enough(1.0, 100) and not enough(1.0))
    sizing = analysis.once(Sizing)
    less, more = sizing.outlay(options, 16), sizing.outlay(options, 64)
    assert less.flops < more.flops and less.nbytes < more.nbytes


def test_by_a_quadrature():
    analysis = analyses()[0]
    options = SketchOptions().for_problem(analysis)
    size = analysis.problem.size
    nodes, weights = torch.tensor([-1e-3, 0.0, 1.0], dtype=F64), torch.tensor([0.4, 0.5, 0.1], dtype=F64)
    found = Spectrum(nodes, weights, size)
    assert found.size_of(1) == 1.0 and found.size_of(2 * size) == 0.0
    assert 1e-3 <= found.size_of(size // 5) < found.size_of(size // 10) <= 1.0
    seven = SketchOptions(rank=7).for_problem(analysis)
    few, many = (at_best(analysis, Asked(damping, 1, 1e-6), seven, found, least=False)[1] for damping in (1.0, 1e-5))
    assert 3 <= few < many
    assert at_best(analysis, Asked(1.0), seven, found, least=True)[0] == 7
    rank, made = at_best(analysis, Asked(1e-5, 1, 1e-6), options, found, least=False)
    assert rank <= size and made < many


def test_without_damping_iterations_are_as_many_as_there_are_parameters():
    """No bound tells of them, and GMRES takes no more."""
    analysis = analyses()[0]
    size, asked = analysis.problem.size, Asked(0.0, 2, 1e-6)
    for options in (SketchOptions(rank=7), SketchOptions()):
        found = spectrum_of(analysis)
        assert at_best(analysis, asked, options.for_problem(analysis), found, least=False)[1] == 2 * size
    assert forecast(analysis, asked, math.inf).iterations == size
    assert make_plan(analysis, 0.0).costs["sketched"].seconds < math.inf


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_without_damping_a_larger_sketch_has_twice_the_directions(rate):
    """The bound is infinite: it tells nothing of how many more would pay."""
    analysis = analyses()[0]
    options = SketchOptions().for_problem(analysis)
    enough = Enough(analysis, Asked(0.0), options, 16, 16)
    factors = SketchedFactorization(analysis, 0.0, SketchOptions(), Asked(0.0), enough)
    assert factors.larger(rate).sketch.rank == 32 < most_directions(analysis)


def test_every_block_of_columns_begins_with_new_patience(monkeypatch):
    """The residuals of a second block begin large again, which tells nothing of how fast they fall."""
    analysis = analyses()[0]
    options = SketchOptions().for_problem(analysis)
    factors = SketchedFactorization(
        analysis, DAMPING, SketchOptions(), Asked(DAMPING), Enough(analysis, Asked(DAMPING), options, 16, 16)
    )
    told = []
    monkeypatch.setattr(SketchedFactorization, "patience", lambda self, columns: told.append(columns) or Patience(20.0))
    watch = Watch(factors)
    for columns in (64, 64, 6):
        watch.begin(columns)
        assert all(f is factors for f in told_of(watch, [14.0 - j for j in range(14)]))
    assert told == [64, 64, 6]
    told.clear()
    A, g = damped(analysis), torch.eye(analysis.problem.size, dtype=F64)[:, :70]
    gmres(lambda X: A @ X, factors.solve, g, lambda _, of_g: 1e-3 * of_g, 300, watch)
    assert told == [64, 6]


@pytest.mark.parametrize("error", [SingularPivotError(1), MemoryError()])
def test_a_larger_sketch_that_cannot_be_made_leaves_the_one_in_use(monkeypatch, error):
    analysis = analyses()[0]
    options, asked = SketchOptions().for_problem(analysis), Asked(DAMPING)
    factors = SketchedFactorization(analysis, DAMPING, SketchOptions(), asked, Enough(analysis, asked, options, 16, 16))
    tried = []

    def larger(self, rate):
        tried.append(rate)
        raise error

    monkeypatch.setattr(SketchedFactorization, "larger", larger)
    assert all(f is factors for f in told_of(begun(factors), [14.0] * 200)) and len(tried) == 1


def test_patience():
    stalled, fast = Patience(20.0), Patience(20.0)
    assert any(stalled.is_over(14.0) for _ in range(10)) and stalled.rate == 0.0
    assert not any(fast.is_over(14.0 - j) for j in range(14)) and fast.rate == pytest.approx(1.0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_larger_sketch_goes_on_where_a_smaller_is_too_slow(which):
    analysis = analyses()[which]
    options = SketchOptions().for_problem(analysis)
    enough = Enough(analysis, Asked(DAMPING), options, 16, 16)
    factors = SketchedFactorization(analysis, DAMPING, SketchOptions(), Asked(DAMPING), enough)
    assert factors.sketch.rank == 16
    omega = factors.sketch.basis.directions
    found = told_of(begun(factors), [14.0] * 200)
    ranks = [f.sketch.rank for f in found]
    assert found[0] is factors and ranks == sorted(ranks) and ranks[-1] == most_directions(analysis)
    larger = next(f for f in found if f is not factors)
    assert larger.sketch.rank >= 32 and torch.equal(larger.sketch.basis.directions[:, :16], omega)
    A, g = damped(analysis), torch.ones(analysis.problem.size, 1, dtype=F64)
    replaced = Replaced(factors, larger, lambda left, iterations: left < 10.0)
    made = gmres(lambda X: A @ X, replaced.solve, g, lambda _, of_g: 1e-8 * of_g, 300, replaced)
    assert made.reached and replaced.factors is larger and float((A @ made.x - g).norm() / g.norm()) < 1.1e-8


def test_factors_that_come_late_are_given_a_cycle(monkeypatch):
    """One with those before, which does not halve the residual, is not the end."""
    monkeypatch.setattr("linop_hess.lq.iterative.gmres.LONGEST", 6)
    values = torch.cat([torch.linspace(1.0, 1e6, 30, dtype=F64), -torch.linspace(1.0, 1e6, 30, dtype=F64)])[:, None]
    late = Replaced(
        lambda v: v, lambda v: v / values, lambda left, iterations: iterations == 10
    )  # the last but one of the second cycle
    made = gmres(lambda X: values * X, late.solve, torch.ones_like(values), lambda _, of_g: 1e-9 * of_g, 60, late)
    assert made.reached and made.iterations > 12
    kept = Replaced(lambda v: v, lambda v: v, lambda left, iterations: False)
    assert not gmres(
        lambda X: values * X, kept.solve, torch.ones_like(values), lambda _, of_g: 1e-9 * of_g, 60, kept
    ).reached
    assert kept.iterations == 10


@pytest.mark.parametrize("options", [SketchOptions(rank=16), SketchOptions(tol=0.2)])
def test_what_was_asked_for_is_kept(options):
    factors = SketchedFactorization(analyses()[0], DAMPING, options)
    assert all(f is factors for f in told_of(begun(factors), [14.0] * 200))


@pytest.mark.parametrize(("lowest", "highest"), [(0.0, 30.0), (-0.4, 0.4), (-0.1, 0.05), (-1e-4, 1e-4), (0.0, 0.0)])
def test_definite_remainders_take_no_more_than_expected(lowest, highest):
    """And less is expected the less is left, where the bound for indefinite matrices has a limit."""
    values = torch.linspace(lowest, highest, 400, dtype=F64) + 0.5
    g = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    made = gmres(lambda X: values[:, None] * X, lambda v: v, g, lambda _, of_g: 1e-6 * of_g, 400).iterations
    left, digits = Left.of(lowest, highest, 0.5), Asked(0.5, 1, 1e-6).digits
    assert made <= left.expected(digits) + 5 <= left.iterations(digits) + 5  # looked at every five iterations
    assert highest >= 0.4 or left.expected(digits) < 0.6 * left.iterations(digits)
    indefinite = Left(3.0, 1.5)
    assert indefinite.expected(digits) == indefinite.iterations(digits)


def test_an_iteration_takes_longer_the_larger_the_pivots_and_the_more_columns():
    analysis = analyses()[0]
    sizing, options = analysis.once(Sizing), SketchOptions().for_problem(analysis)
    (few, _), (many, _) = sizing.iteration(options, 16), sizing.iteration(options, 16, 8)
    assert many == pytest.approx(8 * few)
    spans = [len(cut(analysis.problem, analysis.samples, 1.0, rank).bounds) for rank in (1, 171)]
    assert spans[0] > spans[1] and sizing.iteration(options, 1)[0] < sizing.iteration(options, 171)[0]
