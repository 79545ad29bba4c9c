"""A recorded run as an LQ problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess.graph.grouping import Group, grouped, live_nodes
from linop_hess.graph.lowering import lower
from linop_hess.graph.trace import Trace
from linop_hess.graph.wiring import IDLE, INJECTION, OBJECTIVE, Schedule, Stack, schedule
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.injection import IdleStage, InjectionStage
from linop_hess.lq.stages.objective import ObjectiveStage
from linop_hess.lq.stages.wired import WiredStage


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
    """

    problem: Problem
    gradient: Tensor
    generic: tuple[str, ...]


def build_graph(trace: Trace, target: np.ndarray, objective: ObjectiveStage | None, like: Tensor) -> Graph:
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

    Raises
    ------
    ValueError
        If a derivative is NaN or Inf (the message names the operation).
    """
    nodes = live_nodes(lower(trace), target[target > 0], trace.ids)
    groups = grouped(nodes, trace.parameters, target)
    plan = schedule(groups, trace.parameters, trace.ids, target, objective is not None)
    order = plan.order
    makers = {g: group.rule.linearize(group.op).to(like.dtype) for g, group in enumerate(groups)}
    slopes = [_stage(stack, makers, objective, like) for stack in plan.stacks]
    places = np.concatenate(
        [plan.stacks[b].controls[k] for b, k in order.tolist()] or [np.zeros(0, dtype=np.int64)]
    ).astype(np.int64)
    names = _names(plan, groups, order)
    problem = Problem(slopes, order, names, places - 1)
    _require_finite(problem)
    seed = torch.zeros(problem.layout.size_out, 1, dtype=like.dtype, device=like.device)
    seed[-1] = 1.0
    adjoint = problem.transition.substitute_adjoint(seed)
    gradient = problem.apply_Gt(adjoint)[:, 0]
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
    return Graph(problem, gradient, generic)


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


def _names(plan: Schedule, groups: Sequence[Group], order: np.ndarray) -> list[str]:
    kinds = {IDLE: "parameters that nothing reads", INJECTION: "shared parameters", OBJECTIVE: "loss"}
    names = []
    for b, k in order.tolist():
        stack = plan.stacks[b]
        if stack.group < 0:
            names.append(kinds[stack.group])
        else:
            group = groups[stack.group]
            path = group.paths[int(stack.members[k])]
            names.append(f"{path or ('loss' if group.in_loss else '<model>')}: {group.name.removeprefix('aten.')}")
    return names


def _require_finite(problem: Problem) -> None:
    for b, block in enumerate(problem.blocks):
        bad = block.first_not_finite()
        if bad is not None:
            l = int(np.flatnonzero((problem.order[:, 0] == b) & (problem.order[:, 1] == bad))[0])
            raise ValueError(f"NaN or Inf in the derivatives of layer {problem.name(l)}: check inputs and parameters there")
