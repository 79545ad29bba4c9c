"""The command line: its arguments, and a small real run judged from outside."""

import json
import math

import numpy as np
import pytest
import torch

from linop_hess.cli import main as cli

SMALL = ["--depth", "3", "--width", "4", "--batch", "5", "--maxiter", "30", "--no-progress"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--depth", "0"], "--depth: expected an integer of at least 1, got '0'"),
        (["--depth", "2.5"], "--depth: expected an integer of at least 1, got '2.5'"),
        (["--width", "-3"], "--width: expected an integer of at least 1"),
        (["--batch", "1798"], "--batch: expected an integer from 1 to 1797, got '1798'"),
        (["--batch", "0"], "--batch: expected an integer from 1 to 1797"),
        (["--damping", "0"], "--damping: expected a positive number, got '0'"),
        (["--damping", "nan"], "--damping: expected a positive number"),
        (["--damping", "inf"], "--damping: expected a positive number"),
        (["--rtol", "1"], "--rtol: expected a number between 0 and 1, exclusive"),
        (["--maxiter", "0"], "--maxiter: expected an integer of at least 1"),
        (["--threads", "0"], "--threads: expected an integer of at least 1"),
        (["--train-steps", "-1"], "--train-steps: expected an integer of at least 0"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to"),
        (["--activation", "cosine"], "tanh"),
        (["--out", __file__], "--out: expected a folder"),
        (["--speed"], "--speed"),
    ],
)
def test_wrong_arguments_name_the_valid_range(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: linop-hess")
    assert words in said


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_activations_offered_are_those_that_exist():
    from linop_hess.cli import compare as demo

    assert tuple(demo.ACTIVATIONS) == cli.ACTIVATIONS


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "new"
    threads = torch.get_num_threads()
    assert cli.main(["compare", *SMALL, "--seed", "3", "--out", str(folder)]) == 0
    assert torch.get_num_threads() == threads
    return folder, json.loads((folder / "results.json").read_text())


def test_compare_writes_what_it_says(outcome):
    folder, results = outcome
    assert (folder / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert results["options"]["seed"] == 3
    # 64 pixels to 4, twice 4 to 4, 4 to 10 classes, with biases.
    assert results["parameters"] == 64 * 4 + 4 + 2 * (4 * 4 + 4) + 4 * 10 + 10


def test_every_row_is_there_and_the_exact_ones_are_exact(outcome):
    _, results = outcome
    rows = {row["name"]: row for row in results["rows"]}
    expected = {"CG", "MINRES", "GMRES", "GMRES, M = exact inverse", "MINRES, M = Gauss-Newton inverse"}
    expected |= {"CG, M = Gauss-Newton inverse", "exact inverse, banded", "exact inverse, riccati"}
    expected |= {"exact inverse, dense", "paper's LDU", "dense LU"}
    assert expected == set(rows) | set(results["skipped"])
    assert rows["GMRES, M = exact inverse"]["iterations"] <= 2
    for name in ("exact inverse, banded", "exact inverse, riccati", "exact inverse, dense", "dense LU"):
        assert rows[name]["backward_error"] <= 1e-14
        assert rows[name]["solver"] == "direct"
    for row in rows.values():
        assert row["converged"] == (row["residual"] <= 1.1e-10)
        assert row["memory"] > 0
        assert math.isfinite(row["setup_seconds"])
    assert rows["CG"]["products_A"] == rows["CG"]["iterations"]


def test_the_judge_is_the_dense_double_backward_hessian():
    from linop_hess.cli import compare as demo

    problem = demo.digits_problem(depth=2, width=3, batch=4, seed=1)
    outcome = demo.compare_solvers(problem, 0.05, maxiter=5)
    names = [name for name, _ in problem.model.named_parameters()]
    shapes = [p.shape for p in problem.model.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()])

    def loss(theta):
        parts = theta.split([s.numel() for s in shapes])
        values = {n: part.reshape(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        output = torch.func.functional_call(problem.model, values, (problem.inputs,))
        return problem.loss_fn(output, problem.targets)

    H = torch.autograd.functional.hessian(loss, flat).numpy() + 0.05 * np.eye(len(flat))
    g = torch.autograd.functional.jacobian(loss, flat).numpy()
    norm = np.linalg.norm(H, 2)
    for record in outcome.comparison:
        residual = np.linalg.norm(g - H @ record.x)
        assert record.residual == pytest.approx(residual / np.linalg.norm(g), rel=1e-6, abs=1e-13)
        error = residual / (norm * np.linalg.norm(record.x) + np.linalg.norm(g))
        assert record.backward_error == pytest.approx(error, rel=0.1, abs=1e-14)
    assert outcome.hessian_norm == pytest.approx(norm, rel=0.1)
    assert outcome.hessian_norm <= norm * (1 + 1e-12)


def test_what_does_not_fit_is_left_out_and_said(monkeypatch, capsys, tmp_path):
    from linop_hess.cli import compare as demo

    monkeypatch.setattr(demo, "available_bytes", lambda: 1000)
    assert cli.main(["compare", *SMALL, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "left out: dense LU: needs about" in said
    assert "true residual" in said


def test_training_lowers_the_loss_and_seeds_leave_torch_alone():
    from linop_hess.cli import compare as demo

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    losses = []
    for steps in (0, 60):
        p = demo.digits_problem(depth=2, width=16, batch=64, train_steps=steps)
        losses.append(p.loss_fn(p.model(p.inputs), p.targets).item())
    assert losses[1] < 0.9 * losses[0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("activation", cli.ACTIVATIONS)
def test_the_hessian_of_a_deep_network_is_not_negligible(activation):
    from linop_hess.cli import compare as demo

    p = demo.digits_problem(activation=activation)
    gradient = torch.autograd.grad(p.loss_fn(p.model(p.inputs), p.targets), p.model[0].weight)[0]
    assert 1e-3 < gradient.norm() < 1e3
