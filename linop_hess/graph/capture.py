"""Run a model and a loss once, recorded, on private copies of all that they could change."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from linop_hess._validate import checked_loss
from linop_hess.autograd.calling import as_data, call_loss, call_model
from linop_hess.autograd.differentiate import FusedOperation, twice_differentiable
from linop_hess.autograd.kinks.watch import KinkWatch
from linop_hess.autograd.rounding import Rounded
from linop_hess.autograd.untouched import StandIns
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.movement import Strided
from linop_hess.graph.trace import Recorder, Trace


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

    Raises
    ------
    UnsupportedModelError
        If the model is random, changes its buffers or parameters, or hides operations; see `Recorder`.
    ValueError
        If the loss is no scalar, NaN or Inf, or independent of the parameters.
    TypeError
        If it is no tensor.
    """
    own = _Private(model, loss_fn, inputs, targets, names)
    try:
        return _captured(own, model, loss_fn, selections_compute, again, in_primitives)
    except FusedOperation:
        return _captured(own, model, loss_fn, selections_compute, again, True)


def _captured(
    own: _Private,
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    selections_compute: bool,
    again: bool,
    in_primitives: bool,
) -> Capture:
    leaves, (own_inputs, own_targets) = list(own.leaves.values()), own.data()
    ours = [t for t in tree_leaves((own_inputs, own_targets)) if isinstance(t, Tensor)]
    recorder = Recorder(leaves, [*ours, *own.constants], selections_compute, in_primitives)
    between: list[Any] = []

    def recorded() -> Tensor:
        with recorder:
            output = call_model(model, own_inputs)
        own.require_unchanged()
        tensors = _floating(output)
        ids = np.concatenate([recorder.ids_of(t) for t in tensors] or [np.zeros(0, dtype=np.int64)])
        kept = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, output)
        between.extend((kept, ids))
        recorder.in_loss = True
        with recorder:
            return checked_loss(own.loss(output, own_targets))

    def once_more() -> list[Tensor]:
        own_inputs, own_targets = own.data()
        output = call_model(model, own_inputs)
        kept = [t.detach().clone() for t in _floating(output)]
        return [*kept, checked_loss(own.loss(output, own_targets))]

    twice = twice_differentiable("the model", leaves[0].device, model, in_primitives)
    with twice, recorder.memory.restored():
        with own.standing_in(), _module_paths(model, recorder.path):
            value = recorded()
        loss_ids = recorder.ids_of(value)
        if not loss_ids.any():
            raise ValueError(
                "the loss does not depend on the model's output: loss_fn(output, target) must compute it from output, "
                "without detach() or .item()"
            )
        gradient = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        recorder.memory.restore()
        kept, ids = between
        if not again:
            with own.standing_in():
                _require_equal([*_floating(kept), value], once_more())
    given = np.append(ids, np.arange(1, recorder.trace.parameters + 1))
    return Capture(
        recorder.trace,
        kept,
        ids,
        int(loss_ids[0]),
        float(value.detach()),
        [g.detach() for g in gradient],
        _first_beyond(recorder.trace, given)[0],
        partial(own.loss_of_output, loss_fn),
        in_primitives,
    )


def _require_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    pairs = zip(first, second, strict=True)
    if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):
        raise UnsupportedModelError(
            "expected a model and a loss that give the same value each time, got two values for the same input: call "
            "model.eval(), or remove the randomness"
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
    own = _Private(model, loss_fn, inputs, targets, names)
    watch = KinkWatch(list(own.leaves.values()), model)
    own_inputs, own_targets = own.data()
    with twice_differentiable("the model", next(iter(own.leaves.values())).device, model), own.standing_in():
        with watch.watching():
            value = own.loss(call_model(model, own_inputs), own_targets)
        return watch, checked_loss(value)


def rounded_gradient(
    model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, names: Sequence[str], seed: int
) -> Tensor:
    """Gradient of loss_fn(model(inputs), targets), flat, by autograd with the results of all operations moved by a few ulp."""
    own = _Private(model, loss_fn, inputs, targets, names)
    leaves, (own_inputs, own_targets) = list(own.leaves.values()), own.data()
    with twice_differentiable("the model", leaves[0].device, model), own.standing_in(), Rounded(seed):
        value = own.loss(call_model(model, own_inputs), own_targets)
        gradient = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in gradient])


class _Private:
    """Copies of all that a run of a model and a loss could change.

    Attributes
    ----------
    leaves : dict of str to Tensor
        Of the parameters that are not constants.
    constants : list of Tensor
        Of the other parameters, and of buffers.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, names: Sequence[str]
    ) -> None:
        named, self._buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self._model, self._loss_fn, self._data = model, loss_fn, (inputs, targets)
        self.leaves = dict(zip(names, _leaves([named[name] for name in names]), strict=True))
        others = {name: p.detach().clone() for name, p in named.items() if name not in self.leaves}
        self._copies = {name: b.detach().clone() for name, b in self._buffers.items()}
        self.constants = [*others.values(), *self._copies.values()]
        self._stand_ins = {id(named[name]): tensor for name, tensor in {**self.leaves, **others}.items()}
        self._stand_ins |= {id(self._buffers[name]): copy for name, copy in self._copies.items()}
        self._places = {name: id(named[name]) for name in names}
        of_loss = [StandIns(loss_fn, {})] if isinstance(loss_fn, nn.Module) else []
        self._standing = [*of_loss, StandIns(model, self._stand_ins)]

    def data(self) -> tuple[Any, Any]:
        """Copies of inputs and targets, new ones each time."""
        inputs, targets = as_data(self._data, copy=True)
        return inputs, targets

    def loss(self, output: Any, targets: Any) -> Any:
        """What the loss function makes of an output."""
        return call_loss(self._loss_fn, output, targets, self.leaves)

    def loss_of_output(self, loss_fn: Callable[..., Tensor], output: Any, targets: Any) -> Any:
        """The same of the loss, or of a copy of it in float64, with the parameters as constants."""
        constants = {name: leaf.detach() for name, leaf in self.leaves.items()}
        with self.standing_in(loss_fn, constants):
            return call_loss(loss_fn, output, targets, constants)

    @contextmanager
    def standing_in(self, loss_fn: Any = None, constants: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """The copies, or constants, in the places of the model's own, and all that model and loss had put back afterwards."""
        standing = self._standing
        if constants is not None:
            replaced = {self._places[name]: tensor for name, tensor in constants.items()}
            of_loss = [StandIns(loss_fn, {})] if isinstance(loss_fn, nn.Module) else []
            standing = [*of_loss, StandIns(self._model, {**self._stand_ins, **replaced})]
        with ExitStack() as stack:
            for stand_ins in standing:
                stack.enter_context(stand_ins)
            yield

    def require_unchanged(self) -> None:
        """Raise if a buffer, one of ours or another in its place, differs from the model's own."""
        before, now = self._buffers, {**self._copies, **dict(self._model.named_buffers())}
        changed = [
            name
            for name, b in now.items()
            if name not in before
            or b.shape != before[name].shape
            or not torch.allclose(b, before[name], rtol=0, atol=0, equal_nan=True)
        ]
        if changed:
            raise UnsupportedModelError(
                f"expected a model that leaves its buffers alone, got one whose forward pass changes {', '.join(changed[:5])}: "
                "call model.eval() first"
            )


def _leaves(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Copies of parameters, contiguous, each in a storage of its own, as leaves."""
    with torch.no_grad():
        if all(p.is_contiguous() and type(p) is nn.Parameter for p in parameters):
            copies = torch._foreach_mul(list(parameters), 1.0)  # in one call, and exact
        else:
            copies = tuple(p.detach().clone(memory_format=torch.contiguous_format) for p in parameters)
    for leaf in copies:
        leaf.requires_grad_()
    return list(copies)


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


class _Noting:
    """A module's `forward` that has its name on top of a path while it runs; copies of the module get their own."""

    __slots__ = ("_forward", "_name", "_path", "_thread")

    def __init__(self, name: str, forward: Callable[..., Any], path: list[str], thread: int) -> None:
        self._name, self._forward, self._path, self._thread = name, forward, path, thread

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return self._forward(*args, **kwargs)
        self._path.append(self._name)
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._path.pop()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)  # a method goes with the copy of its module


@contextmanager
def _noting_forward(named: Sequence[tuple[str, nn.Module]], path: list[str]) -> Iterator[None]:
    """`_module_paths` where no module has hooks: with a `forward` that notes, which is sooner called than hooks are by half."""
    mine = threading.get_ident()
    before = [(vars(module), vars(module).get("forward")) for _, module in named]
    for name, module in named:
        vars(module)["forward"] = _Noting(name, module.forward, path, mine)
    try:
        yield
    finally:
        for own, forward in before:
            if forward is None:
                own.pop("forward", None)
            else:
                own["forward"] = forward


@contextmanager
def _module_paths(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep the path of the module that runs in this thread on top of `path`."""
    named = list(model.named_modules())
    if not any(module._forward_pre_hooks or module._forward_hooks for _, module in named):
        with _noting_forward(named, path):
            yield
        return
    names = {id(module): name for name, module in named}
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
