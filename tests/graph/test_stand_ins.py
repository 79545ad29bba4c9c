"""What a model does to itself while it runs is put back, whatever it is; and what a model consists of is what torch says."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linop_hess.autograd.snapshot import Contents
from linop_hess.graph.recording.stand_ins import StandIns


class Holding(nn.Module):
    """Holds some of everything."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Embedding(3, 2, sparse=sparse))
        self.tied = self.inner[0]
        self.weight = self.inner[0].weight
        self.table = torch.arange(3.0)
        self.same_table = self.table
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.register_parameter("none", None)
        self.cache: dict[Any, Any] = {"a": [1, 2], "b": {"c": {3}}}
        self.other = OrderedDict(x=1, y=[2])
        self.counts: defaultdict[str, list[int]] = defaultdict(list)
        self.steps, self.flags = [1, [2]], {1, 2}
        self.last = "last"


def described(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """All that a value holds, in order; tensors and other objects by identity."""
    if id(value) in seen:
        return "again"
    inside = (*seen, id(value))
    if isinstance(value, nn.Module):
        return id(value), described(vars(value), inside)
    if isinstance(value, dict):
        return type(value), id(value), [(key, described(item, inside)) for key, item in value.items()]
    if isinstance(value, (list, set)):
        items = value if isinstance(value, list) else sorted(value)
        return type(value), id(value), [described(item, inside) for item in items]
    return type(value), value if isinstance(value, (int, str, float, bool)) else id(value)


def renamed(model: Holding) -> None:
    vars(model)["later"] = vars(model).pop("last")


def replaced_parameter(model: Holding) -> None:
    model.inner[0]._parameters["weight"] = nn.Parameter(torch.zeros(2, 2))


def new_module(model: Holding) -> None:
    model.extra = nn.BatchNorm1d(2)


CHANGES: list[Callable[[Holding], Any]] = [
    lambda model: None,
    lambda model: setattr(model, "last", "other"),
    lambda model: setattr(model, "new", 1),
    lambda model: setattr(model.inner[2], "new", 1),
    lambda model: delattr(model, "steps"),
    lambda model: model.steps.append(3),
    lambda model: model.steps[1].append(3),
    lambda model: model.flags.add(3),
    lambda model: model.cache["b"]["c"].clear(),
    lambda model: model.cache.update(a=model.cache["b"], b=model.cache["a"]),
    lambda model: model.cache.update(z=0),
    lambda model: model.cache.pop("a"),
    lambda model: model.other.move_to_end("x"),
    lambda model: model.other["y"].append(1),
    lambda model: model.counts["new"].append(1),
    lambda model: model.eval(),
    lambda model: model.inner[1].register_buffer("new", torch.ones(1)),
    lambda model: model.inner[0].register_forward_hook(lambda *_: None),
    lambda model: model.inner[0]._parameters.pop("bias"),
    lambda model: setattr(model, "table", torch.zeros(1)),
    lambda model: model.table.zero_(),
    lambda model: model.inner.append(nn.Linear(2, 2)),
    renamed,
    replaced_parameter,
    new_module,
]


@pytest.mark.parametrize("is_function", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_all_is_put_back(change: Callable[[Holding], Any], is_function: bool) -> None:
    model = Holding(sparse=not is_function)
    if not is_function:
        model.inner[0].register_full_backward_hook(lambda *_: None)
    contents, table = Contents.of(model), model.table.clone()
    others = {id(t): t.detach().clone() for t in [*contents.parameters.values(), *contents.buffers.values()]}
    before, stand_ins = described(model), StandIns(contents, others)
    for _ in range(2):
        with stand_ins:
            assert model.inner[0].weight is model.weight is others[id(contents.parameters["weight"])]
            assert model.table is model.same_table is not before and not model.inner[2].sparse
            assert not model.inner[0]._backward_hooks
            change(model)
        assert described(model) == before
        assert torch.equal(model.table, table)


class Told(nn.Module):
    """Names its parameters as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter([("called", self.weight)])


@pytest.mark.parametrize("model", [Holding(), Told(), nn.Linear(2, 2), nn.GRU(2, 2, bidirectional=True)])
def test_contents_are_what_torch_says(model: nn.Module) -> None:
    contents = Contents.of(model)
    for mine, theirs in (
        (contents.modules, model.named_modules()),
        (contents.parameters, model.named_parameters()),
        (contents.buffers, model.named_buffers()),
    ):
        assert [(name, id(value)) for name, value in mine.items()] == [(name, id(value)) for name, value in theirs]
    assert all(own[key] is tensor for own, key, tensor in contents.places)
    inside = [module._parameters | module._buffers for module in model.modules()]
    held: list[Tensor] = [t for own in inside for t in own.values() if t is not None]
    assert sorted(map(id, held)) == sorted(id(tensor) for _, _, tensor in contents.places)
    assert contents.has_all()
    next(iter(model.modules())).add_module("later", nn.Identity())
    assert not contents.has_all()
