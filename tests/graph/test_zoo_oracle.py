"""The zoo and its truths: every case runs, and its Hessian is symmetric, indefinite, not negligible, and that of its gradient."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.graph.oracle import (
    differenced_product,
    distance_to_singular,
    hessian,
    inertia,
    made,
    primitive_operations,
    truth,
)
from tests.graph.zoo import CASES
from tests.graph.zoo_operations import DETACHING, OPERATIONS
from tests.helpers import oracle_gradient, oracle_hessian

BATCHES = (1, 5)
DAMPINGS = (1e-1, 1e-3, 1e-6, -1e-2)
EVERY = [(name, samples) for name in CASES for samples in BATCHES] + [(name, 3) for name in OPERATIONS]


@pytest.mark.parametrize("name, samples", EVERY)
def test_hessian_is_the_gradients_derivative(name, samples):
    case = made(name, samples)
    loss, gradient, H = truth(name, samples)
    norm = np.linalg.norm(H, 2)
    assert np.isfinite(loss) and gradient.shape == (case.size,) and H.shape == (case.size, case.size)
    assert sum(parameter.numel() for parameter in case.chosen().values()) == case.size
    # Nothing symmetrized it: a wrong second derivative shows here, as that of fused weight norm, off by 20 %.
    assert np.abs(H - H.T).max() <= 5e-15 * norm
    v = np.random.default_rng(0).standard_normal(case.size)
    v /= np.linalg.norm(v)
    if name in DETACHING:
        return  # differences see what is detached move, see `DETACHING`
    # Rounding of the differences is 1.5 eps ‖g‖/h = 1e-12 ‖g‖, and truncation h⁴ D⁽⁵⁾/30 is less; ‖g‖ ≤ 10 ‖H‖ is asserted below.
    assert np.linalg.norm(differenced_product(case, v) - H @ v) <= 1e-11 * norm


@pytest.mark.parametrize("name, samples", EVERY)
def test_hessian_is_indefinite_and_not_negligible(name, samples):
    _, gradient, H = truth(name, samples)
    values = np.linalg.eigvalsh((H + H.T) / 2)
    norm = np.abs(values).max()
    assert norm >= 0.1 and norm >= 0.1 * np.linalg.norm(gradient)
    assert values[0] <= -0.005 * norm and values[-1] >= 0.005 * norm
    # A lone direction is not enough: several of each sign, far from rounding.
    assert (values < -1e-6 * norm).sum() >= 2 and (values > 1e-6 * norm).sum() >= 2


@pytest.mark.parametrize("name, samples", EVERY)
def test_no_damping_is_an_eigenvalue(name, samples):
    """So inertias can be compared: every eigenvalue is further from zero than two right Hessians can be from each other.

    Two computations of H differ by less than 1e-13 ‖H‖, and by Weyl's theorem eigenvalues move by no more.
    """
    H = truth(name, samples)[2]
    for damping in DAMPINGS:
        assert distance_to_singular(H, damping) >= 1e-11, damping
        counts = inertia(H, damping)
        assert counts.negative + counts.positive == len(H) and counts.zero == 0


def test_names_are_unique():
    assert not CASES.keys() & OPERATIONS.keys()


@pytest.mark.parametrize("name", ["chain_mlp", "chain_embedding", "residual_pre_norm", "rnn", "gpt_tied"])
def test_truth_is_that_of_the_other_tests(name):
    case = made(name, 3)
    loss, gradient, H = truth(name, 3)
    data = (case.model, case.loss_fn, case.inputs, case.targets)
    assert loss == pytest.approx(float(case.loss_fn(case.model(case.inputs), case.targets).detach()), rel=1e-14)
    np.testing.assert_allclose(gradient, oracle_gradient(*data), rtol=0, atol=1e-14 * np.abs(gradient).max())
    np.testing.assert_allclose(H, oracle_hessian(*data), rtol=0, atol=1e-14 * np.abs(H).max())


@pytest.mark.parametrize("name", CASES)
def test_cases_are_fixed(name):
    """The same parameters and truths each time, no effect on torch's generator, float32 by conversion."""
    before = torch.get_rng_state()
    first, second = CASES[name](1), CASES[name](1)
    assert torch.equal(torch.get_rng_state(), before)
    for (label, p), (other, q) in zip(first.chosen().items(), second.chosen().items(), strict=True):
        assert label == other and torch.equal(p, q) and p.dtype == torch.float64
    single = first.to(torch.float32)
    assert single.chosen().keys() == first.chosen().keys()
    for label, p in single.chosen().items():
        assert p.dtype == torch.float32 and torch.equal(p, first.chosen()[label].float())
    loss = single.loss(single.chosen())
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(truth(name, 1)[0], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_oracle_changes_nothing(name):
    case = CASES[name](1)
    if not isinstance(case.model, nn.Module):
        return
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    modes = [module.training for module in case.model.modules()]
    hessian(case)
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert modes == [module.training for module in case.model.modules()]


def test_a_wrong_rule_for_many_rows_at_a_time_is_told(monkeypatch):
    case, genuine = made("chain_mlp", 1), torch.autograd.grad

    def wrong(*args, is_grads_batched=False, **options):
        found = genuine(*args, is_grads_batched=is_grads_batched, **options)
        return [part * (1 + 1e-8) for part in found] if is_grads_batched else found

    monkeypatch.setattr(torch.autograd, "grad", wrong)
    with pytest.raises(AssertionError):
        hessian(case)


@pytest.mark.parametrize("name", ["chain_mlp", "resnet_group_norm"])
def test_rows_together_are_rows_one_by_one(name):
    """Of the second torch has no rule for many rows at a time."""
    case = made(name, 1).to(torch.float64)
    with primitive_operations():
        leaf = torch.cat([value.detach().reshape(-1) for value in case.chosen().values()]).requires_grad_()
        values, parts = case.chosen(), leaf.split([value.numel() for value in case.chosen().values()])
        loss = case.loss({key: part.view(values[key].shape) for key, part in zip(values, parts, strict=True)})
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        alone = torch.stack([torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient[::17]])
    H = truth(name, 1)[2]
    np.testing.assert_allclose(H[::17], alone.numpy(), rtol=0, atol=1e-15 * np.linalg.norm(H, 2))
