"""Linearizing again: bit for bit what `linearize` gives, faster, and never by what was true of another run."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess.errors import UnsupportedModelError
from linop_hess.linearization import linearize_again
from tests.helpers import oracle_hessian

CE = nn.CrossEntropyLoss()


class Shared(nn.Module):
    """Records: a weight that is used twice, a norm, a residual, rows that are computed late."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.norm, self.out = nn.Linear(4, 5), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h + torch.tanh(self.cell(self.norm(h)))
        return self.out(torch.tanh(self.cell(h)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.RNN(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.cell(x.view(len(x), 2, 2).repeat(1, 1, 2))[0][:, -1])


class Branching(nn.Module):
    """Goes another way, or picks other entries, by what its parameters are."""

    def __init__(self, picks: bool) -> None:
        super().__init__()
        self.picks, self.a, self.b = picks, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x)
        if self.picks:
            return self.b(torch.sort(h, 1).values)
        return self.b(torch.tanh(h)) if float(h.detach().mean()) > 0 else self.b(torch.sin(h) * h)


def sequential():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


MODELS = {
    "layers": sequential,
    "shared": Shared,
    "recurrent": Recurrent,
    "branch": lambda: Branching(False),
    "sort": lambda: Branching(True),
}


def made(name):
    torch.manual_seed(1)
    model = MODELS[name]().double()
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.orthogonal_(p, 1.5)
    x = torch.randn(7, 4, dtype=torch.float64)
    return model, torch.cat([x, x[:2]]), torch.randint(3, (9,))


def moved(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def require_same(lin, anew):
    assert lin.loss == anew.loss and np.array_equal(lin.gradient, anew.gradient)
    V = np.random.default_rng(0).standard_normal((anew.problem.size, 3))
    assert np.array_equal(lin.H @ V, anew.H @ V)
    assert np.array_equal(lin.gauss_newton() @ V, anew.gauss_newton() @ V)
    assert [str(label) for label in lin.problem.names] == [str(label) for label in anew.problem.names]


@pytest.mark.parametrize("name", MODELS)
def test_as_linearized_anew(name):
    model, x, y = made(name)
    lin = first = lh.linearize(model, CE, x, y)
    before = lh.to_dense(first.H)
    kept = 0
    for seed in range(5):
        if seed == 3:
            other = copy.deepcopy(model)
            moved(other, seed)
            model.load_state_dict(other.state_dict())
        else:
            moved(model, seed)
        new, state = lin.again(), copy.deepcopy(model.state_dict())
        require_same(new, lh.linearize(model, CE, x, y))
        H = oracle_hessian(model, CE, x, y)
        assert np.abs(lh.to_dense(new.H) - H).max() <= 1e-12 * np.abs(H).max()
        assert (np.linalg.eigvalsh(H) < -1e-3 * np.abs(H).max()).any()  # not the easy case
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        kept += new.told.known.layout is lin.told.known.layout
        lin = new
    assert np.array_equal(lh.to_dense(first.H), before)  # a snapshot
    if name in ("layers", "shared", "recurrent"):
        assert kept == 5
    else:
        assert kept < 5  # it went another way, which was noticed


def test_a_branch_that_flips_and_flips_back():
    model, x, y = made("branch")
    lin = lh.linearize(model, CE, x, y)
    operations = set()
    for bias in (3.0, -3.0, 3.0, 3.0):
        with torch.no_grad():
            model.a.bias.fill_(bias)
        lin = lin.again()
        require_same(lin, lh.linearize(model, CE, x, y))
        operations.add(any("sin" in str(label) for label in lin.problem.names))
    assert operations == {True, False}


@pytest.mark.parametrize("name", ["layers", "shared"])
def test_another_batch(name):
    """Of another size, of another dtype of targets, and of the same size."""
    model, x, y = made(name)
    lin = lh.linearize(model, CE, x, y)
    for inputs, targets in [(x[:4], y[:4]), (x.flip(0), y.flip(0)), (x, torch.softmax(torch.randn(9, 3).double(), 1))]:
        require_same(lin.again(inputs, targets), lh.linearize(model, CE, inputs, targets))
    with pytest.raises(TypeError, match="both"):
        lin.again(x)


@pytest.mark.parametrize("name", ["layers", "shared"])
def test_data_that_the_model_does_not_take(name):
    """What torch says of a layer is said of the data, and what is no matter of shapes stays as it is."""
    model, x, y = made(name)
    lin = lh.linearize(model, CE, x, y)
    with pytest.raises(
        ValueError, match=r"Tensor \(9, 4\) with Tensor \(9,\), got Tensor \(9, 3\) with .*: pass one batch"
    ):
        lin.again(x[:, :3], y)
    with pytest.raises(ValueError, match=r"got Tensor \(9, 4\) with Tensor \(3,\)"):
        lin.again(x, y[:3])
    with pytest.raises(
        TypeError, match=r"got list of tuple of Tensor \(9, 4\), Tensor \(9,\) with NoneType.* linearize\(model"
    ):
        lin.again([(x, y)], None)
    with pytest.raises(TypeError, match="^expected inputs of the parameters' dtype"):
        lin.again(x.float(), y)
    with pytest.raises(IndexError, match="out of bounds"):
        lin.again(x, y + 7)
    require_same(lin.again(), lh.linearize(model, CE, x, y))  # nothing is left behind


def test_constants_that_say_what_is_moved():
    """Integers of the batch are compared, as they may choose entries."""

    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Parameter(torch.randn(5, 4).double()), nn.Linear(4, 3).double()

        def forward(self, index):
            return self.out(torch.tanh(self.table[index]) ** 2)

    model, y = Picks(), torch.tensor([0, 1, 2, 1])
    index = torch.tensor([0, 1, 2, 3])
    lin = lh.linearize(model, CE, index, y)
    for other in ([0, 1, 2, 3], [4, 4, 0, 1], [1, 0, 2, 3]):
        moved(model, 5)
        lin = lin.again(torch.tensor(other), y)
        require_same(lin, lh.linearize(model, CE, torch.tensor(other), y))


def test_a_model_that_changes():
    """Modules, modes and hooks are looked at each time; a random model is refused though it was not."""
    model, x, y = made("layers")
    lin = lh.linearize(model, CE, x, y)
    model[1] = nn.ReLU()
    require_same(lin.again(), lh.linearize(model, CE, x, y))
    model[1] = nn.Dropout(0.5)
    with pytest.raises(UnsupportedModelError, match="random"):
        lin.again()
    model[1] = nn.Tanh()
    handle = model[0].register_forward_hook(lambda module, args, output: 2 * output)
    require_same(lin.again(), lh.linearize(model, CE, x, y))
    handle.remove()
    model[0] = nn.Linear(4, 7).double()
    model[2] = nn.Linear(7, 6).double()
    require_same(lin.again(), lh.linearize(model, CE, x, y))
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        lin.again()


def test_a_penalty_and_surrogates():
    model, x, y = made("shared")

    def penalized(output, target, params):
        return CE(output, target) + 0.1 * sum(p.square().sum() for p in params.values())

    lin = lh.linearize(model, penalized, x, y)
    moved(model, 1)
    new = lin.again()
    require_same(new, lh.linearize(model, penalized, x, y))
    assert new.problem.diagonal is not None
    rough = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    lin = lh.linearize(rough, CE, x, y, nonsmooth="smooth", sharpness=3.0)
    moved(rough, 2)
    require_same(lin.again(), lh.linearize(rough, CE, x, y, nonsmooth="smooth", sharpness=3.0))


def test_without_a_model(tmp_path):
    model, x, y = made("layers")
    lin = lh.linearize(model, CE, x, y)
    lin.save(tmp_path / "lin.pt")
    of_function = lh.linearize(lambda p, x: x @ p["w"], CE, x, y, params={"w": torch.randn(4, 3).double()})
    for other in (lh.Linearization.load(tmp_path / "lin.pt"), of_function):
        with pytest.raises(RuntimeError, match="call linearize"):
            other.again()


def test_another_model_is_not_taken_for_the_same():
    """What one tells another is its structure at most: the other is run twice, as at first."""
    model, x, y = made("shared")
    lin = lh.linearize(model, CE, x, y)
    calls = []

    class Counting(Shared):
        def forward(self, x):
            calls.append(None)
            return super().forward(x) + (1e-3 * len(calls) if len(calls) > 2 else 0.0)

    other = Counting().double()
    names = lin.names
    second = lin.told.reference.second
    linearize_again(lin.told, other, CE, x, y, names, second, verify=False)
    assert len(calls) == 2
    with pytest.raises(UnsupportedModelError, match="same value"):
        linearize_again(lin.told, other, CE, x, y, names, second)
