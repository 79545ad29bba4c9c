"""Counting pivots."""

import torch

from linop_hess.lq.pivots.inertia import Inertia, hidden_inertia, inertia_of


def test_counting():
    pivots = [torch.tensor([1.0, -2.0, 1e-16]), torch.tensor([[-1e-16, 3.0], [-4.0, 0.0]]), torch.zeros(0)]
    assert inertia_of(pivots, 1e-15) == Inertia(2, 3, 2)
    assert inertia_of(pivots, 0.0) == Inertia(3, 1, 3)
    assert inertia_of(pivots, 5.0) == Inertia(0, 7, 0)
    assert inertia_of([], 1.0) == inertia_of([torch.zeros(0)], 1.0) == Inertia(0, 0, 0)


def test_direct_sums():
    assert Inertia(1, 2, 3) + Inertia(4, 5, 6) == Inertia(5, 7, 9)
    assert Inertia(5, 7, 9) - Inertia(4, 5, 6) == Inertia(1, 2, 3)


def test_hidden_controls():
    assert hidden_inertia(3, 1e-9) == Inertia(0, 0, 3) and hidden_inertia(3, -1e-9) == Inertia(3, 0, 0)
    assert hidden_inertia(0, 0.0) == Inertia(0, 0, 0)
