"""The systems of the Krylov tests."""

import numpy as np

N = 40


def symmetric(eigenvalues, seed=0):
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


SPD = symmetric(np.linspace(1, 10, N))
INDEFINITE = symmetric(np.linspace(-3, 4, N))
B = np.random.default_rng(1).standard_normal(N)


def true_residual(A, x, b=B):
    return np.linalg.norm(b - A @ x) / np.linalg.norm(b)
