"""Bases of row spaces."""

import pytest
import torch

from linop_hess.lq.stages.row_space import orthogonal_complement, row_basis, spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_basis_of_rows_of_many_sizes(dtype):
    """Small rows lie in the basis to as many digits as large ones."""
    rows = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    rows[0] *= torch.tensor([1.0, 1e-8, 1e8], dtype=dtype)[:, None]
    basis = row_basis(rows)
    assert basis.shape == (2, 6, 3)
    left = rows - rows @ basis @ basis.mT
    assert float((left.norm(dim=2) / rows.norm(dim=2)).max()) <= 10 * torch.finfo(dtype).eps


def test_rank_is_the_largest_of_the_stack_and_at_least_one():
    rows = torch.zeros(2, 3, 5, dtype=torch.float64)
    assert row_basis(rows).shape == (2, 5, 1)
    rows[1, :2] = torch.eye(2, 5, dtype=torch.float64)
    rows[1, 2] = rows[1, 0] + rows[1, 1] * 3
    basis = row_basis(rows)
    assert basis.shape == (2, 5, 2)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(2, dtype=torch.float64).expand(2, 2, 2), rtol=0, atol=1e-15)


def test_orthogonal_complement():
    basis = row_basis(torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    whole = torch.cat([basis, orthogonal_complement(basis)], 2)
    torch.testing.assert_close(whole.mT @ whole, torch.eye(5, dtype=torch.float64).expand(2, 5, 5), rtol=0, atol=1e-15)


def test_spread():
    Y = torch.arange(12.0).view(6, 2)
    assert torch.equal(spread(Y, 3), torch.block_diag(Y[:2], Y[2:4], Y[4:]))
