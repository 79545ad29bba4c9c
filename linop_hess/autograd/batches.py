"""The data of an empirical risk: one batch, or several with the weights that make their sum exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from linop_hess.autograd.calling import takes_parameters

# Losses whose weights are factors of a sum that is divided by the number of entries all the same.
_WEIGHTED_SUMS = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss, nn.MultiMarginLoss)

Progress = bool | Callable[[int], object] | None
"""True for a progress bar, or what to call with the number of batches done in this pass."""

_Batch = TypeVar("_Batch")

_ONE_BATCH = "pass one batch as a tuple (inputs, targets), several as a list of such tuples or a DataLoader"


class Batches:
    """Pairs of inputs and targets that can be gone through again and again, each with its weight.

    The risk is Σ_b w_b ℓ_b with ℓ_b the loss of batch b: w_b = 1 where the loss sums over samples, n_b / Σ
    n_b where it averages, so that the risk is the loss of all data at once however they are cut into batches.

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

    Attributes
    ----------
    count : int
        The number of batches.

    Raises
    ------
    TypeError
        If the data are neither, a one-shot iterator, or a data set without batches, or `progress` is neither.
    ValueError
        If there are no batches, or the weights cannot be told.
    ImportError
        If `progress` is True without tqdm.
    """

    def __init__(
        self, data: Any, loss_fn: Callable[..., Any], reduction: str | None = None, progress: Progress = False
    ) -> None:
        _check_progress(progress)
        self.progress = progress
        self.data: Iterable[Any] = _as_iterable(data)
        stated = _stated_reduction(loss_fn)
        if reduction not in (None, "sum", "mean"):
            raise ValueError(f'expected reduction to be "sum" or "mean", got {reduction!r}: pass one of the two')
        if reduction is not None and stated is not None and reduction != stated:
            raise ValueError(
                f"expected the loss's own reduction, {stated!r}, got reduction={reduction!r}, which contradicts it: leave "
                "reduction out, or change the loss"
            )
        self.reduction = reduction or stated
        self.count = 0
        self.samples = 0
        self._survey(loss_fn)

    def __iter__(self) -> Iterator[tuple[Any, Any, float]]:
        """Yield ``(inputs, targets, weight)`` for each batch."""
        weighted = self.count > 1 and self.reduction == "mean"
        batches, samples = 0, 0
        for batch in self.data:
            inputs, targets = _as_pair(batch)
            weight = 1.0
            if weighted:
                size = _sample_count(inputs, targets)
                samples += size
                weight = size / self.samples
            batches += 1
            yield inputs, targets, weight
        if batches != self.count or (weighted and samples != self.samples):
            raise ValueError(
                f"expected the {self.count} batches that the data gave when the operator was built, got {batches} "
                f"(samples: {self.samples} and {samples}): pass data that are the same on every pass"
            )

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
        trailing = _sample_shape(first[1])
        for inputs, targets in pairs:
            if self.count == 1:
                self._start_weights(loss_fn, *first)
            self.count += 1
            if self.reduction == "mean":
                self.samples += _sample_count(inputs, targets)
                if _sample_shape(targets) != trailing:
                    raise ValueError(
                        "expected targets that differ in their number alone, or their mean is ambiguous, got samples of "
                        f'shapes {trailing} and {_sample_shape(targets)}: use a loss with reduction="sum"'
                    )
                _refuse_ignored(loss_fn, targets)

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
            if getattr(loss_fn, "weight", None) is not None and not isinstance(loss_fn, _WEIGHTED_SUMS):
                raise ValueError(
                    "expected a mean over samples, got that of a class-weighted loss, which divides by the weights in "
                    'each batch, not those in the data: use reduction="sum" in the loss and scale the operator'
                )
            self.samples = _sample_count(inputs, targets)
            _refuse_ignored(loss_fn, targets)


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


def _sample_count(inputs: Any, targets: Any) -> int:
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


def _refuse_ignored(loss_fn: Callable[..., Any], targets: Any) -> None:
    ignored = getattr(loss_fn, "ignore_index", None)
    if ignored is not None and isinstance(targets, Tensor) and not targets.is_floating_point():
        if bool((targets == ignored).any()):
            raise ValueError(
                f"expected targets without ignore_index={ignored}, got some, which make a mean divide by another number "
                'than that of the samples: use reduction="sum" in the loss and scale the operator'
            )


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
