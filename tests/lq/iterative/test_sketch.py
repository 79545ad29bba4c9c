"""What a sketch has before a damping is known, against the dense Hessian."""

import threading

import pytest
import torch

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative.options import SketchOptions
from linop_hess.lq.iterative.sketch import Sketches, why_no_sketch
from linop_hess.lq.matrix.hessian import assembled
from tests.lq.methods.conformance import setting
from tests.lq.sketches import analyses


@pytest.mark.parametrize("kind", ["tanh", "wired"])
@pytest.mark.parametrize("which", [0, 1])
def test_pivot_blocks_and_the_lower_part(kind, which):
    analysis = analyses(kind)[which]
    layout = analysis.problem.layout
    sketch = Sketches(analysis).of(SketchOptions(15, None, 30, torch.float64))
    order = torch.arange(analysis.problem.size) if layout.places is None else torch.from_numpy(layout.places)
    H = assembled(analysis)[order][:, order]
    edges = [int(layout.x_offsets[a]) for a, _ in sketch.cut.bounds] + [analysis.problem.size]
    omega = sketch.basis.directions
    for j, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        assert float((sketch.pivot_block(j) - H[a:b, a:b]).norm() / H.norm()) < 1e-14
        if j:
            assert float((sketch.lower[j] - H[a:b, :a] @ omega[:a]).norm() / H.norm()) < 1e-14
        else:
            assert sketch.lower[0] is None


def test_the_last_one_is_kept():
    analysis, options = analyses()[0], SketchOptions(5, None, 30, torch.float32)
    sketches = Sketches(analysis)
    assert sketches.of(options) is sketches.of(options) and sketches.of(options).nbytes > 0
    assert sketches.of(SketchOptions(6, None, 30, torch.float32)).rank == 6


@pytest.mark.parametrize(
    ("before", "options"), [(60, SketchOptions(rank=64)), (13, SketchOptions(rank=16)), (60, SketchOptions())]
)
def test_directions_are_the_same_whatever_was_asked_before(before, options):
    """A rank that is no multiple of a block leaves the run as long as its blocks are."""
    problem = analyses()[0].problem
    fresh, used = Sketches(Analysis(problem)), Sketches(Analysis(problem))
    enough = lambda seen: seen.have >= 64  # noqa: E731
    options = options.for_problem(Analysis(problem))
    assert used.of(SketchOptions(rank=before).for_problem(Analysis(problem))).rank == before
    found, expected = (sketches.of(options, enough).basis for sketches in (used, fresh))
    assert torch.equal(found.directions, expected.directions) and found.seen == expected.seen


def test_threads_take_turns():
    """Inverses of one linearization share the run of block Lanczos."""
    problem, ranks = analyses()[0].problem, [16, 32, 48, 64, 80, 24, 40, 56]
    options = SketchOptions().for_problem(Analysis(problem))
    expected = Sketches(Analysis(problem)).of(options, lambda seen: seen.have >= 80).basis.directions
    shared, gate, found = Sketches(Analysis(problem)), threading.Barrier(len(ranks)), {}

    def ask(rank):
        gate.wait()
        found[rank] = shared.of(options, lambda seen: seen.have >= rank).basis.directions

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(ranks)
    assert all(torch.equal(found[rank], expected[:, :rank]) for rank in ranks)


def test_why_not():
    assert not why_no_sketch(analyses()[0], 10)
    assert "interact" in why_no_sketch(setting("equal").analysis, None)


def test_bytes_of_all_that_it_holds():
    """The directions are a part of the buffer of a run that went further, and stages in float32 a copy of those in float64."""
    analysis = analyses()[0]
    sketches, options = Sketches(analysis), SketchOptions(60, None, 30, torch.float32)
    sketches.of(SketchOptions(64, None, 30, torch.float32))
    found = sketches.of(options)
    own = found.problem.nbytes + found.basis.directions.untyped_storage().nbytes()
    assert found.problem is not analysis.problem and found.basis.nbytes >= 64 * 4 * found.problem.size
    assert found.nbytes >= own + sum(rows.nbytes for rows in found.lower[1:])
    whole = sketches.of(SketchOptions(60, None, 30, torch.float64))
    assert whole.problem is analysis.problem and whole.nbytes < whole.problem.nbytes + 2 * found.nbytes
