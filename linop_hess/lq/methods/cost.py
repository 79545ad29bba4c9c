"""What a factorization costs, before it is begun."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Estimate for one factorization.

    Attributes
    ----------
    flops : float
        Floating-point operations.
    nbytes : float
        Peak bytes: factors and work space.
    seconds : float
        Modelled time on two cores; used to compare methods, not to promise.
    why_not : str
        Why the method cannot be used here; empty if it can.
    """

    flops: float
    nbytes: float
    seconds: float
    why_not: str = ""
