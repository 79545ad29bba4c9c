"""Recording by templates gives what the dispatch mode alone gives, node by node, and misses nothing that no function shows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import linop_hess as lh
from linop_hess.autograd.calling import as_module
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.grouping import alike
from linop_hess.graph.lowering import lower
from linop_hess.graph.recording.capture import Capture, capture
from linop_hess.graph.recording.movement import Strided
from linop_hess.graph.recording.node import Node
from linop_hess.graph.recording.repeats import Repeats
from tests.graph import oracle
from tests.graph.case import Case
from tests.graph.oracle import made
from tests.graph.zoo import CASES
from tests.graph.zoo_operations import OPERATIONS


def ids_of(ids: Any) -> np.ndarray:
    return ids.ids() if isinstance(ids, Strided) else ids


def require_same(mine: Capture, theirs: Capture) -> None:
    """All of two recordings."""
    assert mine.loss == theirs.loss and mine.loss_id == theirs.loss_id and mine.in_primitives == theirs.in_primitives
    assert np.array_equal(mine.output_ids, theirs.output_ids) and mine.looks_inside == theirs.looks_inside
    assert all(map(torch.equal, mine.gradient, theirs.gradient))
    assert (mine.trace.ids, mine.trace.parameters) == (theirs.trace.ids, theirs.trace.parameters)
    require_same_nodes(mine.trace.nodes, theirs.trace.nodes)


def require_same_nodes(mine: Sequence[Node], theirs: Sequence[Node]) -> None:
    """All of their nodes."""
    assert [node.name for node in mine] == [node.name for node in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert (one.func, one.spec, one.active) == (other.func, other.spec, other.active)
        assert (one.path, one.in_loss, one.operation) == (other.path, other.in_loss, other.operation)
        assert one.outputs == other.outputs
        for a, b in zip(one.arguments, other.arguments, strict=True):
            assert type(a) is type(b) and np.array_equal(ids_of(a), ids_of(b))
        for a, b in zip(one.flat, other.flat, strict=True):
            if isinstance(a, Tensor):
                assert (a.shape, a.stride(), a.dtype, a.requires_grad) == (
                    b.shape,
                    b.stride(),
                    b.dtype,
                    b.requires_grad,
                )
                assert torch.equal(a, b)
            else:
                assert type(a) is type(b) and a == b


@pytest.mark.parametrize("name", [*CASES, *OPERATIONS])
def test_is_the_same_on_the_zoo(name: str) -> None:
    case = made(name, 3)
    model = case.model if isinstance(case.model, nn.Module) else as_module(case.model, case.params)
    run = model, case.loss_fn, case.inputs, case.targets, list(case.chosen())
    require_same(capture(*run), capture(*run, by_repeats=False))


class Layers(nn.Module):
    """Three layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth)).double()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.between(layer(x))
        return x


def both(between: Callable[[Tensor], Tensor], by_repeats: bool, depth: int = 3) -> Capture:
    """A recording, the same in both ways; whether functions showed all; and the Hessian is double backward's."""
    model = Layers(between, depth)
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    run = model, functional.mse_loss, x, x.sin()
    names = [name for name, _ in model.named_parameters()]
    mine = capture(*run, names)
    assert mine.by_repeats == by_repeats
    require_same(mine, capture(*run, names, by_repeats=False))
    H = oracle.hessian(Case(*run, 20 * depth))[2]
    assert np.abs(lh.to_dense(lh.linearize(*run).H) - H).max() <= 1e-13 * np.abs(H).max()
    return mine


def hidden(x: Tensor) -> Tensor:
    """What no function shows, as all that other libraries do."""
    with torch._C.DisableTorchFunction():
        return torch.sin(x) * x


def hidden_in_place(x: Tensor) -> Tensor:
    x = x * 1.0
    with torch._C.DisableTorchFunction():
        x.mul_(2.0)
    return x.clone()


def hidden_without_a_graph(x: Tensor) -> Tensor:
    """Doubles what a node holds after that has read it, and autograd has not saved it."""
    h = x * 1.0
    y = torch.tanh(h)
    with torch._C.DisableTorchFunction():
        h.detach().mul_(2.0)
    return y


def differentiated(x: Tensor) -> Tensor:
    return torch.autograd.grad(torch.sin(x).sum(), x, create_graph=True)[0] * x


def by_transform(x: Tensor) -> Tensor:
    return torch.func.vmap(torch.sin)(x) * x


class SineForTanh(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.sin if func is torch.tanh else func)(*args, **(kwargs or {}))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def within(mode: Callable[[], Any], function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with mode():
            return function(x)

    return run


def overwritten(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    z = y * 2.0  # holds y
    w = torch.tanh(y.clone().mul_(0.5).add_(z))
    return w + z


def written_views(x: Tensor) -> Tensor:
    y = x * 2.0
    z = y + x
    y[:, 0] = x[:, 1].sin()
    return y + z  # like what was recorded before, but for the elements


def other_data(x: Tensor) -> Tensor:
    other = x.detach().t().contiguous().t()  # in other places of memory
    y = x * 2.0
    z = y.tanh()
    y.data = other
    return y.tanh() * torch.arange(8.0, dtype=y.dtype).view(2, 4) + z


def by_itself(x: Tensor) -> Tensor:
    """Functions of one tensor twice, and of two alike."""
    y, b = x.t() @ x, x.sum(0)
    z = 2.0 * y
    return x @ sum(functional.linear(*of) for of in ((y, y, b), (y, z, b), (y, y), (z, y), (z, z, b)))


def relabelled(x: Tensor) -> Tensor:
    y = x * 2.0
    z = y.tanh()  # holds y as it is now
    y.t_()
    return y.tanh().t() * z


OUTSIDE = torch.linspace(0.5, 1.0, 4, dtype=torch.float64)


class TestWhatFunctionsShow:
    """It is recorded by templates, with what is not like what came before looked into."""

    @pytest.mark.parametrize(
        "between",
        [
            torch.tanh,
            lambda x: 0.5 * x + x,
            lambda x: x * x + x * x.sin() + x,
            lambda x: x + x.t().t(),
            lambda x: torch.add(x, x.sin(), alpha=2) - torch.sub(x, 1.0, alpha=3),
            lambda x: x @ (x.t() @ x) @ x.t().flatten().view(2, 4).mT @ x,
            lambda x: x * OUTSIDE + OUTSIDE.view(2, 2)[:, :1].expand(2, 4),
            lambda x: torch.nn.functional.relu(x * 1.0, inplace=True) + functional.silu(x),
            by_itself,
            lambda x: torch.mul(x, 2.0) + torch.mul(x.detach(), x),
            lambda x: functional.layer_norm(x, (4,)) + functional.softmax(x, dim=1) * functional.softmax(x, dim=0),
            lambda x: x.sum(1, keepdim=True) * x.mean(0) - x.sum() / 7,
            lambda x: torch.einsum("bi,bj->bij", x, x).sum(-1),
            lambda x: x.view(2, 2, 2).transpose(1, 2).reshape(2, 4) - 1.0 / (2.0 + x.square()),
            lambda x: (2.0 - x) * (1 - x) ** 2,
            lambda x: functional.linear(x[0], x.t()[:, :1].t() @ x.t() @ x) * x,
            differentiated,
            overwritten,
            written_views,
            other_data,
            relabelled,
            within(SineForTanh, torch.tanh),
            within(torch.no_grad, lambda x: x.sin()),
        ],
    )
    def test_is_recorded_as_by_the_mode_alone(self, between: Callable[[Tensor], Tensor]) -> None:
        if between(torch.ones(2, 4, requires_grad=True, dtype=torch.float64)).requires_grad:
            both(between, True)
        else:
            both(lambda x: between(x) * x, True)

    def test_what_is_put_back_after_the_run_is_held_as_it_was(self) -> None:
        growing = torch.ones(4, dtype=torch.float64)
        model, x = Layers(lambda x: torch.tanh(x + growing.mul_(1.5))), torch.ones(2, 4).double()
        run = model, functional.mse_loss, x, x, [name for name, _ in model.named_parameters()]
        mine = capture(*run)
        require_same(mine, capture(*run, by_repeats=False))
        held = [node.flat[1] for node in mine.trace.nodes if node.name == "aten.add"]
        assert [float(constant[0]) for constant in held] == [1.5, 1.5**2, 1.5**3]
        assert mine.by_repeats and bool((growing == 1.0).all())

    def test_is_a_template_from_the_second_time_on(self) -> None:
        with mock.patch.object(Repeats, "_looked_into", autospec=True, side_effect=Repeats._looked_into) as looked:
            capture(
                Layers(torch.tanh, 9),
                functional.mse_loss,
                torch.ones(2, 4).double(),
                torch.zeros(2, 4).double(),
                ["layers.0.weight"],
            )
        functions = [call.args[1] for call in looked.call_args_list]
        assert functions.count(functional.linear) <= 2 and functions.count(torch.tanh) == 1

    def test_numbers_are_told_apart(self) -> None:
        scales = [1, 1.0, True, 2, -0.5]
        run = both(lambda x: sum((x.tanh() * scale for scale in scales), start=x), True)
        numbers = [node.flat[1] for node in run.trace.nodes if node.name == "aten.mul"]
        assert [(type(a), a) for a in numbers] == [(type(a), a) for a in scales] * 3


class TestWhatNoFunctionShows:
    """All is recorded anew, within the dispatch mode."""

    @pytest.mark.parametrize(
        "between",
        [
            hidden,
            hidden_in_place,
            hidden_without_a_graph,
            by_transform,
            within(Watching, torch.sin),
        ],
    )
    def test_is_recorded_all_the_same(self, between: Callable[[Tensor], Tensor]) -> None:
        both(between, False)

    def test_casting_is_seen(self) -> None:
        def cast(x: Tensor) -> Tensor:
            y = torch.tanh(x) @ x.t()
            with torch.autocast("cpu", torch.bfloat16):
                coarse = torch.tanh(x) @ x.t()
            return (coarse.float() + y) @ x

        model, x = Layers(cast).float(), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        run = model, functional.mse_loss, x, x, [name for name, _ in model.named_parameters()]
        mine = capture(*run)
        assert not mine.by_repeats
        require_same(mine, capture(*run, by_repeats=False))

    def test_a_mode_outside_may_make_others_of_functions(self) -> None:
        class SineNowAndThen(TorchFunctionMode):
            calls = 0

            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.calls += func is torch.tanh
                return (torch.sin if func is torch.tanh and self.calls % 3 == 0 else func)(*args, **(kwargs or {}))

        model, x = Layers(torch.tanh), torch.ones(2, 4).double()
        run = model, functional.mse_loss, x, x.sin(), [name for name, _ in model.named_parameters()]
        with SineNowAndThen():
            mine = capture(*run)
        with SineNowAndThen():
            require_same(mine, capture(*run, by_repeats=False))
        assert [node.name for node in mine.trace.nodes if node.name in ("aten.sin", "aten.tanh")] == [
            "aten.tanh"
        ] * 2 + ["aten.sin"]

    def test_errors_are_those_of_the_mode_alone(self) -> None:
        class Negated(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return -x

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return -grad

        def in_a_thread(x: Tensor) -> Tensor:
            found: list[Tensor] = []
            thread = threading.Thread(target=lambda: found.append(x.sin()))
            thread.start()
            thread.join()
            return found[0]

        for between, message in ((Negated.apply, "Negated"), (in_a_thread, "another library")):
            model, x = Layers(between), torch.ones(2, 4).double()
            for by_repeats in (True, False):
                with pytest.raises(UnsupportedModelError, match=message):
                    capture(model, functional.mse_loss, x, x, ["layers.0.weight"], by_repeats=by_repeats)

    def test_a_parameter_may_be_a_constant_meanwhile(self) -> None:
        class Frozen(Layers):
            def forward(self, x: Tensor) -> Tensor:
                x = self.layers[1](x)
                self.layers[1].weight.requires_grad_(False)
                x = super().forward(x)
                self.layers[1].weight.requires_grad_(True)
                return x

        model, x = Frozen(torch.tanh), torch.ones(2, 4).double()
        run = model, functional.mse_loss, x, x, [name for name, _ in model.named_parameters()]
        mine = capture(*run)
        require_same(mine, capture(*run, by_repeats=False))
        weights = [node.active for node in mine.trace.nodes if node.name == "aten.addmm"]
        assert weights == [[0, 2], [0, 1, 2], [0, 1], [0, 1, 2]]

    def test_is_told_again(self) -> None:
        model, x = Layers(hidden), torch.ones(2, 4).double()
        lin = lh.linearize(model, functional.mse_loss, x, x)
        with mock.patch.object(Repeats, "__enter__", side_effect=AssertionError):
            again = lin.again()
        assert np.array_equal(again.gradient, lin.gradient)


class Norms(nn.Module):
    """Layer norms of one kind, one after the other."""

    def __init__(self, norm: Callable[[], nn.LayerNorm], frozen: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.norms = nn.ModuleList(norm() for _ in range(3))
        for name, parameter in self.norms.named_parameters():
            nn.init.normal_(parameter).requires_grad_(not frozen or frozen not in name)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for norm in self.norms:
            x = norm(x.sin() * 2.0)
        return x


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
@pytest.mark.parametrize("affine, bias", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
def test_layer_norms_are_lowered_together_as_one_by_one(
    shape: tuple[int, ...], affine: bool, bias: bool, frozen: str
) -> None:
    model = Norms(lambda: nn.LayerNorm(shape, elementwise_affine=affine, bias=bias), frozen)
    x = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    run = model, functional.mse_loss, x, x.sin()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    mine, theirs = (capture(*run, names, by_repeats=by_repeats).trace for by_repeats in (True, False))
    together, apart = (lower(trace, alike(trace.nodes), np.zeros(0, dtype=np.int64)) for trace in (mine, theirs))
    require_same_nodes(together, apart)
    assert (mine.ids == theirs.ids or not affine) and {type(node) for node in apart} == {Node}
    assert sum(type(node) is not Node for node in together) >= len(together) - 3
    assert [one.signature for one in alike(together)] == [one.signature for one in alike(apart)]
    lh.linearize(*run).verify()
