"""The tables of a chain: stages, widest cuts, the plan beside them, and what is said where memory does not suffice."""

import pickle
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess import _memory, tables
from linop_hess.lq.methods import plan as plan_module
from tests.graph.test_models import linearized

HIDDEN, STEPS, BATCH = 3, 4, 2


class Cell(nn.Module):
    """A recurrence by hand: x_t W + h V, tanh; V and W are used at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(2, HIDDEN, bias=False)
        self.step = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x):
        h = torch.tanh(self.read(x[:, 0]))
        for t in range(1, STEPS):
            h = torch.tanh(self.read(x[:, t]) + self.step(h))
        return self.head(h)


@pytest.fixture(scope="module")
def recurrent() -> lh.Linearization:
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, STEPS, 2).double(), torch.randn(BATCH, 2).double()
    return lh.linearize(Cell().double(), f.mse_loss, x, y)


def test_stages_of_a_recorded_model(recurrent):
    stages = recurrent.stages
    assert len(stages) == recurrent.problem.length == len(list(stages))
    assert [row.cut for row in stages] == recurrent.problem.layout.n_out.tolist()
    assert sum(row.p for row in stages) == recurrent.problem.size
    head = stages[-2]
    assert (head.name, head.operation, head.derivatives) == ("head", "addmm", "rule")
    assert (head.p, head.n_in, head.n_out, head.samples) == (2 * HIDDEN + 2, BATCH * HIDDEN, BATCH * 2, BATCH)
    assert stages[-1].operation == "loss" and stages[-1].derivatives == "double backward"
    assert stages[0].operation == "shared parameters" and stages[0].name == "" and stages[0].p == 2 * HIDDEN
    assert stages[-2:] == [head, stages[-1]] and {row.name for row in stages} >= {"read", "step", "head", "<model>"}


def test_a_stage_reads_and_computes_part_of_the_state(recurrent):
    adds = [row for row in recurrent.stages if row.operation == "add"]
    assert len(adds) == STEPS - 1
    for row in adds:
        assert (row.p, row.n_in, row.n_out) == (0, 2 * BATCH * HIDDEN, BATCH * HIDDEN) and row.cut >= row.n_out


def test_stages_of_a_plain_chain():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    lin = lh.linearize(model, f.mse_loss, torch.ones(5, 3).double(), torch.zeros(5, 2).double())
    assert [(row.name, row.operation, row.p, row.n_in, row.n_out) for row in lin.stages] == [
        ("0", "Linear", 16, 15, 20),
        ("1", "Tanh", 0, 20, 20),
        ("2", "Linear", 10, 20, 10),
        ("", "loss", 0, 10, 1),
    ]
    assert lin.problem.name(0) == "1 (0: Linear)" and lin.problem.name(3) == "4 (loss)"
    [cut] = lin.plan().cuts
    assert (cut.stage, cut.width, cut.holders) == (0, 20, {"0: Linear": 20})
    assert lin.plan().shared == ()


def test_text_and_html(recurrent):
    lines = str(recurrent.stages).splitlines()
    assert repr(recurrent.stages) == str(recurrent.stages)
    assert lines[0].split() == ["stage", "name", "operation", "p", "n_in", "n_out", "samples", "cut", "derivatives"]
    assert len(lines) == recurrent.problem.length + 1
    html = recurrent.stages._repr_html_()
    assert html.count("<tr>") == len(lines) and "&lt;model&gt;" in html and "<model>" not in html


def test_long_tables_are_cut():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(200))).double()
    lin = lh.linearize(model, f.mse_loss, torch.ones(1, 2).double(), torch.zeros(1, 2).double())
    lines = str(lin.stages).splitlines()
    assert len(lines) == 1 + 60 + 1 and "(141 more)" in lines[31] and lines[-1].split()[0] == "201"
    assert lin.stages[150].name == "150" and len(lin.stages[100:110]) == 10
    with pytest.raises(IndexError):
        lin.stages[201]


def test_a_problem_without_names():
    problem = linearized("chain_mlp", 1).problem
    table = tables.StageTable(lh.lq.Problem(problem.blocks, problem.order))
    assert table[1].operation == "stage 2" and table[1].derivatives == "given"


def test_widest_cut_by_hand(recurrent):
    """Widest at the second step: both weights, and what is between them and the next tanh."""
    widest = recurrent.plan().cuts[0]
    width = recurrent.problem.layout.n_out.max()
    assert widest.width == width == 2 * HIDDEN + HIDDEN**2 + 2 * BATCH * HIDDEN
    assert widest.width == recurrent.problem.layout.n_out[widest.stage]
    assert widest.holders["parameter read.weight"] == 2 * HIDDEN
    assert widest.holders["parameter step.weight"] == HIDDEN**2
    assert sum(widest.holders.values()) == width
    assert list(widest.holders.values()) == sorted(widest.holders.values(), reverse=True)


@pytest.mark.parametrize(
    "name", ["residual_pre_norm", "gru", "gpt_tied", "penalty_coupled", "unused_parameter", "pinn_in_the_loss"]
)
def test_holders_of_every_cut_add_up(name):
    lin = linearized(name, 3)
    cuts = lin._chain.cuts
    assert cuts.widths.tolist() == lin.problem.layout.n_out.tolist()
    for l in range(lin.problem.length):
        assert sum(cuts.holders(l).values()) == lin.problem.layout.n_out[l]


def test_shared_parameters(recurrent):
    shared = recurrent.plan().shared
    assert [(one.name, one.entries) for one in shared] == [("step.weight", HIDDEN**2), ("read.weight", 2 * HIDDEN)]
    stages = recurrent.stages
    for one in shared:
        module = one.name.removesuffix(".weight")
        assert stages[one.first].operation == "shared parameters"
        assert stages[one.last + 1].name == module and all(row.name != module for row in stages[one.last + 2 :])


def test_plan_is_printed_with_its_cuts(recurrent):
    plan = recurrent.plan()
    text = str(plan)
    assert "widest cuts" in text and "parameter step.weight (9)" in text
    assert "used several times" in text and "step.weight (9; stages" in text
    assert plan.costs == recurrent.plan(0.3).costs and "damping 0.3" in str(recurrent.plan(0.3))


def test_cuts_that_are_alike_are_shown_once():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(30))

        def forward(self, x):
            for block in self.blocks:
                x = x + torch.tanh(block(x))
            return x

    lin = lh.linearize(Residual().double(), f.mse_loss, torch.ones(2, 4).double(), torch.zeros(2, 4).double())
    cuts = lin.plan().cuts
    assert cuts[0].width == 16 and len(cuts) <= 3


def test_pickled(recurrent):
    again = pickle.loads(pickle.dumps(recurrent))
    assert str(again.stages) == str(recurrent.stages) and again.plan().cuts == recurrent.plan().cuts


class Wide(nn.Module):
    """Two activations of the whole batch are live at once, and samples meet in the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(40, 60), nn.Linear(60, 60), nn.Linear(60, 2)

    def forward(self, x):
        z = torch.tanh(self.up(x))
        return self.down(z + torch.tanh(self.mix(z) - z.mean(0)))


def available(monkeypatch: pytest.MonkeyPatch, nbytes: int, *modules: ModuleType) -> None:
    for module in modules:
        monkeypatch.setattr(module, "available_bytes", lambda: nbytes)


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return Wide().double(), f.mse_loss, torch.randn(400, 40).double(), torch.randn(400, 2).double()


def test_a_cut_too_wide_for_memory(wide, monkeypatch):
    """Each method's estimate is above what there is: refused with the widest cuts, and nothing is factored."""
    available(monkeypatch, 60 << 20, _memory, plan_module)
    lin = lh.linearize(*wide)
    message = rf"needs about(.|\n)* {2 * 60 * 400 + 60} (.|\n)*mix: addmm \(24000\)"
    assert lin.inverse(1e-2).method == "iterative"  # which keeps some vectors, no factors
    for call in (
        lambda: lin.inverse(1e-2, "banded"),
        lambda: lin.inverse(1e-2, "riccati"),
        lambda: lin.gauss_newton().inverse(1e-2, "dense"),
    ):
        with pytest.raises(MemoryError, match=message):
            call()


def test_states_too_wide_to_be_listed(wide, monkeypatch):
    available(monkeypatch, 2 << 20, _memory)
    with pytest.raises(
        MemoryError, match=r"is live after each of 9 operations(.|\n)*\(<model>: mean\) +48060"
    ) as raised:
        lh.linearize(*wide)
    assert str(raised.value).count("widest cuts") == 1


def test_sums_need_no_second_derivatives(wide, monkeypatch):
    """A mean over 400 samples was asked 146 MiB for, as if it had some."""
    available(monkeypatch, 60 << 20, _memory)
    lin = lh.linearize(*wide)
    v = np.random.default_rng(0).standard_normal(lin.problem.size)
    theirs = lh.Hessian(wide[0], wide[1], wide[2:]) @ v
    assert np.linalg.norm(lin.H @ v - theirs) <= 1e-13 * np.linalg.norm(theirs)
