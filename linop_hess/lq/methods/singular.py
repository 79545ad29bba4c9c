"""What a factorization raises when it meets a singular pivot; the solver turns it into an escalation or an error."""

from __future__ import annotations

import numpy as np


class SingularPivotError(np.linalg.LinAlgError):
    """A pivot is singular. `stage` is its stage in the chain (0-based), or None."""

    def __init__(self, stage: int | None = None) -> None:
        super().__init__("singular pivot")
        self.stage = stage
