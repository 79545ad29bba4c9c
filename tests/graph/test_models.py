"""`lh.linearize` on the whole zoo: gradient, Hessian, solves and inertia against double backward and LAPACK."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from tests.graph.oracle import distance_to_singular, inertia, made, truth
from tests.graph.zoo import CASES
from tests.graph.zoo_operations import OPERATIONS
from tests.graph.zoo_structures import Recurrent
from tests.lq.problems import backward_error

DAMPINGS = (1e-1, 1e-3, 1e-6, -1e-2)
BATCHES = [(name, samples) for name in CASES for samples in (1, 5)]


@cache
def linearized(name: str, samples: int, dtype: torch.dtype = torch.float64) -> lh.Linearization:
    case = made(name, samples, dtype)
    return lh.linearize(case.model, case.loss_fn, case.inputs, case.targets, params=case.params)


def right_hand_sides(gradient: np.ndarray, damping: float) -> list[np.ndarray]:
    """The gradient, and at one damping a random one too."""
    drawn = [np.random.default_rng(0).standard_normal(len(gradient))] if damping == -1e-2 else []
    return [gradient, *drawn]


@pytest.mark.parametrize("name, samples", BATCHES)
def test_loss_and_gradient(name, samples):
    loss, gradient, _ = truth(name, samples)
    lin = linearized(name, samples)
    assert lin.names == tuple(made(name, samples).chosen())
    assert lin.loss == pytest.approx(loss, rel=1e-13)
    # PINNs subtract terms thirty times as large as their gradient, so that a rounding is 1e-14 of it.
    assert np.linalg.norm(lin.gradient - gradient) <= 1e-13 * np.linalg.norm(gradient)


@pytest.mark.parametrize("name, samples", BATCHES)
def test_hessian(name, samples):
    H = truth(name, samples)[2]
    found = linearized(name, samples).H @ np.eye(len(H))
    assert np.linalg.norm(found - H, 2) <= 1e-14 * np.linalg.norm(H, 2)


@pytest.mark.parametrize(
    "name, samples, damping",
    [(name, 5, damping) for name in CASES for damping in DAMPINGS] + [(name, 1, -1e-2) for name in CASES],
)
def test_inverse(name, samples, damping):
    """Backward errors and inertia by the oracle's H: no damping is an eigenvalue (`test_zoo_oracle`)."""
    _, gradient, H = truth(name, samples)
    inverse = linearized(name, samples).inverse(damping)
    for g in right_hand_sides(gradient, damping):
        solution = inverse.solve(g)
        assert backward_error(H, damping, solution.x, g) <= 1e-14
        assert solution.backward_error <= 1e-14
    assert inverse.inertia() == inertia(H, damping)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    """Any operation that torch differentiates twice, without a rule of its own."""
    loss, gradient, H = truth(name, 3)
    lin = linearized(name, 3)
    assert lin.loss == pytest.approx(loss, rel=1e-13)
    assert np.linalg.norm(lin.gradient - gradient) <= 1e-13 * np.linalg.norm(gradient)
    assert np.linalg.norm(lin.H @ np.eye(len(H)) - H, 2) <= 1e-14 * np.linalg.norm(H, 2)
    for damping in (1e-3, -1e-2):
        inverse = lin.inverse(damping)
        assert backward_error(H, damping, inverse @ gradient, gradient) <= 1e-14, damping
        assert inverse.inertia() == inertia(H, damping), damping


@pytest.mark.parametrize("method", ["riccati", "banded", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_every_certified_method(name, method):
    _, gradient, H = truth(name, 5)
    x = linearized(name, 5).inverse(-1e-2, method) @ gradient
    assert backward_error(H, -1e-2, x, gradient) <= 1e-14


@pytest.mark.parametrize("place, name", enumerate(CASES), ids=lambda value: str(value))
def test_float32(place, name):
    """In single precision torch's own double backward is up to 1.3e-6 ‖H‖ from that in double (transformer_decoder_layer).

    So solves are held to 1e-6 by the H that the package multiplies with, and that H to twice torch's error. One sample and five in turn,
    each with the large and the negative damping and with the small ones.
    """
    samples, dampings = (1, 5)[place % 2], (DAMPINGS[::3], DAMPINGS[1:3])[place // 2 % 2]
    _, gradient, truth_H = truth(name, samples, torch.float32)
    lin = linearized(name, samples, torch.float32)
    H = (lin.H @ np.eye(len(truth_H), dtype=np.float32)).astype(np.float64)
    norm = np.linalg.norm(truth_H, 2)
    assert np.linalg.norm(H - truth_H, 2) <= 3e-6 * norm
    # The terms of a PINN's gradient cancel, so what is small beside ‖H‖ is held to the rounding of ‖H‖.
    assert np.linalg.norm(lin.gradient - gradient) <= 1e-6 * np.linalg.norm(gradient) + 1e-6 * norm
    for damping in dampings:
        inverse = lin.inverse(damping)
        for g in right_hand_sides(gradient, damping):
            try:
                solution = inverse.solve(g.astype(np.float32))
            except lh.errors.FactorizationError:  # only what is singular to the precision may be refused
                assert distance_to_singular(truth_H, damping) <= np.finfo(np.float32).eps, damping
                continue
            assert solution.x.dtype == np.float32
            assert backward_error(H, damping, solution.x, g) <= 1e-6, damping
            assert backward_error(truth_H, damping, solution.x, g) <= 4e-6, damping
        if distance_to_singular(truth_H, damping) > 1e-5:  # else the 3e-6 by which H may differ decide
            assert inverse.inertia() == inertia(truth_H, damping), damping


@pytest.mark.parametrize("name", CASES)
def test_looking_changes_nothing(name):
    case = CASES[name](3)
    modules = list(case.model.modules()) if isinstance(case.model, nn.Module) else []
    before = _all_of(modules, case.params)
    rng = torch.get_rng_state()
    lin = lh.linearize(case.model, case.loss_fn, case.inputs, case.targets, params=case.params)
    lin.inverse(1e-1).solve(lin.gradient)
    assert torch.equal(torch.get_rng_state(), rng)
    after = _all_of(modules, case.params)
    assert before.keys() == after.keys()
    for key, (identity, version, value) in before.items():
        assert after[key][:2] == (identity, version), key
        same = torch.equal(after[key][2], value) if isinstance(value, torch.Tensor) else after[key][2] == value
        assert same, key


def _all_of(modules: list[nn.Module], params: object) -> dict[object, tuple[int, int, object]]:
    """Return what a model holds, each tensor with its identity and version: values, gradients, hooks, modes."""
    tensors: dict[object, object] = {(None, key): p for key, p in params.items()} if isinstance(params, dict) else {}
    found: dict[object, tuple[int, int, object]] = {}
    for place, module in enumerate(modules):
        found[place, "training"] = (0, 0, module.training)
        for key, value in vars(module).items():
            if isinstance(value, dict):
                found[place, key, "keys"] = (0, 0, list(value))
                tensors |= {(place, key, name): part for name, part in value.items() if isinstance(part, torch.Tensor)}
            elif isinstance(value, torch.Tensor):
                tensors[place, key] = value
    for key, value in tensors.items():
        found[key] = (id(value), value._version, value.detach().clone())
        found[key, "grad"] = (0, 0, (value.requires_grad, value.grad is None))
    return found


def test_steps_of_a_sequence_are_stages_of_one_stack():
    """nn.GRU multiplies all inputs at once, and each step reads a slice that begins elsewhere: as few kinds however many steps."""
    torch.manual_seed(0)
    model = Recurrent(nn.GRU(2, 3, batch_first=True)).double()
    y = torch.tensor([0, 2])
    short, long = (
        lh.linearize(model, nn.CrossEntropyLoss(), torch.randn(2, steps, 2).double(), y).problem for steps in (6, 9)
    )
    assert long.length > short.length + 20 and len(long.blocks) == len(short.blocks)
