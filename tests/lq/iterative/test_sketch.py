"""What a sketch has before a damping is known, against the dense Hessian."""

import pytest
import torch

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


def test_why_not():
    assert not why_no_sketch(analyses()[0], 10)
    assert "interact" in why_no_sketch(setting("equal").analysis, None)
