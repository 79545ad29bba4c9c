"""The command line: its arguments, and a small real run judged from outside."""

import json
import math
import runpy
import subprocess
import sys

import pytest
import torch

import linop_hess
from linop_hess.cli import compare, compare_command
from linop_hess.cli import main as cli
from linop_hess.cli.models import FAMILIES

SMALL = ["--depth", "3", "--width", "4", "--batch", "5", "--maxiter", "30", "--no-progress"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--depth", "0"], "--depth: expected an integer of at least 1, got '0'"),
        (["--depth", "2.5"], "--depth: expected an integer of at least 1, got '2.5'"),
        (["--width", "-3"], "--width: expected an integer of at least 1"),
        (["--batch", "1798"], "--batch: expected an integer from 1 to 1797, got '1798'"),
        (["--batch", "0"], "--batch: expected an integer from 1 to 1797"),
        (["--damping", "nan"], "--damping: expected a finite number, got 'nan'"),
        (["--damping", "inf"], "--damping: expected a finite number"),
        (["--damping", "much"], "--damping: expected a finite number, got 'much'"),
        (["--rtol", "1"], "--rtol: expected a number between 0 and 1, exclusive"),
        (["--maxiter", "0"], "--maxiter: expected an integer of at least 1"),
        (["--threads", "0"], "--threads: expected an integer of at least 1"),
        (["--train-steps", "-1"], "--train-steps: expected an integer of at least 0"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to"),
        (["--activation", "cosine"], "tanh"),
        (["--model", "gru", "--activation", "tanh"], "--activation: expected none with --model gru"),
        (["--model", "resnet"], "resmlp"),
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


@pytest.mark.parametrize("out", ["/proc/none/out", "/dev/null/out"])
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(out, monkeypatch, capsys):
    monkeypatch.setattr(compare_command, "digits_problem", lambda *_: pytest.fail("computed first"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--out", out])
    assert stop.value.code == 2
    assert f"--out: expected a folder that can be made and written to, got '{out}'" in capsys.readouterr().err


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_command, "digits_problem", interrupt)
    assert cli.main(["compare", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_version_and_the_module_as_a_command(capsys, monkeypatch):
    told = subprocess.run([sys.executable, "-m", "linop_hess", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == f"linop-hess {linop_hess.__version__}\n"
    # As `python -m` runs a module, in this process: another would import torch once more.
    monkeypatch.setattr(sys, "argv", ["linop-hess", "--version"])
    monkeypatch.delitem(sys.modules, "linop_hess.cli.main")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("linop_hess.cli.main", run_name="__main__", alter_sys=True)
    assert not stop.value.code and capsys.readouterr().out == told.stdout


@pytest.mark.parametrize("damping", ["0", "-0.3"])
def test_any_real_damping_is_tried(damping, capsys, tmp_path):
    """A pixel that is dark in all images leaves H without damping singular: LAPACK's pivots are zero, and no method may answer."""
    assert cli.main(["compare", *SMALL, "--damping", damping, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["options"]["damping"] == float(damping)
    direct = {row["name"]: row for row in results["rows"] if row["solver"] == "direct"}
    if damping == "0":
        assert not direct
        assert "left out: dense LU: a pivot is exactly zero" in said
        assert "left out: exact inverse, riccati: H + damping·I with damping=0 is singular" in said
    else:
        assert direct["exact inverse, riccati"]["backward_error"] <= 1e-14


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_help_says_what_sizes_mean_in_each_model(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name, family in FAMILIES.items():
        assert f"{name:12}--depth {family.depth} {family.layers}, --width {family.width} {family.units}" in said


@pytest.mark.parametrize("model", [name for name in FAMILIES if name != "mlp"])
def test_every_model_is_solved_exactly(model, capsys, tmp_path):
    sizes = ["--depth", "1", "--width", "2", "--batch", "2", "--maxiter", "5", "--train-steps", "3", "--no-progress"]
    assert cli.main(["compare", "--model", model, *sizes, "--out", str(tmp_path)]) == 0
    assert f"digits, {model}, depth 1 (" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["options"]["model"] == model
    rows = {row["name"]: row for row in results["rows"]}
    for name in ("exact inverse, banded", "exact inverse, riccati", "exact inverse, dense", "dense LU"):
        assert rows[name]["backward_error"] <= 1e-14, name


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
    assert (results["options"]["model"], results["options"]["activation"]) == ("mlp", "tanh")
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


def test_what_does_not_fit_is_left_out_and_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compare, "available_bytes", lambda: 1000)
    assert cli.main(["compare", *SMALL, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "left out: dense LU: needs about" in said
    assert "true residual" in said
