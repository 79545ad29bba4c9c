"""The digits classifiers are alive, of the sizes that are asked for, and seeded."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import linop_hess as lh
from linop_hess.cli.models import ACTIVATIONS, FAMILIES
from linop_hess.cli.networks import digits_problem
from tests.helpers import dense_hessian

SIZES = {
    # depth, width, and the parameters that they make
    "mlp": (2, 3, (64 * 3 + 3) + (3 * 3 + 3) + (3 * 10 + 10)),
    "resmlp": (2, 3, (64 * 3 + 3) + 2 * (2 * 3 + 2 * (3 * 3 + 3)) + 2 * 3 + (3 * 10 + 10)),
    "convnet": (2, 2, (9 * 2 + 2) + 2 * (2 * 2 + 9 * 2 * 2 + 2) + (2 * 10 + 10)),
    # In a layer: two norms, the projections to queries, keys and values, that of the heads, and two Linears by way of 2 d.
    "transformer": (1, 4, (8 * 4 + 4) + 8 * 4 + (2 * 8 + 4 * 12 + 12 + 4 * 4 + 4 + 4 * 8 + 8 + 8 * 4 + 4) + 8 + 50),
    "gru": (1, 3, 3 * 3 * (8 + 3 + 2) + (3 * 10 + 10)),
}


@pytest.mark.parametrize("model", FAMILIES)
def test_training_lowers_the_loss_and_seeds_leave_torch_alone(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    losses = []
    for steps in (0, 60 if model == "mlp" else 150):
        p = digits_problem(depth=2, width=16, batch=64, train_steps=steps, model=model)
        losses.append(p.loss_fn(p.model(p.inputs), p.targets).item())
    assert losses[1] < 0.9 * losses[0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_hessian_of_a_deep_network_is_not_negligible(activation):
    p = digits_problem(activation=activation)
    gradient = torch.autograd.grad(p.loss_fn(p.model(p.inputs), p.targets), p.model[0].weight)[0]
    assert 1e-3 < gradient.norm() < 1e3


@pytest.mark.parametrize("model", FAMILIES)
def test_every_model_is_exact_at_small_sizes(model):
    depth, width, parameters = SIZES[model]
    p = digits_problem(depth, width, 3, model=model)
    lin = lh.linearize(p.model, p.loss_fn, p.inputs, p.targets)
    names = [name for name, _ in p.model.named_parameters()]
    shapes = [q.shape for q in p.model.parameters()]
    flat = torch.nn.utils.parameters_to_vector(p.model.parameters()).detach()

    def loss(theta):
        parts = theta.split([s.numel() for s in shapes])
        values = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return p.loss_fn(torch.func.functional_call(p.model, values, (p.inputs,)), p.targets)

    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
        H = dense_hessian(loss, flat).numpy()
    spectrum = np.linalg.eigvalsh(H)
    assert lin.problem.size == parameters == len(H)
    assert spectrum[0] < -1e-3 < 1e-2 < spectrum[-1]
    assert np.allclose(lh.to_dense(lin.H), H, rtol=0, atol=1e-13 * abs(spectrum).max())
    inverse = lin.inverse(1e-3)
    assert inverse.solve(lin.gradient).backward_error <= 1e-14
    assert inverse.inertia().negative == (spectrum < -1e-3).sum()


@pytest.mark.parametrize("width", [1, 3])
def test_widths_that_do_not_divide_into_heads_or_groups(width):
    for model in ("convnet", "transformer"):
        p = digits_problem(1, width, 2, model=model)
        assert p.model(p.inputs).shape == (2, 10)


def test_gates_are_not_to_be_chosen():
    with pytest.raises(ValueError, match="'gru', which has its own, got 'relu'"):
        digits_problem(model="gru", activation="relu")
