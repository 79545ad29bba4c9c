"""Calls of torch's functions like one that was looked into: recorded as that was, and not looked into again.

Below autograd each operation takes a detour through Python, of four fifths of what a recorded run takes. A `TorchFunctionMode` sees what
Python calls, for a quarter of that. Here the first call of a function on arguments of some shapes, strides and dtypes runs within the
`Recorder`. Where that noted a single operation, of views of the arguments, or none and the result is a view of one, the call becomes a
template; one like it is carried out alone, and noted as the template says. All other calls run within the recorder each time.

Autograd numbers its nodes as it makes them, so one made between two calls, which no function shows, shows in the next; and what was
written into in place has a version of its own. Then nothing more is noted, and all is recorded anew, within the recorder alone. Where few
calls are like one before, the recorder does the rest of the run alone.

What no function shows and autograd does not count goes unseen: writes, as TorchScript does them, into tensors of others that are no
parameters, buffers, attributes or data. They are not undone, and make two runs differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from linop_hess.autograd.differentiate import Primitives
from linop_hess.graph.recording.movement import Ids, Strided
from linop_hess.graph.recording.node import Node, signature_of
from linop_hess.graph.recording.template import Pattern, Repeat, Template, View
from linop_hess.graph.recording.trace import Recorder, Saving


def _named(names: str, *owners: Any) -> set[Any]:
    return {getattr(owner, name) for name in names.split() for owner in owners if hasattr(owner, name)}


# Functions that compute the same from the same, change nothing, and choose what they are made of by shapes, strides and dtypes alone.
_PURE = frozenset(
    _named(
        "linear tanh relu sigmoid softplus logsigmoid gelu silu elu selu celu mish leaky_relu relu6 hardtanh softmax log_softmax "
        "layer_norm group_norm rms_norm conv1d conv2d conv3d avg_pool1d avg_pool2d",
        functional,
    )
    | _named(
        "add sub mul div rsub true_divide neg pow square sqrt rsqrt reciprocal abs exp expm1 log log1p sin cos tan atan asinh tanh sigmoid "
        "relu erf softmax log_softmax logsumexp sum mean matmul mm bmm mv dot addmm addcmul einsum layer_norm t transpose permute "
        "unsqueeze squeeze flatten reshape view expand movedim swapaxes unflatten __rsub__ __rdiv__ __rtruediv__ __pow__ __rpow__",
        torch,
        Tensor,
    )
)

# Those that compute nothing.
_ASKED = frozenset(
    {
        *_named("size dim ndimension stride numel nelement is_contiguous is_floating_point is_complex element_size __len__", Tensor),
        *(of.__get__ for of in _named("shape dtype device ndim requires_grad is_leaf layout", Tensor)),
        torch._C._set_grad_enabled,
    }
)  # fmt: skip

# Names of those that change a tensor and carry out no operation.
_CHANGES = frozenset({"__set__", "requires_grad_"})

_SCALARS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})
_SEQUENCES = frozenset({tuple, list, torch.Size})

# Of torch's: the number of the next node of a graph; transforms and dispatch modes in force.
_next_node: Any = getattr(torch._C._autograd, "_get_sequence_nr", None)
_transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack
_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

# In place of that number: no call is looked for among those before.
_NEVER = -1

# By so many calls more than those that are like one before, each at 20 µs, others may be looked into one by one; and what it takes to make
# a template, in such calls.
_PATIENCE, _TEMPLATE = 250, 3


class Repeats(TorchFunctionMode):
    """Record what runs inside as a recorder does, or find that something was computed that no function shows.

    Parameters
    ----------
    recorder : Recorder
        Which notes all; it has noted nothing yet.
    leaves : sequence of Tensor
        The parameters that it was given.
    """

    def __init__(self, recorder: Recorder, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self._recorder = recorder
        self._templates: dict[tuple[Any, ...], Template | None] = {}
        self._layouts: dict[tuple[Any, ...], int] = {}
        # By `id` the first element id, and the layout, of tensors that depend on parameters; of other than leaves until something is
        # written or relabelled in place.
        self._leaves: dict[int, tuple[int, int]] = {}
        self._seen: dict[int, tuple[int, int]] = {}
        # Results that the recorder does not know of yet, with the last id before each, and their ids counted from it.
        self._new: list[tuple[Tensor, int, Strided]] = []
        self._versions: dict[int, int] = {}  # by storage that was written into: as it is known to be
        self._modes, self._node = _modes(), _next_node()
        self._is_alone = self._has_missed = False
        self._spent = 0  # as `_PATIENCE` counts it
        start = 1
        of_shape: dict[Any, tuple[int, int]] = {}
        for leaf in leaves:
            known = of_shape.get(key := (leaf.shape, leaf.dtype))
            if known is None:
                of_shape[key] = known = leaf.numel(), self._layout(leaf, True)
            if known[0]:
                self._leaves[id(leaf)] = start, known[1]
                start += known[0]

    @staticmethod
    def can_see() -> bool:
        """Whether functions show here what they are: where no mode outside makes others of them."""
        outside = _get_current_function_mode_stack()
        return _next_node is not None and all(isinstance(mode, (Primitives, DeviceContext)) for mode in outside)

    def __enter__(self) -> Repeats:
        if self._is_alone:
            self._recorder.__enter__()
        elif not self._has_missed:
            self._node = _next_node()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if self._is_alone:
            self._recorder.__exit__(*exception)
        elif _next_node() != self._node:
            self._miss()
        else:
            self._tell()

    def saw_all(self) -> bool:
        """Whether functions showed all that was computed, and all that is held of arguments is as it was when it was recorded."""
        if self._has_missed:
            return False
        self._count_versions()
        nodes = self._recorder.trace.nodes
        repeats = [node.operands for node in nodes if type(node) is Repeat and not node.is_made]
        others = [node.flat for node in nodes if type(node) is not Repeat or node.is_made]
        held = chain(chain.from_iterable(repeats), (a for flat in others for a in flat if isinstance(a, Tensor)))
        try:
            written = [a for a in held if a._version]
        except RuntimeError:  # those of inference mode have no version
            return False
        return all(a._version == self._versions.get(a.untyped_storage().data_ptr()) for a in written)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _next_node() != self._node or _modes() != self._modes or _transform() is not None:
            return self._not_looked_for(func, args, kwargs)
        if func not in _PURE or not torch.is_grad_enabled():
            return func(*args, **(kwargs or {})) if func in _ASKED else self._looked_into(func, args, kwargs)
        recorder, seen, leaves = self._recorder, self._seen, self._leaves
        key: list[Any] = [func, recorder.in_loss]
        operands: list[Tensor] = []
        ids: list[int] = []
        for a in (*args, *kwargs.values()) if kwargs else args:
            kind = type(a)
            if kind is Tensor or kind is nn.Parameter:
                known = seen.get(id(a)) or leaves.get(id(a)) or self._found(a)
                if known is None:
                    return self._looked_into(func, args, kwargs)
                first, layout = known
                ids.append(first)
                operands.append(a)
                key.append(layout)
            elif kind in _SCALARS:
                key += (kind, a)
            elif kind in _SEQUENCES and all(type(b) is int for b in a):
                key.append(tuple(a))
            else:
                return self._looked_into(func, args, kwargs)
        if kwargs:
            key.append(("names", *kwargs))
        if len(operands) == 2:
            if operands[0] is operands[1]:
                key.append("same")
        elif len(operands) > 2 and len(set(map(id, operands))) < len(operands):
            which = list(map(id, operands))
            key.append(("same", *map(which.index, which)))
        call = tuple(key)
        template = self._templates.get(call)
        if template is None:
            is_new = call not in self._templates
            return self._looked_into(func, args, kwargs, call if is_new else None, operands, ids)
        out = func(*args, **kwargs) if kwargs else func(*args)
        self._node = _next_node()
        if out.dtype is not template.dtype:  # within autocast
            self._miss()
            return out
        result, trace = template.result, recorder.trace
        if isinstance(result, View):
            first = ids[result.operand] + result.offset
        else:
            before = trace.ids
            trace.nodes.append(template.repeated(before, recorder.path[-1], operands, ids, recorder.memory))
            trace.ids = before + template.ids
            first = before + result.start + result.offset
            self._new.append((out, before, result))
        recorder.keep(out)
        seen[id(out)] = first, template.layout
        self._spent -= 1
        return out

    def _not_looked_for(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry a function out where the recorder does all alone, or something was missed."""
        if self._is_alone:
            return func(*args, **(kwargs or {}))
        self._miss()
        with Saving(self._recorder.memory):
            return func(*args, **(kwargs or {}))

    def _miss(self) -> None:
        """Note nothing from now on."""
        self._tell()
        self._has_missed, self._node = True, _NEVER

    def _go_on_alone(self) -> None:
        """Leave the rest of the run to the recorder."""
        self._is_alone, self._node = True, _NEVER
        self._recorder.__enter__()

    def _tell(self) -> None:
        """Tell the recorder what it has not noted itself."""
        if self._new:
            self._recorder.note(self._new)
            self._new = []

    def _layout(self, tensor: Tensor, is_active: bool) -> int:
        """A number for the shape, strides and dtype of a tensor, and whether it depends on parameters."""
        key = tensor.shape, tensor.stride(), tensor.dtype, tensor.device, is_active
        return self._layouts.setdefault(key, len(self._layouts))

    def _found(self, tensor: Tensor) -> tuple[int, int] | None:
        """The first element id, of a constant 0, and the layout of an operand; None where it must be looked into."""
        if tensor.layout != torch.strided or not tensor.numel():
            return None
        if not tensor.requires_grad:
            return 0, self._layout(tensor, False)
        ids = self._recorder.find(tensor)
        if ids is None:
            self._tell()
            ids = self._recorder.find(tensor)
        if ids is None or (ids.shape, ids.stride) != (tensor.shape, tensor.stride()):  # its data are others now
            return None
        self._seen[id(tensor)] = known = ids.start + ids.offset, self._layout(tensor, True)
        return known

    def _looked_into(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        call: tuple[Any, ...] | None = None,
        operands: Sequence[Tensor] = (),
        ids: Sequence[int] = (),
    ) -> Any:
        """Carry a function out within the recorder; make a template of it where it is told what the call is."""
        recorder = self._recorder
        self._tell()
        trace, others = recorder.trace, recorder.others
        nodes, before = len(trace.nodes), trace.ids
        is_change = getattr(func, "__name__", "") in _CHANGES
        if is_change:
            recorder.list_readers()
        try:
            with recorder:
                out = func(*args, **(kwargs or {}))
        finally:
            self._node = _next_node()
            if recorder.written or is_change:
                self._count_versions()
                self._seen.clear()
                self._leaves.pop(id(args[0]) if args else 0, None)  # it may be a constant from now on
        if call is not None:
            is_simple = recorder.others == others and len(trace.nodes) <= nodes + 1
            template = self._template(out, trace.nodes[nodes:], before, operands, ids) if is_simple else None
            self._templates[call] = template
            if template is not None and template.pattern is not None:
                path = trace.nodes[-1].path
                trace.nodes[-1] = template.repeated(before, path, list(operands), list(ids), recorder.memory)
            self._spent += _TEMPLATE
        self._spent += 1
        if self._spent > _PATIENCE:
            self._go_on_alone()
        return out

    def _count_versions(self) -> None:
        """Note the versions of what the recorder saw written into."""
        for tensor in self._recorder.written:
            if not tensor.is_inference():
                self._versions[tensor.untyped_storage().data_ptr()] = tensor._version
        self._recorder.written.clear()

    def _template(
        self,
        out: Any,
        nodes: Sequence[Node],
        before: int,
        operands: Sequence[Tensor],
        ids: Sequence[int],
    ) -> Template | None:
        """A template of what was recorded; None where it may depend on more than the operands."""
        if type(out) is not Tensor or not out.requires_grad or not out.numel():
            return None
        memory = self._recorder.memory
        bases: dict[int, tuple[int, Tensor]] = {}
        for j, a in enumerate(operands):
            held = a.detach() if ids[j] else memory.kept(a.detach(), a)
            known = bases.setdefault(held.untyped_storage().data_ptr(), (j, held))
            if operands[known[0]] is not a:
                return None  # two in one storage
        found, layout, count = self._recorder.find(out), self._layout(out, True), self._recorder.trace.ids - before
        if found is None:
            return None
        constants = [j for j, first in enumerate(ids) if not first]
        if not nodes:
            view = _view_of(out, bases)
            if view is None or not ids[view.operand] or ids[view.operand] + view.offset != found.start + found.offset:
                return None
            return Template(None, constants, 0, view, layout, out.dtype)
        node, tensors = nodes[0], {}
        for i, a in enumerate(node.flat):
            if isinstance(a, Tensor):
                view = _view_of(a, bases)
                if view is None or (i in node.active) != bool(ids[view.operand]):
                    return None
                tensors[i] = view
        if sum(math.prod(o.shape) for _, o in node.outputs) != count or found.start <= before:
            return None
        flat = [None if isinstance(a, Tensor) else a for a in node.flat]
        like = node.but(
            flat=flat, arguments=[], outputs=[(j, replace(o, start=o.start - before)) for j, o in node.outputs]
        )
        like.signature = signature_of(node)
        result = replace(found, start=found.start - before)
        template = Template(Pattern(like, tensors), constants, count, result, layout, out.dtype)
        again = template.repeated(before, node.path, list(operands), list(ids), memory)
        is_same = again.outputs == node.outputs and all(map(_are_same, again.flat, node.flat))
        is_same = is_same and all(map(_are_same_ids, again.arguments, node.arguments))
        return template if is_same else None


def _view_of(tensor: Tensor, bases: dict[int, tuple[int, Tensor]]) -> View | None:
    """Which view of which operand a tensor is; `bases` are by their storages."""
    if (key := tensor.untyped_storage().data_ptr()) not in bases:
        return None
    j, base = bases[key]
    shape, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset() - base.storage_offset())
    is_whole = (shape, stride, offset) == (tuple(base.shape), base.stride(), 0)
    is_transposed = base.ndim == 2 and (shape, stride, offset) == (tuple(base.shape[::-1]), base.stride()[::-1], 0)
    return View(j, shape, stride, offset, is_whole, is_transposed)


def _are_same(mine: Any, theirs: Any) -> bool:
    """Whether two arguments are the same number, or tensors of the same entries in memory."""
    if not isinstance(mine, Tensor):
        return bool(mine == theirs)
    where = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad) for t in (mine, theirs)]
    return where[0] == where[1]


def _are_same_ids(mine: Ids, theirs: Ids) -> bool:
    """Whether element ids are those of the same view of the same storage."""
    if not (isinstance(mine, Strided) and isinstance(theirs, Strided)):
        return False
    first = mine.start + mine.offset == theirs.start + theirs.offset
    return first and (mine.shape, mine.stride) == (theirs.shape, theirs.stride)
