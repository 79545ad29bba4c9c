"""Run a model and a loss once, recorded, on private copies of all that they could change."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from linop_hess._validate import checked_loss
from linop_hess.autograd.calling import as_data, call_loss, call_model
from linop_hess.autograd.differentiate import twice_differentiable
from linop_hess.autograd.untouched import StandIns
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.trace import Recorder, Strided, Trace


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
    looks_inside : str
        The first operation of the loss, if any, that reads what the model computed on the way to the output, as one that differentiates
        the output does; empty where the loss is a function of output and parameters.
    """

    trace: Trace
    output: Any
    output_ids: np.ndarray
    loss_id: int
    loss: float
    gradient: list[Tensor]
    reads_output_alone: bool
    looks_inside: str


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
    buffers = dict(model.named_buffers())
    private = {name: b.detach().clone() for name, b in buffers.items()}
    stand_ins = {id(named[name]): tensor for name, tensor in {**leaves, **others}.items()}
    stand_ins |= {id(buffers[name]): copy for name, copy in private.items()}
    device = next(iter(leaves.values())).device
    own_inputs, own_targets = as_data((inputs, targets), copy=True)
    ours = [t for t in tree_leaves((own_inputs, own_targets)) if isinstance(t, Tensor)]
    recorder = Recorder(list(leaves.values()), [*ours, *others.values(), *private.values()])
    between: list[Any] = []

    def evaluated(output: Any, targets: Any) -> Tensor:
        return checked_loss(call_loss(loss_fn, output, targets, leaves))

    def recorded() -> Tensor:
        with recorder:
            output = call_model(model, own_inputs)
        _require_unchanged(model, private, buffers)
        tensors = _floating(output)
        ids = np.concatenate([recorder.ids_of(t) for t in tensors] or [np.zeros(0, dtype=np.int64)])
        kept = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, output)
        between.extend((kept, ids, len(recorder.trace.nodes)))
        recorder.in_loss = True
        with recorder:
            return evaluated(output, own_targets)

    def once_more() -> tuple[list[Tensor], Tensor]:
        again, targets_again = as_data((inputs, targets), copy=True)
        output = call_model(model, again)
        kept = [t.detach().clone() for t in _floating(output)]
        return kept, evaluated(output, targets_again)

    with twice_differentiable("the model", device, model), recorder.memory.restored(), ExitStack() as of_loss:
        if isinstance(loss_fn, nn.Module):
            of_loss.enter_context(StandIns(loss_fn, {}))
        with StandIns(model, stand_ins), _without_collector(), _module_paths(model, recorder.path):
            value = recorded()
        loss_ids = recorder.ids_of(value)
        if not loss_ids.any():
            raise ValueError(
                "the loss does not depend on the model's output: loss_fn(output, target) must compute it from output, "
                "without detach() or .item()"
            )
        gradient = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        recorder.memory.restore()
        with StandIns(model, stand_ins):
            outputs, again = once_more()
    pairs = zip([*_floating(between[0]), value], [*outputs, again], strict=True)
    if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):
        raise UnsupportedModelError(
            "expected a model and a loss that give the same value each time, got two values for the same input: call "
            "model.eval(), or remove the randomness"
        )
    kept, ids, modelled = between
    beyond, known = _first_beyond(recorder.trace, modelled, ids)
    return Capture(
        recorder.trace,
        kept,
        ids,
        int(loss_ids[0]),
        float(value.detach()),
        [g.detach() for g in gradient],
        not beyond and bool(known[int(loss_ids[0])]),
        beyond
        and _first_beyond(recorder.trace, modelled, np.append(ids, np.arange(1, recorder.trace.parameters + 1)))[0],
    )


def _leaf(parameter: Tensor) -> Tensor:
    return parameter.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def _floating(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _require_unchanged(model: nn.Module, ours: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Raise if a buffer, one of ours or another in its place, differs from the model's own."""
    now = {**ours, **dict(model.named_buffers())}
    changed = [
        name
        for name, b in now.items()
        if name not in before
        or b.shape != before[name].shape
        or not torch.allclose(b, before[name], rtol=0, atol=0, equal_nan=True)
    ]
    if changed:
        raise UnsupportedModelError(
            f"expected a model that leaves its buffers alone, got one whose forward pass changes {', '.join(changed[:5])}: call "
            "model.eval() first"
        )


def _first_beyond(trace: Trace, modelled: int, given: np.ndarray) -> tuple[str, np.ndarray]:
    """The first operation of the loss that reads what depends on parameters and is neither given nor computed by the loss, or ""."""
    known = np.zeros(trace.ids + 1, dtype=bool)
    known[0] = True
    known[given] = True
    for node in trace.nodes[modelled:]:
        for ids in node.arguments:
            if not bool(known[ids.ids() if isinstance(ids, Strided) else ids].all()):
                return node.title, known
        for _, output in node.outputs:
            known[output.ids()] = True
    return "", known


@contextmanager
def _module_paths(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep the path of the module that runs in this thread on top of `path`."""
    names = {id(module): name for name, module in model.named_modules()}
    mine = threading.get_ident()

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == mine:
            path.append(names.get(id(module), path[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == mine:
            path.pop()

    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


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
