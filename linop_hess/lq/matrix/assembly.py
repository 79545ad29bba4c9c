"""The dense Hessian of an LQ problem, from the structure of its stages.

With V_l the open-loop value after stage l (V ← FᵀVF + C) and J the derivative of a state by the controls x_m before it,

    H_lm = G_lᵀ V_l J_{l←m} + B_l J_{l−1←m},        m ≤ l,        J_{l←m} = F_l J_{l−1←m},  J_{m←m} = G_m,

is a sum over samples, since V and J of a sample do not see the others. One sweep along the chain carries J for all m at once. Where a stage
has fewer outputs than controls a sample, its columns of J are its outputs (J_{m←m} = I), and G_m is applied last. For a pair of affine
stages, G_b = z̃_bᵀ ⊗ I, that is one matrix product over the samples, Σ_b (z̃_l z̃_mᵀ) ⊗ (V_l J)_b, and 2 N² flops a sample altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil

import numpy as np
import torch
from torch import Tensor

from linop_hess._memory import zeros
from linop_hess.lq.matrix.assembly_plan import AssemblyPlan, Columns, Run, plan_assembly
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import SampleRows, Stage

_COLUMNS_AT_ONCE = 128
# Numbers that one product over samples reads and writes: what is made for it is read from cache.
_IN_CACHE = 1 << 20


def assemble(problem: Problem, dtype: torch.dtype | None = None) -> Tensor:
    """Form H, shape (N, N), symmetric to the last bit; that of a sum over parts part by part, each given back before the next is made.

    Peak memory, which `assembly_cost` tells: N² numbers for H, work space for samples and again for products, each of at most N²/3 numbers
    (16 MiB where that is more), as long as one sample of one stage fits in there. Samples are worked through in chunks, and so are the
    columns where one sample is too large.

    Parameters
    ----------
    problem : Problem
    dtype : torch.dtype, optional
        What to compute in; by default that of the problem.

    Returns
    -------
    Tensor
        H without damping.
    """
    return problem.processes.summed_symmetric("a dense matrix", lambda: _of_parts(problem, dtype or problem.dtype))


def _of_parts(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The sum over the parts of this process."""
    like = torch.zeros(0, dtype=dtype, device=problem.device)
    total = _Total(zeros((problem.size, problem.size), like))
    if problem.size:
        for part, weight in problem.parts():
            total.add(part if part.dtype == total.H.dtype else part.to(total.H.dtype), weight)
    return total.finish()


class _Total:
    """Σ_b w_b H_b, its lower triangle as far as it has come: H/w in the order of the chain, w the last weight."""

    def __init__(self, H: Tensor) -> None:
        self.H = H
        self._weight = 1.0
        self._places: np.ndarray | None = None

    def add(self, problem: Problem, weight: float) -> None:
        """Add w H of one chain."""
        H, places = self.H, problem.layout.places
        if not _is_same(self._places, places):
            self._to_flat_order()
            if places is not None:
                _permute(H, torch.from_numpy(places).to(H.device))
            self._places = places
        if weight != self._weight:  # which of batches of one size it is once
            H.mul_(self._weight / weight)
            self._weight = weight
        plan = plan_assembly(problem)
        for start in range(0, plan.samples, plan.chunk):
            sweep = _Sweep(problem, plan, H, start, min(start + plan.chunk, plan.samples))
            for columns in plan.blocks:
                sweep.run(columns)
            del sweep
        for stage, start in zip(problem.stages, problem.layout.x_offsets[:-1].tolist(), strict=True):
            if "A" in stage.nonzero:
                H[start : start + stage.p, start : start + stage.p] += stage.dense_A()[0]
        if problem.diagonal is not None:
            H.diagonal().add_(problem.layout.in_chain_order(problem.diagonal))

    def _to_flat_order(self) -> None:
        mirror(self.H)
        if self._places is not None:
            _permute(self.H, torch.from_numpy(np.argsort(self._places)).to(self.H.device))
        self._places = None

    def finish(self) -> Tensor:
        """Return the sum, whole and in flat order."""
        self._to_flat_order()
        return self.H if self._weight == 1.0 else self.H.mul_(self._weight)


def _is_same(places: np.ndarray | None, others: np.ndarray | None) -> bool:
    """Whether two orders of the controls are one; None is theirs in flat vectors."""
    if places is None or others is None:
        return places is others
    return np.array_equal(places, others)


def _permute(H: Tensor, order: Tensor) -> None:
    """H ← H[order][:, order] in place, in strips: the sweeps are in the order of the chain."""
    for start in range(0, H.shape[0], _COLUMNS_AT_ONCE):
        strip = H[start : start + _COLUMNS_AT_ONCE]
        strip.copy_(strip.gather(1, order.expand(len(strip), -1)))  # in two thirds of what indexing takes
    for start in range(0, H.shape[0], _COLUMNS_AT_ONCE):
        strip = H[:, start : start + _COLUMNS_AT_ONCE]
        strip.copy_(strip.index_select(0, order))


def assembly_cost(problem: Problem, dtype: torch.dtype | None = None) -> tuple[float, float]:
    """Flops of the matrix products of `assemble`, and its peak bytes, H included; of one chain."""
    plan = plan_assembly(problem, dtype)
    return plan.flops, plan.nbytes


class _Sweep:
    """Some of the samples, taken along the chain; adds what they contribute to the lower triangle of H."""

    def __init__(self, problem: Problem, plan: AssemblyPlan, H: Tensor, start: int, stop: int) -> None:
        self.plan, self.H = plan, H
        self.x_offsets = problem.layout.x_offsets.tolist()
        self.first, self.last = problem.layout.first, problem.length - 1
        self.samples = stop - start
        chain = range(self.first, problem.length)
        self.stages: dict[int, Stage] = {l: problem.stages[l] for l in chain}
        if self.samples < plan.samples:
            self.stages = {l: stage.of_samples(start, stop, plan.samples) for l, stage in self.stages.items()}
        self.rows: dict[int, SampleRows | None] = {
            l: self.stages[l].sample_rows(self.samples) for l in chain if self.stages[l].p
        }
        self.values = self._open_loop_values() if plan.by_value else {}

    def run(self, columns: Columns) -> None:
        """Add all rows of H in some columns."""
        self._stacked = {run.offset: self._stack(run) for run in columns.runs if run.in_pairs}
        if self.plan.by_value:
            self._run_forward(columns)
        else:
            self._run_both_ways(columns)

    def _stack(self, run: Run) -> Tensor:
        """z̃ of the stages of a run, (stages, k, samples)."""
        return torch.stack([rows.Z.mT for piece in run.pieces if (rows := self.rows[piece.stage]) is not None])

    def _product(self, product: Callable[[Tensor], Tensor], d: Tensor) -> Tensor:
        """A product of one stage with states of every sample, (samples, n, k) to (samples, n', k)."""
        out = product(d.reshape(1, d.shape[0] * d.shape[1], d.shape[2]))
        return out.reshape(self.samples, out.shape[1] // self.samples, d.shape[2])

    def _identity(self, n: int) -> Tensor:
        """I of size n for every sample, sharing memory."""
        return torch.eye(n, dtype=self.H.dtype, device=self.H.device).expand(self.samples, n, n)

    def _open_loop_values(self) -> dict[int, Tensor]:
        """V after each stage with controls, (samples, n, n), where it is not zero.

        One block a sample, below each other, is an array of states; so the products that move states move V: V ← Fᵀ(FᵀV)ᵀ + C.
        """
        values: dict[int, Tensor] = {}
        V: Tensor | None = None
        for l in range(self.last, self.first, -1):
            stage = self.stages[l]
            if stage.p and V is not None:
                values[l] = V
            if V is not None:
                half = self._product(stage.Ft, V)
                V = self._product(stage.Ft, half.mT)
            if self.plan.has_C[l]:
                C = stage.C_of_samples(self.samples)[0]
                V = C if V is None else V.add_(C)
        if V is not None:
            values[self.first] = V
        return values

    def _run_forward(self, columns: Columns) -> None:
        """With V: J goes forward, and every stage with controls reads V J."""
        J: Tensor | None = None
        for l in range(columns.first, self.last + 1):
            J = self._step(l, J, columns)
            if l in self.values and J is not None:
                self._add_G(l, torch.bmm(self.values[l], J), columns)

    def _run_both_ways(self, columns: Columns) -> None:
        """Without V, where a sample's state is too large for it: J goes forward, and costates V J come back."""
        widths = columns.widths(self.last)
        before: dict[int, Tensor] = {}
        J: Tensor | None = None
        for l in range(columns.first, self.last + 1):
            if J is not None and self.plan.has_C[l]:
                before[l] = J
            J = self._step(l, J, columns)
        costate: Tensor | None = None
        for l in range(self.last, columns.first - 1, -1):
            if costate is not None and self.stages[l].p:
                self._add_G(l, costate, columns)
            if costate is not None and l > columns.first:
                costate = self._product(self.stages[l].Ft, costate[:, :, : widths[l - 1]])
            if l in before:
                curved = self._product(self.stages[l].C, before.pop(l))
                costate = curved if costate is None else costate.add_(curved)

    def _step(self, l: int, J: Tensor | None, columns: Columns) -> Tensor | None:
        """Add B_l J to H, and return J after stage l with the stage's own columns; after the last nothing costs."""
        stage = self.stages[l]
        if J is not None and self.plan.has_B[l]:
            self._add_B(l, J, columns)
        if l == self.last:
            return None
        parts = [] if J is None else [self._product(stage.F, J)]
        n = stage.n_out // self.samples
        for piece in columns.of_stage(l):
            own = None if piece.by_outputs else stage.G_columns(piece.start, piece.stop)
            parts.append(self._identity(n) if own is None else own.reshape(self.samples, n, piece.width))
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def _add_G(self, l: int, X: Tensor, columns: Columns) -> None:
        """H_l += G_lᵀ X for X of shape (samples, n_l, columns)."""
        rows = self.rows[l]
        for run, count in columns.until(l + 1):
            if run.in_pairs and rows is not None:
                self._add_pairs(l, rows, X, run, count, by_beta=False)
            else:
                self._add_products(l, self.stages[l].Gt, X, run, count)

    def _add_B(self, l: int, J: Tensor, columns: Columns) -> None:
        """H_l += B_l J for J of shape (samples, n_{l−1}, columns)."""
        rows = self.rows[l]
        for run, count in columns.until(l):
            if run.in_pairs and rows is not None:
                self._add_pairs(l, rows, J, run, count, by_beta=True)
            else:
                self._add_products(l, self.stages[l].B, J, run, count)

    def _add_products(self, l: int, product: Callable[[Tensor], Tensor], X: Tensor, run: Run, count: int) -> None:
        """H_l += product(X), X brought to one column a control, which all samples share."""
        rows = self.H[self.x_offsets[l] : self.x_offsets[l + 1]]
        at_once = max(1, self.plan.work // (4 * rows.shape[0]))
        for start, part in self._in_controls(X, run, count):
            for begin in range(0, part.shape[2], at_once):
                piece = part[:, :, begin : begin + at_once]
                target = rows[:, start + begin : start + begin + piece.shape[2]]
                target += product(piece.reshape(1, -1, piece.shape[2]))[0]

    def _in_controls(self, X: Tensor, run: Run, count: int) -> Iterator[tuple[int, Tensor]]:
        """(the first control, (samples, n, controls)): X G_m of every sample where the columns are outputs."""
        at = run.offset
        pieces = run.pieces[:count]
        if not pieces[0].by_outputs:
            width = sum(piece.width for piece in pieces)
            yield self.x_offsets[pieces[0].stage] + pieces[0].start, X[:, :, at : at + width]
            return
        for piece in pieces:
            part = X[:, :, at : at + piece.width]
            yield self.x_offsets[piece.stage], self.stages[piece.stage].Gt_each(part.mT, self.samples).mT
            at += piece.width

    def _add_pairs(self, l: int, rows: SampleRows, X: Tensor, run: Run, count: int, *, by_beta: bool) -> None:
        """H_l += Σ_b (u_b ⊗ X_b)(z̃_mᵀ ⊗ I) for a run of stages m of one shape, and X_b of shape (n, o).

        By G: u = z̃_l, and X_b = (V J)_b has the outputs of l as rows. By B: u = β_l, and X_b = J_b has its inputs as rows. Both are one
        matrix product over the samples a pair, of X with the outer products u z̃ᵀ: indices (r of X, c; s of u, j of z̃_m).
        """
        u = rows.beta if by_beta else rows.Z
        if u is None:
            return
        Z, u = self._stacked[run.offset][:count], u.mT.contiguous()  # samples last: outer products run along them
        b, k, o, n = self.samples, Z.shape[1], run.pieces[0].width, X.shape[1]
        X = X[:, :, run.offset : run.offset + count * o].reshape(b, n, count, o).permute(2, 0, 1, 3)
        members, sources = _cut_pairs(min(self.plan.work, _IN_CACHE), count, len(u), b * n * o, k * (b + n * o))
        for m in range(0, count, members):
            left = X[m : m + members].reshape(-1, b, n * o).mT
            for s in range(0, len(u), sources):
                # No name for the product, which would outlive its use and double the peak.
                outer = (u[None, s : s + sources, None] * Z[m : m + members, None]).flatten(1, 2)
                self._scatter(l, rows, run, m, s, torch.bmm(left, outer.mT).view(len(left), n, o, -1, k), by_beta)
                del outer
            del left

    def _scatter(self, l: int, rows: SampleRows, run: Run, m: int, s: int, block: Tensor, by_beta: bool) -> None:
        """Add products (stages, n, o, sources from s on, k) to H, whose rows and columns are weights (o × i, row-major), then biases."""
        N, (n, o, sources, k) = self.H.shape[0], block.shape[1:]
        first = run.pieces[m].stage
        theirs = self.rows[first]
        assert theirs is not None
        i_m = k - theirs.bias
        x_l, x_m, p_m = self.x_offsets[l], self.x_offsets[first], run.pieces[m].stop
        i_l = n if by_beta else rows.Z.shape[1] - rows.bias
        weights = sources if by_beta else min(sources, max(0, i_l - s))
        # Row of source a in [s, s + weights) and r: by G weight (r, a), by B weight (a, r).
        parts = [(block[:, :, :, :weights], x_l + (s * i_l if by_beta else s), (1, i_l) if by_beta else (i_l, 1))]
        if weights < sources:
            parts.append((block[:, :, :, weights:], x_l + n * i_l, (1, 0)))
        for part, row, (of_r, of_s) in parts:
            for columns, column, of_c in ((part[..., :i_m], x_m, i_m), (part[..., i_m:], x_m + o * i_m, 1)):
                strides = (p_m, of_r * N, of_c, of_s * N, 1)
                self.H.as_strided(columns.shape, strides, row * N + column).add_(columns)


def _cut_pairs(work: int, count: int, sources: int, fixed: int, each: int) -> tuple[int, int]:
    """How many stages, and how many sources of each, one product may take: stages hold `fixed` numbers and `each` a source."""
    members = min(count, work // (fixed + sources * each))
    if members:
        return ceil(count / ceil(count / members)), sources
    return 1, max(1, min(sources, (work - fixed) // each))


def mirror(H: Tensor) -> None:
    """Copy the lower triangle to the upper one, in place."""
    N = H.shape[0]
    for start in range(0, N, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, N)
        square = H[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).mT)
        H[start:stop, stop:] = H[stop:, start:stop].mT
