"""One eager run of a model, recorded operation by operation.

A dispatch mode sees every operation that torch carries out, below autograd, with all views and in-place writes resolved. Each entry of
each storage has an element id: 0 where it depends on no parameter, 1..N for the parameters, a new one for each entry that an operation
computes. A tensor's ids are its storage's, seen with its own shape, strides and offset; so views, slices, transposes, tied parameters
and writes into views need no rules, and operations that only move entries are carried out once more on the ids.

What is active is autograd's own judgement: a tensor is active where it requires a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from linop_hess.autograd.backward_graph import in_memory, is_fused_norm
from linop_hess.autograd.differentiate import FusedOperation
from linop_hess.autograd.kinks.surrogates import surrogate
from linop_hess.autograd.untouched import DispatchMode, Memory
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.recording.movement import (
    AS_NEW,
    RELABELS,
    RELABELS_IN_PLACE,
    Handling,
    Ids,
    Strided,
    as_tensor,
    contiguous_strides,
    draws,
    handling,
    moved_ids,
)
from linop_hess.graph.recording.node import Node, Trace, operation_name

_FLOATS = (torch.float32, torch.float64)
_DTYPES = (*_FLOATS, torch.float16, torch.bfloat16)


# In place of the first id of a storage: that of a tensor which requires a gradient but depends on no parameter.
_CONSTANT = 0
_NONE = np.zeros(0, dtype=np.int64)


class Recorder(DispatchMode):
    """Record what runs inside; see `Trace`.

    Parameters
    ----------
    parameters : sequence of Tensor
        Contiguous leaves, each in a storage of its own.
    private : sequence of Tensor
        Constants that nobody else has. Of other tensors that existed before, what nodes hold is a copy.
    selections_compute : bool
        Whether selections that have a surrogate, as maxima, are operations; else they move entries.
    in_primitives : bool
        Whether it runs with functions of torch's written in others where that is needed; else it ends with `FusedOperation` there.

    Attributes
    ----------
    trace : Trace
    path : list of str
        The paths of the modules that run, the innermost last.
    in_loss : bool
        Whether the loss function runs, and not the model.
    memory : Memory
    forward_mode : bool
        Whether model or loss differentiate by forward mode.
    others : int
        How many operations neither were recorded as a node nor gave views alone.
    written : list of Tensor
        What was written into, or got another shape, in place.

    Notes
    -----
    What runs inside meets `UnsupportedModelError`, naming module and operation, where it draws random numbers, computes with complex
    ones, changes a parameter, or hides operations.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        private: Sequence[Tensor] = (),
        selections_compute: bool = False,
        in_primitives: bool = True,
    ) -> None:
        super().__init__()
        self.trace = Trace()
        self._selections_compute, self._in_primitives = selections_compute, in_primitives
        self.path: list[str] = [""]
        self.in_loss = False
        self.others = 0
        self.forward_mode = False
        self.written: list[Tensor] = []
        self._ids: dict[int, int | Tensor] = {}  # by storage: the first of consecutive ids, or the id of each entry
        # By `id`: element ids of outputs, until something is written or relabelled in place.
        self._known: dict[int, Strided] = {}
        # A storage's address stays its own only while it lives, as does the `id` of a tensor, which may get another storage meanwhile.
        self._alive: list[Tensor | torch.UntypedStorage] = []
        storages = [parameter.untyped_storage() for parameter in parameters]
        keys = [storage.data_ptr() for storage in storages]
        sizes = [parameter.numel() for parameter in parameters]
        starts = accumulate(sizes, initial=1)
        self._ids.update((key, start) for key, start, size in zip(keys, starts, sizes, strict=False) if size)
        self._leaves = set(self._ids)
        self._read: dict[int, list[tuple[Node, int]]] = {}  # by storage: the nodes that hold a tensor of it,
        self._listed = 0  # as far as this many
        self.memory = Memory(private)
        self.memory.note_all(keys)
        self._alive += [*parameters, *storages]
        self.trace.parameters = self.trace.ids = sum(sizes)

    def ids_of(self, tensor: Tensor) -> np.ndarray:
        """Element ids of a tensor, flat, in row-major order; zeros where it depends on no parameter."""
        ids = self._ids_of(tensor) if tensor.requires_grad else None
        if ids is None or ids is _NONE:
            return np.zeros(tensor.numel(), dtype=np.int64)
        return ids.ids() if isinstance(ids, Strided) else ids

    def _ids_of(self, tensor: Tensor) -> Ids | None:
        base = self._ids.get(tensor.untyped_storage().data_ptr())
        if base is None or base is _CONSTANT:
            return None if base is None else _NONE
        if isinstance(base, int):
            return Strided(base, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten().numpy().copy()

    @property
    def differentiates_norms(self) -> bool:
        """Whether fused norms were differentiated inside."""
        norms = [name for name in {node.name for node in self.trace.nodes} if is_fused_norm(name)]
        return any(name.endswith("_backward") for name in norms) or bool(norms) and self.forward_mode

    def find(self, tensor: Tensor) -> Strided | None:
        """Element ids of a tensor that requires a gradient, which then stays alive; None where they are not consecutive."""
        known = self._known.get(id(tensor))
        ids = self._ids_of(tensor) if known is None else known
        self._alive.append(tensor)
        return ids if isinstance(ids, Strided) else None

    def keep(self, tensor: Tensor) -> None:
        """Keep a tensor alive, and so its `id` its own."""
        self._alive.append(tensor)

    def note(self, new: Sequence[tuple[Tensor, int, Strided]]) -> None:
        """Note tensors, each in a storage of its own, with the last id before each and their ids counted from it."""
        self._alive += (storages := [tensor.untyped_storage() for tensor, _, _ in new])
        self.memory.note_all(keys := [storage.data_ptr() for storage in storages])
        for key, (tensor, before, ids) in zip(keys, new, strict=True):
            self._ids[key] = start = before + ids.start
            self._known[id(tensor)] = Strided(start, ids.shape, ids.stride, ids.offset)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, given = kwargs or {}, func
        func = in_memory(given)
        self.forward_mode = self.forward_mode or func is not given
        how = handling(func)
        if how.only:
            if how is not RELABELS:
                self.others += 1
            if how is RELABELS_IN_PLACE:
                self.list_readers()
                self._known.clear()
                self.written.append(args[0])
            out = func(*args, **kwargs)
            return self.memory.note(out) if how is AS_NEW else out
        if how.fused and not self._in_primitives:
            raise FusedOperation
        flat, spec = args, None
        if kwargs or _nested(args):
            flat, spec = tree_flatten((args, kwargs))
        active: list[int] = []
        arguments: list[Ids] = []
        constants: list[int] = []
        is_complex = False
        for i, a in enumerate(flat):
            if type(a) in _SCALARS or not isinstance(a, Tensor):
                continue
            is_complex = is_complex or a.is_complex()
            if a.requires_grad and a.numel():
                known = self._known.get(id(a))
                ids = self._ids_of(a) if known is None else known
                if ids is None:
                    self._take_unknown(func, a)
                elif isinstance(ids, Strided) or ids.any():
                    active.append(i)
                    arguments.append(ids)
                    continue
            constants.append(i)
        if how.random and draws(func, args, kwargs):
            raise UnsupportedModelError(
                f"expected a model and a loss that give the same value each time, got the random operation "
                f"{self._where(func)}: call model.eval(), or remove it"
            )
        if not active or how.writes or how.moves or not torch.is_grad_enabled():
            self.others += 1
        self.written += [flat[i] for i in how.writes if i < len(flat) and isinstance(flat[i], Tensor)]
        if not active:
            return self._constant(func, how, flat, args, kwargs)
        if is_complex:
            raise self._complex(func)
        held = self._before_writing(func, how, flat) if how.writes else None
        # Those of other libraries run with gradients off; what they give counts only where it requires one.
        if not torch.is_grad_enabled() and func.namespace == "aten":
            return self.memory.note(func(*args, **kwargs))
        before = None
        if how.moves and not (self._selections_compute and surrogate(func, 1.0) is not None):
            before = {id(flat[i]): as_tensor(a, flat[i].shape) for i, a in zip(active, arguments, strict=True)}
        out = func(*args, **kwargs)
        results = out if isinstance(out, (tuple, list)) else (out,)
        if any(o.is_complex() for o in results if isinstance(o, Tensor)):
            raise self._complex(func)
        if before is not None or len(results) > 1:
            self.memory.note(out)
        if before is not None:
            moved = moved_ids(func, args, kwargs, before, results)
            if moved is not None:
                for output, new in zip(results, moved, strict=False):
                    if isinstance(output, Tensor) and new is not None and output.numel():
                        self._write(output, new)
                return out
        fresh = [
            (j, o, self.memory.note_one(o))
            for j, o in enumerate(results)
            if isinstance(o, Tensor) and o.dtype in _DTYPES and o.numel()
        ]
        if not how.writes and all(key in self._ids for _, _, key in fresh):
            return out  # views that do not say so
        if held is None:
            held = list(flat)
            for i in active:
                held[i] = held[i].detach()
            for i in constants:
                held[i] = self.memory.kept(flat[i].detach(), flat[i])
        else:
            for i in constants:
                held[i] = self.memory.kept(held[i], flat[i])
        outputs = [(j, self._new(o, key, bool(how.writes))) for j, o, key in fresh]
        self.trace.nodes.append(Node(func, held, spec, active, arguments, outputs, self.path[-1], self.in_loss))
        return out

    def _complex(self, func: Any) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"expected real numbers, got complex ones in {self._where(func)}: write it with real and imaginary parts"
        )

    def _where(self, func: Any) -> str:
        return f"{operation_name(func)} in module {self.path[-1]!r}" if self.path[-1] else operation_name(func)

    def _take_unknown(self, func: Any, tensor: Tensor) -> None:
        """A tensor that requires a gradient and was not recorded: a constant if it is a leaf, else something hides."""
        leaf = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        if leaf.is_leaf and not isinstance(leaf, nn.Parameter):
            self._set_constant(tensor)
            return
        if tensor.is_leaf:
            raise UnsupportedModelError(
                f"expected parameters that the model, or loss_fn(output, target, params), is given, got one of shape "
                f"{tuple(tensor.shape)} in {self._where(func)} that came in another way (a penalty on the weights? torch.func.linearize, "
                "which hides them from autograd?): take it from params there, make it a parameter of the model, .detach() it if it is a "
                "constant, or use torch.func.jvp"
            )
        custom = getattr(tensor.grad_fn, "_forward_cls", None)
        origin = "another library" if custom is None else f"the custom autograd.Function {custom.__name__}"
        raise UnsupportedModelError(
            f"expected operations that torch shows, got a tensor of shape {tuple(tensor.shape)} in {self._where(func)} that comes from "
            f"{origin}: write it in plain torch operations (a checkpoint with use_reentrant=False), or use linop_hess.Hessian"
        )

    def _set_constant(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._ids.setdefault(storage.data_ptr(), _CONSTANT)
        self._alive.append(storage)

    def _constant(self, func: Any, how: Handling, flat: Sequence[Any], args: Any, kwargs: Any) -> Any:
        """Run what depends on no parameter; what it writes into depends on none any more."""
        if how.writes:
            self._save_readers(how, flat)
        out = self.memory.note(func(*args, **kwargs))
        for i in how.writes:
            target = flat[i] if i < len(flat) else None
            if isinstance(target, Tensor) and isinstance(
                self._ids.get(target.untyped_storage().data_ptr()), (int, Tensor)
            ):
                self._write(target, torch.zeros(target.shape, dtype=torch.int64, device="cpu"))
        if any(isinstance(a, Tensor) and a.requires_grad for a in flat):  # by tensors that are no parameters of ours
            for output in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                    self._set_constant(output)
        return out

    def _save_readers(self, how: Handling, flat: Sequence[Any]) -> None:
        """Give nodes that hold what is about to be overwritten a copy of it."""
        for i in how.writes:
            if i < len(flat) and isinstance(flat[i], Tensor) and flat[i].numel():
                self.memory.before_writing(flat[i])
                self.list_readers()
                for node, k in self._read.pop(flat[i].untyped_storage().data_ptr(), ()):
                    node.flat[k] = node.flat[k].clone()

    def list_readers(self) -> None:
        """Note of the nodes since the last time which storages they hold tensors of."""
        for node in self.trace.nodes[self._listed :]:
            for k, a in enumerate(node.made()):
                if isinstance(a, Tensor) and a.numel():
                    self._read.setdefault(a.untyped_storage().data_ptr(), []).append((node, k))
        self._listed = len(self.trace.nodes)

    def _before_writing(self, func: Any, how: Handling, flat: Sequence[Any]) -> list[Any]:
        """Save for all nodes, this one included, what is about to be overwritten; give its arguments."""
        self._save_readers(how, flat)
        written = [flat[i] for i in how.writes if i < len(flat) and isinstance(flat[i], Tensor) and flat[i].numel()]
        storages = {target.untyped_storage().data_ptr() for target in written}
        if storages & self._leaves:
            raise UnsupportedModelError(
                f"expected parameters that the model leaves alone, got {self._where(func)}, which changes one: compute with a copy of it"
            )
        held = []
        for a in flat:
            if isinstance(a, Tensor):
                a = a.detach()
                if a.numel() and a.untyped_storage().data_ptr() in storages:
                    a = a.clone()
            held.append(a)
        return held

    def _new(self, output: Tensor, key: int, in_place: bool) -> Strided:
        """Give an output new ids; `key` is the address of its storage, of which more may be read where it was there before."""
        storage = output.untyped_storage()
        entries = storage.nbytes() // output.element_size()
        start = self.trace.ids + 1
        self._alive += (output, storage)
        shape, stride, offset = output.shape, output.stride(), int(output.storage_offset())
        is_new = key not in self._ids
        if is_new and output.is_contiguous() and not in_place or output.numel() == entries:
            self._ids[key] = start
            self.trace.ids += entries
            ids = Strided(start, shape, stride, offset)
            if is_new:
                self._known[id(output)] = ids
            else:
                self._known.clear()
            return ids
        # Part of a storage of which the rest has ids of its own.
        self.trace.ids += output.numel()
        self._write(output, torch.arange(start, self.trace.ids + 1, device="cpu").view(shape))
        return Strided(start, shape, contiguous_strides(shape), 0)

    def _write(self, tensor: Tensor, ids: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        buffer = self._ids.get(key)
        self._known.clear()
        if buffer is None or isinstance(buffer, int):
            entries = storage.nbytes() // tensor.element_size()
            first = 0 if buffer is None else buffer
            buffer = torch.zeros(entries, dtype=torch.int64, device="cpu")
            if first:
                buffer += torch.arange(first, first + entries, device="cpu")
            self._ids[key] = buffer
            self._alive.append(storage)
        buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(ids)


class Saving(DispatchMode):
    """Save what is written into, where it is not of a run; record nothing.

    Parameters
    ----------
    memory : Memory
        Of the run.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writes = handling(func).writes
        for target in [args[i] for i in writes if i < len(args)] + list(kwargs.values()) * bool(writes):
            if isinstance(target, Tensor) and target.numel():
                self._memory.before_writing(target)
        return self._memory.note(func(*args, **kwargs))


# Usual arguments that are no tensors, told without asking torch.
_SCALARS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})
_NOT_NESTED = _SCALARS | {Tensor, nn.Parameter}


def _nested(args: tuple[Any, ...]) -> bool:
    return not _NOT_NESTED.issuperset(map(type, args)) and any(isinstance(a, (list, tuple, dict)) for a in args)
