"""What recording relies on: whether functions are fused, paths of modules, and what is told of all nodes of a signature at once."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from linop_hess.graph.grouping import alike, live_nodes, needed_of
from linop_hess.graph.lowering import may_be_split, split_late
from linop_hess.graph.recording.capture import Capture, capture


class Attending(nn.Module):
    """Attention, between a linear layer before and one after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)[:, None, None]
        return self.last(functional.scaled_dot_product_attention(h, h, h)[:, 0, 0])


class Copying(nn.Module):
    """Runs a copy of a part of itself on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        twin = copy.deepcopy(self.first)
        with torch.no_grad():
            twin.weight.zero_()
            scale = 1.0 + twin(x).abs().amax()  # of the bias alone
        return self.last(torch.tanh(self.first(x))) * scale


class Unused(nn.Module):
    """Computes much that nothing reads."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.rounds, self.first, self.last = rounds, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = y = torch.tanh(self.first(x))
        for _ in range(self.rounds):
            y = torch.sin(y)
        return self.last(h)


class Stepping(nn.Module):
    """Projects all samples at once and reads one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(1, 4)
        for row in self.first(x).split(1):
            h = torch.tanh(h + row)
        return self.last(h).expand(x.shape[0], 3)


def seen(model: nn.Module, batch: int = 1) -> Capture:
    """A recorded run."""
    torch.manual_seed(0)
    x = torch.randn(batch, 4, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    return capture(model.double(), functional.cross_entropy, x, torch.zeros(batch, dtype=torch.int64), names)


def test_fused_functions_are_found_on_the_way() -> None:
    found = seen(Attending())
    assert found.in_primitives and not any("scaled" in node.name for node in found.trace.nodes)
    assert not seen(Unused(0)).in_primitives


@pytest.mark.parametrize("hooked", [False, True])
def test_paths_are_those_of_modules_with_hooks_or_without(hooked: bool) -> None:
    model = Unused(1)
    if hooked:
        model.last.register_forward_hook(lambda module, args, output: None)
    before = [dict(vars(module)) for module in model.modules()]
    paths = [node.path for node in seen(model).trace.nodes if not node.in_loss]
    assert paths == ["first", "", "", "last"]
    assert [vars(module).keys() for module in model.modules()] == [own.keys() for own in before]


def test_a_copied_module_runs_as_the_copy_that_it_is() -> None:
    model = Copying().double()
    x = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names = [name for name, _ in model.named_parameters()]
    found = capture(model, functional.cross_entropy, x, torch.zeros(1, dtype=torch.int64), names)
    assert found.loss == float(functional.cross_entropy(model(x).detach(), torch.zeros(1, dtype=torch.int64)))


@pytest.mark.parametrize(("rounds", "is_told"), [(0, True), (2, True), (9, False)])
def test_nodes_that_are_needed_are_those_found_one_by_one(rounds: int, is_told: bool) -> None:
    run = seen(Unused(rounds))
    nodes, ids = run.trace.nodes, run.trace.ids
    one_by_one = live_nodes(nodes, run.output_ids, ids)
    told = needed_of(alike(nodes), run.output_ids, ids)
    assert (told is not None) == is_told
    if told is not None:
        at = np.sort(np.concatenate([one.members for one in told])).tolist()
        assert [id(nodes[k]) for k in at] == [id(node) for node in one_by_one]


@pytest.mark.parametrize("model", [Unused(0), Stepping()])
def test_rows_are_split_only_where_they_may_be(model: nn.Module) -> None:
    run = seen(model, 6)
    nodes, ids = run.trace.nodes, run.trace.ids
    is_split = isinstance(model, Stepping)
    assert may_be_split(alike(nodes), ids, len(nodes)) == is_split
    assert (len(split_late(nodes, ids)) > len(nodes)) == is_split
