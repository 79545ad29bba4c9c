"""H as a dense matrix: what is kept of it, what is made of that, and that it is compared with a product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from linop_hess.errors import SingularPivotError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.matrix import hessian
from linop_hess.lq.matrix.hessian import assembled, fresh, kept
from linop_hess.lq.methods.dense import DenseFactorization
from tests.lq.problems import random_blocks


@pytest.fixture
def blocks():
    return random_blocks([2, 3, 4, 2], [3, 6, 2], seed=1)


def test_a_small_matrix_is_formed_once_and_stays_as_it_is(blocks) -> None:
    analysis = Analysis(blocks.problem())
    H = assembled(analysis)
    before = H.clone()
    DenseFactorization(analysis, 0.5)
    assert assembled(analysis) is H and torch.equal(H, before)


def test_a_large_matrix_is_not_kept(blocks, monkeypatch) -> None:
    monkeypatch.setattr(hessian, "_KEPT_UP_TO", 0)
    analysis = Analysis(blocks.problem())
    assert assembled(analysis) is not assembled(analysis)


def test_what_may_be_overwritten_is_made_of_what_is_kept(blocks, monkeypatch) -> None:
    analysis, H = Analysis(blocks.problem()), blocks.hessian()
    one = analysis.once(kept)
    monkeypatch.setattr(hessian, "assemble", None)  # nothing is formed again
    for dtype in (torch.float64, torch.float32):
        found = fresh(analysis, dtype)
        assert found.dtype == dtype and found.data_ptr() != one.data_ptr()
        assert np.abs(found.numpy() - H).max() <= 4 * torch.finfo(dtype).eps * np.abs(H).max()


def test_a_matrix_that_is_not_that_of_products_is_a_defect_that_is_told(blocks, monkeypatch) -> None:
    assemble = hessian.assemble

    def wrong(problem, dtype=None):
        H = assemble(problem, dtype)
        H[0, 1] += 1e-6
        return H

    monkeypatch.setattr(hessian, "assemble", wrong)
    with pytest.raises(ArithmeticError, match="defect of its assembly"):
        assembled(Analysis(blocks.problem()))


def test_a_matrix_beyond_the_range_of_its_numbers_is_left_to_others(blocks, monkeypatch) -> None:
    assemble = hessian.assemble
    monkeypatch.setattr(hessian, "assemble", lambda problem, dtype=None: assemble(problem, dtype) * float("inf"))
    with pytest.raises(SingularPivotError):
        assembled(Analysis(blocks.problem()))
