"""`Processes`: sums over processes in one step with agreement and errors, or nothing of that where a process is alone.

Whatever is summed is announced first, by a message of eight numbers: that this process came here and did not fail, what it is about to
sum, and fingerprints of what all must have in common. So a process that fails, or does something else, is an error on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from linop_hess.errors import (
    FactorizationError,
    NotFiniteError,
    NotPositiveDefiniteError,
    ProcessError,
    UnsupportedModelError,
)
from linop_hess.processes.fingerprint import fingerprint, sketch
from linop_hess.processes.messages import Wire
from linop_hess.processes.packed import summed_in_place

# Errors that a process raises for another one, so that all go the same way on.
_ALIKE: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        ValueError,
        TypeError,
        RuntimeError,
        ArithmeticError,
        OverflowError,
        MemoryError,
        UnsupportedModelError,
        NotFiniteError,
        FactorizationError,
        NotPositiveDefiniteError,
    )
}


@dataclass(frozen=True)
class _Report:
    """What a process tells the others where they do not agree."""

    doing: str
    same: Mapping[str, Any]
    error: tuple[str, str] | None


class Processes:
    """The processes of a group, each of which holds some of the samples.

    Everything here is collective: all processes of the group call the same methods in the same order. Where there is no group, a process
    is alone and nothing is sent.

    Parameters
    ----------
    group : ProcessGroup, DeviceMesh of one dimension, or "world", optional
        None: this process alone.

    Attributes
    ----------
    rank, size : int
        Which process this is, and how many there are; 0 and 1 alone.

    Raises
    ------
    TypeError, ValueError
        If the group is none, this process is not of it, or torch.distributed is not initialized.
    """

    def __init__(self, group: Any = None) -> None:
        self._wire = None if group is None else Wire(group)
        self._steps = 0
        self.rank = 0 if self._wire is None else self._wire.rank
        self.size = 1 if self._wire is None else self._wire.size

    @property
    def messages(self) -> int:
        """Collectives so far."""
        return 0 if self._wire is None else self._wire.messages

    @property
    def numbers(self) -> int:
        """Entries of tensors that this process gave to them."""
        return 0 if self._wire is None else self._wire.numbers

    @property
    def are_several(self) -> bool:
        """Whether there is another process."""
        return self.size > 1

    @classmethod
    def of(cls, group: Any) -> Processes:
        """Return the processes of a group, or those that are given."""
        return group if isinstance(group, Processes) else cls(group)

    def __deepcopy__(self, memo: Any) -> Processes:
        return self

    def __reduce__(self) -> tuple[type[Processes], tuple[()]]:
        if self._wire is not None:
            raise TypeError(
                "expected an operator of one process to pickle, got one with group=: make it anew in each process"
            )
        return Processes, ()

    @contextmanager
    def together(self, doing: str, same: Callable[[], Mapping[str, Any]] = dict, advice: str = "") -> Iterator[None]:
        """Do something in each process; an error in one, raised at the end, is an error in all.

        Parameters
        ----------
        doing : str
            What is done, for messages.
        same : callable
            What all must have in common by name, numbers and texts, called when that is done.
        advice : str
            What to do where it differs.

        Raises
        ------
        ValueError
            If processes do something else, or `same` differs.
        ProcessError
            If one has ended or does not answer, or fails with an error of another class than Python's and this package's.
        """
        if self._wire is None:
            yield
            return
        error, found = None, {}
        try:
            yield
            found = dict(same())
        except Exception as raised:
            if _is_told(raised):
                raise
            error = raised
        self._meet(doing, found, error, advice)

    @contextmanager
    def telling(self, doing: str) -> Iterator[None]:
        """Do something that begins with a step of all; an error before it takes its place."""
        steps = self._steps
        try:
            yield
        except Exception as error:
            if self._wire is not None and self._steps == steps and not _is_told(error):
                self._meet(doing, {}, error, "")
            raise

    def summed(self, doing: str, local: Callable[[], Tensor], *, alike: Tensor | None = None) -> Tensor:
        """Return Σ over processes of `local()`, to the last bit the same in all.

        Parameters
        ----------
        doing : str
            What is summed, for messages.
        local : callable
            Returns this process's part, whose memory is used.
        alike : Tensor, shape (n, k), optional
            What all must have in common to half of its digits: the vectors that are multiplied.

        Raises
        ------
        ValueError, ProcessError
            As in `together`.
        """
        return self._announced(doing, local, alike, Wire.sum)

    def summed_symmetric(self, doing: str, local: Callable[[], Tensor]) -> Tensor:
        """Return the sum of symmetric matrices, as `summed`; half of their numbers are sent."""
        return self._announced(doing, local, None, lambda wire, H: summed_in_place(H.contiguous(), wire.sum))

    def _announced(
        self,
        doing: str,
        local: Callable[[], Tensor],
        alike: Tensor | None,
        add: Callable[[Wire, Tensor], Tensor],
    ) -> Tensor:
        if self._wire is None:
            return local()
        error, part, same = None, None, {}
        try:
            part = local()
            same = {"shape": str(tuple(part.shape)), "dtype": str(part.dtype)}
        except Exception as raised:
            error = raised
        self._meet(doing, same, error, "see that all processes call alike", alike)
        assert part is not None
        return add(self._wire, part)

    def close(self, doing: str, numbers: Tensor, eps: float, advice: str) -> None:
        """Raise ValueError unless all have about the same numbers, to half of the digits that `eps` stands for."""
        if self._wire is not None:
            self._meet(doing, {}, None, advice, numbers.reshape(-1, 1), eps)

    def largest(self, value: float) -> float:
        """The largest value of all processes."""
        return value if self._wire is None else self._wire.maximum([value])[0]

    def all_of(self, condition: bool) -> bool:
        """Whether a condition holds in all processes."""
        return self.largest(0.0 if condition else 1.0) == 0.0

    def from_first(self, value: Any) -> Any:
        """Return an object of process 0, which pickles, in all."""
        return value if self._wire is None else self._wire.from_first(value)

    def _meet(
        self,
        doing: str,
        same: Mapping[str, Any],
        error: Exception | None,
        advice: str,
        alike: Tensor | None = None,
        eps: float | None = None,
    ) -> None:
        """Announce a step, and raise where a process failed or announced another."""
        assert self._wire is not None
        self._steps += 1
        told = fingerprint(self._steps, doing, same)
        first, second, scale = (0.0, 0.0, 0.0) if alike is None or error is not None else sketch(alike)
        numbers = [float(error is not None), float(told), -float(told), first, -first, second, -second, scale]
        failed, high, low, *bounds, scale = self._wire.maximum(numbers)
        unit = 1.0 if alike is None else torch.finfo(alike.dtype).eps if eps is None else eps
        differs = max(bounds[0] + bounds[1], bounds[2] + bounds[3]) > unit**0.5 * scale
        if failed or high != -low:
            mine = None if error is None else (type(error).__name__, str(error))
            self._disagree(_Report(doing, dict(same), mine), error, advice)
        if differs:
            with _known_to_all():
                raise ValueError(
                    f"expected all processes to give the same numbers in {doing}, got others in some: {advice}"
                )

    def _disagree(self, mine: _Report, error: Exception | None, advice: str) -> NoReturn:
        assert self._wire is not None
        with _known_to_all():
            reports: list[_Report] = self._wire.gather(mine)
            if error is not None:
                raise error
            _explain(reports, advice)


def _explain(reports: list[_Report], advice: str) -> NoReturn:
    """Raise what is wrong, from what all processes say."""
    for rank, report in enumerate(reports):
        if report.error is not None:
            kind, message = report.error
            text = message if kind in _ALIKE else f"{kind}: {message}"
            raise _ALIKE.get(kind, ProcessError)(f"process {rank} of {len(reports)} failed in {report.doing}: {text}")
    first = reports[0]
    for rank, report in enumerate(reports):
        if report.doing != first.doing:
            raise ProcessError(
                f"expected all processes to do the same, got process 0 in {first.doing} and process {rank} in {report.doing}: call the "
                "same functions in the same order in all"
            )
        names = [name for name in {**first.same, **report.same} if first.same.get(name) != report.same.get(name)]
        if names:
            raise ValueError(
                f"expected all processes to have the same in {first.doing}, got another {names[0]} in process {rank} than in process 0: "
                f"{advice}"
            )
    raise ProcessError(
        "expected all processes to be in the same step, got some that have done more: call the same functions in the same order in all"
    )


@contextmanager
def _known_to_all() -> Iterator[None]:
    """Mark errors that all processes raise together."""
    try:
        yield
    except Exception as error:
        error._told_to_all = True  # type: ignore[attr-defined]
        raise


def _is_told(error: Exception) -> bool:
    return isinstance(error, ProcessError) or hasattr(error, "_told_to_all")


ALONE = Processes()
"""This process alone."""
