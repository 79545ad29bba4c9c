"""How assembly is cut up, and what it says that it costs."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess import lq
from linop_hess.lq.matrix import assembly_plan
from linop_hess.lq.matrix.assembly import assembly_cost
from linop_hess.lq.matrix.assembly_plan import Columns, plan_assembly
from tests.helpers import make_batch, make_mlp
from tests.lq.problems import random_blocks


def problem_of(widths: list[int], samples: int) -> lq.Problem:
    batch = make_batch(widths[0], widths[-1], samples)
    return lh.linearize(make_mlp(widths), nn.CrossEntropyLoss(), *batch).problem


def controls_of(columns: tuple[Columns, ...]) -> list[tuple[int, int]]:
    """(stage, control) of every column, in order."""
    return [
        (piece.stage, control)
        for block in columns
        for piece in block.pieces
        for control in range(piece.start, piece.stop)
    ]


def test_all_samples_at_once_where_there_is_space() -> None:
    plan = plan_assembly(problem_of([6, 5, 5, 3], 40))
    assert (plan.samples, plan.chunk, len(plan.blocks)) == (40, 40, 1)


def test_the_cut_follows_the_work_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly_plan, "_LEAST_WORK_BYTES", 1 << 11)
    monkeypatch.setattr(assembly_plan, "_WORK_SHARE", 0.0)
    problem = problem_of([6, 5, 5, 3], 40)
    plan = plan_assembly(problem)
    assert plan.samples == 40 and plan.chunk < 10 and len(plan.blocks) > 1
    assert plan.work == (1 << 11) // 8


@pytest.mark.parametrize("share", [1 / 3, 0.0])
def test_every_control_has_one_column(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(assembly_plan, "_LEAST_WORK_BYTES", 1 << 11)
    monkeypatch.setattr(assembly_plan, "_WORK_SHARE", share)
    for problem in (problem_of([6, 5, 5, 3], 8), random_blocks([2, 9, 3, 2, 1], [30, 0, 2, 9], seed=0).problem()):
        last = problem.length - 1
        expected = [(l, c) for l, p in enumerate(problem.layout.p.tolist()) if l < last for c in range(p)]
        assert controls_of(plan_assembly(problem).blocks) == expected


def test_neighbours_of_one_shape_are_computed_together() -> None:
    (columns,) = plan_assembly(problem_of([3, 4, 4, 4, 3], 20)).blocks
    assert [(len(run.pieces), run.in_pairs) for run in columns.runs] == [(1, True), (2, True), (1, True)]
    first, second, third = (run.pieces[0].stage for run in columns.runs)
    assert [(run.offset, count) for run, count in columns.until(third)] == [(0, 1), (4, 2)]
    assert [count for _, count in columns.until(second + 1)] == [1, 1]
    assert columns.first == first and columns.widths(third)[third] == 4 + 4 + 4 + 3


def test_flops_are_two_a_sample_and_pair_of_controls() -> None:
    problem = problem_of([30, 30, 30, 30], 64)
    expected = 2 * 64 * problem.size**2
    assert expected / 1.5 <= assembly_cost(problem)[0] <= 1.5 * expected


def test_controls_of_the_last_stage_only_cost_nothing_but_memory() -> None:
    plan = plan_assembly(random_blocks([3, 3, 2], [0, 4], seed=0).problem())
    assert (plan.blocks, plan.flops, plan.nbytes) == ((), 0.0, 8.0 * 4**2)
    assert assembly_cost(random_blocks([3, 3], [0], seed=0).problem()) == (0.0, 0.0)


def test_a_deep_chain_is_planned_in_time_linear_in_its_length() -> None:
    """Widths that alternate, so that no neighbours are alike; a plan is made for every problem, whatever the method."""
    torch.manual_seed(0)
    times = []
    for length in (200, 1600):
        problem = problem_of([2, 3] * (length // 2), 1)
        plan_assembly(problem)
        start = time.perf_counter()
        plan_assembly(problem)
        times.append(time.perf_counter() - start)
    assert times[1] <= 30 * times[0]  # 8 if linear, 64 if each stage met each
