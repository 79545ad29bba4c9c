"""Band storage, against dense matrices."""

import numpy as np
import pytest

from linop_hess.lq.band_storage import BandMatrix


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
