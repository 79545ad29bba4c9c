"""What a sketch may be asked for."""

import pytest
import torch

from linop_hess.lq.iterative.options import Asked, SketchOptions, sketch_options
from tests.lq.sketches import analyses


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank to be at least 1"),
        ({"rank": 10**6}, "expected rank of 1 to .*, the number of parameters"),
        ({"core": 31}, "expected core of 1 to 30, the number of samples"),
        ({"tol": 0.0}, "expected tol between 0 and 1"),
        ({"tol": 1.0}, "expected tol between 0 and 1"),
        ({"tol": 0.1, "rank": 3}, "expected a rank or a tol"),
    ],
)
def test_bad_values(given, message):
    with pytest.raises(ValueError, match=message):
        sketch_options(analyses()[0], **given)


@pytest.mark.parametrize("given", [{"rank": 1.5}, {"core": True}, {"tol": "small"}])
def test_no_numbers(given):
    with pytest.raises(TypeError):
        sketch_options(analyses()[0], **given)


def test_what_is_left_open():
    analysis = analyses()[0]
    size = analysis.problem.size
    assert sketch_options(analysis).is_default and Asked(0.1).sketch.is_default
    full = SketchOptions().for_problem(analysis)
    assert (full.rank, full.core, full.dtype) == (None, 30, torch.float32) and full.is_open
    assert SketchOptions(rank=5).for_problem(analysis).dtype == torch.float32
    assert SketchOptions(rank=size).for_problem(analysis).dtype == torch.float64
    assert not SketchOptions(tol=0.1).for_problem(analysis).is_open
    assert Asked(0.1, 3, 1e-6).digits == pytest.approx(3 * 14.5087, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, 'a larger damping, or method "dense"'),
        ({"rank": 5}, 'a larger rank, a larger damping, or method "dense"'),
        ({"tol": 0.1, "core": 20}, 'a smaller tol, a larger core, a larger damping, or method "dense"'),
    ],
)
def test_remedies_are_of_what_was_asked_for(given, told):
    assert SketchOptions(**given).remedies == told
