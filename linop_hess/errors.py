"""The exceptions of `linop_hess`: each says what was expected, what came, and what to do."""

from __future__ import annotations

import numpy as np


class UnsupportedModelError(ValueError):
    """The model or loss cannot be treated as a chain of twice differentiable layers.

    The message names the module or operation and what to do about it.
    """


class NotFiniteError(ValueError):
    """A loss or a derivative is NaN or infinite; optimizers refuse such a step."""


class FactorizationError(np.linalg.LinAlgError):
    """H + damping·I is singular to working precision, or no method solved with it to tolerance.

    Attributes
    ----------
    damping : complex
        The damping that failed.
    stage : str or None
        The stage (layer) at which the factorization failed, when one can be named.
    suggested_damping : complex or None
        A damping that was tried and works.
    """

    def __init__(
        self,
        message: str,
        *,
        damping: complex = float("nan"),
        stage: str | None = None,
        suggested_damping: complex | None = None,
    ) -> None:
        super().__init__(message)
        self.damping = damping
        self.stage = stage
        self.suggested_damping = suggested_damping


class NotPositiveDefiniteError(np.linalg.LinAlgError):
    """A positive definite matrix was needed and H + damping·I is not one."""


class SingularPivotError(np.linalg.LinAlgError):
    """A factorization met a singular pivot; solves turn it into an escalation, or a `FactorizationError`.

    Attributes
    ----------
    stage : int or None
        Its stage in the chain (0-based), where one can be named.
    """

    def __init__(self, stage: int | None = None) -> None:
        super().__init__("singular pivot")
        self.stage = stage


class ProcessError(RuntimeError):
    """A process of a group has ended, does not answer, does something else than the others, or failed in a way of its own."""
