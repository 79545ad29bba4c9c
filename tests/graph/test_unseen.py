"""What a recording by templates does not see, or must not be misled by: no wrong answer follows, and memory of others is put back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import linop_hess as lh
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.recording.capture import Capture, capture
from linop_hess.graph.recording.repeats import Repeats
from linop_hess.graph.recording.trace import Recorder
from tests.graph.test_repeats import Layers, both, require_same

DATA = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OUTSIDE = torch.ones(4, dtype=torch.float64)


def recorded(model: nn.Module, by_repeats: bool = True) -> Capture:
    names = [name for name, _ in model.named_parameters()]
    return capture(model, functional.mse_loss, DATA, DATA.sin(), names, by_repeats=by_repeats)


def other_strides(x: Tensor) -> Tensor:
    """Has a template for the strides that the data of y get, whose elements stay those that they were."""
    known = (torch.linspace(0.1, 1.0, 16, dtype=x.dtype).view(4, 4) @ x.t()).t().tanh()
    y = x * 2.0
    y.data = (0.3 * x.detach()).t().contiguous().t()
    return y.tanh() + known


def test_data_of_other_strides() -> None:
    both(other_strides, True)


@pytest.mark.parametrize("by_repeats", [True, False])
def test_memory_that_a_tensor_leaves_is_not_taken_for_another(by_repeats: bool) -> None:
    """The address of the storage that y had must stay its own: with it, operations got lost in every fifth run."""
    model = Layers(other_strides)
    found = {" ".join(node.name for node in recorded(model, by_repeats).trace.nodes) for _ in range(40)}
    assert len(found) == 1


def counting(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """One that changes a tensor that is none of the model's, where each operation shows, and has it put back."""

    def run(x: Tensor) -> Tensor:
        OUTSIDE.add_(1.0)
        return function(x) * OUTSIDE.clone()

    return run


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.tanh() if torch.is_grad_enabled() else x.tanh() * 1.0001,
        lambda x: torch.func.vmap(torch.sin)(x),
        lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1],
    ],
)
def test_what_others_hold_is_put_back(function: Callable[[Tensor], Tensor]) -> None:
    mine, theirs = (recorded(Layers(counting(function)), by_repeats) for by_repeats in (True, False))
    require_same(mine, theirs)
    assert bool((OUTSIDE == 1.0).all())


class Alternating(Layers):
    """Gives one of several values in turn, by a state that is not the model's."""

    def __init__(self, values: int, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__(between)
        self.turn = itertools.cycle(range(1, values + 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * next(self.turn)


def hidden(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return torch.sin(x) * x


def only_in_graphs(x: Tensor) -> Tensor:
    return torch.autograd.grad(torch.sin(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("values", [2, 3, 4])
@pytest.mark.parametrize("between", [torch.tanh, hidden, only_in_graphs])
def test_alternating_values_are_refused(values: int, between: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match="same value each time"):
        recorded(Alternating(values, between))


def test_a_first_value_unlike_all_others_is_refused() -> None:
    model = Alternating(2, hidden)
    model.turn = itertools.chain([1], itertools.repeat(2))  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="same value each time"):
        recorded(model)


@pytest.mark.parametrize("between", [torch.tanh, hidden])
def test_hidden_changes_of_what_others_hold_are_refused(between: Callable[[Tensor], Tensor]) -> None:
    """They are not undone, and no answer may follow of what they left."""
    held = torch.ones(4, dtype=torch.float64)

    def changing(x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            held.add_(1.0)
        return between(x) * held.clone()

    with pytest.raises(UnsupportedModelError, match="same value each time"):
        recorded(Layers(changing))


def test_a_model_that_catches_everything_is_not_led_astray() -> None:
    def cautious(x: Tensor) -> Tensor:
        coarse = torch.tanh(x.float()) @ torch.ones(4, 4)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                again = torch.tanh(x.float()) @ torch.ones(4, 4)
        except BaseException:  # noqa: BLE001
            return x.cos()
        return coarse.double() * again.double() * x

    model = Layers(cautious)
    mine = recorded(model)
    assert not mine.by_repeats and "aten.cos" not in [node.name for node in mine.trace.nodes]
    require_same(mine, recorded(model, by_repeats=False))


def test_runs_twice_where_something_was_missed() -> None:
    runs = []

    def counted(x: Tensor) -> Tensor:
        runs.append(1)
        return hidden(x)

    assert not recorded(Layers(counted, depth=1)).by_repeats
    assert len(runs) == 2


def test_compiled_functions_run_as_they_are_written() -> None:
    compiled = torch.compile(lambda x: x.tanh() * x, backend="eager")
    both(lambda x: compiled(x) + x, True)
    with mock.patch.object(Recorder, "__enter__", side_effect=ValueError), pytest.raises(ValueError):
        recorded(Layers(compiled))
    assert torch._dynamo.eval_frame._stance.stance == "default"


class Narrowing(nn.Module):
    """Few calls are like one before."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(k + 1, k) for k in reversed(range(1, depth))).double()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.weight
            y = x * 2.0
            x = x + y.mul_(0.5)[:, :1]
        return x


def test_the_recorder_goes_on_alone_where_few_calls_are_alike() -> None:
    model, x = Narrowing(40), torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    run = model, functional.mse_loss, x, x[:, :1], [name for name, _ in model.named_parameters()]
    with mock.patch.object(Repeats, "_looked_into", autospec=True, side_effect=Repeats._looked_into) as looked:
        mine = capture(*run)
    assert mine.by_repeats and looked.call_count < 200
    require_same(mine, capture(*run, by_repeats=False))


def test_hessian_where_the_recorder_goes_on_alone() -> None:
    model = Narrowing(8)
    x = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with mock.patch("linop_hess.graph.recording.repeats._PATIENCE", 20):
        lin = lh.linearize(model, functional.mse_loss, x, x[:, :1])
    assert np.array_equal(lh.to_dense(lin.H), lh.to_dense(lh.linearize(model, functional.mse_loss, x, x[:, :1]).H))
    lin.verify()
