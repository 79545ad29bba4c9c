"""Copies of all that a run of a model and a loss could change, and the paths of modules while they run."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from linop_hess.autograd.calling import as_data, call_loss
from linop_hess.autograd.snapshot import Contents
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.recording.stand_ins import StandIns


class Private:
    """Copies of all that a run of a model and a loss could change.

    Attributes
    ----------
    leaves : dict of str to Tensor
        Of the parameters that are not constants.
    constants : list of Tensor
        Of the other parameters, and of buffers.
    """

    def __init__(
        self, contents: Contents, loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, names: Sequence[str]
    ) -> None:
        named, self._buffers = contents.parameters, contents.buffers
        self._contents, self._loss_fn, self._data = contents, loss_fn, (inputs, targets)
        self.leaves = dict(zip(names, _leaves([named[name] for name in names]), strict=True))
        others = {name: p.detach().clone() for name, p in named.items() if name not in self.leaves}
        self._copies = {name: b.detach().clone() for name, b in self._buffers.items()}
        self.constants = [*others.values(), *self._copies.values()]
        self._stand_ins = {id(named[name]): tensor for name, tensor in {**self.leaves, **others}.items()}
        self._stand_ins |= {id(self._buffers[name]): copy for name, copy in self._copies.items()}
        self._standing = [*_of_loss(loss_fn), StandIns(contents, self._stand_ins)]

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
            replaced = {id(self._contents.parameters[name]): tensor for name, tensor in constants.items()}
            standing = [*_of_loss(loss_fn), StandIns(self._contents, {**self._stand_ins, **replaced})]
        with ExitStack() as stack:
            for stand_ins in standing:
                stack.enter_context(stand_ins)
            yield

    def require_unchanged(self) -> None:
        """Raise if a buffer, one of ours or another in its place, differs from the model's own.

        Raises
        ------
        UnsupportedModelError
            Naming them.
        """
        contents = self._contents if self._contents.has_all() else Contents.of(self._contents.model)
        before, now = self._buffers, {**self._copies, **replace(contents).buffers}
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


def _of_loss(loss_fn: Any) -> list[StandIns]:
    """What puts back the attributes of a loss that is a module."""
    return [StandIns(Contents.of(loss_fn), {})] if isinstance(loss_fn, nn.Module) else []


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
    """`module_paths` where no module has hooks: with a `forward` that notes, which is sooner called than hooks are by half."""
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
def module_paths(modules: Mapping[str, nn.Module], path: list[str]) -> Iterator[None]:
    """Keep the path of the module that runs in this thread on top of `path`."""
    named = list(modules.items())
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
