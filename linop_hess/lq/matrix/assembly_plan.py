"""How `lq.matrix.assembly` goes about a problem: into which columns and chunks of samples it is cut, and what that costs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch

from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import Stage, common_samples

# Work space for samples, and again for one product: a third of H each keeps the whole below two H.
_WORK_SHARE = 1 / 3
_LEAST_WORK_BYTES = 1 << 24
_PREFERENCE_FOR_VALUES = 1.5  # times the flops: the costates keep J of the whole chain, the values do not


@dataclass(frozen=True)
class Piece:
    """Controls start..stop of one stage as columns: each by itself, or all by the outputs of a sample, where those are fewer."""

    stage: int
    start: int
    stop: int
    by_outputs: bool
    width: int


@dataclass(frozen=True)
class Run:
    """Neighbouring pieces that are computed together; the first column of the first is `offset`.

    `in_pairs`: stages of one shape with controls on one row a sample, which meet the rows of such a stage in one product.
    """

    pieces: tuple[Piece, ...]
    offset: int
    in_pairs: bool


class Columns:
    """The columns of one sweep, in the order of the chain."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        self.pieces = tuple(piece for run in runs for piece in run.pieces)
        self.first = self.pieces[0].stage
        self._of_stage: dict[int, list[Piece]] = {}
        for piece in self.pieces:
            self._of_stage.setdefault(piece.stage, []).append(piece)

    def of_stage(self, l: int) -> list[Piece]:
        """The pieces of stage l."""
        return self._of_stage.get(l, [])

    def widths(self, last: int) -> dict[int, int]:
        """Columns of the stages up to each stage, from the one before the first on."""
        widths = {l: 0 for l in range(-1, self.first)}
        for l in range(self.first, last + 1):
            widths[l] = widths[l - 1] + sum(piece.width for piece in self.of_stage(l))
        return widths

    def until(self, end: int) -> Iterator[tuple[Run, int]]:
        """The runs, and how many of their pieces are of stages before `end`."""
        for run in self.runs:
            if run.pieces[0].stage >= end:
                return
            yield run, bisect_left(run.pieces, end, key=lambda piece: piece.stage)


@dataclass(frozen=True)
class AssemblyPlan:
    """How H is formed.

    Attributes
    ----------
    samples : int
        Parts that all states split into and that do not see each other.
    chunk : int
        Samples taken at once.
    by_value : bool
        Whether V of a sample is formed, or costates are carried back for every column.
    blocks : tuple of Columns
        Columns taken at once.
    work : int
        Numbers that one product may take beside what the samples take.
    flops, nbytes : float
        Flops of the products; peak bytes, H included.
    has_B, has_C : dict of int to bool
        Whether B and C of a stage are not zero.
    """

    samples: int
    chunk: int
    by_value: bool
    blocks: tuple[Columns, ...]
    work: int
    flops: float
    nbytes: float
    has_B: dict[int, bool]
    has_C: dict[int, bool]


def plan_assembly(problem: Problem, dtype: torch.dtype | None = None) -> AssemblyPlan:
    """Cut the problem up and count.

    Parameters
    ----------
    problem : Problem
    dtype : torch.dtype, optional
        What will be computed in; by default that of the problem.

    Returns
    -------
    AssemblyPlan
    """
    count = _Count(problem)
    item, N = (dtype or problem.dtype).itemsize, problem.size
    work = max(_LEAST_WORK_BYTES, int(_WORK_SHARE * N**2 * item)) // item
    pieces = count.pieces(work)
    if not pieces:  # all controls are in the last stage, after which nothing costs
        return AssemblyPlan(count.samples, count.samples, False, (), work, 0.0, float(item * N**2), {}, {})
    whole = Columns(count.runs(pieces))
    by_value = count.value_flops(whole) <= _PREFERENCE_FOR_VALUES * count.costate_flops(whole)
    blocks = count.cut(whole, by_value, work)
    numbers = max(count.numbers(block, by_value) for block in blocks)
    chunk = min(count.samples, max(1, work // max(numbers, 1)))
    chunk = math.ceil(count.samples / math.ceil(count.samples / chunk))  # chunks of about one size
    flops = sum(count.coupling_flops(block) for block in blocks) + count.push_flops(whole)
    flops += count.value_flops(whole) if by_value else count.costate_flops(whole)
    at_once = max(count.product_numbers(block, chunk) for block in blocks)
    nbytes = float(item * (N**2 + chunk * numbers + min(work, at_once)))
    return AssemblyPlan(count.samples, chunk, by_value, blocks, work, flops, nbytes, count.has_B, count.has_C)


# Calls of torch in an assembly: at all; beside those of a stage's own products as it is gone through; of rows of one stage with columns of
# another, by products of both, and of rows with a run of columns in pairs.
_CALLS, _CALLS_A_STAGE, _CALLS_APART, _CALLS_IN_PAIRS = 120.0, 12, 10, 30


def assembly_calls(problem: Problem) -> float:
    """About how many calls of torch one sweep of an assembly of a chain takes, its samples all at once."""
    samples = common_samples(problem.blocks)
    stacks = [block.at(0) for block in problem.blocks]
    facts = [_Facts.of(stage, samples) for stage in stacks]
    shapes = [
        (fact.p, stage.n_out, fact.form) if fact.by_rows else None for fact, stage in zip(facts, stacks, strict=True)
    ]
    of_shape = {shape: k for k, shape in enumerate(dict.fromkeys(shapes))}
    table = np.array(
        [
            (
                fact.p > 0,
                -1 if shape is None else of_shape[shape],
                stage.calls("G"),
                stage.calls("B") if fact.B else 0,
                3 * stage.calls("F") + (stage.calls("C") if fact.C else 0) + _CALLS_A_STAGE,
            )
            for stage, fact, shape in zip(stacks, facts, shapes, strict=True)
        ],
        dtype=float,
    )
    has_controls, shape, of_G, of_B, own = table[problem.order[problem.layout.first :, 0]].T
    at = np.flatnonzero(has_controls)
    shape, of_G, of_B = shape[at], of_G[at], of_B[at]
    in_pairs = shape >= 0
    runs = np.cumsum(in_pairs & (shape != np.concatenate([[-1.0], shape[:-1]])))
    alone, of_columns = np.cumsum(~in_pairs), np.cumsum(np.where(in_pairs, 0.0, of_G))
    all_columns, count = np.cumsum(of_G), np.arange(1, at.size + 1)
    columns, calls = np.where(in_pairs, alone, count), np.where(in_pairs, of_columns, all_columns)
    total = 0.0
    for of_rows, taken in ((of_G, 1.0), (of_B, of_B > 0)):
        total += float((taken * (_CALLS_IN_PAIRS * runs * in_pairs + (_CALLS_APART + of_rows) * columns + calls)).sum())
    return _CALLS + float(own.sum()) + total


@dataclass(frozen=True)
class _Facts:
    """Of one stage: its controls, the entries of its blocks (0: zero), and whether its controls act on one row a sample."""

    p: int
    F: int
    G: int
    B: int
    C: int
    by_rows: bool
    form: tuple[
        bool, bool
    ]  # whether these controls hold a weight, and a bias: two stages may have as many of both kinds

    @classmethod
    def of(cls, stage: Stage, samples: int) -> _Facts:
        B, C = (stage.entries(name) if name in stage.nonzero else 0 for name in "BC")
        rows = stage.sample_rows(samples) if stage.p else None
        form = (False, False) if rows is None else (rows.weight, rows.bias)
        return cls(stage.p, stage.entries("F"), stage.entries("G"), B, C, rows is not None, form)


class _Count:
    """Sizes of a problem's stages, from the first with controls on, and the flops and numbers that follow from them."""

    def __init__(self, problem: Problem) -> None:
        layout = problem.layout
        self.first, self.last = layout.first, problem.length - 1
        of = problem.order[self.first :, 0].tolist()
        kinds = {b: problem.blocks[b].at(0) for b in set(of)}
        self.samples = common_samples(kinds.values())
        facts = {b: _Facts.of(stage, self.samples) for b, stage in kinds.items()}
        self.facts = {l: facts[b] for l, b in enumerate(of, self.first)}
        self.n = {l: n // self.samples for l, n in enumerate(layout.n_out[self.first :].tolist(), self.first)}
        self.controls = [l for l, fact in self.facts.items() if fact.p]
        self.has_B = {l: fact.B > 0 and l > self.first for l, fact in self.facts.items()}
        self.has_C = {l: fact.C > 0 and l > self.first for l, fact in self.facts.items()}

    # Columns.

    def pieces(self, work: int) -> list[Piece]:
        """The columns of all stages whose outputs matter; a stage too wide for one sweep in several pieces."""
        pieces = []
        for l in self.controls:
            if l == self.last:
                continue
            p, n = self.facts[l].p, self.n[l]
            if n < p or self.facts[l].by_rows:
                pieces.append(Piece(l, 0, p, True, n))
                continue
            widest = max(n for k, n in self.n.items() if k >= l)
            at_once = max(1, work // (8 * max(widest, 1)))
            pieces += [Piece(l, c, min(c + at_once, p), False, min(c + at_once, p) - c) for c in range(0, p, at_once)]
        return pieces

    def runs(self, pieces: Sequence[Piece]) -> list[Run]:
        """Neighbours that can be computed together."""
        runs: list[Run] = []
        offset = 0
        for key, group in groupby(enumerate(pieces), self._key):
            members = tuple(piece for _, piece in group)
            runs.append(Run(members, offset, key[0] == "pairs"))
            offset += sum(piece.width for piece in members)
        return runs

    def _key(self, place: tuple[int, Piece]) -> tuple[str, int, int, tuple[bool, bool]]:
        """What neighbours that can be computed together have in common."""
        position, piece = place
        if not piece.by_outputs:
            return "controls", 0, 0, (False, False)
        fact = self.facts[piece.stage]
        return ("pairs", piece.width, piece.stop, fact.form) if fact.by_rows else ("alone", position, 0, fact.form)

    def cut(self, whole: Columns, by_value: bool, work: int) -> tuple[Columns, ...]:
        """Blocks of columns of which one sample fits into the work space, as far as pieces are small enough."""
        if self.numbers(whole, by_value) <= work:
            return (whole,)
        blocks: list[list[Piece]] = [[]]
        for piece in whole.pieces:
            if blocks[-1] and self.numbers(Columns(self.runs([*blocks[-1], piece])), by_value) > work:
                blocks.append([])
            blocks[-1].append(piece)
        return tuple(Columns(self.runs(block)) for block in blocks)

    # Numbers and flops.

    def numbers(self, columns: Columns, by_value: bool) -> int:
        """Most numbers that one sample takes at a time."""
        widths = columns.widths(self.last)
        carried = max(
            2 * self.n[l] * widths[l] + self.n.get(l - 1, 0) * widths[l - 1] for l in self.facts if l < self.last
        )
        kept = 0
        if by_value:
            kept = sum(self.n[l] ** 2 for l in self.controls if l < self.last)
            carried = max(carried, 3 * max(self.n.values()) ** 2)
        else:
            kept = sum(self.n[l - 1] * widths[l - 1] for l in self.facts if self.has_C[l])
        spread = max(
            (piece.stop * self._rows_met(piece.stage) for piece in columns.pieces if piece.by_outputs), default=0
        )
        return kept + carried + 2 * spread

    def _rows_met(self, m: int) -> int:
        """The largest state that columns of stage m are spread to all controls at."""
        return self._largest[m][self.facts[m].by_rows]

    @cached_property
    def _largest(self) -> dict[int, tuple[int, int]]:
        """From each stage on, the largest state after a stage with controls, and after one whose controls do not act on rows."""
        found, largest = {}, (0, 0)
        for l in range(self.last - 1, self.first - 1, -1):
            fact, n = self.facts[l], self.n[l]
            largest = (max(largest[0], n * (fact.p > 0)), max(largest[1], n * (fact.p > 0 and not fact.by_rows)))
            found[l] = largest
        return found

    def product_numbers(self, columns: Columns, chunk: int) -> int:
        """Most numbers that one product of rows and columns takes beside what the samples take, were it not cut."""
        pairs: dict[tuple[int, int], int] = {}
        widest = widest_alone = 0
        for run in columns.runs:
            width = max(piece.stop - piece.start for piece in run.pieces)
            widest = max(widest, width)
            if run.in_pairs:
                shape = run.pieces[0].stop, run.pieces[0].width
                pairs[shape] = max(pairs.get(shape, 0), len(run.pieces))
            else:
                widest_alone = max(widest_alone, width)
        most = 0
        for p, n, by_rows in {(self.facts[l].p, self.n[l], self.facts[l].by_rows) for l in self.controls}:
            most = max(most, 4 * p * (widest_alone if by_rows else widest))
            for (stop, width), count in pairs.items() if by_rows else ():
                most = max(most, count * (p * stop + chunk * (p // max(n, 1) * (stop // width) + n * width)))
        return most

    def push_flops(self, columns: Columns) -> float:
        """J through every F."""
        widths = columns.widths(self.last)
        return float(sum(2 * self.facts[l].F * widths[l - 1] for l in self.facts if columns.first < l < self.last))

    def value_flops(self, columns: Columns) -> float:
        """V of every stage, and its products with J."""
        widths = columns.widths(self.last)
        moved = sum(
            2 * self.facts[l].F * (self.n[l] + self.n[l - 1]) for l in self.facts if l > self.first and l < self.last
        )
        return float(moved + sum(2 * self.samples * self.n[l] ** 2 * widths[l] for l in self.controls if l < self.last))

    def costate_flops(self, columns: Columns) -> float:
        """Costates of every column."""
        widths = columns.widths(self.last)
        flops = 0
        for l in range(self.first + 1, self.last + 1):
            fact = self.facts[l]
            flops += 2 * (fact.F * (l < self.last) + fact.C) * widths[l - 1]
        return float(flops)

    def coupling_flops(self, columns: Columns) -> float:
        """Rows of every stage against the columns of the stages up to it: by its G with those up to itself, by its B before."""
        flops = controls = spread = spread_by_rows = 0
        for l in range(self.first, self.last + 1):
            fact = self.facts[l]
            if self.has_B[l]:
                flops += self._rows_flops(fact, fact.B, self.n[l - 1], controls, spread, spread_by_rows)
            for piece in columns.of_stage(l):
                controls += piece.stop - piece.start
                spread += fact.G * piece.by_outputs
                spread_by_rows += fact.G * fact.by_rows
            if fact.p and l < self.last:
                flops += self._rows_flops(fact, fact.G, self.n[l], controls, spread, spread_by_rows)
        return float(flops)

    @staticmethod
    def _rows_flops(fact: _Facts, entries: int, n: int, controls: int, spread: int, spread_by_rows: int) -> int:
        """Rows of a stage by so many entries of its G or B: a product with all controls, to which n rows of outputs are spread."""
        return 2 * entries * controls + 2 * n * (spread - spread_by_rows * fact.by_rows)
