"""Run a model and leave nothing behind: tensors stand in for its own; attributes, random states and switches are put back."""

from __future__ import annotations

import functools
import gc
import inspect
import random
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class ProcessWide:
    """What all threads of a process share, as the user has it: the first thread to come saves it, the last to leave puts it back.

    Were each to save and put back what it finds, one that comes while another is there would leave the other's change behind.

    Parameters
    ----------
    change : callable
        Make the change; return what was before.
    put_back : callable
        Given that, undo it.
    """

    def __init__(self, change: Callable[[], Any], put_back: Callable[[Any], object]) -> None:
        self._change, self._put_back = change, put_back
        self._lock, self._users, self._before = threading.Lock(), 0, None

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Have the change in force meanwhile."""
        with self._lock:
            if not self._users:
                self._before = self._change()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._put_back(self._before)


def _put_generators_back(states: tuple[Any, Any, Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


_RANDOMNESS = ProcessWide(
    lambda: (random.getstate(), np.random.get_state(), torch.get_rng_state()), _put_generators_back
)


@cache
def _randomness_of(device: torch.device) -> ProcessWide:
    return ProcessWide(lambda: torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device))


@contextmanager
def untouched_randomness(device: torch.device) -> Iterator[None]:
    """Put the random states of torch, NumPy and Python back afterwards."""
    with ExitStack() as stack:
        stack.enter_context(_RANDOMNESS.changed())
        if device.type == "cuda":
            stack.enter_context(_randomness_of(device).changed())
        yield


def _switch_collector_off() -> bool:
    was = gc.isenabled()
    gc.disable()
    return was


_WITHOUT_COLLECTOR = ProcessWide(_switch_collector_off, lambda was: gc.enable() if was else None)


def without_collector() -> AbstractContextManager[None]:
    """No garbage collection meanwhile, for work that makes many objects and needs them all: each pass would look at all of them."""
    return _WITHOUT_COLLECTOR.changed()


def _compile_nothing() -> Any:
    """Have compiled functions run as they are written; nothing where none can be, as without what compiles them."""
    stance = getattr(torch.compiler, "set_stance", None) if "torch._dynamo" in sys.modules else None
    return None if stance is None else stance("force_eager")


_WITHOUT_COMPILER = ProcessWide(_compile_nothing, lambda was: None if was is None else was.__exit__(None, None, None))


def without_compiler() -> AbstractContextManager[None]:
    """No compiled functions meanwhile, which would hide what they compute, or compile what records it."""
    return _WITHOUT_COMPILER.changed()


class DispatchMode(TorchDispatchMode):
    """A dispatch mode for where nothing is compiled (`without_compiler`).

    Torch wraps those of other classes, lest they be compiled: that imports the compiler, which takes longer than most of what is
    recorded, and goes through it at each operation.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Holders:
    """Which thread has what, all of a set or none of it: so sets that overlap wait for each other, and others do not."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[int, tuple[int, int]] = {}  # by id, alive while held: the thread, and how many times it has it
        self._awaited: dict[int, set[int]] = {}  # by thread

    @contextmanager
    def holding(self, things: Mapping[int, Any]) -> Iterator[None]:
        """Have things, by `id`, for this thread alone; it may have some of them already."""
        me = threading.get_ident()
        with self._changed:
            try:
                while awaited := {key for key in things if self._held.get(key, (me, 0))[0] != me}:
                    self._awaited[me] = awaited
                    if self._wait_for(me):
                        raise RuntimeError(
                            "expected threads that linearize one model after the other, got two of which each waits for a model "
                            "that the other is linearizing: call linearize outside of models and losses"
                        )
                    self._changed.wait()
            finally:
                self._awaited.pop(me, None)
            for key in things:
                self._held[key] = me, self._held.get(key, (me, 0))[1] + 1
        try:
            yield
        finally:
            with self._changed:
                for key in things:
                    count = self._held.pop(key)[1] - 1
                    if count:
                        self._held[key] = me, count
                self._changed.notify_all()

    def _wait_for(self, me: int) -> bool:
        """Whether those that this thread waits for wait for it, be it by way of others."""
        seen, pending = set(), [me]
        while pending:
            for key in self._awaited.get(pending.pop(), ()):
                thread = self._held[key][0] if key in self._held else None
                if thread == me:
                    return True
                if thread is not None and thread not in seen:
                    seen.add(thread)
                    pending.append(thread)
        return False


_HOLDERS = _Holders()


def exclusively(*callables: Any) -> AbstractContextManager[None]:
    """Have the modules of models and losses for this thread alone: others that want one of them wait.

    Of a plain function they are the modules that it names: bound to it, in its closure, among its arguments or global, in
    containers and in functions of the same file too.

    Parameters
    ----------
    callables : nn.Module or callable

    Returns
    -------
    context manager
        Entered again by the same thread, it does not wait.
    """
    modules: dict[int, nn.Module] = {}
    seen: set[int] = set()
    for each in callables:
        _collect(each, modules, seen)
    return _HOLDERS.holding(modules)


def _collect(value: Any, modules: dict[int, nn.Module], seen: set[int]) -> None:
    """Note the modules that a model or loss consists of, as far as they can be seen."""
    if id(value) in seen or isinstance(value, type | Tensor):
        return
    seen.add(id(value))
    inside: list[Any] = []
    if isinstance(value, nn.Module):
        modules.update((id(module), module) for module in value.modules())
    elif isinstance(value, list | tuple | set):
        inside.extend(value)
    elif isinstance(value, dict):
        inside.extend(value.values())
    elif isinstance(value, functools.partial):
        inside += [value.func, *value.args, *value.keywords.values()]
    elif inspect.ismethod(value):
        inside += [value.__func__, *getattr(value.__self__, "__dict__", {}).values(), value.__self__]
    elif inspect.isfunction(value):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                inside.append(cell.cell_contents)
        named = (value.__globals__.get(name) for name in value.__code__.co_names)
        inside += [one for one in named if not inspect.isfunction(one) or one.__module__ == value.__module__]
    elif callable(value):
        inside.extend(getattr(value, "__dict__", {}).values())
    for one in inside:
        _collect(one, modules, seen)


class Memory:
    """Which memory is of a run, and what other memory held before the run overwrote it.

    Parameters
    ----------
    private : sequence of Tensor
        Made for the run.
    """

    def __init__(self, private: Sequence[Tensor]) -> None:
        self._made = {_address(tensor) for tensor in private}
        self._copies: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._overwritten: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def note_all(self, addresses: Iterable[int]) -> None:
        """Note that storages are of the run."""
        self._made.update(addresses)
        self._made.difference_update(self._overwritten)

    def note(self, out: Any) -> Any:
        """Note that what an operation gave is of the run, and return it."""
        if isinstance(out, Tensor) and not self._overwritten:
            self._made.add(out.untyped_storage().data_ptr())
            return out
        for output in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(output, Tensor) and (key := _address(output)) not in self._overwritten:
                self._made.add(key)
        return out

    def note_one(self, tensor: Tensor) -> int:
        """The same of one tensor; return the address of its storage."""
        key = tensor.untyped_storage().data_ptr()
        if key not in self._overwritten:
            self._made.add(key)
        return key

    def kept(self, tensor: Tensor, of: Tensor) -> Tensor:
        """Return a tensor that nobody else changes: a copy where it is not of the run; the same tensor is copied once.

        `of` is what it was detached from, which counts its changes.
        """
        if not tensor.numel() or _address(tensor) in self._made:
            return tensor
        version = 0 if of.is_inference() else of._version
        key = _address(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, version
        if key not in self._copies:
            self._copies[key] = tensor, tensor.clone()
        return self._copies[key][1]

    def before_writing(self, tensor: Tensor) -> None:
        """Save what a tensor holds that is not of the run."""
        key = _address(tensor)
        if key not in self._made and key not in self._overwritten:
            storage = tensor.untyped_storage()
            self._overwritten[key] = storage, storage.clone()

    def restore(self) -> None:
        """Put back what was overwritten."""
        for storage, before in self._overwritten.values():
            storage.copy_(before)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put back, on leaving, what was overwritten."""
        try:
            yield
        finally:
            self.restore()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
