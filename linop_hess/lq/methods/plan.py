"""Which method solves a problem best, from a cost model."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from linop_hess._memory import available_bytes
from linop_hess.lq.methods import banded, dense, riccati, woodbury
from linop_hess.lq.methods import block_ldu as ldu
from linop_hess.lq.methods.cost import Cost
from linop_hess.lq.problem import Problem

METHODS = {"banded": banded, "riccati": riccati, "dense": dense, "woodbury": woodbury, "ldu": ldu}
"""The methods by name: modules with `factor(problem, damping)` and `estimate(problem)`."""

_CHOSEN_AMONG = ("banded", "riccati", "dense", "woodbury")

_costs: WeakKeyDictionary[Problem, dict[str, Cost]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Plan:
    """The cost of each method for one problem, and the choice.

    Attributes
    ----------
    damping : float
    costs : dict of str to Cost
    choice : str
        What ``method="auto"`` uses: the fastest that fits in memory (never "ldu", which is there to compare with).
    available : int
        Bytes available when the plan was made.
    """

    damping: float
    costs: dict[str, Cost]
    choice: str
    available: int

    def fits(self, method: str, times: int = 1) -> bool:
        """Whether `method` can run here and `times` its memory fits."""
        cost = self.costs[method]
        return not cost.why_not and times * cost.nbytes <= self.available

    def __str__(self) -> str:
        """Return the plan as a table."""
        lines = [f"{'method':<10}{'flops':>10}{'memory':>12}{'seconds':>10}  (damping {self.damping:g})"]
        for method, cost in self.costs.items():
            if cost.why_not:
                note = cost.why_not
            elif not self.fits(method):
                note = f"does not fit in {_bytes(self.available)}"
            else:
                note = "<- chosen" if method == self.choice else ""
            lines.append(
                f"{method:<10}{cost.flops:>10.2g}{_bytes(cost.nbytes):>12}{cost.seconds:>10.2g}  {note}".rstrip()
            )
        return "\n".join(lines)


def make_plan(problem: Problem, damping: float) -> Plan:
    """Estimate every method for `problem` and choose.

    Parameters
    ----------
    problem : Problem
    damping : float

    Returns
    -------
    Plan
    """
    available = available_bytes()
    if problem not in _costs:
        _costs[problem] = {name: module.estimate(problem) for name, module in METHODS.items()}
    costs = _costs[problem]
    able = [m for m in _CHOSEN_AMONG if not costs[m].why_not]
    fitting = [m for m in able if costs[m].nbytes <= available]
    choice = min(fitting or able, key=lambda m: costs[m].seconds if fitting else costs[m].nbytes)
    return Plan(damping, costs, choice, available)


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} TiB"
