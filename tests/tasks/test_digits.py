"""Learning tasks on digits and the register of tasks: data, initial points, options, errors."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from linop_hess.tasks import TASKS, LearningTask, ShootingTask, make_task, task_options


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_one_initial_point_and_leaves_generators_alone(name):
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    small = {k: v for k, v in {"depth": 3, "points": 4}.items() if k in task_options(name)}
    one, two, other = make_task(name, 3, **small), make_task(name, 3, **small), make_task(name, 4, **small)
    assert torch.equal(before, torch.random.get_rng_state()) and np.array_equal(numpy_before, np.random.get_state()[1])
    assert one.name == name and one.size == two.size
    if isinstance(one, ShootingTask):
        assert np.array_equal(one.controls, two.controls) and not np.array_equal(one.controls, other.controls)
        return
    assert isinstance(one, LearningTask)
    losses = [float(task.loss().detach()) for task in (one, two, other)]
    assert losses[0] == losses[1] != losses[2] and np.isfinite(losses[0])
    assert {p.dtype for p in one.model.parameters()} == {torch.float64}
    assert one.measured() == two.measured() and all(value >= 0.0 for value in one.measured().values())


def test_images_to_memorize_are_distinct_ones_of_the_data():
    task = make_task("digits-memorize", 0, depth=1, width=2, batch=1797)
    pixels, classes = load_digits(return_X_y=True)
    expected = torch.tensor((pixels - pixels.mean(0)) / pixels.std())
    order = torch.argsort(task.inputs @ torch.linspace(0.1, 1, 64).double())
    theirs = torch.argsort(expected @ torch.linspace(0.1, 1, 64).double())
    assert torch.equal(task.inputs[order], expected[theirs])
    assert torch.equal(task.targets[order], torch.tensor(classes)[theirs])


@pytest.mark.parametrize("name", ["digits", "autoencoder"])
def test_tests_are_on_images_that_are_not_trained_on(name):
    task = make_task(name, depth=1, width=4, batch=1437)
    pixels, classes = load_digits(return_X_y=True)
    every = torch.tensor((pixels - pixels.mean(0)) / pixels.std())
    distances = torch.cdist(every, task.inputs, compute_mode="donot_use_mm_for_euclid_dist")
    apart = (distances.min(1).values > 1e-9).nonzero()[:, 0]
    assert len(apart) == 360
    (value,) = task.measured().values()
    output = task.model(every[apart])
    if name == "digits":
        assert value == pytest.approx(float((output.argmax(1) != torch.tensor(classes)[apart]).double().mean()))
    else:
        assert value == pytest.approx(float((output - every[apart]).square().mean()), rel=1e-12)
        assert [layer.out_features for layer in task.model if isinstance(layer, nn.Linear)] == [1, 64]


def test_initializations():
    wide = {"depth": 2, "width": 400, "batch": 1}
    he, orthogonal, default = (
        make_task("digits-memorize", init=i, **wide).model[2] for i in ("he", "orthogonal", "default")
    )
    assert float(he.weight.detach().var() * 400) == pytest.approx((5 / 3) ** 2, rel=0.03)
    gram = orthogonal.weight.detach() @ orthogonal.weight.detach().T
    assert torch.allclose(gram, (5 / 3) ** 2 * torch.eye(400).double())
    assert float(default.weight.detach().abs().max()) <= 1 / 400**0.5 and bool(default.bias.detach().any())
    assert not bool(he.bias.detach().any())
    relu = make_task("digits-memorize", activation="relu", **wide).model
    assert isinstance(relu[1], nn.ReLU)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mnist", {}, "expected a task of"),
        ("digits", {"length": 3}, "got length: leave it out"),
        ("pendulum", {"width": 3}, "got width"),
        ("digits", {"batch": 1438}, "at most 1,437 images"),
        ("digits-memorize", {"activation": "cosine"}, "activation"),
        ("autoencoder", {"init": "zero"}, "init"),
        ("digits", {"depth": 0}, "depth"),
    ],
)
def test_wrong_options_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        make_task(name, **options)


def test_numbers_that_are_none_are_refused():
    with pytest.raises(TypeError, match="width"):
        make_task("digits", width="wide")
    with pytest.raises(ValueError, match="seed"):
        make_task("pendulum", -1)
