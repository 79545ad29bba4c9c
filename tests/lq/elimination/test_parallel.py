"""Inertia of long chains with legs eliminated side by side, against dense eigenvalues."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.lq.accuracy import ZERO_PIVOT
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.elimination import parallel
from linop_hess.lq.elimination.parallel import Parallel, legs_of, periodic_stretch
from linop_hess.lq.inverse import inertia as inertia_module
from linop_hess.lq.pivots.inertia import Inertia
from tests.helpers import make_batch, make_mlp, oracle_hessian
from tests.lq.graphs import chain as chain_of
from tests.lq.graphs import residual


def chain(widths, samples=1, seed=0, act=nn.Tanh, gain=1.3):
    return _chain(tuple(widths), samples, seed, act, gain)


@cache
def _chain(widths, samples, seed, act, gain):
    model = make_mlp(list(widths), act, seed=seed, gain=gain)
    x, y = make_batch(widths[0], widths[-1], samples, seed)
    return lh.linearize(model, f.cross_entropy, x, y), oracle_hessian(model, f.cross_entropy, x, y)


def of_eigenvalues(eigenvalues):
    return Inertia(int((eigenvalues < 0).sum()), 0, int((eigenvalues > 0).sum()))


CHAINS = {
    "uniform": [3] * 40 + [2],
    "alternating widths": [2, 3] * 18 + [2],
    "other ends": [5, 4, 2] + [3] * 30 + [4, 2],
    "period 3": [2, 3, 4] * 12 + [2],
    "a batch": [2] * 30 + [3],
}


@pytest.mark.parametrize("name", CHAINS)
def test_against_dense_eigenvalues(name):
    lin, H = chain(CHAINS[name], samples=3 if name == "a batch" else 1)
    eigenvalues = np.linalg.eigvalsh(H)
    assert eigenvalues[0] < -1e-2 * eigenvalues[-1]
    solver = Parallel(lin.analysis)
    between = (eigenvalues[:-1] + eigenvalues[1:]) / 2
    wide = np.diff(eigenvalues) > 1e-6
    shifts = np.concatenate([[0.3, 1e-2, 1e-3, -1e-3, -0.2], -between[wide][:: max(1, wide.sum() // 20)]])
    answered = 0
    for damping in shifts:
        found = solver.inertia(damping, ZERO_PIVOT * lin.analysis.norm)
        if found is not None:
            answered += 1
            assert found == of_eigenvalues(eigenvalues + damping), damping
    assert answered >= 0.9 * len(shifts)


def test_close_to_an_eigenvalue():
    lin, H = chain(CHAINS["uniform"])
    eigenvalues = np.linalg.eigvalsh(H)
    solver = Parallel(lin.analysis)
    checked = 0
    for value in eigenvalues[np.abs(eigenvalues) > 1e-2][::2]:
        for side in (-1, 1):
            damping = -value + side * 1.1e-12 * np.abs(eigenvalues).max()
            found = solver.inertia(damping, ZERO_PIVOT * lin.analysis.norm)
            assert found is None or found == of_eigenvalues(eigenvalues + damping)
            checked += found is not None
    assert checked >= 10


def test_a_leg_tries_another_terminal_cost(monkeypatch):
    lin, H = chain(CHAINS["a batch"], samples=3)
    eigenvalues = np.linalg.eigvalsh(H)
    solver = Parallel(lin.analysis)
    monkeypatch.setattr(parallel, "GROWTH_PARALLEL", 20.0)  # so strict that many legs fail with the first
    rescued = 0
    for damping in np.linspace(-0.05, 0.05, 41):
        with monkeypatch.context() as patch:
            patch.setattr(parallel, "_RHOS", (1.0,))
            first = solver.inertia(damping, 1e-14)
        found = solver.inertia(damping, 1e-14)
        rescued += first is None and found is not None
        assert found is None or found == of_eigenvalues(eigenvalues + damping)
    assert rescued >= 3


def test_gives_up_rather_than_guess():
    lin, _ = chain(CHAINS["uniform"])
    assert Parallel(lin.analysis).inertia(1e-10, 1e-14) is None


def test_long_chains_use_it(monkeypatch):
    model = make_mlp([2] * 230 + [2], seed=1, gain=1.3)
    lin = lh.linearize(model, f.cross_entropy, *make_batch(2, 2, 1))
    assert legs_of(lin.analysis) is not None
    eigenvalues = np.linalg.eigvalsh(lh.to_dense(lin.H))
    with monkeypatch.context() as patch:
        patch.setattr(inertia_module, "Factors", None)
        for damping in (0.1, 1e-3, -0.05):
            assert lin.inverse(damping).inertia() == of_eigenvalues(eigenvalues + damping)
    assert legs_of(lh.linearize(make_mlp([2] * 10), f.cross_entropy, *make_batch(2, 2, 1)).analysis) is None


def test_gauss_newton_and_float32():
    model = make_mlp([2] * 230 + [2], seed=1, gain=1.3).float()
    lin = lh.linearize(model, f.cross_entropy, *make_batch(2, 2, 1, dtype=torch.float32))
    eigenvalues = np.linalg.eigvalsh(lh.to_dense(lin.gauss_newton()).astype(float))
    inverse = lin.gauss_newton().inverse(1e-2)
    assert inverse.inertia() == of_eigenvalues(eigenvalues + 1e-2)
    assert lin.gauss_newton().inverse(-1e-2).inertia() == of_eigenvalues(eigenvalues - 1e-2)


def test_periodic_stretch():
    assert periodic_stretch(np.array([0, 1, 1, 1, 1, 1, 2])) == (1, 6, 1)
    assert periodic_stretch(np.array([0, 1, 2, 1, 2, 1, 2, 3])) == (1, 7, 2)


@pytest.mark.parametrize("idle", [False, True])
def test_residual_chains_of_wired_stages(idle):
    """Some repeats of a residual block with controls in any place, an idle parameter in each or none."""
    graph = residual(3, 0)
    for _ in range(40):
        graph.add("dense", "f", ["h"], 3, 4).sum("h", "h", "f")
        if idle:
            graph.add("idle", None, p=2)
    made = chain_of(lambda: graph, permuted=True)
    eigenvalues = np.linalg.eigvalsh(made.hessian())
    solver, norm, answered = Parallel(Analysis(made.problem())), np.abs(eigenvalues).max(), 0
    for damping in (0.3, 1e-2, -0.2, -3.0):
        if np.abs(eigenvalues + damping).min() > 1e-10 * norm:
            found = solver.inertia(damping, ZERO_PIVOT * norm)
            answered += found is not None
            assert found is None or found == of_eigenvalues(eigenvalues + damping)
    assert answered >= 2
