"""`linop-hess train` and `bench-train`: arguments, small real runs against loops written here, interrupts."""

import json
import math

import pytest
import torch

from linop_hess import tasks
from linop_hess.cli import bench_train, contenders, train
from linop_hess.cli import main as cli
from linop_hess.cli.contenders import CONTROL, LEARNING, Contender
from linop_hess.cli.trace import Finished
from linop_hess.tasks import TASKS, make_task, task_options

TINY = ["--depth", "3", "--width", "4", "--batch", "5", "--no-progress"]


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--task", "mnist"], "digits-memorize"),
        (["train", "--optimizer", "lion"], "saddle-free"),
        (["train", "--task", "pendulum", "--optimizer", "adam"], "expected one of newton, gauss-newton, lbfgs"),
        (["train", "--optimizer", "newton"], "--optimizer: expected one of sgd, adam"),
        (["train", "--task", "pendulum", "--width", "3"], "--width: expected none with --task pendulum"),
        (["train", "--optimizer", "lbfgs", "--lr", "1"], "--lr: expected none with --optimizer lbfgs"),
        (["train", "--lr", "-1"], "--lr: expected a positive number, got '-1'"),
        (["train", "--seconds", "inf"], "--seconds: expected a positive number"),
        (["train", "--steps", "0"], "--steps: expected an integer of at least 1"),
        (["train", "--batch", "1798"], "expected a batch of at most 1,797 images, got 1,798"),
        (["train", "--activation", "cosine"], "expected activation to be one of ['tanh', 'relu', 'gelu', 'silu']"),
        (["train", "--init", "zero"], "expected init to be one of ['he', 'orthogonal', 'default'], got 'zero'"),
        (["train", "--out", "/dev/null/out"], "--out: expected a folder that can be made and written to"),
        (["train", "--out", __file__], "--out: expected a folder"),
        (["bench-train", "--optimizers", "adam,lion"], "--optimizers: expected some of sgd, adam"),
        (["bench-train", "--optimizers", ""], "--optimizers: expected some of sgd, adam"),
        (["bench-train", "--seeds", "0"], "--seeds: expected an integer of at least 1"),
        (["bench-train", "--out", "/dev/null/out"], "--out: expected a folder that can be made"),
    ],
)
def test_wrong_arguments_say_what_is_expected(arguments, words, capsys, monkeypatch):
    for module in (train, bench_train):
        monkeypatch.setattr(module, "run", lambda *_: pytest.fail("trained first"))
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: linop-hess") and words in said


@pytest.mark.parametrize("command", ["train", "bench-train"])
def test_help_says_what_may_be_chosen_of_each_task(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name in TASKS:
        assert name in said
        for option, value in task_options(name).items():
            assert option == "shared" or f"--{option} {value}" in said


def test_train_takes_the_steps_of_a_plain_loop(tmp_path, capsys):
    arguments = ["train", *TINY, "--seed", "2", "--optimizer", "sgd", "--lr", "0.1", "--steps", "12"]
    before = torch.random.get_rng_state()
    assert cli.main([*arguments, "--out", str(tmp_path / "new")]) == 0
    assert torch.equal(before, torch.random.get_rng_state())
    task = make_task("digits-memorize", 2, depth=3, width=4, batch=5)
    opt, expected = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(13):
        opt.zero_grad()
        loss = task.loss()
        expected.append(float(loss.detach()))
        loss.backward()
        opt.step()
    found = results(tmp_path / "new")
    assert found["losses"] == expected and found["ended"] == "steps" and found["steps"] == 12
    assert found["best"] == min(expected) and found["options"]["lr"] == 0.1 and found["options"]["depth"] == 3
    assert found["seconds"] == sorted(found["seconds"]) and found["parameters"] == task.size
    assert (tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"{expected[-1]:.4e}" in said and "ended: steps" in said


@pytest.mark.parametrize("optimizer", [name for name in LEARNING if name not in ("sgd", "kfac")])
def test_every_optimizer_lowers_the_loss(optimizer):
    task = make_task("digits-memorize", depth=2, width=3, batch=5)
    first, last = float(task.loss().detach()), contenders.Trace(most=4)
    contenders.run(LEARNING[optimizer], task, last, LEARNING[optimizer].rate)
    assert last.losses[0] == pytest.approx(first, rel=1e-14) and last.best < first and last.ended == "steps"
    assert last.facts == task.measured()


def test_steps_uphill_end_where_the_loss_was_least():
    def until_uphill(trace, note):
        if trace.losses[-1] > 1.5 * trace.best:
            raise Finished

    task, trace = make_task("poisson", 0, width=6), contenders.Trace(most=60, watch=until_uphill)
    contenders.run(LEARNING["gauss-newton-geodesic"], task, trace)
    assert trace.losses[-1] > trace.best == task.loss().item() and trace.facts == task.measured()


@pytest.mark.parametrize("optimizer", list(CONTROL))
def test_a_pendulum_is_trained_as_by_the_functions(optimizer):
    task, trace = make_task("pendulum", 1, depth=12), contenders.Trace(most=3)
    contenders.run(CONTROL[optimizer], task, trace)
    method = tasks.lbfgs if optimizer == "lbfgs" else tasks.newton
    how = {"curvature": "gauss-newton"} if optimizer == "gauss-newton" else {}
    expected = [record.cost for record in method(task.control, task.controls, most=3, **how).records]
    assert trace.losses[:3] == expected[:3] and trace.steps == 3 and trace.best < trace.losses[0]
    assert trace.facts["gradient norm"] > 0.0


def test_a_run_that_diverges_is_written_too(tmp_path):
    arguments = ["train", "--task", "autoencoder", *TINY, "--optimizer", "sgd", "--lr", "1e200", "--steps", "9"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    found = results(tmp_path)
    assert found["ended"] == "not finite" and found["losses"][-1] is None and math.isfinite(found["best"])


def interrupted_after(steps):
    def run(task, trace, rate):
        for k in range(100):
            if k == steps and trace.budget != math.inf:  # not in the first step, for which the clock stands still
                raise KeyboardInterrupt
            trace.add(1.0 / (k + 1))

    return Contender("slow", run, has_rate=False)


def test_an_interrupt_writes_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(LEARNING, "lbfgs", interrupted_after(3))
    arguments = ["train", *TINY, "--optimizer", "lbfgs", "--seconds", "9"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 130
    found = results(tmp_path)
    assert found["ended"] == "interrupted" and found["losses"] == [1.0, 1 / 2, 1 / 3]
    monkeypatch.setitem(LEARNING, "lbfgs", interrupted_after(0))
    assert cli.main([*arguments, "--out", str(tmp_path / "none")]) == 130
    assert "nothing was written" in capsys.readouterr().err and not list((tmp_path / "none").iterdir())


def test_an_interrupted_comparison_has_the_optimizers_that_are_through(tmp_path, monkeypatch):
    monkeypatch.setitem(LEARNING, "lbfgs", interrupted_after(3))
    arguments = ["bench-train", *TINY, "--seeds", "1", "--seconds", "0.05", "--optimizers", "gauss-newton,lbfgs"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 130
    assert [row["optimizer"] for row in results(tmp_path)["rows"]] == ["GaussNewton"]
    assert cli.main([*arguments[:-1], "lbfgs", "--out", str(tmp_path / "none")]) == 130
    assert not list((tmp_path / "none").iterdir())


def test_all_start_from_the_same_points_and_rates_are_the_best_of_the_grid(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("linop_hess.cli.contenders.importlib.util.find_spec", lambda _: None)
    arguments = ["bench-train", *TINY, "--seed", "4", "--seeds", "2", "--seconds", "0.1", "--tuning-seconds", "0.01"]
    names = "adam,kfac,lbfgs,saddle-free"
    assert cli.main([*arguments, "--clock", "cpu", "--optimizers", names, "--out", str(tmp_path)]) == 0
    found = results(tmp_path)
    said = capsys.readouterr().out
    assert found["skipped"] == {"K-FAC": "needs curvlinops, which is not installed: pip install curvlinops-for-pytorch"}
    assert "left out: K-FAC: needs curvlinops" in said
    rows = {row["optimizer"]: row for row in found["rows"]}
    assert list(rows) == ["Adam", "L-BFGS", "SaddleFree"]
    for k in range(2):
        first = float(make_task("digits-memorize", 4 + k, depth=3, width=4, batch=5).loss().detach())
        assert all(row["runs"][k]["losses"][0] == pytest.approx(first, rel=1e-14) for row in rows.values())
    scores = rows["Adam"]["tuning"]
    assert set(scores) == {f"{rate:g}" for rate in LEARNING["adam"].rates}
    assert scores[f"{rows['Adam']['lr']:g}"] == min(scores.values())
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert len(found["table"]) == 3 and all(len(line) == len(found["header"]) for line in found["table"])


def test_the_table_tells_medians_and_worst_seeds():
    traces = []
    for scale in (1.0, 2.0, 4.0):
        trace = contenders.Trace()
        trace.losses, trace.seconds = [scale, scale / 10, 1e-7 * scale], [0.1, 2.0, 6.0]
        traces.append(trace)
    header, cells = bench_train.table([bench_train.Row(LEARNING["lbfgs"], None, {}, traces)], 8.0, 3e-7)
    told = dict(zip(header, cells[0], strict=True))
    assert told["after 2 s"] == "2.0e-01 (4.0e-01)" and told["after 8 s"] == "2.0e-07 (4.0e-07)"
    assert told["≤ 1e-06"] == "3/3, 2 steps, 6.0 s" and told["≤ 3e-07"] == "2/3, 2 steps, 6.0 s"


def test_kfac_steps_are_those_of_its_kronecker_factors(tmp_path):
    pytest.importorskip("curvlinops")
    assert cli.main(["train", *TINY, "--optimizer", "kfac", "--steps", "8", "--out", str(tmp_path)]) == 0
    found = results(tmp_path)
    assert found["losses"] == sorted(found["losses"], reverse=True) and found["best"] < 0.7 * found["losses"][0]
