"""What the solvers are judged by, against a dense truth."""

import numpy as np
import pytest
import torch

from linop_hess.cli import compare
from linop_hess.cli.compare import compare_solvers
from linop_hess.cli.networks import digits_problem
from tests.helpers import dense_hessian


def test_the_judge_is_the_dense_double_backward_hessian(monkeypatch):
    monkeypatch.setattr(compare, "FULL_BATCH_FROM", 4)
    problem = digits_problem(depth=2, width=3, batch=4, seed=1)
    outcome = compare_solvers(problem, 0.05, maxiter=5)
    names = [name for name, _ in problem.model.named_parameters()]
    shapes = [p.shape for p in problem.model.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()])

    def loss(theta):
        parts = theta.split([s.numel() for s in shapes])
        values = {n: part.reshape(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        output = torch.func.functional_call(problem.model, values, (problem.inputs,))
        return problem.loss_fn(output, problem.targets)

    H = dense_hessian(loss, flat).numpy() + 0.05 * np.eye(len(flat))
    g = torch.autograd.functional.jacobian(loss, flat).numpy()
    norm = np.linalg.norm(H, 2)
    assert {"exact inverse, dense", "GMRES, M = sketch", "dense LU"} <= {r.name for r in outcome.comparison}
    for record in outcome.comparison:
        residual = np.linalg.norm(g - H @ record.x)
        assert record.residual == pytest.approx(residual / np.linalg.norm(g), rel=1e-6, abs=1e-13)
        error = residual / (norm * np.linalg.norm(record.x) + np.linalg.norm(g))
        assert record.backward_error == pytest.approx(error, rel=0.1, abs=1e-14)
    assert outcome.hessian_norm == pytest.approx(norm, rel=0.1)
    assert outcome.hessian_norm <= norm * (1 + 1e-12)


def test_what_takes_long_is_left_out(monkeypatch):
    monkeypatch.setattr(compare, "LONGEST_SECONDS", 0.0)
    outcome = compare_solvers(digits_problem(depth=1, width=2, batch=2), 0.05, maxiter=2)
    for method in ("exact inverse, banded", "exact inverse, dense", "paper's LDU", "dense LU"):
        assert "more than 0 s" in outcome.skipped[method]
    assert not {record.name for record in outcome.comparison} & set(outcome.skipped)
