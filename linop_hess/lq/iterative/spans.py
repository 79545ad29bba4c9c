"""A chain cut into spans of several stages with controls, which a sketch eliminates together; and what that takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from linop_hess.lq.problem import Problem

# Sweeps forth and back that every direction takes: H times it, its rows of the lower part, the feedback, and what is felt of it.
SWEEPS_A_DIRECTION = 4.0
# Pivots may take so many times the flops of all sweeps: longer spans leave less to be approximated, and fewer iterations.
_PIVOTS_WORTH = 1.0


@dataclass(frozen=True)
class Cut:
    """Where spans begin and end in a chain, and flops.

    Attributes
    ----------
    bounds : tuple of (int, int)
        Stages of each span, the first inclusive, the last not.
    controls : ndarray of int
        Controls of each span.
    assembly, elimination, sweeps : float
        Flops: of the pivot blocks, of their factors, of all products with directions.
    """

    bounds: tuple[tuple[int, int], ...]
    controls: np.ndarray
    assembly: float
    elimination: float
    sweeps: float


def product_flops(problem: Problem, *, by_stages: bool = True) -> float:
    """Flops of one product with H, stage by stage; else those beside the substitutions by a band."""
    of_stacks = []
    for stack in problem.blocks:
        at_rest = {name: stack.entries(name) if name in stack.nonzero else 0 for name in "BC"}
        G = stack.entries("G") if stack.p else 0
        of_stacks.append(2.0 * (2 * by_stages * stack.entries("F") + 2 * G + 2 * at_rest["B"] + at_rest["C"]))
    order = problem.order[problem.layout.first :, 0]
    return float(np.array(of_stacks)[order].sum())


def cut(problem: Problem, samples: int, share: float, rank: int) -> Cut:
    """Cut a chain: as few spans as have pivots that cost no more than the sweeps of the directions.

    Parameters
    ----------
    problem : Problem
    samples : int
        Into how many its states split.
    share : float
        Part of them that the sketch is made of.
    rank : int
        Number of directions.
    """
    layout = problem.layout
    starts = np.flatnonzero(layout.p)
    sizes = layout.p[starts].astype(float)
    sweeps = SWEEPS_A_DIRECTION * rank * share * product_flops(problem)
    count = min(2, starts.size)
    while True:
        first = _balanced(sizes, count)
        controls = np.add.reduceat(sizes, first)
        assembly = float((2.0 * samples * share * controls**2).sum())
        elimination = float((controls**3 / 3).sum())
        if assembly + elimination <= _PIVOTS_WORTH * sweeps or count >= starts.size:
            break
        count = min(starts.size, count + max(1, count // 4))
    edges = [*starts[first].tolist(), problem.length]
    return Cut(tuple(zip(edges[:-1], edges[1:], strict=True)), controls.astype(int), assembly, elimination, sweeps)


def _balanced(sizes: np.ndarray, count: int) -> np.ndarray:
    """Positions at which `count` runs of about equal sum begin, none empty."""
    middle = np.cumsum(sizes) - sizes / 2
    at = np.searchsorted(middle, sizes.sum() * np.arange(count) / count)
    at[0] = 0
    for k in range(1, count):
        at[k] = max(at[k], at[k - 1] + 1)
    for k in range(count - 1, 0, -1):
        at[k] = min(at[k], sizes.size - (count - k))
    return at
