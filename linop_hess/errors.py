"""The exceptions of `linop_hess`: each says what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
        A damping that was tried and works. It is looked for when it is asked for, here or by the message.
    """

    def __init__(
        self,
        message: str,
        *,
        damping: complex = float("nan"),
        stage: str | None = None,
        suggested_damping: complex | Callable[[], complex | None] | None = None,
    ) -> None:
        super().__init__(message)
        self.damping = damping
        self.stage = stage
        # A search takes as long as several factorizations: it is made when somebody asks, or reads the message.
        self._is_searched = callable(suggested_damping)
        self._suggested = suggested_damping

    @property
    def suggested_damping(self) -> complex | None:
        if callable(self._suggested):
            self._suggested = self._suggested()
        return self._suggested

    def __str__(self) -> str:
        if not self._is_searched:
            return super().__str__()
        found = self.suggested_damping
        none = "no damping up to the norm of H works: look at the model for saturated or dead layers"
        return f"{super().__str__()}; {none if found is None else f'damping={found:.1e} works'}."

    def __reduce__(self) -> tuple[Any, ...]:
        of_instance = {**vars(self), "_suggested": self.suggested_damping, "_is_searched": False}
        return type(self), (str(self),), of_instance


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
