"""A recorded run as an LQ problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import NotFiniteError
from linop_hess.graph.chains import chain_of
from linop_hess.graph.grouping import Alike, Footprint, Group, alike, grouped, live_nodes, needed_of
from linop_hess.graph.liveness import LiveCuts
from linop_hess.graph.lowering import lower, may_be_split, split_late
from linop_hess.graph.recording.node import Node, Trace
from linop_hess.graph.recording.template import Flats
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.graph.samples import state_order
from linop_hess.graph.wiring import IDLE, INJECTION, OBJECTIVE, Stack, order_of, places_of, run_by_loss, schedule
from linop_hess.lq.layout import Layout
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.injection import IdleStage, InjectionStage
from linop_hess.lq.stages.objective import ObjectiveStage
from linop_hess.lq.stages.wired import WiredStage
from linop_hess.tables import DIFFERENCES, DOUBLE_BACKWARD, RULE, Cuts, StageLabels


@dataclass(frozen=True)
class Graph:
    """A network as a chain of stages on live sets.

    Attributes
    ----------
    problem : Problem
    gradient : Tensor, shape (N,)
        By the adjoint recursion through the stages.
    generic : tuple of str
        Operations whose derivatives are torch's own second derivatives of operations that no rule knows.
    cuts : Cuts
        What lives in its states.
    differenced : tuple of str
        Operations whose second derivatives are differences of first ones.
    terms : callable
        ``terms()`` is the size of what gradients are sums of: rounding in them is relative to it, where all cancels.
    structure : Structure
    """

    problem: Problem
    gradient: Tensor
    generic: tuple[str, ...]
    cuts: Cuts
    differenced: tuple[str, ...]
    terms: Callable[[], float]
    structure: Structure


@dataclass(frozen=True)
class Structure:
    """What a recorded run shares with others of the same operations on elements of the same places: all but numbers.

    Attributes
    ----------
    nodes : list of Footprint
        Of what was recorded, by signature.
    ids : int
        The largest element id there.
    target : ndarray of int
    samples : int
        Of the objective.
    second : SecondDerivatives
    kept : list of int
        Which of the lowered nodes are live.
    splits : bool
        Whether some of them are computed row by row.
    groups : list of Group
        Without arguments.
    parts : list of int
        Into how many equal parts the stages of each group fall.
    stacks : list of Stack
    order, places : ndarray of int
        As of `Problem`.
    cuts : Cuts
    of_loss : frozenset of int
    adjoints : list of Tensor
        Where, in all states after events, that stands which the stages of each group write; −1 where nothing reads it.
    layout : Layout or None
    """

    nodes: list[Footprint]
    ids: int
    target: np.ndarray
    samples: int
    second: SecondDerivatives
    kept: list[int]
    splits: bool
    groups: list[Group]
    parts: list[int]
    stacks: list[Stack]
    order: np.ndarray
    places: np.ndarray
    cuts: Cuts
    of_loss: frozenset[int]
    adjoints: list[Tensor]
    layout: Layout | None = None

    def fits(
        self,
        trace: Trace,
        sets: Sequence[Alike],
        target: np.ndarray,
        objective: ObjectiveStage | None,
        second: SecondDerivatives,
    ) -> bool:
        """Whether a run did the same on elements of the same places: then nothing here would come out otherwise.

        `sets` are its nodes by signature.

        Of constants, numbers that are no floats must be the same, since they may say what is moved where.
        """
        return (
            self.second == second
            and self.ids == trace.ids
            and self.samples == (1 if objective is None else objective.samples)
            and (objective is None) == all(stack.group != OBJECTIVE for stack in self.stacks)
            and np.array_equal(self.target, target)
            and len(self.nodes) == len(sets)
            and all(mine.equals(one.print()) for mine, one in zip(self.nodes, sets, strict=True))
        )

    def groups_of(self, lowered: list[Node], ids: int) -> list[Group]:
        """The groups with the arguments of a run's lowered nodes, whose largest element id is `ids`."""
        nodes = [lowered[k] for k in self.kept]
        if self.splits:
            nodes = split_late(nodes, ids)
        return [group.with_arguments(Flats([nodes[k] for k in group.nodes.tolist()])) for group in self.groups]


def build_graph(
    trace: Trace,
    target: np.ndarray,
    objective: ObjectiveStage | None,
    like: Tensor,
    parameters: dict[str, int],
    second: SecondDerivatives,
    known: Structure | None = None,
) -> Graph:
    """Linearize what was recorded.

    Parameters
    ----------
    trace : Trace
    target : ndarray of int
        Elements that the objective reads, in its order; without an objective the element that is the loss.
    objective : ObjectiveStage or None
        The loss, where it depends on the model's output alone.
    like : Tensor
        Of the parameters' dtype and device.
    parameters : dict of str to int
        Names of the parameters with their numbers of entries, in order.
    second : SecondDerivatives
        Where those come from that autograd does not have, or that kinks hide.
    known : Structure, optional
        That of another run, which is taken over where this one is alike.

    Raises
    ------
    ValueError
        If a derivative is NaN or Inf (the message names the operation).
    MemoryError
        If the states do not fit into memory; the message has the widest of them.
    """
    lowered, seen, ids = None, known, trace.ids
    sets = alike(trace.nodes)
    if known is not None and known.fits(trace, sets, target, objective, second):
        lowered = lower(trace, sets, target)
        groups = known.groups_of(lowered, trace.ids)
        makers = [group.rule.linearize(group.op).to(like.dtype) for group in groups]
        if known.parts != [max(1, maker.samples) for maker in makers]:
            seen = None
    else:
        seen = None
    if seen is None:
        seen, groups, makers = _analysed(trace, ids, sets, lowered, target, objective, like, parameters, second)
    slopes = [_stage(stack, makers, objective, like) for stack in seen.stacks]
    labels = seen.cuts.labels
    if seen.layout is None:
        problem = Problem(slopes, seen.order, labels, seen.places, seen.of_loss)
        seen = replace(seen, layout=problem.layout)
    else:
        problem = Problem.laid_out(seen.layout, slopes, labels, seen.of_loss)
    _require_finite(problem)
    seed = torch.zeros(problem.layout.size_out, 1, dtype=like.dtype, device=like.device)
    seed[-1] = 1.0
    adjoint = problem.transition.substitute_adjoint(seed)
    gradient = problem.apply_Gt(adjoint)[:, 0]
    bars = torch.cat([adjoint[:, 0], adjoint.new_zeros(1)])  # the last for −1
    curved = [
        group.rule.curve(group.op, maker, bars[places]).to(like.dtype)
        for group, maker, places in zip(groups, makers, seen.adjoints, strict=True)
    ]
    slopes_alone = problem
    problem = problem.with_curvature([_stage(stack, curved, objective, like) for stack in seen.stacks])
    _require_finite(problem, slopes_alone)
    generic = tuple(dict.fromkeys(group.op.title for group in groups if group.rule.is_generic))
    differenced = tuple(dict.fromkeys(group.op.title for group in groups if group.op.by_differences))
    return Graph(
        problem, gradient, generic, seen.cuts, differenced, partial(_size_of_terms, slopes_alone, adjoint), seen
    )


def _analysed(
    trace: Trace,
    ids: int,
    sets: list[Alike],
    lowered: list[Node] | None,
    target: np.ndarray,
    objective: ObjectiveStage | None,
    like: Tensor,
    parameters: dict[str, int],
    second: SecondDerivatives,
) -> tuple[Structure, list[Group], list[Stage]]:
    """What numbers do not change, worked out; and the groups with their numbers, linearized.

    `ids` and `sets` are the trace's largest id, and its nodes by signature; `lowered` what it is lowered to, where that is done.
    """
    footprints = [one.print() for one in sets]
    lowered = lower(trace, sets, target) if lowered is None else lowered
    if lowered is not trace.nodes:
        sets = alike(lowered)
    plain = _chained(trace, ids, footprints, sets, target, objective, like, second)
    if plain is not None:
        return plain
    needed = target[target > 0]
    chosen = needed_of(sets, needed, trace.ids)
    if chosen is None:
        position = {id(node): k for k, node in enumerate(lowered)}
        kept = [position[id(node)] for node in live_nodes(lowered, needed, trace.ids)]
        chosen = alike([lowered[k] for k in kept])
    else:
        kept = sorted(k for one in chosen for k in one.members.tolist())
        chosen = [replace(one, members=np.searchsorted(kept, one.members)) for one in chosen]
    splits = may_be_split(chosen, trace.ids, len(kept))
    if splits:
        nodes = split_late([lowered[k] for k in kept], trace.ids)
        splits = len(nodes) > len(kept)
        chosen = alike(nodes)
    groups = grouped(chosen, trace.parameters, target, second)

    def cuts_of(what: np.ndarray, birth: np.ndarray, last: np.ndarray) -> LiveCuts:
        return LiveCuts(_labels(groups, what), birth, last, parameters, like.element_size())

    makers = [group.rule.linearize(group.op).to(like.dtype) for group in groups]
    parts = [max(1, maker.samples) for maker in makers]
    samples = 1 if objective is None else objective.samples
    rank, orders = state_order(groups, parts, trace.ids, target, samples)
    for g, parts_order in enumerate(orders):
        if parts_order is not None:
            groups[g] = group = groups[g].in_order(parts_order)
            makers[g] = group.rule.linearize(group.op).to(like.dtype)
    plan = schedule(groups, trace.parameters, trace.ids, target, rank, objective is not None, cuts_of)
    order = order_of(plan.stacks)
    new = np.flatnonzero(plan.live.is_new)
    where = np.full(trace.ids + 2, -1, dtype=np.int64)
    where[plan.live.ids[new]] = new
    return (
        Structure(
            footprints,
            ids,
            target,
            samples,
            second,
            kept,
            splits,
            [group.without_arguments() for group in groups],
            parts,
            plan.stacks,
            order,
            places_of(plan.stacks, order),
            plan.cuts,
            run_by_loss(plan.stacks, groups),
            [torch.from_numpy(where[group.written]) for group in groups],
        ),
        groups,
        makers,
    )


def _chained(
    trace: Trace,
    ids: int,
    footprints: list[Footprint],
    sets: list[Alike],
    target: np.ndarray,
    objective: ObjectiveStage | None,
    like: Tensor,
    second: SecondDerivatives,
) -> tuple[Structure, list[Group], list[Stage]] | None:
    """The same of a plain chain, `sets` being its lowered nodes by signature; None where it is none."""
    chain = chain_of(sets, trace.parameters, target, second)
    if chain is None:
        return None
    groups, samples = chain.groups, 1 if objective is None else objective.samples
    makers = [group.rule.linearize(group.op).to(like.dtype) for group in groups]
    if not chain.falls_into(samples, makers):
        return None
    stacks = chain.stacks(objective is not None)
    order = order_of(stacks)
    widths = chain.widths if objective is None else np.append(chain.widths, 1)
    kinds = np.array([stack.group for stack in stacks])[order[:, 0]]
    cuts = Cuts(_labels(groups, np.column_stack([kinds, order[:, 1]])), widths, like.element_size())
    return (
        Structure(
            footprints,
            ids,
            target,
            samples,
            second,
            list(range(chain.nodes)),
            False,
            [group.without_arguments() for group in groups],
            [max(1, maker.samples) for maker in makers],
            stacks,
            order,
            places_of(stacks, order),
            cuts,
            run_by_loss(stacks, groups),
            list(map(torch.from_numpy, chain.places())),
        ),
        groups,
        makers,
    )


def _size_of_terms(problem: Problem, adjoint: Tensor) -> float:
    """Of the terms that gradients are sums of, the size in the largest sum: with random signs they do not cancel; or that of adjoints."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    draws = torch.randint(2, (len(adjoint), 4), generator=generator, dtype=torch.int64, device="cpu")
    sums = problem.apply_Gt(adjoint * (2 * draws - 1).to(adjoint))
    sizes = [float(sums.square().mean(1).max().sqrt()) if sums.numel() else 0.0, float(adjoint.abs().max())]
    return max(sizes)


def _stage(stack: Stack, makers: Sequence[Stage], objective: ObjectiveStage | None, like: Tensor) -> Stage:
    K, p = stack.controls.shape
    inner: Stage
    if stack.group == IDLE:
        return IdleStage.of(p, K, dtype=like.dtype, device=like.device)
    if stack.group == INJECTION:
        inner = InjectionStage.of(p, K, dtype=like.dtype, device=like.device)
    elif stack.group == OBJECTIVE:
        assert objective is not None
        inner = objective
    else:
        inner = makers[stack.group]
        if stack.members.size < inner.count:
            inner = inner.take(stack.members)
    return inner if stack.wiring is None else WiredStage(inner, stack.wiring)


def _labels(groups: Sequence[Group], what: np.ndarray) -> StageLabels:
    """What each event is in the model, from its group and its position there."""
    kinds = [(group.name.removeprefix("aten."), _origin(group)) for group in groups]
    paths = [tuple(path or ("loss" if group.in_loss else "<model>") for path in group.paths) for group in groups]
    kinds += [("shared parameters", RULE), ("parameters that nothing reads", RULE), ("loss", DOUBLE_BACKWARD)]
    paths += [("",)] * 3
    return StageLabels(
        np.where(what < 0, len(groups) - 1 - what, what), kinds, paths
    )  # those are INJECTION, IDLE and OBJECTIVE


def _origin(group: Group) -> str:
    """Where the second derivatives of a group come from."""
    if group.op.by_differences:
        return DIFFERENCES
    return DOUBLE_BACKWARD if group.rule.is_generic else RULE


def _require_finite(problem: Problem, known: Problem | None = None) -> None:
    """Raise where a derivative is NaN or Inf; the arrays of `known` are finite."""
    finite = frozenset() if known is None else frozenset(id(a) for block in known.blocks for a in block._arrays())
    for b, block in enumerate(problem.blocks):
        bad = block.first_not_finite(finite)
        if bad is not None:
            l = int(np.flatnonzero((problem.order[:, 0] == b) & (problem.order[:, 1] == bad))[0])
            raise NotFiniteError(
                f"NaN or Inf in the derivatives of layer {problem.name(l)}: check inputs and parameters there"
            )
