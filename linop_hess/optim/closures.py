"""Which objective a step is given: a batch, or what a closure returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from linop_hess.autograd.backward_graph import depends_on, without_graphs
from linop_hess.autograd.calling import NOT_GIVEN
from linop_hess.autograd.differentiate import once_differentiable_graphs
from linop_hess.optim.objective import Batch, Closure, Loss, Objective, Scalar, described, number


def objective_of(
    parameters: Mapping[str, nn.Parameter], model: nn.Module, loss_fn: Loss | None, data: Any, targets: Any
) -> Objective:
    """Make the objective of ``step(inputs, targets)`` or ``step(closure)``.

    Raises
    ------
    TypeError
        If a closure returns neither ``(output, target)`` nor a scalar tensor, or a loss function is missing.
    ValueError
        If a closure calls ``backward()``, or the target that it returns depends on the parameters.
    """
    if data is NOT_GIVEN:
        raise TypeError(
            "expected step(inputs, targets) or step(closure), got nothing: pass a batch; backward() need not be called before"
        )
    if targets is not NOT_GIVEN or not callable(data):
        if targets is NOT_GIVEN:
            raise TypeError(
                f"expected step(inputs, targets) or step(closure), got {type(data).__name__} alone: pass targets too, or None"
            )
        if isinstance(data, DataLoader | Dataset | Iterator):
            raise TypeError(
                f"expected inputs of one batch in step(inputs, targets), got a {type(data).__name__}: step once for each batch, or with "
                "all data as one"
            )
        return Batch(parameters, model, _needed(loss_fn), data, targets)
    leaves = list(parameters.values())
    before = _gradients(leaves)
    with once_differentiable_graphs(leaves[0].device):
        calls, found = _watched(model, data)
    if any(now is not None and now != then for now, then in zip(_gradients(leaves), before, strict=True)):
        raise ValueError(
            "expected a closure that computes the loss alone, got one that differentiates it: leave backward() out, the optimizer "
            "differentiates"
        )
    if isinstance(found, Tensor):
        number(found)
        return Scalar(parameters, data)
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(
            f"expected a closure that returns (output, target) or a scalar loss, got {described(found)}: return the model's output and "
            "the target, the loss function is the optimizer's"
        )
    output, target = found
    loss_fn = _needed(loss_fn)
    if depends_on(target, leaves):
        raise ValueError(
            "expected a closure whose target is constant, got one that depends on parameters: .detach() it"
        )
    target = without_graphs(target)
    if len(calls) == 1 and calls[0][1] is output and not depends_on(calls[0][0], leaves):
        args = without_graphs(calls[0][0])
        return Batch(parameters, model, loss_fn, args[0] if len(args) == 1 else args, target)
    return Closure(parameters, model, loss_fn, data, target)


def _watched(model: nn.Module, closure: Callable[[], Any]) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    """What a closure returns, and the arguments and outputs of the calls of the model on the way; none where there are keywords."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    others: list[None] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if kwargs or not args:
            others.append(None)
        calls.append((args, output))

    handle = model.register_forward_hook(watch, with_kwargs=True)
    try:
        found = closure()
    finally:
        handle.remove()
    return [] if others else calls, found


def _gradients(leaves: Sequence[Tensor]) -> list[tuple[int, int] | None]:
    """Which tensor the gradient of each leaf is, and how often it was written; None where there is none."""
    return [None if p.grad is None else (id(p.grad), p.grad._version) for p in leaves]


def _needed(loss_fn: Loss | None) -> Loss:
    if loss_fn is None:
        raise TypeError(
            "expected a loss function, as the step has outputs and targets, got None: give the optimizer one, or return the loss itself"
        )
    return loss_fn
