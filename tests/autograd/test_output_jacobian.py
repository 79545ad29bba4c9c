"""Rows of the output's Jacobian against one backward pass for each row."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from linop_hess.autograd.output_jacobian import output_jacobian


def by_rows(run, parameters):
    with torch.enable_grad():
        output = run()
        rows = [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(y, parameters, retain_graph=True, materialize_grads=True)]
            )
            for y in output.flatten()
        ]
    return torch.stack(rows).view(len(output), -1, rows[0].numel())


class Made(nn.Module):
    """Weights that are made of parameters and constants, used twice; a scalar; a parameter that enters the data's own function."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (4,), ()))
        self.register_buffer("mask", (torch.rand(4, 3) > 0.3).double())
        self.norm, self.last = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(x @ (self.a * self.mask).T + self.b)
        h = self.norm(h) * torch.exp(self.b) + self.c
        first, second = self.last.weight.unbind(0)
        return self.last(h) + torch.stack([(h * first).sum(-1), (torch.relu(h) * second).sum(-1)], -1)


class Derivative(nn.Module):
    """What a physics-informed network computes: derivatives by the input."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        unit = torch.eye(2, dtype=x.dtype).expand(len(x), 2, 2)
        for layer in self.inner:
            if isinstance(layer, nn.Linear):
                x, unit = layer(x), unit @ layer.weight.T
            else:
                x = torch.tanh(x)
                unit = (1 - x * x)[:, None] * unit
        return torch.cat([x, unit[:, :, 0]], 1)


class Residual(nn.Module):
    """As users write it: derivatives by torch.autograd.grad, of any order, within the model."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.inner(x)
            (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first[:, 1].sum(), x, create_graph=True)
            return torch.stack([u[:, 0] * first[:, 0] - second[:, 1], u[:, 0]], 1)


class Functional(nn.Module):
    """The same by torch.func."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        return torch.func.vmap(torch.func.grad(lambda one: self.inner(one)[0].square()))(x)


ROWS = {
    "a plain network": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), (7, 3)),
    "one output": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)), (7, 3)),
    "weights that are made": (Made, (7, 3)),
    "derivatives by the input": (Derivative, (6, 2)),
    "derivatives by autograd inside": (Residual, (6, 2)),
    "derivatives by torch.func inside": (Functional, (6, 2)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 2)
        ),
        (5, 1, 4, 4),
    ),
    "running statistics": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).eval(),
        (6, 3),
    ),
    "an embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2)), None),
    "a recurrent cell": (lambda: nn.GRUCell(3, 4), (5, 3)),
    "outputs of several axes": (lambda: nn.Linear(3, 2), (4, 2, 3)),
    "one sample": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (1, 3)),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_those_of_one_backward_pass_each(name):
    make, shape = ROWS[name]
    torch.manual_seed(0)
    model = make().double()
    x = torch.randint(9, (6, 3)) if shape is None else torch.randn(shape, dtype=torch.float64)
    if len(x) > 1:
        x[-1] = x[0]  # a sample twice
    parameters = list(model.parameters())
    for samples in (None, len(x)):
        output, J = output_jacobian(lambda: model(x), parameters, samples)
        assert torch.equal(output, model(x).detach()) and not J.requires_grad
        expected = by_rows(lambda: model(x), parameters)
        assert float((J - expected).norm()) <= 1e-15 * J.shape[1] * float(expected.norm())
    assert all(p.grad is None for p in parameters)


def detached(model, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(torch.tanh(model(x)).sum(), x, create_graph=True)
        return slope * model(x).detach()


def masked(model, x):
    return x @ (model.weight * torch.ones(5, 3, dtype=x.dtype)).T


def two_calls(model, x):
    return torch.cat([model(x[:2]), model(x[2:])])


INTERACT = {
    "statistics of the batch": (lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), None),
    "a mean over the batch": (lambda: nn.Linear(3, 2), lambda model, x: model(x) - model(x).mean(0)),
    "attention over samples": (lambda: nn.Linear(3, 3), lambda model, x: torch.softmax(model(x) @ model(x).T, 1) @ x),
    "parts of the batch": (lambda: nn.Linear(3, 2), two_calls),
    "what a model detaches while it differentiates": (lambda: nn.Linear(3, 1), lambda model, x: detached(model, x)),
    "as many samples as rows of a weight that is made": (lambda: nn.Linear(3, 5, bias=False), masked),
    "a tuple": (lambda: nn.Linear(3, 2), lambda model, x: (model(x), x)),
    "a number": (lambda: nn.Linear(3, 2), lambda model, x: model(x).sum()),
    "no parameter": (lambda: nn.Linear(3, 2), lambda model, x: x),
}


@pytest.mark.parametrize("name", INTERACT)
def test_there_are_none_where_samples_interact_or_are_not_told(name):
    make, run = INTERACT[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(5, 3, dtype=torch.float64)
    assert output_jacobian(lambda: model(x) if run is None else run(model, x), list(model.parameters())) is None


def in_pieces(model, x):
    """A reentrant checkpoint, which autograd refuses to differentiate by what is within it."""
    return torch.utils.checkpoint.checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)


def forward_mode(model, x):
    return torch.func.jvp(lambda one: torch.tanh(model(one)), (x,), (torch.ones_like(x),))[1]


def clamped(model, x):
    with torch.no_grad():
        model.weight.clamp_(-2.0, 2.0)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(torch.tanh(model(x)).sum(), x, create_graph=True)[0]


def sparse(model, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = torch.sparse.mm(torch.eye(5, dtype=x.dtype).to_sparse(), torch.tanh(model(x)))
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


REFUSED = {
    "a reentrant checkpoint": in_pieces,
    "forward mode": forward_mode,
    "a parameter that is changed": clamped,
    "sparse tensors": sparse,
    "complex outputs": lambda model, x: torch.complex(model(x), x[:, :2]),
    "outputs in less precision": lambda model, x: model(x).float(),
    "outputs in half precision": lambda model, x: model(x).bfloat16(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_there_are_none_where_autograd_or_types_refuse(name):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    REFUSED[name](model, x)  # the model itself runs
    assert output_jacobian(lambda: REFUSED[name](model, x), list(model.parameters())) is None
    assert all(map(torch.equal, before, model.parameters())) and all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("error")
def test_normalized_weights_and_attention_warn_of_nothing():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 6, 3, dtype=torch.float64)

    def run():
        z = inner(x)
        return nn.functional.scaled_dot_product_attention(z, z, z).flatten(1)

    parameters = list(inner.parameters())
    _, J = output_jacobian(run, parameters)
    expected = by_rows(run, parameters)
    assert float((J - expected).norm()) <= 1e-14 * float(expected.norm())


@pytest.mark.parametrize("scale", [1e-8, 1e-14])
def test_a_coupling_of_a_sample_that_is_small_beside_the_others_is_seen(scale):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    sizes = torch.tensor([scale, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)[:, None]

    def coupled():
        y = model(x)
        return sizes * torch.cat([y[:1] + y[1:2], y[1:]])

    parameters = list(model.parameters())
    assert output_jacobian(coupled, parameters) is None
    _, J = output_jacobian(lambda: sizes * model(x), parameters)
    expected = by_rows(lambda: sizes * model(x), parameters)
    assert float(((J - expected) / sizes[:, :, None]).norm()) <= 1e-14 * float((expected / sizes[:, :, None]).norm())


@pytest.mark.parametrize("scale", [1e-7, 1e-13])
def test_a_parameter_that_matters_little_is_checked_by_itself(scale):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    little = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def mean_of_the_batch():
        return model(x) + scale * (x[:, :2] * little).mean(0)

    assert output_jacobian(mean_of_the_batch, [*model.parameters(), little]) is None
    assert output_jacobian(lambda: model(x) + scale * x[:, :2] * little, [*model.parameters(), little]) is not None


def test_a_coupling_that_is_small_is_seen():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    parameters = list(model.parameters())
    assert output_jacobian(lambda: model(x) + 1e-9 * model(x).mean(0), parameters) is None


def test_single_precision_and_memory(monkeypatch):
    torch.manual_seed(0)
    model, x = Derivative(), torch.randn(6, 2)
    _, J = output_jacobian(lambda: model(x), list(model.parameters()))
    assert float((J - by_rows(lambda: model(x), list(model.parameters()))).norm()) <= 1e-6 * float(J.norm())
    monkeypatch.setattr("linop_hess._memory.available_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match="Jacobian"):
        output_jacobian(lambda: model(x), list(model.parameters()))
