"""The data of an empirical risk: one batch, or several with the weights that make their sum exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from linop_hess._validate import Reduction
from linop_hess.autograd.calling import checksum, refuse_empty, takes_parameters
from linop_hess.processes import ALONE, Processes
from linop_hess.processes.fingerprint import fingerprint

Progress = bool | Callable[[int], object] | None
"""True for a progress bar, or what to call with the number of batches done in this pass."""

_Batch = TypeVar("_Batch")


_ONE_BATCH = "pass one batch as a tuple (inputs, targets), several as a list of such tuples or a DataLoader"


class Batches:
    """Pairs of inputs and targets that can be gone through again and again, each with its weight.

    The risk is Σ_b w_b ℓ_b with ℓ_b the loss of batch b: w_b = 1 where the loss sums over samples, n_b / Σ
    n_b where it averages, so that the risk is the loss of all data at once however they are cut into batches. n_b is the
    number of samples, or what `weight_fn` gives; batches of weight 0 are left out.

    Parameters
    ----------
    data : tuple or iterable
        ``(inputs, targets)``, or a re-iterable of such pairs.
    loss_fn : callable
        Asked for its `reduction` attribute where `reduction` is not given.
    reduction : {"sum", "mean"}, optional
        How `loss_fn` combines the samples of a batch. Needed for several batches only.
    progress : bool or callable
        True shows a progress bar over batches, where there is a terminal; a callable is called with the number of batches done.
    weight_fn : callable, optional
        ``weight_fn(inputs, targets)`` is what the mean of a batch divides by.
    processes : Processes
        Those that the samples are spread over; these batches are one's.

    Attributes
    ----------
    count : int
        The number of batches of this process.
    samples : float
        The sum of the weights of all processes, once they have joined.

    Raises
    ------
    TypeError
        If the data are neither, a one-shot iterator, or a data set without batches, or `progress` is neither.
    ValueError
        If there are no batches, or the weights cannot be told, are negative, not finite or all zero.
    ImportError
        If `progress` is True without tqdm.
    """

    def __init__(
        self,
        data: Any,
        loss_fn: Callable[..., Any],
        reduction: Reduction | None = None,
        progress: Progress = False,
        weight_fn: Callable[[Any, Any], Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        _check_progress(progress)
        self.processes = processes
        self.progress = progress if callable(progress) or not processes.rank else False
        self.data: Iterable[Any] = _as_iterable(data)
        stated = _stated_reduction(loss_fn)
        if reduction not in (None, "sum", "mean"):
            raise ValueError(f'expected reduction to be "sum" or "mean", got {reduction!r}: pass one of the two')
        if reduction is not None and stated is not None and reduction != stated:
            raise ValueError(
                f"expected the loss's own reduction, {stated!r}, got reduction={reduction!r}, which contradicts it: leave "
                "reduction out, or change the loss"
            )
        if weight_fn is not None and "sum" in (reduction, stated):
            raise ValueError(
                "expected weight_fn with a loss that averages, got one that sums over samples, whose batches have equal weights: "
                "leave weight_fn out"
            )
        self.reduction = reduction or stated or ("mean" if weight_fn is not None else None)
        self._weight_fn = weight_fn
        self.count = 0
        self.samples = self._own_samples = 0.0
        self._survey(loss_fn)

    @property
    def are_several(self) -> bool:
        """Whether there is another batch, in this process or in another."""
        return self.count > 1 or self.processes.are_several

    @property
    def has_weights(self) -> bool:
        """Whether `weight_fn` gives what means divide by."""
        return self._weight_fn is not None

    @property
    def _are_weighted(self) -> bool:
        return self.are_several and self.reduction == "mean"

    def in_common(self) -> dict[str, Any]:
        """What all processes must have in common, by name."""
        same = {"reduction of the loss": self.reduction, "weight_fn": fingerprint(self._weight_fn)}
        if self._are_weighted and self._weight_fn is None:
            same["shape of a sample's targets"] = str(self._shape)
        return same

    def join(self) -> None:
        """Sum the weights of all processes' batches.

        Raises
        ------
        ValueError
            If they are all zero.
        """
        if not self._are_weighted:
            return
        own = torch.tensor([self._own_samples], dtype=torch.float64, device="cpu")
        self.samples = float(self.processes.summed("the weights of batches", lambda: own))
        if not self.samples:
            raise ValueError(
                "expected weights of which one at least is positive, got zeros only: see what weight_fn returns"
            )

    def __iter__(self) -> Iterator[tuple[Any, Any, float]]:
        """Yield ``(inputs, targets, weight)`` for each batch."""
        batches, samples = 0, 0.0
        for batch in self.data:
            inputs, targets = _as_pair(batch)
            weight = 1.0
            if self._are_weighted:
                size = self.weight_of(inputs, targets)
                samples += size
                weight = size / self.samples
            batches += 1
            if weight:
                yield inputs, targets, weight
        changed = self._are_weighted and not math.isclose(samples, self._own_samples, rel_tol=1e-6)
        if batches != self.count or changed:
            raise ValueError(
                f"expected the {self.count} batches that the data gave when the operator was built, got {batches} "
                f"(samples: {self._own_samples:g} and {samples:g}): pass data that are the same on every pass"
            )

    def weight_of(self, inputs: Any, targets: Any) -> float:
        """Return what the mean of a batch divides by: the number of samples, or what `weight_fn` gives.

        Raises
        ------
        ValueError
            If that is no number, not finite or negative, or there is no number of samples.
        """
        if self._weight_fn is None:
            return sample_count(inputs, targets)
        weight = self._weight_fn(inputs, targets)
        try:
            number = float(weight)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"expected weight_fn to return a number, got {type(weight).__name__}: return what the mean of a batch divides by"
            ) from None
        if not 0.0 <= number < math.inf:
            raise ValueError(
                f"expected weight_fn to return a weight that is finite and not negative, got {number:g}: return what the mean of "
                "a batch divides by"
            )
        return number

    def tracked(self, title: str) -> Iterable[tuple[Any, Any, float]]:
        """Return an iterable of the batches, with a progress bar where one was asked for and there is a terminal."""
        if callable(self.progress):
            return _telling(self, self.progress)
        return _import_tqdm()(self, desc=title, total=self.count, unit="batch", disable=None) if self.progress else self

    def _survey(self, loss_fn: Callable[..., Any]) -> None:
        """Count batches and, for a mean over several, samples; check that weights make the mean exact."""
        pairs = (_as_pair(batch) for batch in self.data)
        first = next(pairs, None)
        if first is None:
            raise ValueError(f"expected at least one batch, got no batch: {_ONE_BATCH}")
        self.count = 1
        self._shape = _sample_shape(first[1])
        if self.are_several:
            self._start_weights(loss_fn, *first)
        for inputs, targets in pairs:
            if self.count == 1 and not self.are_several:
                self._start_weights(loss_fn, *first)
            self.count += 1
            if self.reduction == "mean":
                self._add_weight(loss_fn, inputs, targets)
                if self._weight_fn is None and _sample_shape(targets) != self._shape:
                    raise ValueError(
                        "expected targets that differ in their number alone, or their mean is ambiguous, got samples of shapes "
                        f"{self._shape} and {_sample_shape(targets)}: pass weight_fn, which gives what the mean of a batch divides by, "
                        'or use a loss with reduction="sum"'
                    )

    def _start_weights(self, loss_fn: Callable[..., Any], inputs: Any, targets: Any) -> None:
        if self.reduction is None:
            raise ValueError(
                "expected a loss that says how it combines samples, as several batches need, got one without "
                'reduction: pass reduction="sum" or reduction="mean"'
            )
        if self.reduction == "sum" and takes_parameters(loss_fn):
            raise ValueError(
                "expected a mean over batches or a single batch for a loss that takes the parameters, got a sum over several, "
                "which counts a penalty once a batch: join the batches, or add the penalty's Hessian by itself"
            )
        if self.reduction == "mean":
            self._add_weight(loss_fn, inputs, targets)

    def _add_weight(self, loss_fn: Callable[..., Any], inputs: Any, targets: Any) -> None:
        weight = self.weight_of(inputs, targets)
        self._own_samples += weight
        if weight and _are_all_ignored(loss_fn, targets):
            raise ValueError(
                f"expected targets in each batch without ignore_index={loss_fn.ignore_index}, got a batch of none others, whose "  # type: ignore[attr-defined]
                "mean is NaN: leave it out, or pass weight_fn, which gives the number of the others"
            )


class SameBatches:
    """Batches that must be the same, in the same order, on every pass, and have samples.

    Each is told by a checksum of its tensors, arrays, numbers and texts. Sums over batches that are computed at different times, as a
    matrix and its products, belong together only then.

    Parameters
    ----------
    data : iterable
        Of pairs, as of `Batches`.

    Raises
    ------
    TypeError, ValueError
        As of `Batches`, for data that cannot be gone through again and again.
    """

    def __init__(self, data: Any) -> None:
        self._data = _as_iterable(data)
        self._marks: list[int] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches.

        Raises
        ------
        ValueError
            If one is not what it was in the first pass, or has no samples.
        """
        marks: list[int] = []
        for batch in self._data:
            marks.append(checksum(batch))
            if self._marks is None:
                for what, value in zip(("inputs", "targets"), _as_pair(batch), strict=True):
                    refuse_empty(value, f"{what} of batch {len(marks)}")
            elif self._marks[len(marks) - 1 : len(marks)] != marks[-1:]:
                raise ValueError(
                    f"expected the same batches in the same order on every pass, got another batch {len(marks)} than in the first: pass "
                    "a loader that does not shuffle, sample or augment at random, and do not change the data"
                )
            yield batch
        if self._marks is None:
            self._marks = marks
        elif len(marks) < len(self._marks):
            raise ValueError(
                f"expected the same {len(self._marks)} batches on every pass, got {len(marks)}: pass data that do not change"
            )


def _as_iterable(data: Any) -> Iterable[Any]:
    if _is_pair(data) and not (_is_pair(data[0]) and _is_pair(data[1])):
        return [tuple(data)]
    if isinstance(data, tuple) and _is_pair(data):
        raise ValueError(
            "expected one batch or a list of batches, got a tuple of two pairs, and it is not clear which it is: put the "
            "batches in a list, also where there is only one"
        )
    if isinstance(data, Tensor) or not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TypeError(f"expected a batch or an iterable of batches, got {type(data).__name__}: {_ONE_BATCH}")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"expected batches, got a {type(data).__name__} of single samples: wrap it as "
            "torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    if iter(data) is data:
        raise TypeError(
            f"expected data that can be gone through once a product, got a {type(data).__name__}, which can be gone "
            "through only once: pass a list of batches or a DataLoader"
        )
    return data


def _as_pair(batch: Any) -> tuple[Any, Any]:
    if not _is_pair(batch):
        raise TypeError(f"expected each batch to be a pair (inputs, targets), got {type(batch).__name__}: {_ONE_BATCH}")
    return batch[0], batch[1]


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _stated_reduction(loss_fn: Callable[..., Any]) -> str | None:
    stated = getattr(loss_fn, "reduction", None)
    return {"sum": "sum", "mean": "mean", "batchmean": "mean"}.get(stated) if isinstance(stated, str) else None


def sample_count(inputs: Any, targets: Any) -> int:
    """Return the length of the first dimension of the targets, or of the inputs where the targets are no tensors.

    Raises
    ------
    ValueError
        If there is none, or several.
    """
    for value in (targets, inputs):
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        counts = {tensor.shape[0] if tensor.ndim else None for tensor in tensors}
        count = counts.pop() if len(counts) == 1 else None
        if count is not None:
            return int(count)
        if tensors:
            break
    raise ValueError(
        "expected targets (or inputs, where the targets are no tensors) whose first dimension is the number of samples, which "
        "a mean over several batches needs, got none: give the batches one"
    )


def _sample_shape(targets: Any) -> tuple[int, ...] | list[tuple[int, ...]]:
    """Shape of a sample's targets, or of each tensor of a nest."""
    shapes = [tuple(leaf.shape[1:]) for leaf in pytree.tree_leaves(targets) if isinstance(leaf, Tensor)]
    return shapes[0] if isinstance(targets, Tensor) else shapes


def are_ignored(loss_fn: Callable[..., Any], targets: Any) -> Tensor | None:
    """Which targets a loss leaves out by its `ignore_index`; None where it has none."""
    ignored = getattr(loss_fn, "ignore_index", None)
    if ignored is None or not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    return targets == ignored


def _are_all_ignored(loss_fn: Callable[..., Any], targets: Any) -> bool:
    ignored = are_ignored(loss_fn, targets)
    return ignored is not None and bool(ignored.all())


def _check_progress(progress: Any) -> None:
    """Refuse what is neither a bool, None nor callable, and True without tqdm."""
    if progress is None or callable(progress):
        return
    if not isinstance(progress, bool | np.bool_):
        raise TypeError(
            f"expected progress to be a bool or callable, got {type(progress).__name__}: pass True or leave it out"
        )
    if progress:
        _import_tqdm()


def _telling(batches: Iterable[_Batch], told: Callable[[int], object]) -> Iterator[_Batch]:
    """The same batches; after each is done `told` is called with how many are."""
    for done, batch in enumerate(batches, 1):
        yield batch
        told(done)


def _import_tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            "expected tqdm for progress=True, got no such package: run `python -m pip install tqdm`, or leave progress out"
        ) from None
    return tqdm
