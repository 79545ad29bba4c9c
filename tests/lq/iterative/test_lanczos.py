"""Block Lanczos directions and the quadrature of a spectrum, against LAPACK."""

import numpy as np
import pytest
import torch

from linop_hess.lq.iterative.lanczos import BlockLanczos, Probing, krylov_basis, spectrum
from tests.autograd.test_threads import at_once

N = 120


def matrix(values):
    Q = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    return (Q * torch.as_tensor(values, dtype=torch.float64)) @ Q.mT, Q


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 7, 40, N])
def test_orthonormal_and_where_H_is_large(dtype, rank):
    H, Q = matrix(np.r_[[-3.0, 2.5, 2.0, -1.5], np.full(N - 4, 1e-3)])
    H = H.to(dtype)
    found = krylov_basis(lambda X: H @ X, H[0], rank, None).directions
    assert found.shape == (N, rank)
    eps = torch.finfo(dtype).eps
    assert float((found.mT @ found - torch.eye(rank)).norm()) < 100 * N * eps
    if rank >= 7:
        top = Q[:, :4].to(dtype)
        assert float((top - found @ (found.mT @ top)).norm()) < 1e-2


def test_a_matrix_of_low_rank_has_no_more_to_show():
    H, _ = matrix(np.r_[np.ones(3), np.zeros(N - 3)])
    found = krylov_basis(lambda X: H @ X, H[0], 20, None).directions
    assert float((found.mT @ found - torch.eye(20)).norm()) < 1e-10


def test_tol_stops_where_H_is_small():
    H, _ = matrix(np.geomspace(1.0, 1e-8, N))
    loose, tight = (krylov_basis(lambda X: H @ X, H[0], N, tol) for tol in (1e-1, 1e-4))
    assert loose.directions.shape[1] < tight.directions.shape[1] < N
    assert tight.remaining <= 1e-4 and loose.remaining <= 1e-1


def test_counts_of_eigenvalues():
    values = np.r_[np.linspace(1.0, 3.0, 30), -np.ones(10), np.full(N - 40, 1e-3)]
    H, _ = matrix(values)
    found = spectrum(lambda X: H @ X, H[0], 25)
    assert float(found.weights.sum()) == pytest.approx(1.0)
    assert found.count_beyond(0.5) == pytest.approx(40, rel=0.4)
    assert float(found.nodes.max()) == pytest.approx(3.0, rel=1e-2)
    assert found.count_beyond(10.0) == 0.0


@pytest.mark.parametrize("radius", [0.02, 0.3, 1.5])
def test_counts_from_below(radius):
    """The measure of the vector that the run begins with, by eigenvectors, is never exceeded, and come close to."""
    values = np.r_[np.linspace(1.0, 3.0, 30), -np.ones(10), np.geomspace(1e-3, 0.5, N - 40)]
    H, Q = matrix(values)
    probing = Probing(lambda X: H @ X, H[0])
    q = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    of_q = ((Q.mT @ q) / q.norm()).square()
    true = N * float(of_q[torch.as_tensor(np.abs(values) > radius)].sum())
    told = [probing.after(steps).least_beyond(radius) for steps in (1, 3, 6, 12, 30)]
    assert max(told) <= true * (1 + 1e-10) and told[-1] > 0.6 * true
    assert told[0] == 0.0 and probing.after(2).nodes.numel() == 30  # none is taken back


def test_a_run_goes_on_where_it_ended():
    H, _ = matrix(np.geomspace(1.0, 1e-2, N))
    calls = []
    probing = Probing(lambda X: (calls.append(0), H @ X)[1], H[0])
    for steps in (4, 9, 9, 5):
        found = probing.after(steps)
    whole = spectrum(lambda X: H @ X, H[0], 9)
    assert len(calls) == 9 and torch.equal(found.nodes, whole.nodes) and torch.equal(found.weights, whole.weights)


def test_threads_take_turns():
    """A step of one in the middle of another's would take its vector twice."""
    H, _ = matrix(np.geomspace(1.0, 1e-2, N))
    probing = Probing(lambda X: H @ X, H[0])
    found = at_once([lambda steps=steps: probing.after(steps) for steps in (20, 20, 12, 20)])
    expected = spectrum(lambda X: H @ X, H[0], 20)
    assert all(told.nodes.numel() >= 12 for told in found)
    assert torch.equal(probing.after(20).nodes, expected.nodes) and torch.equal(found[0].weights, expected.weights)


def test_bytes_are_those_of_the_whole_buffer():
    H, _ = matrix(np.geomspace(1.0, 1e-2, N))
    run = BlockLanczos(lambda X: H @ X, H[0], 8)
    few = run.until(16)
    run.until(72)
    found = run.until(16)
    assert few.nbytes == 16 * N * 8 and torch.equal(few.directions, found.directions)
    assert found.nbytes == found.directions.untyped_storage().nbytes() >= 72 * N * 8


@pytest.mark.parametrize("damping", [0.3, -0.2, 2.0])
def test_residuals_are_those_of_gmres_on_the_vector_that_it_began_with(damping):
    H, _ = matrix(np.r_[np.linspace(1.0, 3.0, 30), -np.ones(10), np.geomspace(1e-3, 0.5, N - 40)])
    found = spectrum(lambda X: H @ X, H[0], 12).residuals(damping)
    v = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A, K = H + damping * torch.eye(N), (v / v.norm())[:, None]
    for k in range(1, 12):
        AK = A @ K
        y = torch.linalg.lstsq(AK, K[:, :1]).solution
        assert found[k] == pytest.approx(float((K[:, :1] - AK @ y).norm()), rel=1e-6)
        K = torch.linalg.qr(torch.cat([K, AK[:, -1:]], 1)).Q * torch.tensor([1.0] * (k + 1))
        K[:, :1] = (v / v.norm())[:, None]
    assert found[0] == 1.0 and len(found) == 12
