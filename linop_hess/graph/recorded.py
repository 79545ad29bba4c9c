"""A recorded run as an LQ problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import NotFiniteError
from linop_hess.graph.grouping import Group, grouped, live_nodes
from linop_hess.graph.liveness import LiveCuts
from linop_hess.graph.lowering import lower, split_late
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.graph.samples import state_order
from linop_hess.graph.trace import Trace
from linop_hess.graph.wiring import IDLE, INJECTION, OBJECTIVE, Stack, schedule
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.injection import IdleStage, InjectionStage
from linop_hess.lq.stages.objective import ObjectiveStage
from linop_hess.lq.stages.wired import WiredStage
from linop_hess.tables import DIFFERENCES, DOUBLE_BACKWARD, RULE, StageLabel


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
    cuts : LiveCuts
        What lives in its states.
    differenced : tuple of str
        Operations whose second derivatives are differences of first ones.
    terms : float
        Size of what gradients are sums of: rounding in them is relative to it, where all cancels.
    """

    problem: Problem
    gradient: Tensor
    generic: tuple[str, ...]
    cuts: LiveCuts
    differenced: tuple[str, ...]
    terms: float


def build_graph(
    trace: Trace,
    target: np.ndarray,
    objective: ObjectiveStage | None,
    like: Tensor,
    parameters: dict[str, int],
    second: SecondDerivatives,
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

    Raises
    ------
    ValueError
        If a derivative is NaN or Inf (the message names the operation).
    MemoryError
        If the states do not fit into memory; the message has the widest of them.
    """
    nodes = live_nodes(lower(trace), target[target > 0], trace.ids)
    nodes = split_late(nodes, trace.ids)
    groups = grouped(nodes, trace.parameters, target, second)

    def cuts_of(what: np.ndarray, birth: np.ndarray, last: np.ndarray) -> LiveCuts:
        return LiveCuts(_labels(groups, what), birth, last, parameters, like.element_size())

    makers = {g: group.rule.linearize(group.op).to(like.dtype) for g, group in enumerate(groups)}
    parts = [max(1, makers[g].samples) for g in range(len(groups))]
    rank, orders = state_order(groups, parts, trace.ids, target, 1 if objective is None else objective.samples)
    for g, parts_order in enumerate(orders):
        if parts_order is not None:
            groups[g] = group = replace(groups[g], op=replace(groups[g].op, order=parts_order))
            makers[g] = group.rule.linearize(group.op).to(like.dtype)
    plan = schedule(groups, trace.parameters, trace.ids, target, rank, objective is not None, cuts_of)
    order = plan.order
    slopes = [_stage(stack, makers, objective, like) for stack in plan.stacks]
    places = np.concatenate(
        [plan.stacks[b].controls[k] for b, k in order.tolist()] or [np.zeros(0, dtype=np.int64)]
    ).astype(np.int64)
    # Gauss-Newton keeps the curvature of all that the loss runs; an objective keeps its own.
    of_loss = frozenset(b for b, stack in enumerate(plan.stacks) if stack.group >= 0 and groups[stack.group].in_loss)
    problem = Problem(slopes, order, plan.cuts.labels, places - 1, of_loss)
    _require_finite(problem)
    seed = torch.zeros(problem.layout.size_out, 1, dtype=like.dtype, device=like.device)
    seed[-1] = 1.0
    adjoint = problem.transition.substitute_adjoint(seed)
    gradient = problem.apply_Gt(adjoint)[:, 0]
    terms = _size_of_terms(problem, adjoint)
    new = torch.from_numpy(np.flatnonzero(plan.live.is_new))
    bars = torch.zeros(trace.ids + 2, dtype=like.dtype, device=like.device)
    bars[torch.from_numpy(plan.live.ids[plan.live.is_new])] = adjoint[new, 0]
    curved = {}
    for g, group in enumerate(groups):
        written = group.placement.written
        outputs = group.outputs if written is None else group.outputs[:, written]
        beta = bars[torch.from_numpy(outputs)]
        curved[g] = group.rule.curve(group.op, makers[g], beta).to(like.dtype)
    problem = problem.with_curvature([_stage(stack, curved, objective, like) for stack in plan.stacks])
    _require_finite(problem)
    generic = tuple(dict.fromkeys(group.op.title for group in groups if group.rule.is_generic))
    differenced = tuple(dict.fromkeys(group.op.title for group in groups if group.op.by_differences))
    return Graph(problem, gradient, generic, plan.cuts, differenced, terms)


def _size_of_terms(problem: Problem, adjoint: Tensor) -> float:
    """Of the terms that gradients are sums of, the size in the largest sum: with random signs they do not cancel; or that of adjoints."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    draws = torch.randint(2, (len(adjoint), 4), generator=generator, dtype=torch.int64, device="cpu")
    sums = problem.apply_Gt(adjoint * (2 * draws - 1).to(adjoint))
    sizes = [float(sums.square().mean(1).max().sqrt()) if sums.numel() else 0.0, float(adjoint.abs().max())]
    return max(sizes)


def _stage(stack: Stack, makers: dict[int, Stage], objective: ObjectiveStage | None, like: Tensor) -> Stage:
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


def _labels(groups: Sequence[Group], what: np.ndarray) -> list[StageLabel]:
    """What each event is in the model, from its group and its position there."""
    kinds = {
        IDLE: StageLabel("", "parameters that nothing reads"),
        INJECTION: StageLabel("", "shared parameters"),
        OBJECTIVE: StageLabel("", "loss", DOUBLE_BACKWARD),
    }
    labels = []
    for g, k in what.tolist():
        if g < 0:
            labels.append(kinds[g])
        else:
            group = groups[g]
            path = group.paths[k] or ("loss" if group.in_loss else "<model>")
            way = DOUBLE_BACKWARD if group.rule.is_generic else RULE
            way = DIFFERENCES if group.op.by_differences else way
            labels.append(StageLabel(path, group.name.removeprefix("aten."), way))
    return labels


def _require_finite(problem: Problem) -> None:
    for b, block in enumerate(problem.blocks):
        bad = block.first_not_finite()
        if bad is not None:
            l = int(np.flatnonzero((problem.order[:, 0] == b) & (problem.order[:, 1] == bad))[0])
            raise NotFiniteError(
                f"NaN or Inf in the derivatives of layer {problem.name(l)}: check inputs and parameters there"
            )
