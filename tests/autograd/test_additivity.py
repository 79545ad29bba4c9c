"""Several batches add up to the loss of all data at once, or are refused; means that divide by something else take weight_fn."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as f

from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.errors import UnsupportedModelError
from linop_hess.operators import to_dense
from tests.autograd.settings import CURVATURES, mlp_and_batch, worst
from tests.helpers import make_batch, make_mlp, oracle_hessian

WEIGHT = torch.tensor([1.0, 9.0, 0.5], dtype=torch.float64)
SIZES = [3, 4, 1, 3]


def masked(output, target):
    return f.cross_entropy(output, target, ignore_index=2)


def smooth_targets(output, target):
    return f.cross_entropy(output, f.one_hot(target, 3).to(output) * 0.8 + 0.1, weight=WEIGHT)


def in_place(output, target):
    output.sub_(1.0)
    return f.cross_entropy(output, target)


WEIGHTED = functools.partial(f.cross_entropy, weight=WEIGHT)


def parts(*tensors):
    return list(zip(*(tensor.split(SIZES) for tensor in tensors), strict=True))


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize(
    ("loss_fn", "weight_fn"),
    [
        (masked, lambda x, y: (y != 2).sum()),
        (nn.CrossEntropyLoss(ignore_index=2), lambda x, y: (y != 2).sum()),
        (WEIGHTED, lambda x, y: WEIGHT[y].sum()),
        (nn.CrossEntropyLoss(weight=WEIGHT), lambda x, y: float(WEIGHT[y].sum())),
        (lambda o, t: f.nll_loss(f.log_softmax(o, 1), t, WEIGHT), lambda x, y: WEIGHT[y].sum()),
        (f.cross_entropy, lambda x, y: 3 * len(y)),
        (smooth_targets, None),  # a mean of samples, though its classes are weighted
        (in_place, None),
        (nn.MSELoss(), None),
    ],
    ids=[
        "masked",
        "ignored index",
        "weights in a partial",
        "weights in a module",
        "weights in a lambda",
        "three a sample",
        "smooth targets",
        "in place",
        "squares",
    ],
)
def test_means_are_those_of_all_data(kind, loss_fn, weight_fn):
    model, (x, y) = mlp_and_batch(samples=11)
    if isinstance(loss_fn, nn.MSELoss):
        y = x[:, :3].sin()
    one_batch = to_dense(kind(model, loss_fn, (x, y)))
    options = {"weight_fn": weight_fn} if weight_fn else {"reduction": "mean"}
    several = kind(model, loss_fn, parts(x, y), **options)
    assert worst(several, one_batch) <= 1e-13
    if kind is Hessian and loss_fn is not in_place:
        assert worst(several, oracle_hessian(model, loss_fn, x, y)) <= 1e-13


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize(
    ("loss_fn", "reduction", "weight_fn", "says"),
    [
        (masked, "mean", None, "pass weight_fn"),
        (WEIGHTED, "mean", None, "pass weight_fn"),
        (nn.CrossEntropyLoss(ignore_index=2), None, None, "ignore_index=2.*pass weight_fn"),
        (nn.CrossEntropyLoss(weight=WEIGHT), None, None, "class-weighted.*pass weight_fn"),
        (WEIGHTED, None, lambda x, y: len(y), "return such weights"),
        (f.cross_entropy, None, lambda x, y: 1.0, "return such weights"),
        (f.cross_entropy, "sum", None, 'reduction="mean"'),
        (functools.partial(f.cross_entropy, reduction="sum"), "mean", None, "pass weight_fn"),
        (lambda o, t: f.cross_entropy(o, t) ** 2, "mean", None, "pass weight_fn"),
        (lambda o, t: f.cross_entropy(o @ o.mT, torch.arange(len(o))), "mean", None, "pass weight_fn"),  # contrastive
    ],
)
def test_what_does_not_add_up_is_refused(kind, loss_fn, reduction, weight_fn, says):
    model, (x, y) = mlp_and_batch(samples=11)
    with pytest.raises(ValueError, match=says):
        kind(model, loss_fn, parts(x, y), reduction=reduction, weight_fn=weight_fn)
    kind(model, loss_fn, (x, y))


def test_equal_losses_and_vanishing_slopes_hide_nothing():
    x, y = make_batch(4, 3, 11)
    model = make_mlp([4, 5, 3])
    nn.init.zeros_(model[-1].weight), nn.init.zeros_(model[-1].bias)  # all samples have the loss log 3
    with pytest.raises(ValueError, match="pass weight_fn"):
        Hessian(model, masked, parts(x, y), reduction="mean")
    model = make_mlp([4, 5, 3])
    mask = (y != 2).double()[:, None]

    def fitted(output, target):
        return ((output - target[0]) ** 2 * target[1]).sum() / target[1].sum()

    data = [(a, (model(a).detach(), m)) for a, m in parts(x, mask)]
    with pytest.raises(ValueError, match="pass weight_fn"):
        Hessian(model, fitted, data, reduction="mean")
    H = Hessian(model, fitted, data, weight_fn=lambda a, t: t[1].sum())
    assert worst(H, to_dense(Hessian(model, fitted, (x, (model(x).detach(), mask))))) <= 1e-13


def test_confident_fits_are_not_refused():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-3)):
        model, (x, _) = mlp_and_batch(dtype, samples=11)
        with torch.no_grad():
            model[-1].weight *= 30
        y = model(x).argmax(1)
        H = Hessian(model, f.cross_entropy, parts(x, y), reduction="mean")
        assert worst(H, to_dense(Hessian(model, f.cross_entropy, (x, y)))) <= tolerance


def test_nests_shared_tensors_and_losses_inside_the_model():
    model, (x, y) = mlp_and_batch(samples=11)
    truth = oracle_hessian(model, WEIGHTED, x, y)

    def of_dict(output, target):
        return f.cross_entropy(output, target["labels"], weight=target["weight"])

    data = [(a, {"labels": b, "weight": WEIGHT}) for a, b in parts(x, y)]
    H = Hessian(model, of_dict, data, weight_fn=lambda a, t: t["weight"][t["labels"]].sum())
    assert worst(H, truth) <= 1e-13

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return {"loss": WEIGHTED(self.model(batch["x"]), batch["y"])}

    def given(output, target):
        return output["loss"]

    data = [({"x": a, "y": b}, None) for a, b in parts(x, y)]
    H = Hessian(Inside(), given, data, weight_fn=lambda batch, t: WEIGHT[batch["y"]].sum())
    assert worst(H, truth) <= 1e-13
    with pytest.raises(ValueError, match="pass weight_fn"):
        Hessian(Inside(), given, data, reduction="mean")


def test_sequences_of_unequal_lengths_take_weights():
    model = make_mlp([4, 5, 3])
    xs = [torch.linspace(-1, 1, n * t * 4).double().reshape(n, t, 4).cos() for n, t in ((2, 5), (3, 9), (1, 2))]
    ys = [(x.sum(-1) > 0).long() for x in xs]
    ys[1][0, 4:] = -100

    def loss_fn(output, target):
        return f.cross_entropy(output.flatten(0, -2), target.flatten())

    data = list(zip(xs, ys, strict=True))
    flat = torch.cat([x.flatten(0, 1) for x in xs]), torch.cat([y.flatten() for y in ys])
    H = Hessian(model, loss_fn, data, weight_fn=lambda x, y: (y != -100).sum())
    assert worst(H, oracle_hessian(model, loss_fn, *flat)) <= 1e-13
    with pytest.raises(ValueError, match="return such weights"):
        Hessian(model, loss_fn, data, weight_fn=lambda x, y: len(y))  # the halves of the masked batch tell
    with pytest.raises(ValueError, match="pass weight_fn"):
        Hessian(model, loss_fn, data, reduction="mean")
    summed = Hessian(model, functools.partial(lambda o, t: loss_fn(o, t) * (t != -100).sum()), data, reduction="sum")
    assert worst(summed, to_dense(H) * int((flat[1] != -100).sum())) <= 1e-13


def test_losses_that_differentiate_the_model_add_up():
    model = make_mlp([1, 6, 1])

    def residual(output, target):
        (slope,) = torch.autograd.grad(output.sum(), target, create_graph=True)
        return (slope + output - 1).square().mean()

    x = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None]
    points = [part.clone().requires_grad_() for part in x.split(SIZES)]
    whole = x.clone().requires_grad_()
    H = Hessian(model, residual, [(p, p) for p in points], reduction="mean")
    assert worst(H, to_dense(Hessian(model, residual, (whole, whole)))) <= 1e-13
    with pytest.raises(ValueError, match='reduction="mean"'):
        Hessian(model, residual, [(p, p) for p in points], reduction="sum")


def test_a_batch_without_weight_is_left_out():
    model, (x, y) = mlp_and_batch(samples=11)
    data = [*parts(x, y), (x, torch.full_like(y, 2))]
    H = Hessian(model, masked, data, weight_fn=lambda x, y: (y != 2).sum())
    assert worst(H, oracle_hessian(model, masked, x, y)) <= 1e-13


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "3 tokens", torch.ones(2), 0.0])
def test_weights_that_are_none_are_refused(weight):
    model, (x, y) = mlp_and_batch(samples=11)
    with pytest.raises(ValueError, match="weight"):
        GaussNewton(model, f.cross_entropy, parts(x, y), weight_fn=lambda x, y: weight)


def test_weights_of_sums_are_refused():
    model, (x, y) = mlp_and_batch(samples=11)
    for loss_fn, reduction in ((nn.CrossEntropyLoss(reduction="sum"), None), (f.cross_entropy, "sum")):
        with pytest.raises(ValueError, match="leave weight_fn out"):
            Hessian(model, loss_fn, parts(x, y), reduction=reduction, weight_fn=lambda x, y: len(y))


def test_chance_is_told_before_batches_that_do_not_add_up():
    model, (x, y) = mlp_and_batch(samples=11)
    with pytest.raises(UnsupportedModelError, match="fixed function"):
        Hessian(model, lambda o, t: f.cross_entropy(f.dropout(o), t), parts(x, y), reduction="mean")
