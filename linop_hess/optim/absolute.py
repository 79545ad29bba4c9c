"""(|H| + λI)⁻¹ and (H² + δ²I)^(−½) times a vector, from solves with H + iσI.

The saddle-free step flips the signs of negative eigenvalues. Two ways to it: a small subspace that holds nearly all that |H| does to one
vector, in which an eigendecomposition is free; and quadrature, exact to any accuracy, at a factorization a pole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ellipj, ellipk, ellipkm1
from torch import Tensor

from linop_hess._validate import finite_real, whole
from linop_hess.curvature import ChainCurvature
from linop_hess.linearization import Linearization
from linop_hess.lq.inverse.solver import Solver

Product = Callable[[Tensor], Tensor]
"""H times the columns of (N, k)."""

# A new direction counts where more than this is left of it after orthogonalization, relatively: below it is rounding.
_NEW = 1e-12

# ‖H‖ is known from below, to within some per cent.
_ABOVE = 1.2


@dataclass(frozen=True)
class Subspace:
    """An orthonormal basis whose first column is g/‖g‖, and H on it.

    Attributes
    ----------
    basis : Tensor, shape (N, m)
    image : Tensor, shape (N, m)
        H times the basis.
    values : Tensor, shape (m,)
        Eigenvalues of basisᵀ H basis.
    vectors : Tensor, shape (m, m)
    size : float
        ‖g‖.
    """

    basis: Tensor
    image: Tensor
    values: Tensor
    vectors: Tensor
    size: float

    @classmethod
    def of(cls, basis: Tensor, image: Tensor, size: float) -> Subspace:
        """Diagonalize H on a basis."""
        T = basis.mT @ image
        values, vectors = torch.linalg.eigh((T + T.mT) / 2)
        return cls(basis, image, values, vectors, size)

    def step(self, damping: float) -> tuple[Tensor, float]:
        """Return s = −(|H| + λI)⁻¹g within the subspace, (N,), and the change gᵀs + ½ sᵀHs that the quadratic model promises."""
        e = self.vectors[0] * self.size
        c = -e / (self.values.abs() + damping)
        return self.basis @ (self.vectors @ c), float(e @ c + 0.5 * (c * c) @ self.values)


def rational_subspace(
    solves: Sequence[Callable[[Tensor], Tensor]], product: Product, g: Tensor, steps: int
) -> Subspace:
    """Span of g and of the real and imaginary parts of (H + iσI)⁻ʲ g, j = 1..steps, for each σ.

    Parameters
    ----------
    solves : sequence of callable
        (H + iσI)⁻¹ times (N, 1), complex, for each σ.
    product : callable
    g : Tensor, shape (N,)
        Not zero; float64.
    steps : int
        Solves with each.
    """
    size = float(g.norm())
    basis = [g / size]
    for solve in solves:
        z = torch.complex(g / size, torch.zeros_like(g))[:, None]
        for _ in range(steps):
            z = solve(z)
            z = z / z.norm()
            for part in (z.imag[:, 0], z.real[:, 0]):
                _extend(basis, part)
    M = torch.stack(basis, 1)
    return Subspace.of(M, product(M), size)


def krylov_subspace(product: Product, g: Tensor, steps: int) -> Subspace:
    """Span of Hʲ g, j = 0..steps, by Lanczos with full orthogonalization; one product a step."""
    size = float(g.norm())
    basis, images = [g / size], [product(g[:, None] / size)[:, 0]]
    while len(basis) < min(steps, g.numel()) and _extend(basis, images[-1]):
        images.append(product(basis[-1][:, None])[:, 0])
    return Subspace.of(torch.stack(basis, 1), torch.stack(images, 1), size)


def _extend(basis: list[Tensor], v: Tensor) -> bool:
    """Append what is new of v to an orthonormal basis, and tell whether there is anything."""
    before = float(v.norm())
    M = torch.stack(basis, 1)
    v = v - M @ (M.mT @ v)
    v = v - M @ (M.mT @ v)  # twice is enough (Kahan)
    left = float(v.norm())
    if not left > _NEW * before:
        return False
    basis.append(v / left)
    return True


def quadrature(ratio: float, poles: int) -> tuple[np.ndarray, np.ndarray]:
    """σ_j and w_j with (λ² + 1)^(−½) ≈ Σ_j w_j/(λ² + σ_j²) for |λ| ≤ ratio.

    Parameters
    ----------
    ratio : float
        ‖H‖/δ.
    poles : int

    Returns
    -------
    tuple of ndarray, each of shape (poles,)

    Raises
    ------
    ValueError, TypeError
        If the ratio is not positive, or there is no pole.

    References
    ----------
    N. Hale, N. J. Higham, L. N. Trefethen, "Computing A^α, log(A), and related matrix functions by contour integrals", SIAM Journal on
    Numerical Analysis 46 (2008), method 3.
    """
    ratio, n = finite_real(ratio, "ratio"), whole(poles, "poles", least=1)
    if not ratio > 0.0:
        raise ValueError(f"expected a ratio that is positive, got {ratio!r}: pass ‖H‖/δ")
    k2 = 1.0 / (1.0 + ratio**2)
    k = k2**0.5
    quarter = float(ellipk(1.0 - k2) if k2 > 0.5 else ellipkm1(k2))
    t = (np.arange(1, n + 1) - 0.5) * quarter / n
    sn, cn, dn, _ = ellipj(np.minimum(t, quarter - t), 1.0 - k2)
    # Beyond the middle by symmetry, sc(K' − u) = 1/(k sc(u)), which keeps the digits that sn and cn lose there.
    far = t > quarter / 2
    squares = np.where(far, (cn / (k * sn)) ** 2, (sn / cn) ** 2)
    slopes = np.where(far, dn / (k * sn**2), dn / cn**2)
    return np.sqrt(squares + 1.0), 2.0 * quarter / (np.pi * n) * slopes


def inverse_absolute(
    curvature: Linearization | ChainCurvature,
    delta: float,
    g: Tensor,
    *,
    poles: int = 24,
    tolerance: float | None = None,
) -> Tensor:
    """(H² + δ²I)^(−½) g by quadrature: |H|⁻¹g, smoothed at eigenvalues below δ.

    (H² + σ²I)⁻¹g is the imaginary part of (H − iσI)⁻¹g over σ, so each pole takes one complex factorization, and its solve is certified.

    Parameters
    ----------
    curvature : Linearization or ChainCurvature
    delta : float
        δ > 0.
    g : Tensor, shape (N,) or (N, k)
        Real.
    poles : int
        24 give 1e-8 up to ‖H‖/δ = 1e4; each further decade takes about five more.
    tolerance : float, optional
        Backward error of the solves, 1e-14 by default.

    Returns
    -------
    Tensor
        In float64, of the shape of g.

    Raises
    ------
    ValueError, TypeError
        If δ is not positive, or g no real array of that shape.
    FactorizationError
        If a solve does not reach its tolerance.
    """
    return AbsoluteInverse(curvature, delta, poles=poles, tolerance=tolerance)(g)


class AbsoluteInverse:
    """The same for several vectors: factors of all poles are made once and kept. See `inverse_absolute`.

    Raises
    ------
    ValueError, TypeError
        If δ is not positive, or there is no pole.
    FactorizationError
        If H + iσI is singular to working precision.
    """

    def __init__(
        self,
        curvature: Linearization | ChainCurvature,
        delta: float,
        *,
        poles: int = 24,
        tolerance: float | None = None,
    ) -> None:
        delta = finite_real(delta, "delta")
        if not delta > 0.0:
            raise ValueError(f"expected delta to be positive, got {delta!r}: |H| itself may be singular")
        analysis = curvature.analysis
        with torch.no_grad():
            sigma, weights = quadrature(max(_ABOVE * analysis.norm / delta, 1.0), poles)
            self._terms = [
                (Solver(analysis, complex(0.0, -delta * s), tolerance=tolerance), float(w / s))
                for s, w in zip(sigma, weights, strict=True)
            ]

    def __call__(self, g: Tensor) -> Tensor:
        """(H² + δ²I)^(−½) g for g of shape (N,) or (N, k)."""
        with torch.no_grad():
            return torch.stack([solver.solve(g).x.imag * weight for solver, weight in self._terms]).sum(0)
