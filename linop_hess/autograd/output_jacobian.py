"""The Jacobian of a model's output by its parameters, row by row of the samples, where each sample's output is a function of it alone.

One backward pass gives the adjoints of all samples at each operation that a parameter enters; what each sample adds to the gradient
there are the rows. Nothing is known of operations but that samples are along their first axis, and whether that is so is checked: rows
added up with random weights must be the gradient of the same sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.func import vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from linop_hess._memory import require
from linop_hess.autograd.backward_graph import Inside
from linop_hess.autograd.differentiate import in_primitives
from linop_hess.lq.accuracy import ROUNDED, ROWS_ADD_UP


def output_jacobian(
    run: Callable[[], Any], parameters: Sequence[Tensor], samples: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """The output of a model and its Jacobian, if its samples do not interact.

    Parameters
    ----------
    run : callable
        Runs the model on a batch; samples are along the first axis of all that depends on them.
    parameters : sequence of Tensor
        Leaves of the graph that `run` makes, of one dtype.
    samples : int, optional
        How many there are; where it is not known the model is run once more.

    Returns
    -------
    (Tensor, Tensor) or None
        The output, (samples, …), and its Jacobian, (samples, outputs, N), outputs those of a sample. None where samples interact, the
        output is no tensor of the parameters' dtype with samples along its first axis, an operation that a parameter enters does not
        have them there, or autograd refuses.

    Raises
    ------
    MemoryError
        If the Jacobian does not fit.
    """
    if samples is None:
        with torch.no_grad():
            found = run()
        if not isinstance(found, Tensor) or not found.ndim:
            return None
        samples = len(found)
    size = sum(p.numel() for p in parameters)
    for way in (_as_called, _as_run):
        with torch.enable_grad(), Inside() as inside:
            output, again, watch = way(run, parameters, samples)
        if inside.has_norms_differentiated:
            return None
        if not isinstance(output, Tensor) or not output.requires_grad or output.shape[:1] != (samples,) or not samples:
            return None
        if output.dtype not in ROWS_ADD_UP or any(p.dtype != output.dtype for p in parameters):
            return None
        if again is not None and watch.uses and not watch.is_strange:
            require(output.numel() * size * output.element_size(), "the Jacobian of the model's output")
            jacobian = _checked_rows(output, again, watch.uses, parameters)
            if jacobian is not None:
                return output.detach(), jacobian
    return None


def _checked_rows(output: Tensor, again: Tensor, uses: Sequence[_Use], parameters: Sequence[Tensor]) -> Tensor | None:
    try:
        jacobian = _rows(again, uses, parameters)
        return jacobian if jacobian is not None and _add_up(output, jacobian, parameters) else None
    except RuntimeError:  # no derivative by what is in the midst of a graph, as where a reentrant checkpoint is
        return None


def _as_called(run: Callable[[], Any], parameters: Sequence[Tensor], samples: int) -> tuple[Any, Tensor | None, _Watch]:
    """Watch the functions that a model calls, which is the least work; what it differentiates inside is not seen."""
    with _Watch(parameters, samples) as watch:
        output = run()
    return output, None if watch.derivatives else output, watch


def _as_run(run: Callable[[], Any], parameters: Sequence[Tensor], samples: int) -> tuple[Any, Tensor | None, _Watch]:
    """Write down which operations are run, those of derivatives inside too, and watch them run again."""
    watch = _Watch(parameters, samples, folded=True)
    try:
        with _Tape() as tape:
            output = run()
        return output, tape.again(output, parameters, watch.call) if isinstance(output, Tensor) else None, watch
    except RuntimeError:  # the model ran before: of sparse tensors, forward mode, or parameters that it changes
        return None, None, watch


def _rows(output: Tensor, uses: Sequence[_Use], parameters: Sequence[Tensor]) -> Tensor | None:
    """The rows, (samples, outputs, N), from what samples add in each use."""
    flat = output.flatten(1) if output.ndim > 1 else output[:, None]
    jacobian = output.new_zeros(*flat.shape, sum(p.numel() for p in parameters))
    parts = jacobian.split([p.numel() for p in parameters], 2)
    columns = {id(p): part for p, part in zip(parameters, parts, strict=True)}
    edges = [use.edge for use in uses]
    units = torch.eye(flat.shape[1], dtype=output.dtype, device=output.device)
    passes = [
        torch.autograd.grad(
            output, edges, unit.expand_as(flat).reshape(output.shape), retain_graph=True, allow_unused=True
        )
        for unit in units
    ]
    for use, adjoints in zip(uses, zip(*passes, strict=True), strict=True):
        if (seen := next((a for a in adjoints if a is not None), None)) is None:
            continue
        rows = use.rows([torch.zeros_like(seen) if a is None else a for a in adjoints])
        if rows is None:
            return None
        for p, part in rows:
            columns[id(p)] += part.reshape(*flat.shape, -1)
    return jacobian


def _add_up(output: Tensor, jacobian: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether random weights times the rows are the gradient of the sum with these weights, for each parameter by itself.

    Weights are such that rows of all sizes count alike: what is small in one row or one parameter is not lost beside the others.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    weights = torch.randn(output.shape, generator=generator, dtype=output.dtype, device="cpu").to(output.device)
    eps, rows = torch.finfo(output.dtype).eps, jacobian.flatten(0, 1)
    sizes = rows.norm(dim=1)
    if not bool(sizes.any()):
        sizes = torch.ones_like(sizes)
    weights = weights / sizes.clamp_min(eps * sizes.max()).view_as(output)
    parts = torch.autograd.grad(
        output, parameters, weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    error = torch.cat([part.reshape(-1) for part in parts]) - weights.flatten() @ rows
    few = max(1, _IN_CACHE // rows.shape[1])
    pairs = zip(weights.flatten().split(few), rows.split(few), strict=True)
    terms = torch.stack([w.abs() @ r.abs() for w, r in pairs]).sum(0)
    counts = [p.numel() for p in parameters]
    errors, bounds = (torch.stack([part.norm() for part in x.split(counts)]) for x in (error, terms))
    # Derivatives that cancel are rounding of the others.
    return not bool((errors > ROWS_ADD_UP[output.dtype] * bounds + ROUNDED * eps * bounds.norm()).any())


class _Made:
    """A tensor that depends on parameters and on no sample.

    Attributes
    ----------
    value : Tensor
    leaves : list of Tensor
        The parameters.
    function : callable
        Makes it again, of others in their place.
    """

    def __init__(self, value: Tensor, leaves: list[Tensor], function: Callable[..., Tensor]) -> None:
        self.value, self.leaves, self.function = value, leaves, function


class _Call:
    """A function called with parameters, or what is made of them, and other things."""

    def __init__(self, function: Callable[..., Any], args: Any, made: Mapping[int, _Made]) -> None:
        self._function = in_primitives(function)
        flat, self._spec = pytree.tree_flatten(args)
        self._made = {k: made[id(x)] for k, x in enumerate(flat) if id(x) in made}
        self._rest = [None if k in self._made else x for k, x in enumerate(flat)]
        self.leaves = list({id(p): p for m in self._made.values() for p in m.leaves}.values())
        self.data = {k: x for k, x in enumerate(self._rest) if isinstance(x, Tensor)}

    def __call__(self, leaves: Sequence[Tensor], data: Mapping[int, Tensor]) -> Any:
        at = {id(p): value for p, value in zip(self.leaves, leaves, strict=True)}
        flat = list(self._rest)
        for k, m in self._made.items():
            flat[k] = m.function(*(at[id(p)] for p in m.leaves))
        for k, x in data.items():
            flat[k] = x
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        return self._function(*args, **kwargs)

    def part(self, k: int) -> Callable[..., Tensor]:
        """Its k-th tensor as a function of the leaves."""
        return lambda *leaves: list(_leaves(self(leaves, {})))[k]


class _Use:
    """A call of which the result has samples: along its first axis, where several of its rows may be of one sample."""

    def __init__(self, call: _Call, out: Tensor, samples: int) -> None:
        self._call, self._samples, self.edge = call, samples, get_gradient_edge(out)
        self._rows = len(out) // samples
        # What autograd knows of the data is of no use here, and would be kept.
        self._data = {k: x.detach() for k, x in call.data.items()}

    def rows(self, adjoints: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]] | None:
        """What each sample adds to the derivatives by each parameter, (samples, outputs, *shape), of the adjoints of each output.

        None where the operation cannot be run on one sample.
        """
        leaves = [p.detach() for p in self._call.leaves]
        data, dims = [], []
        for x in self._data.values():
            has_samples = x.ndim > 0 and len(x) == self._samples * self._rows
            data.append(self._by_sample(x) if has_samples else x)
            dims.append(0 if has_samples else None)

        def of_one(seeds: Tensor, *sample: Tensor) -> tuple[Tensor, ...]:
            one = dict(zip(self._data, sample, strict=True))
            pull = vjp(lambda *p: self._call(p, one), *leaves)[1]
            parts: tuple[Tensor, ...] = vmap(pull)(seeds)
            return parts

        try:
            found = vmap(of_one, in_dims=(0, *dims))(torch.stack([self._by_sample(a) for a in adjoints], 1), *data)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
        ):  # what it says of one sample is nothing that a user did
            return None
        return list(zip(self._call.leaves, found, strict=True))

    def _by_sample(self, x: Tensor) -> Tensor:
        return x.reshape(self._samples, self._rows, *x.shape[1:])


def _leaves(tree: Any) -> Iterator[Any]:
    """What is in nested tuples, lists and dicts, in pytree's order; that takes much longer."""
    if isinstance(tree, tuple | list):
        for x in tree:
            yield from _leaves(x)
    elif isinstance(tree, dict):
        for x in tree.values():
            yield from _leaves(x)
    else:
        yield tree


class _Watch(TorchFunctionMode):
    """Sees which operations parameters enter.

    Parameters
    ----------
    parameters : sequence of Tensor
    samples : int
        How many there are.
    folded : bool
        Whether the first axis may hold several rows of each sample.

    Attributes
    ----------
    uses : list of _Use
    is_strange : bool
        Whether one was not understood.
    derivatives : int
        How often autograd was asked for some.
    """

    def __init__(self, parameters: Sequence[Tensor], samples: int, folded: bool = False) -> None:
        super().__init__()
        self._samples, self._folded, self.is_strange, self.derivatives = samples, folded, False, 0
        self._made = {id(p): _Made(p, [p], lambda value: value) for p in parameters}
        self.uses: list[_Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function, and see what it does with parameters."""
        self.derivatives += func is torch.autograd.grad
        out = func(*args, **kwargs)
        if not any(id(x) in self._made for x in _leaves((args, kwargs))):
            return out
        call = None
        for k, x in enumerate(_leaves(out)):
            if not isinstance(x, Tensor) or not x.requires_grad or id(x) in self._made:
                continue
            call = call or _Call(func, (args, kwargs), self._made)
            of_samples = self._has_samples(x) and bool(call.data)
            if not of_samples and not any(data.requires_grad for data in call.data.values()):
                self._made[id(x)] = _Made(x, call.leaves, call.part(k))
            elif of_samples and x is out:
                self.uses.append(_Use(call, x, self._samples))
            else:
                self.is_strange = True
        return out

    def _has_samples(self, x: Tensor) -> bool:
        return x.ndim > 0 and (len(x) % self._samples == 0 if self._folded else len(x) == self._samples)


class _Tape(TorchDispatchMode):
    """Writes down the operations that are run, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def again(self, output: Tensor, parameters: Sequence[Tensor], call: Callable[..., Any]) -> Tensor | None:
        """Run those that depend on parameters again by `call`, for autograd to see each; None where it cannot be said what they change."""
        # Autograd saves results as other tensors in the same memory, all of which is kept here.
        at = {_place(p): p for p in parameters}
        for func, args, kwargs, out in self._calls:
            is_active = [_place(x) in at for x in _leaves((args, kwargs)) if isinstance(x, Tensor)]
            # Autograd detaches what it saves; where a model does, rows will not add up.
            if not any(is_active) or func is torch.ops.aten.detach.default:
                continue
            if func._schema.is_mutable and not is_active[0]:
                return None
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: at.get(_place(x), x.detach()), (args, kwargs))
            for old, new in zip(_leaves(out), _leaves(call(func, args, kwargs)), strict=True):
                if isinstance(old, Tensor):
                    at[_place(old)] = new
        return at.get(_place(output))


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where in memory the entries of a tensor lie."""
    return x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype


# How many numbers of rows their sizes are taken of at once: of all of them that takes as long as making them.
_IN_CACHE = 1 << 16
