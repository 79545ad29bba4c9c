"""The command ``linop-hess train``: one optimizer on one task."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from linop_hess import plot
from linop_hess.cli.arguments import (
    INTERRUPTED,
    Help,
    add_shared,
    integer,
    machine,
    make_folder,
    missing,
    options,
    positive,
    progress_bar,
    torch_threads,
)
from linop_hess.cli.contenders import CONTROL, LEARNING, Contender, Task, contenders_of, run
from linop_hess.cli.task_arguments import (
    CLOCK_NAMES,
    CLOCKS,
    add_task,
    chosen_options,
    describe_tasks,
    headline,
    loss_name,
    made,
)
from linop_hess.cli.trace import Trace

SECONDS = 20.0
"""Budget where none is given."""


def add_train(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    train = commands.add_parser(
        "train",
        help="train one task with one optimizer",
        description="Train a model, or swing a pendulum up, with one optimizer from one initial point. Prints steps, writes loss.png "
        "and results.json; after Ctrl-C too, with what there is.",
        epilog=describe_tasks(),
        formatter_class=Help,
    )
    train.set_defaults(command=_train, parser=train)
    names = tuple(dict.fromkeys([*LEARNING, *CONTROL]))
    add = train.add_argument
    add_task(train)
    add("--optimizer", choices=names, help="by default saddle-free, and newton for pendulum")
    add("--lr", type=positive, metavar="X", help="the rate; 1 for those whose steps have a length of their own")
    add("--steps", type=integer(1), metavar="N", help="after which it ends, at least 1")
    add("--seconds", type=positive, metavar="X", help=f"after which it ends; {SECONDS:g} where no --steps are given")
    add_shared(train)


def _train(arguments: argparse.Namespace) -> int:
    chosen = chosen_options(arguments)
    if why := missing("train"):
        print(why, file=sys.stderr)
        return 1
    task = made(arguments, chosen, arguments.seed)
    known = contenders_of(task)
    name = arguments.optimizer or ("newton" if "newton" in known else "saddle-free")
    if name not in known:
        arguments.parser.error(
            f"argument --optimizer: expected one of {', '.join(known)} with --task {arguments.task}, got {name}"
        )
    contender = known[name]
    if why := contender.why_not(task):
        arguments.parser.error(f"argument --optimizer: {name}: {why}")
    if arguments.lr is not None and not contender.has_rate:
        arguments.parser.error(f"argument --lr: expected none with --optimizer {name}: leave it out")
    rate = contender.rate if arguments.lr is None else arguments.lr
    make_folder(arguments)
    with torch_threads(arguments.threads):
        trace = _run(arguments, task, contender, rate)
    picture, results = arguments.out / "loss.png", arguments.out / "results.json"
    found = {
        "options": options(arguments) | chosen | {"optimizer": name, "lr": rate},
        "parameters": task.size,
        "machine": machine(),
        **trace.as_dict(),
    }
    if not trace.losses:
        print("interrupted before the first loss; nothing was written", file=sys.stderr)
        return INTERRUPTED
    _draw(arguments, chosen, contender, trace, picture)
    results.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    print(f"\nwrote {picture} and {results}")
    return INTERRUPTED if trace.ended == "interrupted" else 0


def _run(arguments: argparse.Namespace, task: Task, contender: Contender, rate: float | None) -> Trace:
    budget = SECONDS if arguments.seconds is None and arguments.steps is None else arguments.seconds or float("inf")
    length = f", rate {rate:g}" if rate is not None else ""
    print(f"{arguments.task}, {task.size:,} parameters, seed {arguments.seed}; {contender.label}{length}\n")
    print(f"{'step':>8}{'seconds':>10}{'loss':>13}")
    bar = None if arguments.no_progress else progress_bar(contender.label, arguments.steps or round(budget))
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True) if bar is None else bar.write(line, file=sys.stdout)

    def watch(trace: Trace, note: str) -> None:
        line = f"{trace.steps:8,}{trace.seconds[-1]:10.2f}{trace.losses[-1]:13.4e}  {_short(note)}".rstrip()
        lines[:] = [line]
        if _is_shown(trace.steps):
            say(line)
            lines.clear()
        if bar is not None:
            bar.n = min(trace.steps if arguments.steps else round(trace.seconds[-1]), bar.total)
            bar.set_postfix(loss=f"{trace.losses[-1]:.1e}")

    trace = Trace(budget, arguments.steps, arguments.goal, watch, CLOCKS[arguments.clock])
    try:
        run(contender, task, trace, rate)
    finally:
        if bar is not None:
            bar.close()
    print(*lines, sep="\n")
    print(
        f"ended: {trace.ended}; lowest loss {trace.best:.4e}"
        + "".join(f", {n} {v:.4g}" for n, v in trace.facts.items())
    )
    return trace


def _is_shown(step: int) -> bool:
    """Steps 0, 1, 2, 3, 5, 7 and these times powers of ten."""
    while step >= 10 and step % 10 == 0:
        step //= 10
    return step in (0, 1, 2, 3, 5, 7)


def _short(note: str) -> str:
    """A record without what its line says already."""
    return note.split(", ", 1)[1] if note.startswith("step ") else note


def _draw(
    arguments: argparse.Namespace, chosen: dict[str, Any], contender: Contender, trace: Trace, path: Path
) -> None:
    runs = {contender.label: [plot.History(trace.losses, trace.seconds)]}
    plot.losses(
        runs, title=headline(arguments.task, chosen), name=loss_name(arguments.task), clock=CLOCK_NAMES[arguments.clock]
    ).savefig(path)
