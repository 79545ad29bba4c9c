"""Which method solves a problem best, from a cost model; and which to try next when one fails."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from linop_hess._display import Shown
from linop_hess._memory import available_bytes, format_bytes
from linop_hess.lq.accuracy import SINGLE_DAMPING, SINGLE_NORMS, default_tolerance
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative import plain
from linop_hess.lq.iterative.convergence import looks_definite
from linop_hess.lq.iterative.options import Asked, SketchOptions
from linop_hess.lq.methods import banded, block_ldu, dense, mixed, riccati, sketched, state_band, woodbury
from linop_hess.lq.methods.base import Cost, Factor, Method
from linop_hess.lq.methods.mixed import further_columns, promoted

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        state_band.METHOD,
        riccati.METHOD,
        replace(dense.METHOD, single=mixed.METHOD),
        woodbury.METHOD,
        block_ldu.METHOD,
        sketched.METHOD,
        plain.METHOD,
    )
}
"""The methods by name."""


# The most robust first.
_COMPLEX_RUNGS = ["banded", "dense", "riccati"]

# From so many controls on "auto" takes factors in single precision: below, those in double take a few milliseconds, and answer all.
SINGLE_FROM = 1000

# Iterations must be expected to be so many times as fast as factors, of a method that can change nothing meanwhile.
_GUESSED = 2.0

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

    damping: complex
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
                notes = [f"in {cost.precision} precision"] if cost.precision else []
                notes += [] if cost.iterations is None else [f"about {cost.iterations} iterations"]
                notes += ["<- chosen"] if method == self.choice else []
                if not self.fits(method):
                    notes = [f"does not fit in {format_bytes(self.available)}"]
                more = "> " * cost.at_least
                rows.append(
                    [
                        method,
                        f"{more}{cost.flops:.2g}",
                        format_bytes(cost.nbytes),
                        f"{more}{cost.seconds:.2g}",
                        " ".join(notes),
                    ]
                )
        return rows

    def _notes(self) -> list[str]:
        return [f"{method} cannot be used: {cost.why_not}" for method, cost in self.costs.items() if cost.why_not]


def estimates(analysis: Analysis) -> dict[str, Cost]:
    """The cost of each method that does not iterate, which is the same at any damping; of process 0 where there are several."""
    why_not, processes = analysis.problem.why_no_chain, analysis.problem.processes
    with processes.together("estimating costs"):
        costs = {
            name: Cost.impossible(why_not) if why_not and not method.of_matrix else method.estimate(analysis)
            for name, method in METHODS.items()
            if method.estimate is not None
        }
    return processes.from_first(costs)  # all must choose alike, however fast they were measured to be


def single_estimates(analysis: Analysis) -> dict[str, Cost]:
    """The cost of each method that has factors in float32 for a problem in float64; of process 0 where there are several."""
    with analysis.problem.processes.together("estimating costs in single precision"):
        costs = {
            name: method.single.estimate(analysis)
            for name, method in METHODS.items()
            if method.single is not None and method.single.estimate is not None
        }
    return analysis.problem.processes.from_first(costs)


def plan_for(analysis: Analysis, damping: float, method: str) -> Plan:
    """Return the plan where one method is all that there is to be: nothing else is estimated, and its factors are in own precision."""
    change, estimate = analysis.at(damping), METHODS[method].estimate
    assert estimate is not None
    costs = {name: Cost.impossible("it was not asked for") for name in METHODS} | {method: estimate(change.analysis)}
    return Plan(damping, costs, method, available_bytes(), costs)


def _in_single(
    analysis: Analysis, damping: complex, costs: dict[str, Cost], precision: str, method: str, right_hand_sides: int
) -> dict[str, Cost]:
    """The costs of methods that are to factor in float32, where `method`, or "auto" or "" for all of them, may be one."""
    if analysis.problem.dtype != torch.float64 or isinstance(damping, complex) or precision == "double":
        return {}
    if precision == "auto" and analysis.problem.size < SINGLE_FROM:
        return {}
    found = {name: cost for name, cost in analysis.once(single_estimates).items() if not costs[name].why_not}
    if precision == "auto":
        more = further_columns(analysis, right_hand_sides)
        found = {name: cost for name, cost in found.items() if not more or cost.seconds + more < costs[name].seconds}
        least = min((costs[m].seconds for m in costs if METHODS[m].is_automatic and not costs[m].why_not), default=0.0)
        if method == "auto" and all(cost.seconds >= least for cost in found.values()):
            return {}  # none would be chosen, whatever the norm is
        if not _is_worth_trying(analysis, damping):
            return {}
    return found


def _is_worth_trying(analysis: Analysis, damping: float) -> bool:
    """Whether GMRES may reach the solution with factors in float32."""
    norm = analysis.rough_norm
    return SINGLE_NORMS[0] <= norm <= SINGLE_NORMS[1] and SINGLE_DAMPING * norm <= abs(damping) <= SINGLE_NORMS[1]


def make_plan(
    analysis: Analysis,
    damping: complex,
    right_hand_sides: int = 1,
    tolerance: float | None = None,
    sketch: SketchOptions | None = None,
    precision: str = "auto",
    method: str = "",
) -> Plan:
    """Estimate every method for a problem and choose.

    Parameters
    ----------
    analysis : Analysis
    damping : complex
    right_hand_sides : int
        How many solves are to be made: what a factorization costs once, a method that iterates costs with every one.
    tolerance : float, optional
        Backward error that they must reach.
    sketch : SketchOptions, optional
        What is asked of method "sketched".
    precision : {"auto", "single", "double"}
        What methods factor in, as of `Solver`.
    method : str
        The one that is asked for, or "auto" where the plan is there to choose one; by default all are told as they would be used.

    Returns
    -------
    Plan
    """
    processes = analysis.problem.processes
    available = int(-processes.largest(-float(available_bytes())))  # the least of all processes
    change = analysis.at(damping)
    own = change.analysis.once(estimates)
    costs = own | _in_single(change.analysis, change.damping, own, precision, method, right_hand_sides)
    if isinstance(change.damping, complex):
        real = Cost.impossible("it takes real dampings alone")
        costs = {name: costs[name].in_complex if method.is_complex else real for name, method in METHODS.items()}
    else:
        goal = default_tolerance(analysis.problem.dtype) if tolerance is None else tolerance
        asked = Asked(change.damping, right_hand_sides, goal, sketch or SketchOptions())
        # A sketch that is asked for by name finds what it needs itself.
        is_settled = method in METHODS and (METHODS[method].exact or METHODS[method].watch is not None)
        costs = _with_forecasts(change.analysis, asked, costs, available, 0.0 if is_settled else math.inf)
        costs = _as_definite(change.analysis, change.damping, costs)
    if precision == "single" and analysis.problem.dtype == torch.float64:
        able_to = {name for name, cost in costs.items() if cost.precision or cost.why_not or not METHODS[name].exact}
        costs = {name: cost if name in able_to else _ONLY_DOUBLE for name, cost in costs.items()}
    able = [name for name, cost in costs.items() if METHODS[name].is_automatic and not cost.why_not]
    fitting = _fitting(costs, available)
    choice = min(fitting or able, key=lambda m: _weighed(m, costs[m]) if fitting else costs[m].nbytes)
    return Plan(damping, costs, choice, available, costs | own)


def _weighed(method: str, cost: Cost) -> float:
    """Seconds; of iterations, which are a guess, and which the next solve costs again, more where nothing makes them fewer meanwhile."""
    is_told = METHODS[method].exact or METHODS[method].watch is not None
    return cost.seconds if is_told else cost.certain + _GUESSED * (cost.seconds - cost.certain)


def _fitting(costs: dict[str, Cost], available: int) -> list[str]:
    """Methods that "auto" may choose, and that fit."""
    return [
        name
        for name, cost in costs.items()
        if METHODS[name].is_automatic and not cost.why_not and cost.nbytes <= available and not cost.at_least
    ]


def _with_forecasts(
    analysis: Analysis, asked: Asked, known: dict[str, Cost], available: int, most: float
) -> dict[str, Cost]:
    """The costs of all methods, of those that iterate too, as closely as it takes to choose: where that is settled, no product is made.

    `most` is what looking closer is worth at most, in seconds.
    """
    costs, why_not = dict(known), analysis.problem.why_no_chain
    for name, method in reversed(METHODS.items()):  # a method that needs no set-up first
        if method.forecast is None:
            continue
        if why_not and not method.of_matrix:
            costs[name] = Cost.impossible(why_not)
            continue
        worth = min((costs[m].seconds for m in _fitting(costs, available)), default=math.inf)
        worth = min(worth, most)
        costs[name] = method.forecast(analysis, asked, worth)
    return {name: costs[name] for name in METHODS}


def _as_definite(analysis: Analysis, damping: float, costs: dict[str, Cost]) -> dict[str, Cost]:
    """The costs with what factors of a definite matrix save, where the spectrum was looked at and seems to be one."""
    if not looks_definite(analysis, damping):
        return costs
    told = dict(costs)
    for name, method in METHODS.items():
        if method.single is not None and method.single.definite is not None and costs[name].precision == "single":
            told[name] = method.single.definite(analysis, costs[name])
    return analysis.problem.processes.from_first(told)


def ladder(
    plan: Plan, method: str, dtype: torch.dtype, precision: str = "auto", asked: Asked | None = None
) -> list[tuple[str, Factor]]:
    """Methods to try, in order: the one asked for, then the robust ones that fit; in float32 all those in float64.

    With factors in single precision of a float64 problem the same in double comes second; none does where "single" is asked for.
    """
    first: tuple[str, Factor] = (method, METHODS[method].factor)
    if isinstance(plan.damping, complex):
        others = [name for name in plan.by_time() if name != method]
        return [first, *((name, METHODS[name].factor) for name in sorted(others, key=_COMPLEX_RUNGS.index))]
    single, iterates = METHODS[method].single, not METHODS[method].exact
    if single is not None and plan.costs[method].precision == "single":
        in_single = [(method, single.factor)]
        return in_single if precision == "single" else in_single + ladder(plan.in_own_precision, method, dtype)
    if method == sketched.METHOD.name:
        first = (method, partial(sketched.factor, asked=asked))
    if dtype != torch.float64 and precision == "single":
        return [first]
    if not iterates and dtype != torch.float64 and 0.0 < abs(plan.damping) < 1.0 / torch.finfo(dtype).max:
        first = (method, promoted(first[1]))  # 1/ε is no number of this dtype
    if not METHODS[method].is_automatic:
        return [first]  # kept to be compared with, so that no other method may stand in
    robust: list[tuple[str, Factor]] = [
        ("banded", banded.factor),
        ("riccati", riccati.factor_careful),
        ("dense", dense.factor),
    ]
    rungs = [first] + [(name, factor) for name, factor in robust if plan.fits(name) and factor is not first[1]]
    if dtype == torch.float64:
        return rungs
    rungs = rungs[1:] if iterates else rungs
    own = [] if precision == "double" and not iterates else [first]
    return own + [(name, promoted(factor)) for name, factor in rungs if plan.fits(name, 2)]


def with_first(rungs: list[tuple[str, Factor]]) -> list[tuple[str, Factor]]:
    """A ladder with what its first method tries before its own factors, where these are those it begins with."""
    method = METHODS[rungs[0][0]]
    return [(method.name, method.first), *rungs] if method.first is not None and rungs[0][1] is method.factor else rungs
