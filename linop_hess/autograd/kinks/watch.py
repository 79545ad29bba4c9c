"""Finding the kinks on the way from some tensors to a loss, and giving them the curvature of surrogates.

A dispatch mode sees every ATen operation, however it was spelled and in whichever layer, so nothing slips through. It
cannot change derivatives, as it runs below autograd; it need not. With z what goes into an operation f with a kink, b the
adjoint of its output and s a surrogate,

    ∇ℓ(θ) + Σ (∂z/∂θ)ᵀ c(z),     c(z) = ∇s(z)ᵀb − ∇f(z)ᵀb less their values,

has the value of ∇ℓ, as c is zero, and the Jacobian H + Σ (∂z/∂θ)ᵀ (Σ_i b_i ∇²(s_i − f_i)) ∂z/∂θ: the Hessian with the
surrogate's curvature in place of f's.

Kinks that no operation has by itself are found by following values. What depends on the parameters and is constant but for
jumps (comparisons, indices, signs) drives a kink wherever it meets a differentiable tensor: in `where`, in indexing, in a
product with a mask. So does what is read into Python, to branch on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from linop_hess.autograd.backward_graph import in_memory, recorded_within_dispatch
from linop_hess.autograd.differentiate import differentiate
from linop_hess.autograd.kinks.surrogates import is_curved, is_kinked, jumps, operation_name, surrogate
from linop_hess.errors import UnsupportedModelError

_OWN_BACKWARD = "(within an operation that has a backward pass of its own)"
_READS = {"_local_scalar_dense": "item", "equal": "equal"}
_SELECTIONS = frozenset({"masked_select", "repeat_interleave"})
_READING_METHODS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__})


@dataclass
class Kink:
    """One operation with a kink, as it ran.

    Attributes
    ----------
    title : str
        The operation, what drives it where it has no kink by itself, and the module.
    call : tuple or None
        The operation and its arguments, with copies of those that are differentiable; None where no surrogate replaces it.
    points : list of Tensor
        These copies, each with its graph.
    outputs : list
        Where the adjoints of its differentiable outputs are found; None: it matters in any case.
    """

    title: str
    call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
    points: list[Tensor] = field(default_factory=list)
    outputs: list[_Output] | None = field(default_factory=list)

    def corrections(self, adjoints: Sequence[Tensor | None], sharpness: float) -> list[Tensor | None]:
        """Return c(z) for each of the points: zero, with the derivative Σ_i b_i ∇²(s_i − f_i)."""
        assert self.call is not None
        func, args, kwargs = self.call
        smooth = surrogate(func, sharpness)
        assert smooth is not None
        total = self._slopes(smooth(*args, **kwargs), adjoints)
        if is_curved(func):
            private = tree_map(lambda a: a.clone() if isinstance(a, Tensor) and a.requires_grad else a, args)
            own = self._slopes(func(*private, **kwargs), adjoints)
            total = [s if f is None else -f if s is None else s - f for s, f in zip(total, own, strict=True)]
        return [None if c is None or not c.requires_grad else c - c.detach() for c in total]

    def _slopes(self, result: Any, adjoints: Sequence[Tensor | None]) -> list[Tensor | None]:
        """∇f(z)ᵀb, to be differentiated."""
        outputs = [t for t in tree_leaves(result) if t.requires_grad]
        pairs = [(t, b.to(t.dtype)) for t, b in zip(outputs, adjoints, strict=False) if b is not None]
        if not pairs:
            return [None] * len(self.points)
        tensors, seeds = zip(*pairs, strict=True)
        return list(differentiate(tensors, self.points, seeds, create_graph=True))


@dataclass(frozen=True)
class _Output:
    """Where the adjoint of an output is found: at an edge of the graph, or in a part of the tensor that it is a view of."""

    edge: GradientEdge
    view: tuple[Sequence[int], Sequence[int], int] | None = None
    base: tuple[Sequence[int], Sequence[int]] | None = None

    @classmethod
    def of(cls, tensor: Tensor, in_place: bool) -> _Output:
        base = tensor._base
        if not (in_place and base is not None and base.requires_grad):
            return cls(get_gradient_edge(tensor))
        offset = int(tensor.storage_offset() - base.storage_offset())
        view = tensor.size(), tensor.stride(), offset
        return cls(get_gradient_edge(base), view, (base.size(), base.stride()))

    def adjoint(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or self.view is None or self.base is None:
            return gradient
        whole = torch.empty_strided(*self.base, dtype=gradient.dtype, device=gradient.device)
        return whole.copy_(gradient).as_strided(*self.view)


@dataclass(frozen=True)
class _Taint:
    """What is known of values that depend on the parameters.

    Attributes
    ----------
    jump : str or None
        The operation that makes them jump.
    hidden : str or None
        The operation whose kink autograd has not seen. Where a tensor with a graph has such values, the kink is inside an
        operation with a backward pass of its own.
    """

    jump: str | None = None
    hidden: str | None = None


class KinkWatch(TorchDispatchMode):
    """Watches a loss being computed, and tells its kinks.

    Parameters
    ----------
    sources : sequence of Tensor
        What kinks are looked for in: the parameters.
    model : torch.nn.Module, optional
        Its modules are named in messages.
    """

    def __init__(self, sources: Sequence[Tensor], model: nn.Module | None = None) -> None:
        super().__init__()
        self.kinks: list[Kink] = []
        self._names = {} if model is None else {id(module): name for name, module in model.named_modules()}
        self._path: list[str] = []
        self._taints: dict[int, _Taint | None] = {}  # by storage; None: does not depend on the sources
        self._alive: list[Any] = []
        self._pending: tuple[Kink, Any, bool] | None = None
        for source in sources:
            self._mark(source, _Taint())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is computed inside."""
        with _named_modules(self._names, self._path), _Reads(self._saw_read), self:
            yield
        self._settle()

    def refuse(self, loss: Tensor) -> None:
        """Raise if a kink leads to `loss`.

        Raises
        ------
        UnsupportedModelError
            Naming the operations and their modules.
        """
        found = [kink.title for kink, _ in self._relevant(loss)]
        if found:
            raise UnsupportedModelError(
                f'expected operations without kinks, as nonsmooth="error" asks for, got {_listed(found)}: replace it by a '
                'smooth one (Softplus, GELU), or pass nonsmooth="smooth" for the curvature of a surrogate or '
                'nonsmooth="generalized" for the second derivative that holds almost everywhere'
            )

    def corrections(self, loss: Tensor, sharpness: float) -> tuple[list[Tensor], list[Tensor]]:
        """Return what to add to the gradient that it has the surrogates' curvature.

        Parameters
        ----------
        loss : Tensor
            What was computed while it was watched.
        sharpness : float

        Returns
        -------
        points, slopes : list of Tensor
            Σ (∂point/∂θ)ᵀ slope is to be added to the gradient: zero, with the Jacobian that is missing.

        Raises
        ------
        UnsupportedModelError
            If a kink leads to `loss` that has no surrogate.
        """
        points: list[Tensor] = []
        slopes: list[Tensor] = []
        for kink, adjoints in self._with_surrogates(loss):
            if kink.call is not None:
                pairs = zip(kink.points, kink.corrections(adjoints, sharpness), strict=True)
                for point, slope in ((p, c) for p, c in pairs if c is not None):
                    points.append(point)
                    slopes.append(slope)
        return points, slopes

    def has_surrogates(self, loss: Tensor) -> bool:
        """Tell whether kinks lead to `loss` that surrogates smooth.

        Raises
        ------
        UnsupportedModelError
            If a kink leads to `loss` that has no surrogate.
        """
        return any(kink.call is not None for kink, _ in self._with_surrogates(loss))

    def _with_surrogates(self, loss: Tensor) -> list[tuple[Kink, list[Tensor | None]]]:
        """Kinks that lead to a loss, with the adjoints of their outputs; each has a surrogate or was warned of."""
        relevant = self._relevant(loss)
        reads = [kink.title for kink, _ in relevant if kink.outputs is None]
        if reads:
            warnings.warn(
                f"the loss depends on parameters through {_listed(reads)}: a kink that comes of it has no surrogate",
                stacklevel=2,
            )
        missing = [kink.title for kink, _ in relevant if kink.call is None and kink.outputs is not None]
        if missing:
            raise UnsupportedModelError(
                f'expected kinks with a surrogate, as nonsmooth="smooth" needs, got {_listed(missing)}: write it with relu, '
                'clamp, abs or maximum, or pass nonsmooth="generalized"'
            )
        return relevant

    def _relevant(self, loss: Tensor) -> list[tuple[Kink, list[Tensor | None]]]:
        """Kinks that lead to a loss, with the adjoints of their outputs."""
        self._settle()
        taint = self._taint(loss)
        if taint is not None and taint.hidden:
            self.kinks.append(Kink(f"{taint.hidden} {_OWN_BACKWARD}", outputs=None))
        edges = [output.edge for kink in self.kinks for output in kink.outputs or ()]
        gradients: Sequence[Tensor | None] = []
        if edges and loss.requires_grad:
            gradients = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        found, at = [], iter(gradients)
        for kink in self.kinks:
            adjoints = [output.adjoint(next(at, None)) for output in kink.outputs or ()]
            if kink.outputs is None or any(b is not None for b in adjoints):
                found.append((kink, adjoints))
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, kwargs = in_memory(func), kwargs or {}
        self._settle()
        name = operation_name(func)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        taints = [self._taint(tensor) for tensor in tensors]
        if _is_shape_alone(name) or not any(taint is not None for taint in taints):
            result = func(*args, **kwargs)
            if any(tensor.requires_grad for tensor in tensors):  # such as inputs that the loss differentiates by
                self._mark_all(result, None)
            return result
        if name in _READS:
            self._saw_read(_READS[name], tensors)
        active = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        # A backward operation is linear in what it takes first, as what selects is, and has its kinks in the rest.
        is_linear_first = name.endswith("_backward") or name in _SELECTIONS
        is_bent = any(taint is not None for taint in taints[is_linear_first:])
        kinked = is_bent and is_kinked(func, *args, **kwargs)
        if is_bent and torch.Tag.dynamic_output_shape in func.tags and name != "index":
            self.kinks.append(Kink(self._titled(f"a shape that depends on values ({name})"), outputs=None))
        kink = self._kink(func, args, kwargs, tensors, taints, kinked) if active else None
        result = func(*args, **kwargs)
        known = [taint for taint in taints if taint is not None]
        jump = next((taint.jump for taint in known if taint.jump), name if jumps(func) else None)
        hidden = next((taint.hidden for taint in known if taint.hidden), jump or (name if kinked else None))
        hidden = None if active else hidden
        self._mark_all(result, _Taint(jump, hidden), _Taint(jump or name, hidden))
        if kink is not None:
            self._pending = kink, result, func._schema.is_mutable
        return result

    def _kink(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
        taints: Sequence[_Taint | None],
        kinked: bool,
    ) -> Kink | None:
        """Describe the kink of an operation that autograd records, before it runs; None where it has none."""
        name = operation_name(func)
        if kinked:
            if surrogate(func, 1.0) is None:
                return Kink(self._titled(name))
            points: list[Tensor] = []
            args, kwargs = tree_map(partial(_private, points), (tuple(args), kwargs))
            return Kink(self._titled(name), (func, args, kwargs), points)
        overwritten = tensors[:1] if name == "copy" else []
        for tensor, taint in zip(tensors, taints, strict=True):
            if taint is None or any(tensor is other for other in overwritten):
                continue
            if tensor.requires_grad and taint.hidden:
                return Kink(self._titled(f"{taint.hidden} {_OWN_BACKWARD}"))
            if taint.jump and not tensor.requires_grad:
                return Kink(self._titled(f"{name} (driven by {taint.jump})"))
        return None

    def _settle(self) -> None:
        """Note where the adjoints of the last kink's outputs are, which autograd has recorded by now."""
        if self._pending is not None:
            kink, result, in_place = self._pending
            self._pending = None
            outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
            kink.outputs = [_Output.of(output, in_place) for output in outputs]
            self.kinks.append(kink)

    def _taint(self, tensor: Tensor) -> _Taint | None:
        if tensor.layout != torch.strided:
            return _Taint() if tensor.requires_grad else None
        storage = tensor.untyped_storage().data_ptr()
        if storage not in self._taints and tensor.requires_grad and not tensor.is_leaf and tensor.numel():
            return _Taint(hidden="what cannot be seen")  # a compiled function, say
        return self._taints.get(storage)

    def _mark_all(self, result: Any, floats: _Taint | None, others: _Taint | None = None) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._mark(tensor, floats if tensor.is_floating_point() or tensor.is_complex() else others)

    def _mark(self, tensor: Tensor, taint: _Taint | None) -> None:
        if tensor.layout == torch.strided and tensor.numel():
            storage = tensor.untyped_storage()
            self._alive.append(storage)  # that its address is not another's before the end
            known = self._taints.get(storage.data_ptr())
            if known is not None:
                taint = known if taint is None else _Taint(taint.jump or known.jump, taint.hidden or known.hidden)
            self._taints[storage.data_ptr()] = taint

    def _saw_read(self, name: str, tensors: Sequence[Tensor]) -> None:
        if any(self._taint(tensor) is not None for tensor in tensors):
            self.kinks.append(Kink(self._titled(f"a value read into Python ({name})"), outputs=None))

    def _titled(self, name: str) -> str:
        inside = self._path[-1] if self._path else ""
        return f"{name} in module {inside!r}" if inside else name


class _Reads(TorchFunctionMode):
    """Sees tensors that become arrays and lists, which no operation shows."""

    def __init__(self, saw: Callable[[str, Sequence[Tensor]], None]) -> None:
        super().__init__()
        self.saw = saw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_METHODS:
            self.saw(func.__name__, args[:1])
        return func(*args, **(kwargs or {}))


def _is_shape_alone(name: str) -> bool:
    """Tell whether an operation takes no more than the shape of its argument."""
    return name.endswith("_like") or name.startswith("new_")


def _private(points: list[Tensor], value: Any) -> Any:
    """Return a copy of a tensor that is safe from later changes, within its graph where it has one."""
    if not isinstance(value, Tensor):
        return value
    if not value.requires_grad:
        return value.detach().clone()
    with recorded_within_dispatch():
        points.append(value.clone())
    return points[-1]


@contextmanager
def _named_modules(names: dict[int, str], path: list[str]) -> Iterator[None]:
    """Keep the path of the module that runs as the last entry of `path`."""

    def enter(module: nn.Module, inputs: Any) -> None:
        if id(module) in names:
            path.append(names[id(module)])

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if id(module) in names and path:
            path.pop()

    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listed(titles: Sequence[str]) -> str:
    different = list(dict.fromkeys(titles))
    return "; ".join(different[:4]) + ("; …" if len(different) > 4 else "")
