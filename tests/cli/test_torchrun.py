"""`linop-hess compare` under torchrun: one table, of all images."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from linop_hess.cli.networks import digits_problem

SECONDS = 120


def test_compare_under_torchrun(tmp_path):
    arguments = "--batch 301 --depth 2 --width 4 --damping 0.02 --maxiter 3 --no-progress".split()
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "linop_hess", "compare"]
        + [*arguments, "--out", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("parameters, loss") == 1 and "in 2 processes" in run.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convergence.png", "results.json"]
    assert results["machine"]["processes"] == 2
    problem = digits_problem(2, 4, 301)
    gradient = np.linalg.norm(_gradient(problem))
    assert results["gradient_norm"] == pytest.approx(gradient, rel=1e-12)
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["exact inverse, dense"]["backward_error"] <= 1e-15
    assert {"exact inverse, banded", "exact inverse, riccati", "paper's LDU"} <= set(results["skipped"])


def _gradient(problem):
    loss = problem.loss_fn(problem.model(problem.inputs), problem.targets)
    loss.backward()
    return np.concatenate([parameter.grad.numpy().ravel() for parameter in problem.model.parameters()])
