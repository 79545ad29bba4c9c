"""Run a model and a loss once, recorded, on private copies of all that they could change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from linop_hess._validate import checked_loss
from linop_hess.autograd.backward_graph import InMemory, PrimitiveNorms, require_same
from linop_hess.autograd.calling import call_model
from linop_hess.autograd.differentiate import FusedOperation, twice_differentiable
from linop_hess.autograd.kinks.watch import KinkWatch
from linop_hess.autograd.rounding import Rounded
from linop_hess.autograd.snapshot import Contents
from linop_hess.autograd.untouched import without_compiler
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.recording.movement import Strided
from linop_hess.graph.recording.node import Trace
from linop_hess.graph.recording.private import Private, module_paths
from linop_hess.graph.recording.repeats import Repeats
from linop_hess.graph.recording.trace import Recorder


class _DifferentiatedNorm(Exception):
    """Where a run has differentiated a fused norm, of which torch has no further derivatives right."""


class _NotAllSeen(Exception):
    """Where functions did not show all that was computed, of which this is the output and the loss."""

    def __init__(self, output: Any, loss: Tensor) -> None:
        super().__init__()
        self.values = _values(output, loss)


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
    looks_inside : str
        The first operation of the loss, if any, that reads what the model computed on the way to the output, as one that differentiates
        the output does; empty where the loss is a function of output and parameters.
    loss_of_output : callable
        ``loss_of_output(output, targets)``: the loss with the parameters, where it reads them itself, as constants.
    in_primitives : bool
        Whether functions of torch's had to be written in others.
    by_repeats : bool
        Whether functions showed all that was computed; see `Repeats`.
    norms : bool
        Whether norms had to be written in others too, as they are differentiated inside.
    """

    trace: Trace
    output: Any
    output_ids: np.ndarray
    loss_id: int
    loss: float
    gradient: list[Tensor]
    looks_inside: str
    loss_of_output: Callable[[Any, Any], Tensor]
    in_primitives: bool
    by_repeats: bool
    norms: bool

    def reads_output_alone(self, trace: Trace) -> bool:
        """Whether the loss of a trace, this run's or what is left of it, depends on the parameters through the output alone."""
        beyond, known = _first_beyond(trace, self.output_ids)
        return not beyond and bool(known[self.loss_id])


def capture(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    names: Sequence[str],
    selections_compute: bool = False,
    again: bool = False,
    in_primitives: bool = False,
    by_repeats: bool = True,
    norms: bool = False,
    contents: Contents | None = None,
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
    again : bool
        Whether this model and loss have been seen to give the same value each time; else they run twice.
    in_primitives : bool
        Whether it is known that functions of torch's must be written in others; else it is found on the way, and run anew.
    by_repeats : bool
        Whether functions may show all that is computed, which is found on the way too; else each operation is looked at by itself.
    norms : bool
        Whether it is known that norms must be written in others too, since model or loss differentiate them.
    contents : Contents, optional
        The model's, where they are known.

    Raises
    ------
    UnsupportedModelError
        If the model is random, changes its buffers or parameters, or hides operations; see `Recorder`.
    ValueError
        If the loss is no scalar, NaN or Inf, or independent of the parameters.
    TypeError
        If it is no tensor.
    """
    contents = Contents.of(model) if contents is None else contents
    values = None
    while True:
        own = Private(contents, loss_fn, inputs, targets, names)
        run = own, contents, in_primitives
        try:
            loss_of_output = partial(own.loss_of_output, loss_fn)
            seen, found, recorder = _captured(*run, norms, loss_of_output, selections_compute, by_repeats)
            break
        except FusedOperation:
            in_primitives, values = True, None
        except _DifferentiatedNorm:
            norms, values = True, None
        except _NotAllSeen as other:  # it serves as the other run
            by_repeats, values = False, other.values
        except Exception as error:  # what is wrong with a model is told as the recorder alone sees it
            values = None
            if by_repeats:
                by_repeats = False
            elif not in_primitives and isinstance(error.__cause__, NotImplementedError):
                in_primitives = True  # a fused one in forward mode
            else:
                raise
    if not again and not _are_equal(found, _once_more(*run, norms, recorder) if values is None else values):
        raise UnsupportedModelError(
            "expected a model and a loss that give the same value each time, got two values for the same input: call "
            "model.eval(), or remove the randomness"
        )
    if norms and not again:
        require_same(_once_more(own, contents, in_primitives, False, recorder)[-1], found[-1])
    return seen


def _captured(
    own: Private,
    contents: Contents,
    in_primitives: bool,
    norms: bool,
    loss_of_output: Callable[[Any, Any], Tensor],
    selections_compute: bool,
    by_repeats: bool,
) -> tuple[Capture, list[Tensor], Recorder]:
    """A recorded run, its output and loss, and what recorded it."""
    leaves, (own_inputs, own_targets) = list(own.leaves.values()), own.data()
    ours = [t for t in tree_leaves((own_inputs, own_targets)) if isinstance(t, Tensor)]
    recorder = Recorder(leaves, [*ours, *own.constants], selections_compute, in_primitives)
    repeats = Repeats(recorder, leaves) if by_repeats and Repeats.can_see() else None
    with _plainly(contents, leaves[0].device, in_primitives, norms), recorder.memory.restored():
        with own.standing_in(), module_paths(contents.modules, recorder.path):
            with repeats or recorder:
                output = call_model(contents.model, own_inputs)
            own.require_unchanged()
            ids = np.concatenate([np.zeros(0, dtype=np.int64), *map(recorder.ids_of, _floating(output))])
            kept = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, output)
            recorder.in_loss = True
            with repeats or recorder:
                value = own.loss(output, own_targets)
            value = checked_loss(value)
            if repeats is not None and not repeats.saw_all():
                raise _NotAllSeen(kept, value)
        if not norms and recorder.differentiates_norms:
            raise _DifferentiatedNorm
        loss_ids = recorder.ids_of(value)
        if not loss_ids.any():
            raise ValueError(
                "the loss does not depend on the model's output: loss_fn(output, target) must compute it from output, "
                "without detach() or .item()"
            )
        gradient = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    given = np.append(ids, np.arange(1, recorder.trace.parameters + 1))
    seen = Capture(
        recorder.trace,
        kept,
        ids,
        int(loss_ids[0]),
        float(value.detach()),
        [g.detach() if g.requires_grad else g for g in gradient],
        _first_beyond(recorder.trace, given)[0],
        loss_of_output,
        in_primitives,
        by_repeats,
        norms,
    )
    return seen, _values(kept, value), recorder


def _once_more(own: Private, contents: Contents, in_primitives: bool, norms: bool, recorder: Recorder) -> list[Tensor]:
    """Output and loss of another run, which overwrites the same memory."""
    inputs, targets = own.data()
    device = next(iter(own.leaves.values())).device
    # Sums of zeros that are in memory and of such that are not may be rounded otherwise.
    zeros = InMemory() if recorder.forward_mode else nullcontext()
    with _plainly(contents, device, in_primitives, norms), recorder.memory.restored():
        with own.standing_in(), zeros:
            output = call_model(contents.model, inputs)
            kept = [t.detach().clone() for t in _floating(output)]
            return _values(kept, checked_loss(own.loss(output, targets)))


@contextmanager
def _plainly(contents: Contents, device: torch.device, in_primitives: bool, norms: bool) -> Iterator[None]:
    """Twice differentiable, with norms written out where they are to be, and nothing compiled."""
    twice = twice_differentiable("the model", device, contents.modules.values(), in_primitives)
    with twice, without_compiler(), PrimitiveNorms() if norms else nullcontext():
        yield


def _values(output: Any, loss: Tensor) -> list[Tensor]:
    return [*_floating(output), loss.detach()]


def _are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(first, second, strict=True))


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
    own = Private(Contents.of(model), loss_fn, inputs, targets, names)
    watch = KinkWatch(list(own.leaves.values()), model)
    own_inputs, own_targets = own.data()
    with twice_differentiable("the model", next(iter(own.leaves.values())).device, model), own.standing_in():
        with watch.watching():
            value = own.loss(call_model(model, own_inputs), own_targets)
        return watch, checked_loss(value)


def rounded_gradient(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    names: Sequence[str],
    norms: bool,
    seed: int,
) -> Tensor:
    """Gradient of loss_fn(model(inputs), targets), flat, by autograd with the results of all operations moved by a few ulp."""
    own = Private(Contents.of(model), loss_fn, inputs, targets, names)
    leaves, (own_inputs, own_targets) = list(own.leaves.values()), own.data()
    written = PrimitiveNorms() if norms else nullcontext()
    with twice_differentiable("the model", leaves[0].device, model), written, own.standing_in(), Rounded(seed):
        value = own.loss(call_model(model, own_inputs), own_targets)
        gradient = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in gradient])


def _floating(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _first_beyond(trace: Trace, given: np.ndarray) -> tuple[str, np.ndarray]:
    """The first operation of the loss that reads what depends on parameters and is neither given nor computed by the loss, or ""."""
    known = np.zeros(trace.ids + 1, dtype=bool)
    known[0] = True
    known[given] = True
    for node in trace.nodes:
        if not node.in_loss:
            continue
        for ids in node.arguments:
            if not bool(known[ids.ids() if isinstance(ids, Strided) else ids].all()):
                return node.title, known
        for _, output in node.outputs:
            known[output.ids()] = True
    return "", known
