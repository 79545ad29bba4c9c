"""Run a model and a loss once, recorded, on private copies of all that they could change."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from linop_hess._validate import checked_loss
from linop_hess.autograd.calling import as_data, call_loss, call_model
from linop_hess.autograd.differentiate import twice_differentiable
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.trace import Recorder, Strided, Trace, module_paths


@dataclass(frozen=True)
class Capture:
    """A recorded run.

    Attributes
    ----------
    trace : Trace
    output : object
        What the model returned, its tensors detached and as they were when the loss got them.
    output_ids : ndarray of int
        Element ids of its floating-point tensors, one after the other, each row-major.
    loss_id : int
        Element id of the loss; 0 where it depends on no parameter.
    loss : float
    gradient : list of Tensor
        By autograd, of each parameter.
    loss_of_output : callable
        ``loss_of_output(output, targets)``: the loss with the parameters, where it reads them itself, as constants.
    """

    trace: Trace
    output: Any
    output_ids: np.ndarray
    loss_id: int
    loss: float
    gradient: list[Tensor]
    loss_of_output: Callable[[Any, Any], Tensor]

    def reads_output_alone(self, trace: Trace) -> bool:
        """Whether the loss of a trace, this run's or what is left of it, depends on the parameters through the output alone."""
        known = np.zeros(trace.ids + 1, dtype=bool)
        known[0] = True
        known[self.output_ids] = True
        for node in trace.nodes:
            if not node.in_loss:
                continue
            for ids in node.arguments:
                if not bool(known[ids.ids() if isinstance(ids, Strided) else ids].all()):
                    return False
            for _, output in node.outputs:
                known[output.ids()] = True
        return bool(known[self.loss_id])


def capture(
    model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, names: Sequence[str]
) -> Capture:
    """Record loss_fn(model(inputs), targets).

    Parameters
    ----------
    model : nn.Module
    loss_fn : callable
    inputs, targets : object
    names : sequence of str
        The parameters that are not constants.

    Raises
    ------
    UnsupportedModelError
        If the model is random, changes its buffers or parameters, or hides operations; see `Recorder`.
    ValueError
        If the loss is no scalar, NaN or Inf, or independent of the parameters.
    TypeError
        If it is no tensor.
    """
    named = dict(model.named_parameters())
    leaves = {name: _leaf(named[name]) for name in names}
    others = {name: p.detach().clone() for name, p in named.items() if name not in leaves}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    inputs, targets = as_data((inputs, targets))
    device = next(iter(leaves.values())).device
    recorder = Recorder(list(leaves.values()))
    between: list[Any] = []

    def evaluated(output: Any) -> Tensor:
        return checked_loss(call_loss(loss_fn, output, targets, leaves))

    def recorded(model: nn.Module) -> Tensor:
        with recorder:
            output = call_model(model, inputs)
        tensors = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.is_floating_point()]
        ids = np.concatenate([recorder.ids_of(t) for t in tensors] or [np.zeros(0, dtype=np.int64)])
        kept = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, output)
        between.extend((kept, ids))
        recorder.in_loss = True
        with recorder:
            return evaluated(output)

    def called(work: Callable[[nn.Module], Tensor], values: dict[str, Tensor] = leaves) -> Tensor:
        private = {name: b.clone() for name, b in buffers.items()}
        mine = {f"model.{name}": t for name, t in {**values, **others, **private}.items()}
        with _attributes_restored(model):
            value = functional_call(_Holder(model), mine, (work,))
        _require_unchanged(private, buffers)
        return value

    def of_output(loss_fn: Callable[..., Tensor], output: Any, targets: Any) -> Tensor:
        constants = {name: t.detach() for name, t in leaves.items()}
        return called(lambda _: call_loss(loss_fn, output, targets, constants), constants)

    with twice_differentiable("the model", device, model):
        with _without_collector(), module_paths(model, recorder.path):
            value = called(recorded)
        again = called(lambda model: evaluated(call_model(model, inputs)))
    loss_ids = recorder.ids_of(value)
    if not loss_ids.any():
        raise ValueError(
            "the loss does not depend on the model's output: loss_fn(output, target) must compute it from output, "
            "without detach() or .item()"
        )
    if not torch.equal(again.detach(), value.detach()):
        raise UnsupportedModelError(
            "expected a model and a loss that give the same value each time, got two values for the same input: call "
            "model.eval(), or remove the randomness"
        )
    gradient = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    kept, ids = between
    return Capture(
        recorder.trace,
        kept,
        ids,
        int(loss_ids[0]),
        float(value.detach()),
        [g.detach() for g in gradient],
        partial(of_output, loss_fn),
    )


class _Holder(nn.Module):
    """Holds a model, so that `functional_call` replaces its parameters while some work is done with it, the loss included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], Tensor]) -> Tensor:
        return work(self.model)


def _leaf(parameter: Tensor) -> Tensor:
    return parameter.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def _require_unchanged(private: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    changed = [name for name, b in private.items() if not torch.allclose(b, before[name], rtol=0, atol=0, equal_nan=True)]
    if changed:
        raise UnsupportedModelError(
            f"expected a model that leaves its buffers alone, got one whose forward pass changes {', '.join(changed[:5])}: call "
            "model.eval() first"
        )


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Give modules back the attributes that they set while they run."""
    saved = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for now, before in saved:
            if now.keys() != before.keys() or any(now[key] is not value for key, value in before.items()):
                now.clear()
                now.update(before)


@contextmanager
def _without_collector() -> Iterator[None]:
    """No garbage collection meanwhile: the many objects of a recording are all still needed."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
