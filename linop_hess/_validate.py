"""Checks of arguments, the same wherever they are taken."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def finite_real(value: Any, name: str) -> float:
    """Return a finite real number as a float.

    Raises
    ------
    TypeError
        If it is not a real number; the message names the argument.
    ValueError
        If it is NaN or infinite.
    """
    try:
        if isinstance(value, complex | str | bytes) or not np.isscalar(value):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number
