"""S = T diag(θ) Tᵀ."""

import numpy as np
import pytest
import torch

from linop_hess.lq.pivots.bunch_kaufman import SymmetricFactor, packed_factor, packed_pivots

DTYPES = [torch.float64, torch.float32]


def symmetric(n, seed, dtype=torch.float64, batch=(), small_diagonal=True):
    """Symmetric matrices with many 2×2 pivots."""
    S = torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    S = (S + S.mT) / 2
    if small_diagonal:
        S.diagonal(dim1=-2, dim2=-1).mul_(0.1)
    return S.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 40, 130])
def test_congruence(n, dtype):
    S = symmetric(n, n, dtype)
    factor = SymmetricFactor.of(S)
    eye, eps = torch.eye(n, dtype=dtype), torch.finfo(dtype).eps
    half = factor.whiten(eye)
    assert n < 3 or factor.pairs.numel()
    scale = max(1.0, float(half.abs().max() if n else 0)) ** 2 * max(n, 1) ** 2
    torch.testing.assert_close(half @ S @ half.mT, torch.diag(factor.theta), rtol=0, atol=20 * eps * scale)
    torch.testing.assert_close(factor.unwhiten(eye), half.mT, rtol=0, atol=20 * eps * scale)
    values = np.linalg.eigvalsh(S.double().numpy())
    assert int((factor.theta < 0).sum()) == (values < 0).sum()
    assert float(factor.theta.double().abs().log().sum()) == pytest.approx(
        np.log(np.abs(values)).sum(), abs=1e4 * n * eps
    )
    X = torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    kept = X.clone()
    condition = np.linalg.cond(S.double().numpy()) if n else 1.0
    expected = np.linalg.solve(S.double().numpy(), X.double().numpy())
    atol = 20 * max(n, 1) * eps * condition * np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(factor.solve(X).double().numpy(), expected, rtol=0, atol=atol)
    assert torch.equal(X, kept)
    assert (factor.nbytes > 0) == (n > 0)


def test_only_the_lower_triangle_is_read_and_nothing_written():
    S = symmetric(6, 3)
    upper = torch.triu(torch.full_like(S, 7.0), 1)
    given = S.tril() + upper
    factor = SymmetricFactor.of(given)
    torch.testing.assert_close(factor.solve(S), torch.eye(6).double(), rtol=0, atol=1e-13)
    assert torch.equal(given, S.tril() + upper)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_of_its_own_is_factored_in_its_own_memory(dtype, threads):
    S = symmetric(80, 5, dtype)
    expected, given = SymmetricFactor.of(S), S.clone()
    factor = SymmetricFactor.of(given, is_own=True)
    assert factor.L.data_ptr() == given.data_ptr()
    X = torch.randn(80, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    assert torch.equal(factor.solve(X), expected.solve(X))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, *DTYPES], ids=str)
def test_packed_as_torch_packs_it(dtype, threads):
    S = symmetric(150, 6).to(dtype)
    if S.is_complex():
        S = S + 1j * symmetric(150, 7).to(dtype)
    (packed, interchanges), (theirs, their_interchanges, _) = packed_factor(S), torch.linalg.ldl_factor_ex(S)
    assert interchanges.dtype == their_interchanges.dtype
    X = torch.eye(150, dtype=dtype)
    atol = 1e3 * torch.finfo(dtype).eps * float(torch.linalg.cond(S))
    solved = torch.linalg.ldl_solve(packed, interchanges, X)
    torch.testing.assert_close(solved, torch.linalg.ldl_solve(theirs, their_interchanges, X), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_packed_pivots_are_those_of_the_factor_in_its_order(seed, dtype):
    """Where 2×2 pivots were ordered otherwise, |θ| went to the wrong rows of T⁻¹."""
    n = 2 + seed % 9
    S = symmetric(n, seed, dtype, batch=(4,))
    packed, interchanges, _ = torch.linalg.ldl_factor_ex(S)
    assert n < 4 or bool((interchanges < 0).any())
    found = packed_pivots(packed, interchanges)
    for k in range(4):
        expected = SymmetricFactor.from_packed(packed[k].clone(), interchanges[k]).theta
        torch.testing.assert_close(found[k], expected, rtol=100 * torch.finfo(dtype).eps, atol=0)


def test_a_pair_of_very_different_sizes():
    """The smaller eigenvalue of a 2×2 pivot to relative precision."""
    S = torch.tensor([[1e-9, 1.0], [1.0, 1e9]], dtype=torch.float64)[None]
    S[0, 0, 0] = 0.5e-9
    packed, interchanges = S.tril(), torch.full((1, 2), -2, dtype=torch.int32)
    found = packed_pivots(packed, interchanges)[0].tolist()
    assert found == pytest.approx([-0.5e-9, 1e9], rel=1e-14)


def test_without_pairs():
    S = torch.eye(3).double()[None] * torch.tensor([3.0, 2.0, 1.0]).double()
    packed, interchanges, _ = torch.linalg.ldl_factor_ex(S)
    assert sorted(packed_pivots(packed, interchanges)[0].tolist()) == [1.0, 2.0, 3.0]
    assert packed_pivots(packed[:, :0, :0], interchanges[:, :0]).shape == (1, 0)


def test_smallest_pivot_ratio():
    assert SymmetricFactor.of(torch.diag(torch.tensor([4.0, -1.0]))).smallest_pivot_ratio == 0.25
    assert SymmetricFactor.of(torch.zeros(2, 2)).smallest_pivot_ratio == 0.0
    assert SymmetricFactor.of(torch.zeros(0, 0)).smallest_pivot_ratio == 1.0
    assert SymmetricFactor.of(torch.full((1, 1), torch.inf)).smallest_pivot_ratio == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_a_matrix_that_is_not_its_own_is_left_as_it_is(dtype):
    A = torch.randn(9, 9, dtype=dtype, generator=torch.Generator().manual_seed(3))
    for S in (A + A.mT, (A + A.mT).mT, torch.cat([A + A.mT] * 2, 1)[:, :9]):
        before = S.clone()
        SymmetricFactor.of(S)
        assert torch.equal(S, before)
