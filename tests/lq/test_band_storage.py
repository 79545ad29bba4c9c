"""Band storage, against dense matrices."""

import numpy as np
import pytest
import torch

from linop_hess.lq.band_storage import BandLU, BandMatrix


def dense(band, n, kl, shift):
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            row = shift + i - j
            if 0 <= row < band.storage.shape[1] and abs(i - j) <= kl:
                out[i, j] = band.storage[j, row]
    return out


@pytest.mark.parametrize("rows", [[0, 3, 6], [0, 2, 7], [4], []], ids=["even", "uneven", "one", "none"])
@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_blocks_land_where_they_belong(rows, offset, dtype):
    n, kl, shape = 12, 4, (2, 3)
    band = BandMatrix(n, 3 * kl + 1, 2 * kl, np.dtype(dtype))
    blocks = np.random.default_rng(0).standard_normal((len(rows), *shape)).astype(dtype)
    starts = np.array(rows, dtype=np.int64)
    band.put(starts + offset, starts, blocks)
    expected = np.zeros((n, n))
    for row, block in zip(rows, blocks, strict=True):
        expected[row + offset : row + offset + 2, row : row + 3] = block
    np.testing.assert_array_equal(dense(band, n, kl, 2 * kl), expected)
    assert band.storage.dtype == dtype and band.storage.T.flags.f_contiguous


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 0, 3), (2, 3, 0)])
def test_empty_blocks(shape):
    band = BandMatrix(6, 4, 1, np.dtype(float))
    band.put(np.zeros(shape[0], dtype=np.int64), np.zeros(shape[0], dtype=np.int64), np.ones(shape))
    assert not band.storage.any()


def test_blocks_are_written_not_added():
    band = BandMatrix(2, 3, 1, np.dtype(float))
    for value in (1.0, 2.0):
        band.put(np.array([0, 1]), np.array([0, 1]), np.full((2, 1, 1), value))
    np.testing.assert_array_equal(dense(band, 2, 1, 1), 2 * np.eye(2))


@pytest.mark.parametrize("rows", [[0, 2, 4], [0, 1, 4], [3], []], ids=["even", "uneven", "one", "none"])
def test_blocks_are_added(rows):
    band = BandMatrix(8, 7, 4, np.dtype(float))
    starts, blocks = np.array(rows, dtype=np.int64), np.random.default_rng(0).standard_normal((len(rows), 1, 2))
    for _ in range(2):
        band.add(starts + 1, starts, blocks)
    expected = np.zeros((8, 8))
    for row, block in zip(rows, blocks, strict=True):
        expected[row + 1 : row + 2, row : row + 2] += 2 * block
    np.testing.assert_array_equal(dense(band, 8, 2, 4), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
def test_lu(dtype):
    n, kl = 9, 2
    band = BandMatrix(n, 3 * kl + 1, 2 * kl, np.dtype(dtype))
    blocks, starts = np.random.default_rng(0).standard_normal((3, 3, 3)).astype(dtype), np.array([0, 3, 6])
    band.put(starts, starts, blocks)
    lu, b = BandLU(band, kl), np.random.default_rng(1).standard_normal((n, 2)).astype(dtype)
    expected = np.concatenate(
        [np.linalg.solve(block, b[at : at + 3]) for at, block in zip(starts, blocks, strict=True)]
    )
    np.testing.assert_allclose(lu.solve(torch.from_numpy(b)).numpy(), expected, rtol=1e3 * np.finfo(dtype).eps)
    of_blocks = np.linalg.slogdet(blocks.astype(complex))[1].sum()
    assert np.log(np.abs(lu.pivots)).sum() == pytest.approx(of_blocks, rel=1e-5) and lu.singular_at is None
    assert lu.nbytes == band.storage.nbytes + 4 * n


def test_lu_of_a_singular_matrix_and_of_none():
    band = BandMatrix(4, 4, 2, np.dtype(float))
    band.put(np.array([0, 1, 3]), np.array([0, 1, 3]), np.ones((3, 1, 1)))
    assert BandLU(band, 1).singular_at == 2
    empty = BandLU(BandMatrix(0, 1, 0, np.dtype(float)), 0)
    assert empty.singular_at is None and empty.solve(torch.zeros(0, 2)).shape == (0, 2) and empty.pivots.size == 0
