"""Which samples of a loss interact, decided exactly, and outputs that are nests; the truth is dense double backward in float64."""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f
from torch.utils import _pytree as pytree

import linop_hess as lh
from linop_hess import _memory
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.rules import loss as rule
from linop_hess.graph.rules.loss import linearize_loss
from tests.helpers import dense_hessian, make_mlp, oracle_hessian

B, WIDTH = 9, 3


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OUTPUT = normal(B, WIDTH, seed=1)
VALUES = normal(B, WIDTH, seed=2)
LABELS = torch.tensor([0, 1, -100, 2, 1, 0, -100, 2, 2])
WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def hard_examples(o, t):
    """The mean over the worst half of the batch: which samples these are depends on all, their derivatives do not."""
    return (o - t).square().sum(1).topk(len(o) // 2).values.mean()


def standardized_targets(o, t):
    return f.mse_loss(o, (t - t.mean(0)) / t.std(0))


def closed_gate(o, t):
    return f.mse_loss(o, t) + (f.relu(-o[0].square().sum()) * o[5]).sum()


APART = {
    "mean": f.mse_loss,
    "sum": lambda o, t: (o - t).pow(4).sum(),
    "weighted, ignored": lambda o, t: f.cross_entropy(o, LABELS, WEIGHTS.to(o.dtype)),
    "weighted, ignored, module": lambda o, t: nn.CrossEntropyLoss(weight=WEIGHTS.to(o.dtype))(o, LABELS),
    "hard examples": hard_examples,
    "standardized targets": standardized_targets,
    "some samples": lambda o, t: f.mse_loss(o[2:5], t[2:5]),
    "very different weights": lambda o, t: (10.0 ** torch.arange(-8, 10, 2).to(o.dtype)[:, None] * (o - t) ** 4).sum(),
    "a closed gate": closed_gate,
    "linear": lambda o, t: (o * t).sum(),
}
TOGETHER = {
    "contrastive": lambda o, t: f.cross_entropy(
        f.normalize(o, dim=1) @ f.normalize(t * o, dim=1).T, torch.arange(len(o))
    ),
    "log-sum-exp over the batch": lambda o, t: o.logsumexp(0).sum() + f.mse_loss(o, t),
    "variance": lambda o, t: f.mse_loss(o, t) + o.var(0).sum(),
    "square of a mean": lambda o, t: (o.mean() - t.mean()) ** 2 + o.sin().sum(),
    "normalized by the largest": lambda o, t: f.mse_loss(o / o.abs().max(), t),
    "standardized outputs": lambda o, t: f.mse_loss((o - o.mean(0)) / o.std(0), t),
    "ranking": lambda o, t: f.softplus(o[:, None, 0] - o[None, :, 0]).mean() + o.square().sum(),
    "weak": lambda o, t: f.mse_loss(o, t) + 1e-9 * (o[0] * o[8]).sum(),
    "far below the largest": lambda o, t: 1e9 * (o[3] - t[3]).square().sum() + 1e-9 * (o[0] * o[8]).sum(),
    "an open gate": lambda o, t: (f.relu(o[0].square().sum()) * o[5]).sum(),
    "root of a sum": lambda o, t: (o - t).norm(),
}
LOSSES = {**APART, **TOGETHER}


def true_hessian(loss, output, target):
    """By double backward of the outputs' concatenated floating tensors, in float64."""
    leaves, nest = pytree.tree_flatten(output)
    real = [k for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    sizes = [leaves[k].numel() for k in real]

    def flat_loss(flat):
        parts = list(leaves)
        for k, part in zip(real, flat.split(sizes), strict=True):
            parts[k] = part.reshape(leaves[k].shape)
        return loss(pytree.tree_unflatten(parts, nest), target)

    flat = torch.cat([leaves[k].double().reshape(-1) for k in real])
    return dense_hessian(flat_loss, flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_samples_interact_or_not(name, dtype):
    output, target = OUTPUT.to(dtype), VALUES.to(dtype)
    parts = linearize_loss(LOSSES[name], output, target)
    assert parts.stage.samples == (B if name in APART else 1) and parts.stage.dtype == dtype
    H = true_hessian(LOSSES[name], output, target.double())
    ours = parts.stage.dense_C()[0].double()
    # Entry by entry, to the last digit but one: however much larger another sample's may be. Rows that come out of the derivative of a
    # norm are sums of terms that cancel.
    scale = H.abs() if name in ("weak", "far below the largest", "very different weights") else H.abs().max()
    assert bool(((ours - H).abs() <= 8 * torch.finfo(dtype).eps * scale + 1e-300).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_pair_is_separated(dtype):
    output = OUTPUT.to(dtype)
    for a, b in itertools.combinations(range(B), 2):
        parts = linearize_loss(lambda o, _, a=a, b=b: 1e6 * o.square().sum() + 1e-12 * o[a, 0] * o[b, 2], output, None)
        assert parts.stage.samples == 1
        assert abs(float(parts.stage.c[0, 0, a * WIDTH, b * WIDTH + 2]) - 1e-12) <= 1e-18


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_flat_outputs_are_per_sample(count):
    """Outputs of shape (N,), as a regression's after squeeze()."""
    output, target = normal(count), normal(count, seed=3)
    parts = linearize_loss(f.mse_loss, output, target)
    assert parts.stage.samples == count and parts.stage.c.shape == (1, count, 1, 1)
    np.testing.assert_allclose(parts.stage.dense_C()[0], 2 / count * torch.eye(count), atol=1e-16)
    coupled = linearize_loss(lambda o, t: o.var() if count > 1 else o.square().sum(), output, target)
    assert coupled.stage.samples == 1


def test_samples_are_sought_in_the_first_dimension_only():
    output, target = normal(2, 7, 3), normal(2, 7, 3, seed=3)
    assert linearize_loss(lambda o, t: o.logsumexp(1).sum(), output, target).stage.samples == 2
    assert linearize_loss(lambda o, t: o.logsumexp(0).sum(), output, target).stage.samples == 1


NESTS = {
    "tuple": ((normal(7, 3), normal(7, 2, 2, seed=1)), 7),
    "dict": ({"mean": normal(7, 4), "more": [normal(7, seed=1), "label"]}, 7),
    "with constants": ((normal(7, 3), torch.arange(7), None), 7),
    "of different lengths": ((normal(7, 3), normal(5, 2, seed=1)), 1),
    "with a number": ((normal(7, 3), torch.tensor(0.7).double()), 1),
    "small": ((normal(3, 2), normal(3, 1, seed=1)), 3),
    "one sample": ([normal(1, 3), normal(1, 20, seed=1)], 1),
    "in two dtypes": ((normal(7, 3).float(), normal(7, 2, seed=1)), 7),
}


def over_all(output, _):
    """Couples the tensors of each sample where they agree in their number of samples."""
    tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
    together = len({t.shape[:1] for t in tensors}) == 1
    sums = [t.reshape(len(t), -1).sum(1) if t.ndim else t for t in (t.double() for t in tensors)]
    extra = torch.stack([s.sin() for s in sums]).prod(0).sum() if together else sums[0].sum() * sums[1].sum()
    return extra + sum((t.double() ** 3).sum() for t in tensors)


@pytest.mark.parametrize("name", NESTS)
def test_nests_of_outputs(name):
    output, samples = NESTS[name]
    parts = linearize_loss(over_all, output, None)
    H = true_hessian(over_all, output, None)
    tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    n = sum(t.numel() for t in tensors)
    assert sorted(parts.order.tolist()) == list(range(n)) and parts.stage.samples == samples
    np.testing.assert_allclose(
        parts.stage.dense_C()[0], H[parts.order][:, parts.order], atol=1e-12 * float(H.abs().max())
    )
    flat = torch.cat([t.double().reshape(-1) for t in tensors])
    if samples > 1:  # each sample's entries lie together
        owner = torch.cat([torch.arange(samples).repeat_interleave(t.numel() // samples) for t in tensors])
        assert bool((owner[parts.order].diff() >= 0).all())
    seed = torch.autograd.functional.jacobian(lambda u: over_all(_refilled(output, u), None), flat)
    np.testing.assert_allclose(parts.stage.row[0], seed[parts.order], atol=1e-12 * float(seed.abs().max()))


def _refilled(output, flat):
    leaves, nest = pytree.tree_flatten(output)
    start = 0
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            leaves[k] = flat[start : start + leaf.numel()].reshape(leaf.shape)
            start += leaf.numel()
    return pytree.tree_unflatten(leaves, nest)


def test_one_tensor_keeps_its_order():
    assert linearize_loss(f.mse_loss, OUTPUT, VALUES).order.tolist() == list(range(OUTPUT.numel()))


def test_losses_that_hold_float32_tensors_or_work_in_float32():
    output, weight = OUTPUT.float(), WEIGHTS.float()
    H = true_hessian(lambda o, t: f.cross_entropy(o, LABELS, WEIGHTS.float().double()), output, None)
    module = nn.CrossEntropyLoss(weight=weight)
    in_double = [(module, LABELS), (functools.partial(f.cross_entropy, weight=weight), LABELS)]
    in_single = [(lambda o, t: f.cross_entropy(o, t, weight), LABELS), (lambda o, t: module(o.float(), t), LABELS)]
    for loss, target in in_double + in_single:
        parts = linearize_loss(loss, output, target)
        assert parts.stage.dtype == torch.float32 and parts.stage.samples == B
        assert float((parts.stage.dense_C()[0] - H).abs().max()) <= 3e-7 * float(H.abs().max())
    assert module.weight is weight and weight.dtype == torch.float32


def test_the_dtype_may_be_asked_for():
    parts = linearize_loss(f.mse_loss, OUTPUT.float(), VALUES.float(), torch.float64)
    assert parts.stage.dtype == torch.float64
    np.testing.assert_allclose(parts.stage.dense_C()[0], 2 / OUTPUT.numel() * torch.eye(OUTPUT.numel()), atol=1e-17)


def test_outputs_that_cannot_be_used():
    with pytest.raises(TypeError, match="float16"):
        linearize_loss(f.mse_loss, OUTPUT.half(), VALUES)
    with pytest.raises(TypeError, match="real"):
        linearize_loss(lambda o, t: o.abs().sum(), OUTPUT.to(torch.complex128), VALUES)
    for output, seen in ((torch.arange(3), "int64"), ("text", "str"), ((), "nothing")):
        with pytest.raises(TypeError, match=f"floating tensor.*{seen}"):
            linearize_loss(lambda o, t: o, output, None)
    with pytest.raises(ValueError, match="empty batch"):
        linearize_loss(lambda o, t: o.sum(), OUTPUT[:0], None)
    with pytest.raises(UnsupportedModelError, match="three arguments"):
        linearize_loss(lambda o, t, params: o.sum(), OUTPUT, None)


def test_targets_are_constants_whatever_graph_they_carry():
    teacher = nn.Linear(WIDTH, WIDTH).double()
    with torch.inference_mode():
        inside = VALUES.clone()
    for target in (teacher(VALUES), {"a": [teacher(VALUES)]}, inside, (inside, 3)):
        tensor = next(leaf for leaf in pytree.tree_leaves(target) if isinstance(leaf, torch.Tensor))
        loss = functools.partial(lambda o, t: f.mse_loss(o, pytree.tree_leaves(t)[0]))
        parts = linearize_loss(loss, OUTPUT, target)
        np.testing.assert_allclose(
            parts.stage.row[0], 2 / OUTPUT.numel() * (OUTPUT - tensor).detach().reshape(-1), atol=1e-16
        )


def test_losses_that_differentiate_the_model_are_told_where_to_go():
    x = normal(4, 1).requires_grad_()

    def residual(u, x):
        return (torch.autograd.grad(u.sum(), x, create_graph=True)[0] + u).square().mean()

    for loss in (residual, lambda u, _: residual(u, x)):
        with pytest.raises(UnsupportedModelError, match=r"differentiates.*linop_hess\.Hessian"):
            linearize_loss(loss, x.sin(), x)


def test_random_losses_are_refused_and_draw_nothing():
    state = torch.random.get_rng_state()
    with pytest.raises(UnsupportedModelError, match="another value"):
        linearize_loss(lambda o, t: f.dropout(o, 0.5).square().sum(), OUTPUT, None)
    assert torch.equal(state, torch.random.get_rng_state())


def test_memory_is_asked_for_before_it_is_taken(monkeypatch):
    output = normal(300, 10)
    monkeypatch.setattr(_memory, "available_on", lambda device: 5 * 8 * 300 * 10**2)
    assert linearize_loss(f.mse_loss, output, torch.zeros_like(output)).stage.samples == 300
    with pytest.raises(MemoryError, match="3000 outputs, whose samples interact.*MiB"):
        linearize_loss(lambda o, t: o.var(0).sum(), output, None)
    monkeypatch.setattr(_memory, "available_on", lambda device: 8 * 300 * 10**2)
    with pytest.raises(MemoryError, match="300 samples by 10 outputs"):
        linearize_loss(f.mse_loss, output, torch.zeros_like(output))


class Inverse(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(x.view(-1, 6, 6) + 5 * torch.eye(6, dtype=x.dtype)).flatten(1)


class Softmaxes(nn.Module):
    """A softmax over all that a sample has, twice."""

    def forward(self, x):
        return x.softmax(1) * x.log_softmax(1)


@pytest.mark.parametrize(
    ("layers", "bytes", "words"),
    [
        ([nn.Linear(3, 64), nn.LayerNorm(64), nn.Linear(64, 2)], 30_000, "LayerNorm.*runs of 64 entries"),
        ([nn.Linear(3, 36), Inverse()], 400_000, "aten.linalg_inv_ex in module '1', 180 outputs by 180 inputs, dense"),
        ([nn.Linear(3, 64), Softmaxes(), nn.Linear(64, 2)], 30_000, "aten._softmax in module '1'"),
    ],
)
def test_norms_and_other_operations_ask_for_memory(layers, bytes, words, monkeypatch):
    model = nn.Sequential(*layers).double()
    x = normal(5, 3)
    monkeypatch.setattr(_memory, "available_on", lambda device: bytes)
    with pytest.raises(MemoryError, match=words):
        lh.linearize(model, f.mse_loss, x, torch.zeros_like(model(x)))


def neighbours(o, t):
    """A sample with a heavy weight, and a term between neighbours: public fault s02."""
    return 0.5e5 * (o[:1] - t[:1]).square().sum() + 0.5 * (o[1:] - o[:-1]).square().sum()


def test_a_weak_coupling_is_kept_in_float32_and_its_loss_seen_by_verify(monkeypatch):
    model = make_mlp([2, 6, 2], dtype=torch.float32)
    x, y = normal(12, 2).float(), normal(12, 2, seed=1).float()
    twin = make_mlp([2, 6, 2])
    twin.load_state_dict(model.state_dict())
    H = oracle_hessian(twin, neighbours, x.double(), y.double())
    lin = lh.linearize(model, neighbours, x, y)
    assert np.abs(lh.to_dense(lin.H) - H).max() <= 1e-6 * np.abs(H).max()
    assert lin.verify() <= 1e-6
    monkeypatch.setattr(rule, "_are_apart", lambda *_: True)
    broken = lh.linearize(model, neighbours, x, y)
    assert (
        1e-5 < np.abs(lh.to_dense(broken.H) - H).max() / np.abs(H).max() < 1e-2
    )  # what verify's former bound let pass
    with pytest.raises(ArithmeticError, match="differs from double backward"):
        broken.verify()
