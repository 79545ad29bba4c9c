"""Method "dense": what it keeps, what it says it needs, and when it gives up."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from linop_hess.errors import SingularPivotError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.methods import dense
from tests.lq.methods.conformance import CongruenceConformance, setting
from tests.lq.problems import backward_error, random_blocks


class TestDense(CongruenceConformance):
    def factor(self, analysis, damping):
        return dense.factor(analysis, damping)


def test_no_rounding_is_made_by_elimination_along_the_chain() -> None:
    assert dense.factor(setting("equal").analysis, 0.5).growth == 0.0


@pytest.fixture
def blocks():
    return random_blocks([2, 3, 4, 2], [3, 6, 2], seed=1)


def test_solves(blocks) -> None:
    H, analysis = blocks.hessian(), Analysis(blocks.problem())
    g = np.random.default_rng(0).standard_normal((len(H), 2))
    for damping in (0.0, 0.3, -1.0):
        x = dense.factor(analysis, damping).solve(torch.tensor(g))
        assert backward_error(H, damping, x.numpy(), g) <= 1e-14


def test_a_singular_matrix_is_an_error(blocks) -> None:
    H = blocks.hessian()
    eigenvalue = float(np.linalg.eigvalsh(H)[3])
    with pytest.raises(SingularPivotError):
        dense.factor(Analysis(blocks.problem()), -eigenvalue)


MEASURE = """
import ctypes, sys, torch, linop_hess as lh
from torch import nn
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.methods import dense
from tests.helpers import make_batch, make_mlp
def analysis(widths, samples):
    return lh.linearize(make_mlp(widths), nn.CrossEntropyLoss(), *make_batch(widths[0], widths[-1], samples)).analysis
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
dense.factor(analysis([9, 9, 3], 9), 1.0); torch.randn(500, 500) @ torch.randn(500, 500)
for widths in [30, 30, 30, 10], [500, 6]:  # kept, and not
    f, a = None, analysis(widths, 20)
    nbytes = dense.estimate(a).nbytes
    ctypes.CDLL(None).malloc_trim(0); open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS"); f = dense.factor(a, 1.0); print((status("VmHWM") - before) / nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_foretold() -> None:
    # Small arrays from the heap leave holes, which the count cannot see; above this size torch's allocations are mapped and given back.
    command, environment = [sys.executable, "-c", MEASURE], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    shares = [float(line) for line in run.stdout.splitlines()]
    assert len(shares) == 2 and all(1 / 1.3 <= share <= 1.3 for share in shares), shares


@pytest.mark.parametrize("damping", [0.4, -0.3])
@pytest.mark.parametrize("shape", ["stages without controls", "shared, places"])
def test_entries_of_the_inverse(shape, damping, monkeypatch) -> None:
    monkeypatch.setattr(dense, "_COLUMNS_AT_ONCE", 4)
    truth = setting(shape)
    expected = np.linalg.inv(truth.shifted(damping))
    factors = dense.factor(truth.analysis, damping)
    atol = 1e-14 * np.linalg.cond(expected) * np.abs(expected).max()
    np.testing.assert_allclose(factors.diagonal().numpy(), np.diag(expected), rtol=0, atol=atol)
    for block, own in zip(factors.blocks(), truth.controls(), strict=True):
        np.testing.assert_allclose(block.numpy(), expected[np.ix_(own, own)], rtol=0, atol=atol)
