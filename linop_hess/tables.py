"""What a chain is made of, as tables to print: its stages, its widest cuts and what lives across them, and the plan beside them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import Any, overload

import numpy as np

from linop_hess._display import html_table
from linop_hess._memory import format_bytes
from linop_hess.lq.methods.plan import Plan
from linop_hess.lq.problem import Problem

RULE, DOUBLE_BACKWARD, DIFFERENCES = "rule", "double backward", "differences"
"""Where second derivatives of a stage come from: a rule, torch's of the whole operation, or differences of torch's first ones."""

# So many rows of a table are printed, the first and the last of them.
_SHOWN = 60

# So many cuts are looked at for some that are not alike.
_LOOKED_AT = 40

# So many holders of a cut, and shared parameters, are named.
_NAMED = 5


@dataclass(frozen=True, slots=True)
class StageLabel:
    """What a stage is in the model; as a string its name in messages.

    Attributes
    ----------
    path : str
        Path of the module, ``"<model>"`` of the model itself; empty where a stage is of no module.
    operation : str
    derivatives : str
        Where they come from, as `RULE`.
    """

    path: str
    operation: str
    derivatives: str = RULE

    def __str__(self) -> str:
        """Path and operation."""
        return f"{self.path}: {self.operation}" if self.path else self.operation


@dataclass(frozen=True, eq=False)
class StageLabels(Sequence[StageLabel]):
    """The labels of stages, each made when it is asked for.

    Attributes
    ----------
    of : ndarray of int, shape (L, 2)
        Of each stage its kind, and the place of its path among the kind's.
    kinds : list of (str, str)
        Operation and origin of the derivatives of each kind.
    paths : list of tuple of str
        Those of each kind.
    """

    of: np.ndarray
    kinds: list[tuple[str, str]]
    paths: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.of)

    @overload
    def __getitem__(self, l: int) -> StageLabel: ...
    @overload
    def __getitem__(self, l: slice) -> list[StageLabel]: ...
    def __getitem__(self, l: int | slice) -> StageLabel | list[StageLabel]:
        """Label of stage l (0-based), or those of a slice."""
        if isinstance(l, slice):
            return [self[k] for k in range(*l.indices(len(self)))]
        kind, place = self.of[l].tolist()
        operation, derivatives = self.kinds[kind]
        return StageLabel(self.paths[kind][place], operation, derivatives)


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage of a chain.

    Attributes
    ----------
    name : str
        Path of its module, ``"<model>"`` of the model itself; empty where it is of no module.
    operation : str
    p : int
        Number of its controls.
    n_in, n_out : int
        Number of entries of the state that it reads and computes.
    samples : int
        Number of independent parts that the state falls into there; 1: they interact.
    cut : int
        Number of entries of the state after it, those that pass by included.
    derivatives : str
        ``"rule"``; ``"double backward"`` where torch's second derivatives of the whole operation were taken; ``"differences"`` where it
        has none.
    """

    name: str
    operation: str
    p: int
    n_in: int
    n_out: int
    samples: int
    cut: int
    derivatives: str


class StageTable(Sequence[StageRow]):
    """The stages of a chain, a row each; `print` shows them, notebooks too.

    Parameters
    ----------
    problem : Problem
        Whose names are labels (`StageLabel`), or none.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __len__(self) -> int:
        return self._problem.length

    @overload
    def __getitem__(self, l: int) -> StageRow: ...
    @overload
    def __getitem__(self, l: slice) -> list[StageRow]: ...
    def __getitem__(self, l: int | slice) -> StageRow | list[StageRow]:
        """Row of stage l (0-based), or those of a slice."""
        where = range(len(self))[l]
        return [self._row(k) for k in where] if isinstance(where, range) else self._row(where)

    def _row(self, l: int) -> StageRow:
        problem = self._problem
        stack = problem.blocks[int(problem.order[l, 0])]
        label = None if problem.names is None else problem.names[l]
        if not isinstance(label, StageLabel):
            label = StageLabel("", f"stage {l + 1}" if label is None else str(label), "given")
        cut = int(problem.layout.n_out[l])
        return StageRow(
            label.path, label.operation, stack.p, stack.inputs, stack.outputs, stack.samples, cut, label.derivatives
        )

    def _cells(self) -> Iterator[list[str]]:
        """The rows to be shown, number first; one of dots where some are left out."""
        L = len(self)
        shown = range(L) if L <= _SHOWN else [*range(_SHOWN // 2), -1, *range(L - _SHOWN // 2, L)]
        yield ["stage", *(field.name for field in fields(StageRow))]
        for l in shown:
            yield ["…", f"({L - _SHOWN} more)", *[""] * 7] if l < 0 else [str(l + 1), *map(str, astuple(self[l]))]

    def __str__(self) -> str:
        """Return the table as text."""
        return aligned(list(self._cells()), left={1, 2, 8})

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._cells())


@dataclass(frozen=True)
class Cut:
    """The state after a stage.

    Attributes
    ----------
    stage : int
        The stage, 0-based.
    after : str
        What it is in the model.
    width : int
        Number of live entries.
    holders : dict of str to int
        What made them, or the shared parameters that they are, with the number of entries, the largest first.
    """

    stage: int
    after: str
    width: int
    holders: dict[str, int]


@dataclass(frozen=True)
class Shared:
    """A parameter that is part of the state, since several operations use it.

    Attributes
    ----------
    name : str
    entries : int
    first, last : int
        The stages, 0-based, after which it is live first and last.
    """

    name: str
    entries: int
    first: int
    last: int


class CutTable(list[Cut]):
    """Some cuts of a chain, the widest first; `print` shows them."""

    def __init__(self, cuts: Sequence[Cut], itemsize: int) -> None:
        super().__init__(cuts)
        self._itemsize = itemsize

    def __str__(self) -> str:
        """Return the table as text."""
        rows = [["widest cuts after stage", "live", "V", "what is live there"]]
        for cut in self:
            parts = [f"{name} ({entries})" for name, entries in cut.holders.items()]
            more = [f"{len(parts) - _NAMED} more"] if len(parts) > _NAMED else []
            nbytes = format_bytes(float(cut.width) ** 2 * self._itemsize)
            rows.append([f"{cut.stage + 1} ({cut.after})", str(cut.width), nbytes, ", ".join(parts[:_NAMED] + more)])
        return aligned(rows, left={0, 3})

    __repr__ = __str__


class Cuts:
    """The states of a chain and what lives in them; here of one where each state is what the stage before computed.

    Parameters
    ----------
    labels : sequence or None
        Of each stage, as strings its name; None: numbers will do.
    widths : ndarray of int, shape (L,)
        Size of the state after each stage.
    itemsize : int
        Bytes of a number.
    """

    def __init__(self, labels: Sequence[object] | None, widths: np.ndarray, itemsize: int) -> None:
        self.labels, self.widths, self.itemsize = labels, widths, itemsize

    def recipe(self) -> dict[str, Any]:
        """The arguments that make these cuts again, by name."""
        return {"labels": self.labels, "widths": self.widths, "itemsize": self.itemsize}

    def label(self, l: int) -> str:
        """Name of stage l."""
        return f"stage {l + 1}" if self.labels is None else str(self.labels[l])

    def holders(self, l: int) -> dict[str, int]:
        """What is live after stage l, with the number of entries."""
        return {self.label(l): int(self.widths[l])}

    def shared(self) -> list[Shared]:
        """The parameters that are part of the state."""
        return []

    def widest(self, k: int = 5) -> CutTable:
        """The widest cuts, at most k: the widest of neighbours, and one of those that are alike but for numbers in names."""
        seen: set[tuple[tuple[str, int], ...]] = set()
        found: list[Cut] = []
        around = np.concatenate([[0], self.widths, [0]])
        peaks = np.flatnonzero((self.widths > around[:-2]) & (self.widths >= around[2:]))
        for l in peaks[np.argsort(-self.widths[peaks], kind="stable")][:_LOOKED_AT].tolist():
            holders = dict(sorted(self.holders(l).items(), key=lambda item: -item[1]))
            kind = tuple(sorted((re.sub(r"\d+", "*", name), entries) for name, entries in holders.items()))
            if len(found) < k and kind not in seen:
                found.append(Cut(l, self.label(l), int(self.widths[l]), holders))
                seen.add(kind)
        return CutTable(found, self.itemsize)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Add the table of the widest cuts to the message of a MemoryError."""
        try:
            yield
        except MemoryError as error:
            message = str(error)
            if _TOLD in message or not self.widths.size:
                raise
            raise MemoryError(f"{message}\n{_TOLD}\n{self.widest()}") from None


_TOLD = "What is live between operations decides that:"


@dataclass(frozen=True, repr=False)
class NetworkPlan(Plan):
    """The cost of each method for a network, and what makes it: the widest cuts, and the parameters that are part of the state.

    Attributes
    ----------
    cuts : CutTable
    shared : tuple of Shared
    """

    cuts: CutTable
    shared: tuple[Shared, ...]

    @classmethod
    def of(cls, plan: Plan, cuts: Cuts, k: int = 5) -> NetworkPlan:
        """Return a plan with the k widest cuts beside it."""
        shared = tuple(sorted(cuts.shared(), key=lambda one: -one.entries))
        told = plan.damping, plan.costs, plan.choice, plan.available, plan.own_costs
        return cls(*told, cuts.widest(k), shared)

    def __str__(self) -> str:
        """Return the plan as tables."""
        return "\n\n".join([super().__str__(), *self._below()])

    def _repr_html_(self) -> str:
        below = "\n\n".join(self._below())
        return f"{super()._repr_html_()}<pre>{html.escape(below)}</pre>"

    def _below(self) -> list[str]:
        return [*([str(self.cuts)] if self.cuts else []), *self._told_of_shared()]

    def _told_of_shared(self) -> list[str]:
        parts = []
        if self.shared:
            named = [
                f"{one.name} ({one.entries}; stages {one.first + 1} to {one.last + 1})" for one in self.shared[:_NAMED]
            ]
            more = [f"{len(self.shared) - _NAMED} more"] if len(self.shared) > _NAMED else []
            parts.append(
                "used several times, and so part of the state from the first use to the last: "
                + ", ".join(named + more)
            )
        return parts


def aligned(rows: Sequence[Sequence[str]], left: set[int]) -> str:
    """Rows of cells as text in columns; those of `left` begin at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if j in left else cell.rjust(width)
            for j, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
