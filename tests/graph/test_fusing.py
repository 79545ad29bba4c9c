"""Products of matrices and the bias that is added to them, as one operation."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import linop_hess as lh
from tests.helpers import oracle_hessian


class Written(nn.Module):
    """Two layers as products and sums, written in one of several ways."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(3)
        shapes = ((4, 6), (6,), (6, 3), (3,))
        self.W, self.b, self.V, self.c = (nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes)
        self.way = way

    def affine(self, x, W, b):
        way = self.way
        if way == "bias first":
            return b + x @ W
        if way == "in place":
            return (x @ W).add_(b)
        if way == "constant bias":
            return x @ W + b.detach()
        if way == "bias is a state":
            return x @ W + torch.sin(b)
        if way == "read twice":
            product = x @ W
            return product + b + 0.3 * product.square()
        if way == "bias twice":
            return x @ W + b + b.square()
        if way == "with a factor":
            return torch.add(x @ W, b, alpha=0.5)
        if way == "a part is read":
            product = x @ W
            return product + b + product[:, :1].square()
        if way == "rows of a sequence":
            return (x.view(1, *x.shape) @ W + b)[0]
        if way == "bias of another shape":
            return x @ W + b[:1]
        return x @ W + b

    def forward(self, x):
        return self.affine(torch.tanh(self.affine(x, self.W, self.b)), self.V, self.c)


FUSED = ["plain", "bias first", "in place", "constant bias", "bias is a state", "rows of a sequence"]
APART = ["read twice", "with a factor", "a part is read", "bias of another shape"]


def linearized(way):
    model, generator = Written(way), torch.Generator().manual_seed(1)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    y = torch.arange(5) % 3
    return model, x, y, lh.linearize(model, functional.cross_entropy, x, y, verify=False)


@pytest.mark.parametrize("way", [*FUSED, *APART, "bias twice"])
def test_exact(way):
    model, x, y, lin = linearized(way)
    H = oracle_hessian(model, functional.cross_entropy, x, y)
    ours = lh.to_dense(lin.H)
    assert abs(ours - H).max() <= 1e-13 * abs(H).max()
    assert abs(H).max() > 0.1


@pytest.mark.parametrize("way", FUSED)
def test_a_product_and_its_bias_are_one_stage(way):
    names = [stage.operation for stage in linearized(way)[3].stages]
    assert names.count("addmm") == 2
    assert not {"mm", "add", "add_"} & set(names)


@pytest.mark.parametrize("way", APART)
def test_what_else_is_read_stays(way):
    names = [stage.operation for stage in linearized(way)[3].stages]
    assert names.count("mm") == 2 and "addmm" not in names


def test_a_product_that_the_loss_reads_stays():
    model = Written("plain")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            product = x @ model.W
            return torch.cat([product, product + model.b], 1)

    x, y = torch.ones(2, 4, dtype=torch.float64), torch.tensor([0, 7])
    lin = lh.linearize(Both(), functional.cross_entropy, x, y, params=["inner.W", "inner.b"], verify=False)
    assert "mm" in [stage.operation for stage in lin.stages]


def test_a_layer_of_recurrence_takes_the_stages_of_its_cells():
    class Recurrent(nn.Module):
        def __init__(self, layer):
            super().__init__()
            torch.manual_seed(0)
            self.rnn = nn.GRU(3, 4, batch_first=True) if layer else nn.GRUCell(3, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            if isinstance(self.rnn, nn.GRU):
                return self.head(self.rnn(x)[0][:, -1])
            h = x.new_zeros(len(x), 4)
            for step in x.unbind(1):
                h = self.rnn(step, h)
            return self.head(h)

    x, y = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([0, 2])
    counts = [
        lh.linearize(Recurrent(layer).double(), functional.cross_entropy, x, y).problem.length
        for layer in (True, False)
    ]
    assert counts[0] <= counts[1]
