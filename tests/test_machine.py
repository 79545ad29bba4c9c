"""Rates of this machine."""

import time

import numpy as np
import pytest
import torch

from linop_hess import _machine


@pytest.mark.skipif(time.get_clock_info("process_time").resolution > 1e-6, reason="a coarse clock of processor time")
def test_waiting_for_others_is_not_counted():
    """A run that does nothing while 20 ms pass, as one that others keep from the processor."""
    assert _machine._seconds(lambda: time.sleep(0.02)) < 0.01


def test_where_processor_time_is_coarse_all_time_counts(monkeypatch):
    monkeypatch.setattr(_machine, "_FINE", 0.0)
    assert _machine._seconds(lambda: time.sleep(0.005)) >= 0.005


def test_time_that_is_worked_in_counts():
    A = np.ones((300, 300))
    start = time.perf_counter()
    A @ A
    assert 1e-6 < _machine._seconds(lambda: A @ A) < 10 * (time.perf_counter() - start) + 1.0


def test_rates():
    machine = _machine.machine(torch.float64)
    assert machine is _machine.machine(torch.float64) and machine.call > 0 and machine.byte > 0
    for kernel, (sizes, per_flop) in machine.rates.items():
        assert list(sizes) == sorted(sizes) and len(sizes) == len(per_flop) and min(per_flop) > 0
        assert machine.seconds(kernel, 2e6, sizes[-1]) == pytest.approx(2e6 * per_flop[-1])
        assert machine.seconds(kernel, 1e6, 1e9) == pytest.approx(1e6 * per_flop[-1])  # beyond, as at the nearest
