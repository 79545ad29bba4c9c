"""Runs that are plain chains are told from others, and come out as they do where live sets are sought."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess.graph import recorded
from linop_hess.graph.recording.movement import Strided, fills
from linop_hess.tables import Cuts
from tests.graph.small_nets import CE, LINEAR, Net, prepared
from tests.helpers import oracle_gradient, oracle_hessian


def deep(net, x):
    for layer in (net.a, net.b, net.c):
        x = torch.tanh(layer(x))
    return net.d(x)


def layers(*widths):
    return {name: LINEAR(a, b) for name, a, b in zip("abcdefg", widths[:-1], widths[1:], strict=False)}


CHAINS = {
    "widths that repeat": (Net(deep, **layers(4, 5, 5, 5, 3)), (4,)),
    "widths that do not": (Net(deep, **layers(4, 5, 6, 2, 3)), (4,)),
    "shapes that change": (
        Net(lambda n, x: n.b(torch.tanh(n.a(x)).reshape(-1, 10)), a=LINEAR(4, 5), b=LINEAR(10, 3)),
        (2, 4),
    ),
    "norms": (
        Net(lambda n, x: n.b(n.c(torch.sin(n.a(x))).exp().sigmoid()), **layers(4, 5, 3), c=nn.LayerNorm(5)),
        (4,),
    ),
    "convolutions": (
        Net(lambda n, x: n.b(torch.tanh(n.a(x)).flatten(1)), a=nn.Conv2d(1, 2, 2), b=LINEAR(8, 3)),
        (1, 3, 3),
    ),
    "a generic operation": (Net(lambda n, x: n.b(torch.cumsum(n.a(x), 1)), **layers(4, 5, 3)), (4,)),
}


def tied(net, x):
    return net.c(torch.tanh(net.b(torch.tanh(net.b(torch.tanh(net.a(x)))))))


OTHERS = {
    "a branch": (Net(lambda n, x: n.c((h := n.a(x)) + torch.tanh(n.b(h))), **layers(4, 5, 5, 3)), (4,)),
    "a weight used twice": (Net(tied, **layers(4, 5, 5, 3)), (4,)),
    "a part of the state": (Net(lambda n, x: n.b(torch.tanh(n.a(x))[:, 1:]), a=LINEAR(4, 5), b=LINEAR(4, 3)), (4,)),
    "a state in another order": (Net(lambda n, x: n.b(torch.tanh(n.a(x)).flip(1)), **layers(4, 5, 3)), (4,)),
    "a transposed state": (
        Net(lambda n, x: (n.b.weight @ torch.tanh(n.a(x)).T).T, a=LINEAR(4, 5), b=LINEAR(5, 3, bias=False)),
        (4,),
    ),
    "a parameter that nothing reads": (Net(lambda n, x: n.a(x), a=LINEAR(4, 3), b=LINEAR(2, 2)), (4,)),
    "part of a parameter": (Net(lambda n, x: x @ n.a.weight[:3].T, a=LINEAR(4, 5, bias=False)), (4,)),
    "a product with itself": (Net(lambda n, x: (h := n.a(x)) * h, a=LINEAR(4, 3)), (4,)),
    "a parameter twice in one operation": (
        Net(lambda n, x: n.a(x) * (n.b.bias * n.b.bias), a=LINEAR(4, 3), b=LINEAR(1, 3)),
        (4,),
    ),
    "a state read later": (
        Net(lambda n, x: n.c(torch.tanh(n.b(h := torch.tanh(n.a(x)))) * h), **layers(4, 5, 5, 3)),
        (4,),
    ),
    "samples that meet": (Net(lambda n, x: n.b(n.a(x) - n.a(x).mean(0)), **layers(4, 5, 3)), (4,)),
}


def linearized(model, x, y):
    return lh.linearize(model, CE, x, y, verify=False)


@pytest.mark.parametrize("name", [*CHAINS, *OTHERS])
def test_chains_and_others_have_the_derivatives_of_autograd(name):
    net, shape = {**CHAINS, **OTHERS}[name]
    model, (x, y) = prepared(net, 4, *shape)
    lin = linearized(model, x, y)
    assert (type(lin._chain.cuts) is Cuts) == (name in CHAINS)
    H = oracle_hessian(model, CE, x, y)
    np.testing.assert_allclose(lin.H @ np.eye(len(H)), H, atol=1e-12 * abs(H).max())
    g = oracle_gradient(model, CE, x, y)
    np.testing.assert_allclose(lin.gradient, g, atol=1e-12 * abs(g).max())


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_what_live_sets_make_of_it(name, monkeypatch):
    model, (x, y) = prepared(CHAINS[name][0], 4, *CHAINS[name][1])
    mine = linearized(model, x, y)
    monkeypatch.setattr(recorded, "chain_of", lambda *arguments: None)
    theirs = linearized(model, x, y)
    assert type(theirs._chain.cuts) is not Cuts
    np.testing.assert_array_equal(mine.problem.order, theirs.problem.order)
    np.testing.assert_array_equal(mine.problem.places, theirs.problem.places)
    assert list(map(str, mine.problem.names)) == list(map(str, theirs.problem.names))
    assert [type(block) for block in mine.problem.blocks] == [type(block) for block in theirs.problem.blocks]
    for one, other in zip(mine.problem.blocks, theirs.problem.blocks, strict=True):
        assert all(map(torch.equal, one._arrays(), other._arrays()))
    assert [str(row) for row in mine.stages] == [str(row) for row in theirs.stages]


def test_parameters_that_an_operation_does_not_control_are_part_of_the_state():
    model = Net(lambda n, x: torch.sin(n.a.weight) * x[0], a=nn.LayerNorm(3, bias=False)).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    run = model, lambda z, y: (z - y).square().sum(), x, torch.ones(3).double()
    lin = lh.linearize(*run, verify=False)
    H = oracle_hessian(*run)
    np.testing.assert_allclose(lin.H @ np.eye(3), H, atol=1e-12 * abs(H).max())


def test_rows_of_one_number_are_told_from_others_in_all_that_is_asked_of_them():
    model, (x, y) = prepared(Net(lambda n, x: n.b(n.a(x).prod(1, keepdim=True)), a=LINEAR(4, 1), b=LINEAR(1, 3)), 4, 4)
    lin = linearized(model, x, y)
    assert "DiagonalStage" in {type(block).__name__ for block in lin.problem.blocks}
    H = oracle_hessian(model, CE, x, y)
    np.testing.assert_allclose(lin.H @ np.eye(len(H)), H, atol=1e-12 * abs(H).max())


def test_a_chain_goes_on_as_one():
    model, (x, y) = prepared(CHAINS["widths that repeat"][0], 4, 4)
    lin = linearized(model, x, y)
    with torch.no_grad():
        model.a.weight.mul_(1.1)
    again, anew = lin.again(), linearized(model, x, y)
    assert again._known.structure is lin._known.structure
    np.testing.assert_array_equal(again.gradient, anew.gradient)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (1, 4), (3, 1, 2)])
def test_whether_a_tensor_fills_its_memory(shape):
    for tensor in (torch.zeros(shape), torch.zeros(shape).T if len(shape) == 2 else torch.zeros(shape)):
        ids = Strided(7, tuple(tensor.shape), tensor.stride(), 0).ids()
        assert fills(tuple(tensor.shape), tensor.stride())
        assert fills(tuple(tensor.shape), tensor.stride(), in_order=True) == bool((np.diff(ids) == 1).all())
    for tensor in (torch.zeros(4, 5)[:, :3], torch.zeros(4, 5)[::2], torch.zeros(3, 1).expand(3, 4)):
        assert not fills(tuple(tensor.shape), tensor.stride())


def test_recording_does_not_import_the_compiler():
    script = """
import sys, torch, linop_hess as lh
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(3, 2)
    def forward(self, x):
        return torch.tanh(self.a(x))
lh.linearize(Net().double(), torch.nn.functional.cross_entropy, torch.ones(1, 3).double(), torch.tensor([1]))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
