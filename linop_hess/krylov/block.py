"""A block of right-hand sides of one matrix, solved one after another, each beginning with what those before it left."""

from __future__ import annotations

from typing import Any

import numpy as np

from linop_hess.krylov.checks import SolverName, check_operator
from linop_hess.krylov.record import Record
from linop_hess.krylov.recycled import RecycledSpace
from linop_hess.krylov.run import run


def run_block(
    solver: SolverName,
    A: Any,
    B: Any,
    M: Any = None,
    *,
    recycled: RecycledSpace | None = None,
    name: str | None = None,
    **options: Any,
) -> list[Record]:
    """Solve ``A X = B`` column by column and record how each went.

    Parameters
    ----------
    solver : str
        As of `run`; "gcrotmk" makes use of earlier columns.
    A : LinearOperator, ndarray or sparse array, shape (N, N)
    B : ndarray, shape (N, k)
        One right-hand side a column.
    M : LinearOperator, ndarray or sparse array, shape (N, N), optional
    recycled : RecycledSpace, optional
        For gcrotmk, where its space begins and ends; by default a new one.
    name : str, optional
        Label of the records, with the number of the column behind it.
    **options
        All else that `run` takes, but x0.

    Returns
    -------
    list of Record
        One for each column; ``numpy.column_stack([record.x for record in records])`` is X.

    Raises
    ------
    ValueError
        If B is no array of shape (N, k), or as of `run`.
    TypeError
        As of `run`.

    Examples
    --------
    >>> import numpy as np
    >>> from linop_hess import krylov
    >>> A, B = np.diag(np.arange(1.0, 41.0)), np.random.default_rng(0).standard_normal((40, 3))
    >>> [record.converged for record in krylov.run_block("gcrotmk", A, B)]
    [True, True, True]
    """
    n = check_operator("A", A).shape[0]
    block = np.asarray(B)
    if block.ndim != 2 or block.shape[0] != n:
        raise ValueError(
            f"expected a block of right-hand sides of shape ({n}, k), got {block.shape}: pass one vector a column"
        )
    if solver == "gcrotmk" and recycled is None:
        recycled = RecycledSpace()
    label = solver if name is None else name
    return [
        run(solver, A, np.ascontiguousarray(column), M, recycled=recycled, name=f"{label}, column {j}", **options)
        for j, column in enumerate(block.T)
    ]
