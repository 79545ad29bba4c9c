"""Problems that are sums over parts made one at a time: H = Σ_b w_b H_b over batches, which need not fit into memory together.

What needs H alone works as on a chain: products, norms, the dense matrix, its factors, certificates. There are no stages of the whole:
each part has a chain of its own, which exists while it is worked on. Where several processes have parts each, sums are those over all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import UnsupportedModelError
from linop_hess.lq.layout import Layout
from linop_hess.lq.problem import Problem
from linop_hess.processes import ALONE, Processes

Parts = Callable[[], Iterable[tuple[Problem, float]]]
"""Makes the parts, with their weights, one after the other; called once a pass."""

_OF_STAGES = frozenset({"blocks", "transition"})


@dataclass(frozen=True)
class _Group:
    """Controls that make a diagonal block of the inverse; in the place of a stage, without states."""

    p: int
    n_in: int = 0
    n_out: int = 0


class SummedProblem(Problem):
    """A problem without stages of its own, whose Hessian is the weighted sum of those of its parts.

    Parameters
    ----------
    parts : callable
        ``parts()`` gives an iterable of ``(problem, weight)``, of this process; each is dropped before the next is asked for. All have
        this problem's size and dtype, and their flat vectors are this problem's. Weights are those of the sum over all processes.
    count : int
        How many parts there are.
    groups : sequence of ndarray of int
        The places of the controls, each once, in groups: those of a layer, say, whose block of the inverse may be asked for.
    dtype : torch.dtype
    device : torch.device
    product : callable, optional
        ``product(x)`` gives Σ_b w_b H_b x of the parts of all processes, for x of shape (N, k), as fresh memory; by default the parts
        multiply, made anew for each product.
    processes : Processes
        Those that have parts; all ask the same questions in the same order. By default this one alone.
    names : sequence, optional
        Of the groups.

    Raises
    ------
    ValueError
        If `groups` does not hold each place once.
    """

    why_no_chain = (
        "a sum over batches, made one at a time, has no stages of its own: linearize one batch for what needs them, or use what H alone "
        'answers, as method "dense" does'
    )

    def __init__(
        self,
        parts: Parts,
        count: int,
        groups: Sequence[np.ndarray],
        dtype: torch.dtype,
        device: torch.device,
        *,
        product: Callable[[Tensor], Tensor] | None = None,
        processes: Processes = ALONE,
        names: Sequence[object] | None = None,
    ) -> None:
        self._parts, self.count = parts, count
        self._dtype, self._device = dtype, device
        self._product, self.processes = product, processes
        self._groups, self.names = groups, names
        self.diagonal, self.of_loss = None, frozenset()
        order = np.array([(g, 0) for g in range(len(groups))])
        self.layout = Layout([_Group(len(group)) for group in groups], order, np.concatenate(groups))

    def __getattr__(self, name: str) -> Any:
        """Refuse what a chain has and a sum has not."""
        if name in _OF_STAGES:
            raise UnsupportedModelError(
                f"expected a chain of stages, got a sum over {self.count} batches: {self.why_no_chain}"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __reduce__(self) -> tuple[Callable[..., Problem], tuple[Any, ...]]:
        """Refuse to be pickled: what makes the parts need not pickle.

        Raises
        ------
        UnsupportedModelError
            Always.
        """
        raise UnsupportedModelError(
            "expected a problem with stages to pickle, got a sum over batches, which are not part of it: make it again where it is needed"
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def nbytes(self) -> int:
        """Bytes held: none, between products."""
        return 0

    def parts(self) -> Iterator[tuple[Problem, float]]:
        """Make the parts of this process, one after the other.

        Raises
        ------
        ValueError
            If one has another number of controls.
        """
        for part, weight in self._parts():
            if part.size != self.size:
                raise ValueError(
                    f"expected parts of {self.size} controls, got one of {part.size}: differentiate each batch by the same parameters"
                )
            yield part, weight

    def typical_part(self) -> tuple[Problem, int]:
        """Make the first part, and tell how many there are."""
        return next(iter(self.parts()))[0], self.count

    def _times(self, x: Tensor) -> Tensor:
        summed = self._product or self._by_parts
        return summed(x)

    def _by_parts(self, x: Tensor) -> Tensor:
        def local() -> Tensor:
            out = torch.zeros_like(x)
            for part, weight in self.parts():
                out.add_(part.hessian_product(x), alpha=weight)
            return out

        return self.processes.summed(f"a product of a sum over batches with {x.shape[1]} columns", local, alike=x)

    def to(self, dtype: torch.dtype) -> SummedProblem:
        """Return the sum in another precision; its parts are made as before, then converted."""
        return self._of(lambda part: part.to(dtype), dtype)

    def gauss_newton(self) -> SummedProblem:
        return self._of(Problem.gauss_newton, self._dtype)

    def _of(self, change: Callable[[Problem], Problem], dtype: torch.dtype) -> SummedProblem:
        def changed() -> Iterator[tuple[Problem, float]]:
            return ((change(part), weight) for part, weight in self.parts())

        return SummedProblem(
            changed, self.count, self._groups, dtype, self._device, processes=self.processes, names=self.names
        )
