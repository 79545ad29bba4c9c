"""Run a model and a loss once, recorded, on private copies of all that they could change."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from linop_hess._validate import checked_loss
from linop_hess.autograd.calling import as_data, call_loss, call_model
from linop_hess.autograd.differentiate import twice_differentiable
from linop_hess.autograd.kinks import KinkWatch
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
    reads_output_alone : bool
        Whether the loss depends on the parameters through the output alone.
    """

    trace: Trace
    output: Any
    output_ids: np.ndarray
    loss_id: int
    loss: float
    gradient: list[Tensor]
    reads_output_alone: bool


def capture(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    names: Sequence[str],
    selections_compute: bool = False,
) -> Capture:
    """Record loss_fn(model(inputs), targets).

    Parameters
    ----------
    model : nn.Module
    loss_fn : callable
    inputs, targets : object
    names : sequence of str
        The parameters that are not constants.
    selections_compute : bool
        Whether selections that have a surrogate, as maxima, are operations; else they move entries.

    Raises
    ------
    UnsupportedModelError
        If the model is random, changes its buffers or parameters, or hides operations; see `Recorder`.
    ValueError
        If the loss is no scalar, NaN or Inf, or independent of the parameters.
    TypeError
        If it is no tensor.
    """
    run = _Run(model, loss_fn, inputs, targets, names)
    leaves = list(run.leaves.values())
    recorder = Recorder(leaves, selections_compute)
    between: list[Any] = []

    def recorded(model: nn.Module) -> Tensor:
        with recorder:
            output = run.output(model)
        tensors = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.is_floating_point()]
        ids = np.concatenate([recorder.ids_of(t) for t in tensors] or [np.zeros(0, dtype=np.int64)])
        kept = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, output)
        between.extend((kept, ids, len(recorder.trace.nodes)))
        recorder.in_loss = True
        with recorder:
            return checked_loss(run.loss(output))

    with twice_differentiable("the model", leaves[0].device, model):
        with _without_collector(), module_paths(model, recorder.path):
            value = run.called(recorded)
        again = run.called(lambda model: checked_loss(run.loss(run.output(model))))
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
    gradient = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    kept, ids, modelled = between
    return Capture(
        recorder.trace,
        kept,
        ids,
        int(loss_ids[0]),
        float(value.detach()),
        [g.detach() for g in gradient],
        _reads_alone(recorder.trace, modelled, ids, int(loss_ids[0])),
    )


def watched(
    model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, names: Sequence[str]
) -> tuple[KinkWatch, Tensor]:
    """Compute loss_fn(model(inputs), targets) as `capture` does, and give what was seen of its kinks, and the loss.

    Parameters
    ----------
    model : nn.Module
    loss_fn : callable
    inputs, targets : object
    names : sequence of str
        The parameters whose kinks count.
    """
    run = _Run(model, loss_fn, inputs, targets, names)
    watch = KinkWatch(list(run.leaves.values()), model)

    def seen(model: nn.Module) -> Any:
        with watch.watching():
            return run.loss(run.output(model))

    with twice_differentiable("the model", next(iter(run.leaves.values())).device, model):
        return watch, checked_loss(run.called(seen))


class _Run:
    """Runs of a model and a loss on private copies of parameters and buffers.

    Attributes
    ----------
    leaves : dict of str to Tensor
        The copies of the parameters that are not constants.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, names: Sequence[str]
    ) -> None:
        named = dict(model.named_parameters())
        self.leaves = {name: _leaf(named[name]) for name in names}
        self._model, self._loss_fn = model, loss_fn
        self._others = {name: p.detach().clone() for name, p in named.items() if name not in self.leaves}
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self._inputs, self._targets = as_data((inputs, targets))

    def output(self, model: nn.Module) -> Any:
        """What the model returns."""
        return call_model(model, self._inputs)

    def loss(self, output: Any) -> Any:
        """What the loss function makes of it."""
        return call_loss(self._loss_fn, output, self._targets, self.leaves)

    def called(self, work: Callable[[nn.Module], Tensor]) -> Tensor:
        """Do some work with the model, whose parameters and buffers are the copies meanwhile."""
        private = {name: b.clone() for name, b in self._buffers.items()}
        mine = {f"model.{name}": t for name, t in {**self.leaves, **self._others, **private}.items()}
        with _attributes_restored(self._model):
            value = functional_call(_Holder(self._model), mine, (work,))
        _require_unchanged(private, self._buffers)
        return value


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
    changed = [
        name for name, b in private.items() if not torch.allclose(b, before[name], rtol=0, atol=0, equal_nan=True)
    ]
    if changed:
        raise UnsupportedModelError(
            f"expected a model that leaves its buffers alone, got one whose forward pass changes {', '.join(changed[:5])}: call "
            "model.eval() first"
        )


def _reads_alone(trace: Trace, modelled: int, outputs: np.ndarray, loss: int) -> bool:
    """Whether operations of the loss read nothing that depends on parameters but the output, and what they computed themselves."""
    known = np.zeros(trace.ids + 1, dtype=bool)
    known[0] = True
    known[outputs] = True
    for node in trace.nodes[modelled:]:
        for ids in node.arguments:
            if not bool(known[ids.ids() if isinstance(ids, Strided) else ids].all()):
                return False
        for _, output in node.outputs:
            known[output.ids()] = True
    return bool(known[loss])


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
