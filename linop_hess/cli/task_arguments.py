"""What chooses a task on the command line: its name and options, the clock of its runs, and how they are titled."""

from __future__ import annotations

import argparse
import time
from typing import Any

from linop_hess.cli.arguments import integer, positive
from linop_hess.cli.contenders import Task
from linop_hess.tasks import TASKS, make_task, task_options

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What seconds are."""

CLOCK_NAMES = {"wall": "seconds", "cpu": "seconds of the processor"}

CHOICES = ("depth", "width", "batch", "points", "activation", "init")
"""Options of tasks."""


def add_task(parser: argparse.ArgumentParser) -> None:
    """Add what chooses a task."""
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), default="digits-memorize", help="what is trained; sizes are said below")
    add("--depth", type=integer(1), metavar="N", help="hidden layers, or stages of a pendulum")
    add("--width", type=integer(1), metavar="N", help="neurons a hidden layer")
    add("--batch", type=integer(1), metavar="N", help="samples in the one batch")
    add("--points", type=integer(1), metavar="N", help="along a side of a domain")
    add("--activation", metavar="NAME", help="between the layers: tanh, relu, gelu or silu")
    add("--init", metavar="NAME", help="he, orthogonal or default (torch's)")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: this process's, where others use the machine")
    add("--goal", type=positive, default=1e-12, metavar="X", help="loss at which a run ends")


def describe_tasks() -> str:
    """What may be chosen of each task, with what it is where nothing is said."""
    lines = ["tasks, with what they are where nothing is said:"]
    for name in TASKS:
        chosen = ", ".join(f"--{option} {value}" for option, value in task_options(name).items() if option in CHOICES)
        lines.append(f"  {name:16}{chosen or 'no options'}")
    return "\n".join(lines)


def chosen_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the task, those that were not given at their defaults; or end with a usage message."""
    known = task_options(arguments.task)
    given = {name: getattr(arguments, name) for name in CHOICES if getattr(arguments, name) is not None}
    for name in given:
        if name not in known:
            arguments.parser.error(f"argument --{name}: expected none with --task {arguments.task}: leave it out")
    return known | given


def made(arguments: argparse.Namespace, chosen: dict[str, Any], seed: int) -> Task:
    """Return the task, or end with a usage message."""
    try:
        return make_task(arguments.task, seed, **chosen)
    except ValueError as error:
        arguments.parser.error(str(error))
        raise  # which it has done


def headline(task: str, chosen: dict[str, Any]) -> str:
    """A task and what was chosen of it."""
    sizes = f"{chosen['depth']}×{chosen['width']}" if {"depth", "width"} <= set(chosen) else ""
    if not sizes and "depth" in chosen:
        sizes = f"{chosen['depth']:,} stages"
    batch = f"batch {chosen['batch']:,}" if "batch" in chosen else ""
    init = f"init {chosen['init']}" if "init" in chosen else ""
    return ", ".join(part for part in (task, sizes, batch, chosen.get("activation", ""), init) if part)


def loss_name(task: str) -> str:
    """What falls: a loss, or the cost of controls."""
    return "cost" if task == "pendulum" else "loss"
