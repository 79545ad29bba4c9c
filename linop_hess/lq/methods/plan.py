"""Which method solves a problem best, from a cost model; and which to try next when one fails."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from linop_hess._display import Shown
from linop_hess._memory import available_bytes, format_bytes
from linop_hess.lq.accuracy import SINGLE_DAMPING, SINGLE_NORMS
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.methods import banded, block_ldu, dense, mixed, riccati, woodbury
from linop_hess.lq.methods.base import Cost, Factor, Method
from linop_hess.lq.methods.promoted import promoted

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        banded.METHOD,
        riccati.METHOD,
        replace(dense.METHOD, single=mixed.METHOD),
        woodbury.METHOD,
        block_ldu.METHOD,
    )
}
"""The methods by name."""


# From so many controls on "auto" takes factors in single precision: below, those in double take a few milliseconds, and answer all.
SINGLE_FROM = 1000

_ONLY_DOUBLE = Cost.impossible('it factors a float64 problem in float64: use method "dense", or another precision')


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """The cost of each method for one problem, and the choice.

    Attributes
    ----------
    damping : float
    costs : dict of str to Cost
    choice : str
        What ``method="auto"`` uses: the fastest that fits in memory (never "ldu", which is there to compare with).
    available : int
        Bytes available when the plan was made.
    own_costs : dict of str to Cost
        The same where all methods factor in the precision of the problem, as questions need it.
    """

    damping: float
    costs: dict[str, Cost]
    choice: str
    available: int
    own_costs: dict[str, Cost]

    @property
    def in_own_precision(self) -> Plan:
        """The plan with costs of factors in the precision of the problem."""
        return replace(self, costs=self.own_costs)

    def fits(self, method: str, times: int = 1) -> bool:
        """Whether `method` can run here and `times` its memory fits."""
        cost = self.costs[method]
        return not cost.why_not and times * cost.nbytes <= self.available

    def by_time(self) -> list[str]:
        """Methods that fit, the fastest first."""
        return sorted((name for name in self.costs if self.fits(name)), key=lambda name: self.costs[name].seconds)

    def __str__(self) -> str:
        """Return the plan as a table, and below it a line for each method that cannot be used here, with the reason."""
        lines = ["{:<10}{:>10}{:>12}{:>10}  {}".format(*row).rstrip() for row in self._cells()]
        return "\n".join([*lines, *self._notes()])

    def _cells(self) -> list[list[str]]:
        """The methods that can be used, a row each."""
        rows = [["method", "flops", "memory", "seconds", f"(damping {self.damping:g})"]]
        for method, cost in self.costs.items():
            if not cost.why_not:
                note = "<- chosen" if method == self.choice else ""
                if cost.precision:
                    note = f"in {cost.precision} precision {note}".rstrip()
                if not self.fits(method):
                    note = f"does not fit in {format_bytes(self.available)}"
                rows.append([method, f"{cost.flops:.2g}", format_bytes(cost.nbytes), f"{cost.seconds:.2g}", note])
        return rows

    def _notes(self) -> list[str]:
        return [f"{method} cannot be used: {cost.why_not}" for method, cost in self.costs.items() if cost.why_not]


def estimates(analysis: Analysis) -> dict[str, Cost]:
    """The cost of each method."""
    why_not = analysis.problem.why_no_chain
    return {
        name: Cost.impossible(why_not) if why_not and not method.of_matrix else method.estimate(analysis)
        for name, method in METHODS.items()
    }


def single_estimates(analysis: Analysis) -> dict[str, Cost]:
    """The cost of each method that has factors in float32 for a problem in float64."""
    return {name: method.single.estimate(analysis) for name, method in METHODS.items() if method.single is not None}


def _in_single(analysis: Analysis, damping: float, costs: dict[str, Cost], precision: str) -> dict[str, Cost]:
    """The costs of methods that are to factor in float32."""
    if analysis.problem.dtype != torch.float64 or precision == "double":
        return {}
    if precision == "auto" and (analysis.problem.size < SINGLE_FROM or not _is_worth_trying(analysis, damping)):
        return {}
    return {name: cost for name, cost in analysis.once(single_estimates).items() if not costs[name].why_not}


def _is_worth_trying(analysis: Analysis, damping: float) -> bool:
    """Whether GMRES may reach the solution with factors in float32."""
    norm = analysis.rough_norm
    return SINGLE_NORMS[0] <= norm <= SINGLE_NORMS[1] and SINGLE_DAMPING * norm <= abs(damping) <= SINGLE_NORMS[1]


def make_plan(analysis: Analysis, damping: float, precision: str = "auto") -> Plan:
    """Estimate every method for a problem and choose.

    Parameters
    ----------
    analysis : Analysis
    damping : float
    precision : {"auto", "single", "double"}
        What methods factor in, as of `Solver`.

    Returns
    -------
    Plan
    """
    available = available_bytes()
    change = analysis.at(damping)
    own = change.analysis.once(estimates)
    single = _in_single(change.analysis, change.damping, own, precision)
    costs = own | single if single else own
    if precision == "single" and analysis.problem.dtype == torch.float64:
        costs = {name: cost if cost.precision or cost.why_not else _ONLY_DOUBLE for name, cost in costs.items()}
    able = [name for name, method in METHODS.items() if method.is_automatic and not costs[name].why_not]
    fitting = [name for name in able if costs[name].nbytes <= available]
    choice = min(fitting or able, key=lambda m: costs[m].seconds if fitting else costs[m].nbytes)
    return Plan(damping, costs, choice, available, own)


def ladder(plan: Plan, method: str, dtype: torch.dtype, precision: str = "auto") -> list[tuple[str, Factor]]:
    """Methods to try, in order: the one asked for, then the robust ones that fit; in float32 all those in float64.

    With factors in single precision of a float64 problem the same in double comes second; none does where "single" is asked for.
    """
    asked: tuple[str, Factor] = (method, METHODS[method].factor)
    single = METHODS[method].single
    if single is not None and plan.costs[method].precision == "single":
        first = [(method, single.factor)]
        return first if precision == "single" else first + ladder(plan.in_own_precision, method, dtype)
    if dtype != torch.float64 and precision == "single":
        return [asked]
    if dtype != torch.float64 and 0.0 < abs(plan.damping) < 1.0 / torch.finfo(dtype).max:
        asked = (method, promoted(asked[1]))  # 1/ε is no number of this dtype
    if not METHODS[method].is_automatic:
        return [asked]  # kept to be compared with, so that no other method may stand in
    robust: list[tuple[str, Factor]] = [
        ("banded", banded.factor),
        ("riccati", riccati.factor_careful),
        ("dense", dense.factor),
    ]
    rungs = [asked] + [(name, factor) for name, factor in robust if plan.fits(name) and factor is not asked[1]]
    if dtype == torch.float64:
        return rungs
    return ([] if precision == "double" else [asked]) + [
        (name, promoted(factor)) for name, factor in rungs if plan.fits(name, 2)
    ]
