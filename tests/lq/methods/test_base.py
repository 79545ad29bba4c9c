"""A congruence: each question is one line of the halves and of D."""

import math

import numpy as np
import pytest
import torch

from linop_hess.lq.methods.base import EVERYTHING, Congruence, Cost, Tally
from linop_hess.lq.methods.plan import METHODS
from linop_hess.lq.pivots.inertia import Inertia
from tests.lq.methods.conformance import Setting, setting


class Known(Congruence):
    """H + εI = L D Lᵀ with a unit triangle L, no control hidden."""

    method = "known"
    growth = 0.0
    nbytes = 0

    def __init__(self, truth: Setting, theta):
        self.analysis, self.damping = truth.analysis, 0.25
        n = len(truth.H)
        self.L = torch.eye(n).double() + torch.ones(n, n).double().tril(-1) / 3
        self.values = torch.tensor(theta, dtype=torch.float64)

    @property
    def theta(self):
        return self.values

    def whiten(self, g):
        return torch.linalg.solve_triangular(self.L, g, upper=False)

    def unwhiten(self, w):
        return torch.linalg.solve_triangular(self.L.mT, w, upper=True)

    def dense(self, theta):
        return (self.L * torch.as_tensor(theta, dtype=torch.float64)) @ self.L.mT


THETA = [3.0, -2.0, 1e-3, 5.0]


def test_every_question():
    known = Known(setting("one stage"), THETA)
    I = torch.eye(4).double()
    torch.testing.assert_close(known.solve(I), torch.linalg.inv(known.dense(THETA)))
    torch.testing.assert_close(known.positive(I), torch.linalg.inv(known.dense(np.abs(THETA))))
    assert known.inertia(0.0) == Inertia(1, 0, 3) and known.inertia(1e-3) == Inertia(1, 1, 2)
    assert known.logabsdet() == pytest.approx(math.log(0.03), rel=1e-14)
    assert known.noise == 4 and known.answers == EVERYTHING
    positive = Known(setting("one stage"), np.abs(THETA).tolist())
    root = positive.color(torch.eye(4).double())
    torch.testing.assert_close(root @ root.mT, torch.linalg.inv(positive.dense(np.abs(THETA))))


@pytest.mark.parametrize("damping", [0.25, -0.5])
def test_hidden_pivots_are_the_damping(damping):
    known = Known(setting("one stage"), THETA[:3])
    known.hidden, known.damping = 1, damping
    assert known.inertia(0.0) == Inertia(1 + (damping < 0), 0, 2 + (damping > 0))
    assert known.logabsdet() == pytest.approx(math.log(6e-3 * abs(damping)), rel=1e-14)
    assert known.noise == 3 + 4
    np.testing.assert_array_equal(known.pivots[:, 0], THETA[:3] + [damping] * 4)


def test_a_zero_pivot_is_no_error_of_python():
    assert Known(setting("one stage"), [1.0, 0.0]).logabsdet() == -math.inf


def test_impossible():
    cost = Cost.impossible("too warm")
    assert cost.why_not == "too warm" and cost.seconds == cost.nbytes == cost.flops == math.inf


def test_products_with_thin_matrices():
    """A flop of them takes as long at any length beyond some, and as long as one of squares where they are square."""

    def seconds(add, *size):
        tally = Tally(torch.float64)
        add(tally, *size)
        assert tally.flops == 1e9
        return tally.seconds

    assert seconds(Tally.thin, 1e9, 8.0, 1e3) == seconds(Tally.thin, 1e9, 8.0, 1e6)
    assert seconds(Tally.thin, 1e9, 200.0, 200.0) == pytest.approx(seconds(Tally.kernel, "gemm", 1e9, 200.0))
    assert seconds(Tally.thin, 1e9, 1.0, 1e3) < seconds(Tally.kernel, "gemm", 1e9, 1.0)


def test_methods_promise_no_more_than_everything():
    for name, method in METHODS.items():
        assert method.name == name and "solve" in method.answers <= EVERYTHING
