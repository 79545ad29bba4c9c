"""What the plan counts, of plain and of recorded networks, against what is done: calls of torch, and products it need not make."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import linop_hess as lh
from linop_hess._machine import Machine
from linop_hess.lq.iterative.convergence import product_calls, spectrum_of
from linop_hess.lq.matrix.assembly import assemble
from linop_hess.lq.matrix.assembly_plan import assembly_calls, plan_assembly
from linop_hess.lq.methods import base
from linop_hess.lq.methods.plan import make_plan
from tests.graph.zoo_structures import Recurrent
from tests.helpers import CountedCalls, make_mlp

SAMPLES = 4
WIDTH = 8


class Block(nn.Module):
    """A residual block, perhaps with attention over tokens."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True) if attends else None
        self.norm, self.first, self.second = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.attention is not None:
            h = self.attention(h, h, h)[0]
        return h + self.second(torch.tanh(self.first(self.norm(h))))


def gru() -> nn.Module:
    return Recurrent(nn.GRU(WIDTH, WIDTH, batch_first=True))


MODELS = {
    "plain": (lambda: make_mlp([WIDTH] * 8), (WIDTH,)),
    "plain, wide": (lambda: make_mlp([WIDTH] + [200] * 3 + [WIDTH]), (WIDTH,)),
    "residual": (lambda: nn.Sequential(*(Block(False) for _ in range(3))), (WIDTH,)),
    "residual, deep": (lambda: nn.Sequential(*(Block(False) for _ in range(30))), (WIDTH,)),
    "attention": (lambda: nn.Sequential(Block(True), nn.Flatten()), (5, WIDTH)),
    "GRU": (gru, (10, WIDTH)),
}


def linearized(name: str) -> lh.Linearization:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(SAMPLES, *shape).double()
    return lh.linearize(model, functional.cross_entropy, x, torch.arange(SAMPLES) % 3)


@pytest.fixture
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does not vary, of about the speed of one core."""
    kernels = ("gemm", "ldl", "cholesky", "substitution", "lu", "band")
    fixed = Machine(1.5e-6, 2e-11, 1e-10, {kernel: ((1.0, 1000.0), (1e-9, 5e-11)) for kernel in kernels})
    monkeypatch.setattr(base, "machine", lambda dtype: fixed)


@pytest.mark.parametrize("name", MODELS)
def test_calls_of_a_product(name: str) -> None:
    problem = linearized(name).problem
    v = torch.ones(problem.size, 1, dtype=torch.float64)
    problem.hessian_product(v)  # bands and wirings are made once
    with CountedCalls() as found:
        problem.hessian_product(v)
    transition = problem.transition
    told = product_calls(problem) - (transition.calls if transition.is_banded else 0.0)
    assert found.count / 1.5 <= told <= 1.5 * found.count


def test_no_spectrum_is_looked_at_where_iterating_cannot_pay(one_machine: None) -> None:
    analysis = linearized("GRU").H.analysis
    plan = make_plan(analysis, 1e-2)
    assert plan.costs["iterative"].at_least and not analysis.has(spectrum_of)


def test_no_spectrum_is_looked_at_for_a_method_that_factors() -> None:
    analysis = lh.lq.Analysis(linearized("GRU").problem)
    plan = lh.lq.Solver(analysis, 1e-2, "dense").plan
    assert plan.costs["iterative"].at_least and not analysis.has(spectrum_of)


@pytest.mark.parametrize("name", [name for name in MODELS if "wide" not in name])
def test_calls_of_an_assembly(name: str) -> None:
    problem = linearized(name).problem
    assemble(problem)  # wirings are made once
    with CountedCalls() as found:
        assemble(problem)
    plan = plan_assembly(problem)
    told = assembly_calls(problem) * -(-plan.samples // plan.chunk)
    assert found.count / 2.0 <= told <= 2.0 * found.count
