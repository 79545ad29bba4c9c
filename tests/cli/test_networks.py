"""The digits classifiers are alive, and seeded."""

import pytest
import torch

from linop_hess.cli.networks import ACTIVATIONS, digits_problem


def test_training_lowers_the_loss_and_seeds_leave_torch_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    losses = []
    for steps in (0, 60):
        p = digits_problem(depth=2, width=16, batch=64, train_steps=steps)
        losses.append(p.loss_fn(p.model(p.inputs), p.targets).item())
    assert losses[1] < 0.9 * losses[0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_hessian_of_a_deep_network_is_not_negligible(activation):
    p = digits_problem(activation=activation)
    gradient = torch.autograd.grad(p.loss_fn(p.model(p.inputs), p.targets), p.model[0].weight)[0]
    assert 1e-3 < gradient.norm() < 1e3
