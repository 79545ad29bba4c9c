"""Whether the loss of all data at once is the weighted sum of its batches': seen from the losses of batches put together."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from linop_hess.autograd.batches import Batches, are_ignored, sample_count
from linop_hess.autograd.calling import as_data
from linop_hess.autograd.differentiate import differentiate
from linop_hess.errors import NotFiniteError, ProcessError, UnsupportedModelError
from linop_hess.processes import Processes

Loss = Callable[[Any, Any], Tensor]

# So many samples of process 0 are compared with the first batch of each; more where the loss of fewer is not finite.
_FEW = (8, 64, 512)

# Samples that take more bytes than these are not sent.
_MOST_BYTES = 2**22


@dataclass(frozen=True)
class Part:
    """One batch, or a part of one, what the model gives for it, and its weight."""

    inputs: Any
    targets: Any
    output: Any
    weight: float

    @property
    def count(self) -> int:
        return sample_count(self.inputs, self.targets)


class NotJoined(Exception):
    """Two batches cannot be put together."""


class Additivity:
    """Compares each batch and the one before with both as one batch.

    They are put together along the first dimension: the model's outputs and the targets, so that the model is not run again; where
    the loss cannot be taken of outputs without their graph, or they are no samples, inputs and targets, and the model is run on
    both. Tensors that are the same in both and have another length than the number of samples are no samples. Batches that do not
    fit together, as those of unequal lengths, are each compared with their own halves.

    Parameters
    ----------
    loss : callable
        Of an output and targets.
    model : callable
        Of inputs.
    weight_fn : callable or None
        Weight of inputs and targets in a mean, which is divided by their sum; None for sums.
    eps : float
        Unit of rounding.

    Attributes
    ----------
    worst : float
        By how much, relatively, the loss or its derivatives were off the weighted sum, at most; 0 for rounding.
    worst_targets : list
        Those of these two batches.
    """

    def __init__(
        self,
        loss: Loss,
        model: Callable[[Any], Any],
        weight_fn: Callable[[Any, Any], float] | None,
        eps: float,
    ) -> None:
        self._loss, self._model, self._weight_fn, self._mean, self._eps = (
            loss,
            model,
            weight_fn,
            weight_fn is not None,
            eps,
        )
        self._first: Part | None = None
        self._before: Part | None = None
        self.worst = 0.0
        self.worst_targets: list[Any] = []

    def take(self, part: Part) -> None:
        """Compare the next batch with the one before; keep the worst gap."""
        part = replace(part, output=pytree.tree_map(_detached, part.output))
        before, self._before = self._before, part
        if before is None:
            self._first = part
        else:
            self._compare(before, part)

    def _compare(self, before: Part, part: Part) -> None:
        gap = self._gap(before, part)
        if gap > self.worst:
            self.worst, self.worst_targets = gap, [before.targets, part.targets]

    def from_first(self, processes: Processes, device: torch.device) -> Part | None:
        """A few samples of the first batch of process 0, in all processes; None where they cannot be told apart or sent."""
        packed = processes.from_first(self._packed_few() if processes.rank == 0 else b"")
        if not packed:
            return None
        few: Part = pickle.loads(packed)
        inputs, targets, output = as_data((few.inputs, few.targets, few.output), device)
        return Part(inputs, targets, output, few.weight)

    def beside(self, few: Part | None) -> Tensor:
        """Compare the first batch with samples of process 0; return the loss of these and its derivatives, as this process has them."""
        if few is None:
            return torch.zeros(1, dtype=torch.float64, device="cpu")
        if self._first is not None:
            self._compare(few, replace(self._first, weight=self._weight(self._first.inputs, self._first.targets)))
        try:
            value, derivatives = _derivatives(self._loss, self._model(few.inputs), few.targets)
        except (RuntimeError, ValueError, TypeError, IndexError):  # a model may take batches of one size alone
            return torch.zeros(1, dtype=torch.float64, device="cpu")
        flat = [tensor.detach().double().reshape(-1).cpu() for tensor in derivatives]
        return torch.cat([torch.tensor([value], dtype=torch.float64, device="cpu"), *flat])

    def _packed_few(self) -> bytes:
        part = self._first
        for count in _FEW if part is not None else ():
            assert part is not None
            try:
                inputs, targets, output = _cut((part.inputs, part.targets, part.output), part.count, slice(None, count))
                self._loss(output, targets)
                weight = self._weight(inputs, targets)
                inputs, targets, output = pytree.tree_map(_on_host, (inputs, targets, output))
                packed = pickle.dumps(Part(inputs, targets, output, weight))
                if weight and len(packed) <= _MOST_BYTES:
                    return packed
            except Exception:  # whatever samples are that cannot be cut or pickled, they are not compared
                continue
        return b""

    def require(self, batches: Batches, loss_fn: Callable[..., Any]) -> None:
        """Raise where the loss of two batches put together was not the weighted sum of theirs.

        Raises
        ------
        ValueError
            Saying what to pass.
        """
        if not self.worst:
            return
        gap = f"{self.worst:.1e}"
        if batches.reduction == "sum":
            raise ValueError(
                "expected a loss that sums over samples, so that the loss of two batches put together is the sum of theirs, got "
                f'one that is off that by {gap}: pass reduction="mean" if it averages, or all data as one batch'
            )
        if batches.has_weights:
            raise ValueError(
                "expected weight_fn to return what the mean of a batch divides by, so that the loss of two batches put together "
                f"is the weighted mean of theirs, got weights with which it is off that by {gap}: return such weights, or use a "
                'loss that sums with reduction="sum" and scale the operator'
            )
        raise ValueError(
            "expected a loss that averages over samples, so that the loss of two batches put together is the mean of theirs by "
            f"numbers of samples, got one that is off that by {gap}{_cause(loss_fn, self.worst_targets)}: pass weight_fn, which gives "
            "what the mean of a batch divides by (of masked targets how many are not, the sum of the weights of a weighted mean), "
            'or use a loss that sums with reduction="sum" and scale the operator'
        )

    def _gap(self, before: Part, part: Part) -> float:
        """0 where the gap is no more than rounding, and where nothing can be compared."""
        for compare in (
            lambda: self._of_outputs([before, part], _joined_pair(before, part)),
            lambda: self._of_inputs([before, part]),
            lambda: self._of_halves(part),
        ):
            try:
                return compare()
            except (NotJoined, RuntimeError, ValueError, TypeError, IndexError):  # other shapes than the loss can take
                continue
        return 0.0

    def _of_outputs(self, parts: Sequence[Part], whole: tuple[Any, Any]) -> float:
        if not _slopes_of(whole[0]):
            raise NotJoined
        found = [_derivatives(self._loss, part.output, part.targets) for part in parts]
        return self._compared(parts, found, _derivatives(self._loss, *whole))

    def _of_inputs(self, parts: Sequence[Part]) -> float:
        """The same by the value alone, of the model on the inputs put together."""
        a, b = parts
        inputs, targets = _joined((a.inputs, a.targets), (b.inputs, b.targets), a.count, b.count)
        values = [float(self._loss(self._model(part.inputs), part.targets)) for part in parts]
        whole = float(self._loss(self._model(inputs), targets))
        return self._compared(parts, [(value, []) for value in values], (whole, []))

    def _of_halves(self, part: Part) -> float:
        half = part.count // 2
        if not half:
            raise NotJoined
        halves = []
        for at in (slice(None, half), slice(half, None)):
            output, targets, inputs = _cut((part.output, part.targets, part.inputs), part.count, at)
            halves.append(Part(inputs, targets, output, self._weight(inputs, targets)))
        return self._of_outputs(halves, (part.output, part.targets))

    def _weight(self, inputs: Any, targets: Any) -> float:
        return 1.0 if self._weight_fn is None else self._weight_fn(inputs, targets)

    def _compared(self, parts: Sequence[Part], found: Sequence[Any], whole: Any) -> float:
        total = sum(part.weight for part in parts) if self._mean else 1.0
        shares = [part.weight / total for part in parts]
        # A slope of order one a sample is lost in rounding where the fit is close; means divide by the number of samples.
        floor = 16 * self._eps * (1.0 / sum(part.count for part in parts) if self._mean else 1.0)
        values = [share * value for share, (value, _) in zip(shares, found, strict=True)]
        scale = sum(map(abs, values)) + floor
        gaps = [abs(whole[0] - sum(values)) / (scale + abs(whole[0]))]
        for k, seen in enumerate(whole[1]):
            mine = [share * tensors[k] for share, (_, tensors) in zip(shares, found, strict=True)]
            expected = sum(mine) if all(m.shape == seen.shape for m in mine) else torch.cat(mine)
            size = max(float(expected.abs().max()), float(seen.abs().max())) if seen.numel() else 0.0
            if size > floor:
                gaps.append(max(float((seen - expected).abs().max()) - floor, 0.0) / size)
        if not all(gap < torch.inf for gap in gaps):  # derivatives that are not finite are told of elsewhere
            raise NotJoined
        worst = max(gaps)
        return worst if not worst <= self._eps**0.5 else 0.0


def _joined_pair(a: Part, b: Part) -> tuple[Any, Any]:
    return _joined((a.output, a.targets), (b.output, b.targets), a.count, b.count)


def _cause(loss_fn: Callable[..., Any], targets: list[Any]) -> str:
    ignored = [are_ignored(loss_fn, each) for each in targets]
    if any(each is not None and bool(each.any()) for each in ignored):
        return f" (there are targets with ignore_index={loss_fn.ignore_index})"  # type: ignore[attr-defined]
    return " (a class-weighted loss)" if getattr(loss_fn, "weight", None) is not None else ""


def _on_host(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().cpu().clone().requires_grad_(leaf.requires_grad)  # a view would take all its memory along


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _slopes_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _derivatives(loss: Loss, output: Any, targets: Any) -> tuple[float, list[Tensor]]:
    """The loss, its slopes by the output, and the product of its second derivatives with a vector, a function of the entries."""
    leaves, nest = pytree.tree_flatten(output)
    states, mine = [], list(leaves)
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            states.append(leaf.detach().requires_grad_())
            mine[k] = states[-1].clone()  # which a loss may change in place
    value = loss(pytree.tree_unflatten(mine, nest), targets)
    slopes = _filled(differentiate([value], states, create_graph=True), states)
    try:
        curved = differentiate(slopes, states, [state.detach().cos() for state in states])
    except RuntimeError:  # no second derivative, as products by differences allow
        curved = []
    return float(value.detach()), [slope.detach() for slope in [*slopes, *_filled(curved, states)]]


def _filled(derivatives: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if d is None else d for d, x in zip(derivatives, like, strict=False)]


def _joined(a: Any, b: Any, n_a: int, n_b: int) -> Any:
    """Two nests of samples as one; a tensor in two places of them stays one."""
    (left, nest), (right, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    if nest != other:
        raise NotJoined
    made: dict[tuple[int, int], Any] = {}

    def join(x: Any, y: Any) -> Any:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            if isinstance(x, Tensor) or isinstance(y, Tensor) or x != y:
                raise NotJoined
            return x
        if x.ndim and y.ndim and x.shape[0] == n_a and y.shape[0] == n_b:
            if x.shape[1:] != y.shape[1:]:
                raise NotJoined
            return torch.cat([x.detach(), y.detach()]).requires_grad_(x.requires_grad and x.is_leaf)
        if x.shape != y.shape or not torch.equal(x, y):
            raise NotJoined
        return x

    for x, y in zip(left, right, strict=True):
        if (id(x), id(y)) not in made:
            made[id(x), id(y)] = join(x, y)
    return pytree.tree_unflatten([made[id(x), id(y)] for x, y in zip(left, right, strict=True)], nest)


def _cut(nest: Any, count: int, at: slice) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf[at] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count else leaf, nest
    )


@contextmanager
def differences_told(first: Any, inputs: Any, targets: Any, number: int) -> Iterator[None]:
    """Tell, in place of torch's message, how a batch differs from the first one where model or loss failed with it.

    Batches may differ, in sizes of images or lengths of texts, where model and loss take them. `first` is the `form` of the first.

    Raises
    ------
    TypeError
        If a computation failed and tensors are of another dtype or class.
    ValueError
        If it failed and they are nested, placed or shaped in another way.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        is_told = isinstance(error, UnsupportedModelError | NotFiniteError | ProcessError)
        found = None if is_told else _difference(first, form(inputs, targets))
        if found is None:
            raise
        kind, what = found
        raise kind(
            f"expected batches that model and loss take, got {what} of batch {number}, with which they failed "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): give all batches the same form"
        ) from error


def form(inputs: Any, targets: Any) -> list[tuple[Any, list[tuple[str, str, tuple[int, ...]]]]]:
    """The nesting of inputs and of targets, and of each leaf class or dtype, device, and shape; it holds no data."""
    found = []
    for value in (inputs, targets):
        leaves, spec = pytree.tree_flatten(value)
        kinds = [str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
        places = [str(getattr(leaf, "device", "")) for leaf in leaves]
        shapes = [tuple(getattr(leaf, "shape", ())) for leaf in leaves]
        found.append((spec, list(zip(kinds, places, shapes, strict=True))))
    return found


def _difference(first: Any, batch: Any) -> tuple[type[Exception], str] | None:
    """How the form of a batch differs from that of the first one, apart from its number of samples."""
    for what, (one, leaves), (other, others) in zip(("inputs", "targets"), first, batch, strict=True):
        if one != other:
            return ValueError, f"another nesting than the first one's in the {what}"
        for (kind, place, shape), (other_kind, other_place, other_shape) in zip(leaves, others, strict=True):
            if kind != other_kind:
                return TypeError, f"{other_kind} in place of the first one's {kind} in the {what}"
            if place != other_place:
                return ValueError, f"a tensor on {other_place} in place of the first one's on {place} in the {what}"
            if shape[1:] != other_shape[1:] or len(shape) != len(other_shape):
                return ValueError, f"shape {other_shape} beside the first one's {shape} in the {what}"
    counts, other_counts = _counts(first), _counts(batch)
    if len(counts) == 1 < len(other_counts):
        return (
            ValueError,
            f"first dimensions {sorted(other_counts)}, of which the first one has one, in inputs and targets",
        )
    return None


def _counts(form_of_batch: Any) -> set[int]:
    return {shape[0] for _, leaves in form_of_batch for _, _, shape in leaves if shape}
