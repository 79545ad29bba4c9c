"""A space that solves with one matrix leave to the next: what gcrotmk recycles, and blocks of right-hand sides that share it.

Source: E. de Sturler, Truncation strategies for optimal Krylov subspace methods (1999); J. Hicken and D. Zingg, A simplified and flexible
variant of GCROT (2010), as in `scipy.sparse.linalg.gcrotmk`.
"""

from __future__ import annotations

from typing import Any

from linop_hess._validate import whole
from linop_hess.krylov.checks import check_operator


class RecycledSpace:
    """Directions u with their products A u, orthonormal, from earlier solves; `linop_hess.krylov.run` fills and uses it.

    Parameters
    ----------
    size : int
        The most directions that are kept (SciPy's ``k``).

    Examples
    --------
    >>> import numpy as np
    >>> from linop_hess import krylov
    >>> A, space = np.diag(np.arange(1.0, 61.0)), krylov.RecycledSpace(20)
    >>> first, second = (krylov.run("gcrotmk", A, b, recycled=space) for b in (np.ones(60), np.ones(60)))
    >>> second.products_A < first.products_A
    True
    """

    def __init__(self, size: int = 20) -> None:
        self.size = whole(size, "size", least=1)
        self._pairs: list[tuple[Any, Any]] = []

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors."""
        return sum(vector.nbytes for pair in self._pairs for vector in pair if vector is not None)

    def options(self, solver: str, n: int) -> dict[str, Any]:
        """Return what SciPy's gcrotmk takes for it.

        Raises
        ------
        ValueError
            If the solver is another, or the space is one of vectors of another length.
        """
        if solver != "gcrotmk":
            raise ValueError(
                f'expected no recycled space for {solver}, an option of gcrotmk: take "gcrotmk", or leave it out'
            )
        if self._pairs and self._pairs[0][1].shape != (n,):
            raise ValueError(
                f"expected a recycled space of vectors of length {n}, got {self._pairs[0][1].shape[0]}: make a new RecycledSpace"
            )
        return {"CU": self._pairs, "k": self.size, "discard_C": False}

    def for_other(self, A: Any) -> RecycledSpace:
        """Return the directions for another matrix, such as one of another damping: a product with it each.

        Parameters
        ----------
        A : LinearOperator, ndarray or sparse array, shape (N, N)

        Raises
        ------
        ValueError, TypeError
            If A is not usable.
        """
        A = check_operator("A", A)
        other = RecycledSpace(self.size)
        # Without its product a direction is multiplied, and orthogonalized, by gcrotmk itself.
        other._pairs = [(None, u.copy()) for _, u in self._pairs]
        if other._pairs and A.shape[0] != len(other._pairs[0][1]):
            raise ValueError(
                f"expected A of shape {(len(other._pairs[0][1]),) * 2} as of the space, got {A.shape}: make a new RecycledSpace"
            )
        return other

    def __repr__(self) -> str:
        """Return it in words."""
        return f"<RecycledSpace of {len(self)} of at most {self.size} directions>"
