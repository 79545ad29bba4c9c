"""The command ``linop-hess bench-train``: optimizers on one task, from the same initial points, in the same seconds."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
from linop_hess.cli.contenders import COMPARED, CONTROL, LEARNING, Contender, contenders_of, run
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

# What a table tells of: losses after so many steps, and the first time below a loss, beside the goal.
_STEPS, _BELOW = (20, 60), 1e-6


@dataclass(frozen=True)
class Row:
    """One optimizer, a run a seed.

    Attributes
    ----------
    contender : Contender
    rate : float or None
        The best of its grid.
    scores : dict of float to float
        Of each rate of the grid: the median over seeds of log10 of the lowest loss in the time of tuning.
    traces : list of Trace
    """

    contender: Contender
    rate: float | None
    scores: dict[float, float]
    traces: list[Trace] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Its name, with the rate."""
        return self.contender.label + (f", lr {self.rate:g}" if self.rate is not None else "")


def add_bench_train(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    bench = commands.add_parser(
        "bench-train",
        help="compare optimizers on one task",
        description="Train one task with several optimizers, each from the same initial points and for the same seconds; rates are the "
        "best of a grid that is printed, by the median of log10 of the lowest loss. Prints a table, writes training.png and results.json; "
        "after Ctrl-C too, with the optimizers that are through.",
        epilog=describe_tasks(),
        formatter_class=Help,
    )
    bench.set_defaults(command=_bench, parser=bench)
    add = bench.add_argument
    add_task(bench)
    names = ", ".join(dict.fromkeys([*LEARNING, *CONTROL]))
    add("--optimizers", metavar="A,B,...", help=f"by default {','.join(COMPARED)}, or all of a pendulum; of {names}")
    add("--seeds", type=integer(1), default=5, metavar="N", help="initial points, from --seed on")
    add("--seconds", type=positive, default=20.0, metavar="X", help="of each run")
    add("--tuning-seeds", type=integer(1), default=3, metavar="N", help="initial points that a rate is chosen by")
    add("--tuning-seconds", type=positive, metavar="X", help="of each run of these; by default a fifth of --seconds")
    add_shared(bench)


def _bench(arguments: argparse.Namespace) -> int:
    chosen = chosen_options(arguments)
    if why := missing("bench-train"):
        print(why, file=sys.stderr)
        return 1
    task = made(arguments, chosen, arguments.seed)
    known = contenders_of(task)
    names = [name for name in known if name in COMPARED or known is CONTROL]
    if arguments.optimizers is not None:
        names = arguments.optimizers.split(",")
    for name in names:
        if name not in known:
            arguments.parser.error(
                f"argument --optimizers: expected some of {', '.join(known)} with --task {arguments.task}, got {name!r}"
            )
    make_folder(arguments)
    begin = time.perf_counter()
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    print(
        f"{headline(arguments.task, chosen)}: {task.size:,} parameters, {len(seeds)} seeds, {arguments.seconds:g} s each\n"
    )
    rows, skipped = list[Row](), dict[str, str]()
    interrupted = False
    with torch_threads(arguments.threads):
        for name in dict.fromkeys(names):
            contender = known[name]
            if why := contender.why_not(task):
                skipped[contender.label] = why
                continue
            try:
                rows.append(_row(arguments, chosen, contender, seeds))
                lowest = _spread([trace.best for trace in rows[-1].traces])
                print(f"{rows[-1].label}: lowest loss {lowest}, median (worst seed)", flush=True)
            except KeyboardInterrupt:
                interrupted = True
                break
    if not rows:
        print("interrupted; nothing was written" if interrupted else "nothing to compare", file=sys.stderr)
        return INTERRUPTED if interrupted else 1
    header, cells = table(rows, arguments.seconds, arguments.goal)
    print()
    print(as_markdown(header, cells))
    for label, why in skipped.items():
        print(f"left out: {label}: {why}")
    picture, results = arguments.out / "training.png", arguments.out / "results.json"
    runs = {row.label: [plot.History(trace.losses, trace.seconds) for trace in row.traces] for row in rows}
    plot.losses(
        runs, title=headline(arguments.task, chosen), name=loss_name(arguments.task), clock=CLOCK_NAMES[arguments.clock]
    ).savefig(picture)
    found = {
        "options": options(arguments) | chosen,
        "parameters": task.size,
        "seconds": time.perf_counter() - begin,
        "machine": machine(),
        "header": header,
        "table": cells,
        "rows": [
            {
                "optimizer": row.contender.label,
                "lr": row.rate,
                "tuning": {f"{rate:g}": score for rate, score in row.scores.items()},
                "runs": [trace.as_dict() for trace in row.traces],
            }
            for row in rows
        ],
        "skipped": skipped,
    }
    results.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    print(
        f"\nwrote {picture} and {results}; {found['seconds']:.0f} s in all" + (", interrupted" if interrupted else "")
    )
    return INTERRUPTED if interrupted else 0


def _row(arguments: argparse.Namespace, chosen: dict[str, Any], contender: Contender, seeds: range) -> Row:
    tuning = arguments.tuning_seconds or arguments.seconds / 5
    few = seeds[: arguments.tuning_seeds]
    total = len(contender.rates) * len(few) + len(seeds)
    bar = None if arguments.no_progress else progress_bar(contender.label, total)

    def trained(seed: int, rate: float | None, seconds: float) -> Trace:
        task = made(arguments, chosen, seed)
        trace = run(contender, task, Trace(seconds, goal=arguments.goal, clock=CLOCKS[arguments.clock]), rate)
        if trace.ended == "interrupted":
            raise KeyboardInterrupt
        if bar is not None:
            bar.update(1)
        return trace

    try:
        scores = {}
        for rate in contender.rates:
            best = [trained(seed, rate, tuning).best for seed in few]
            scores[rate] = float(np.median([math.log10(min(max(b, 1e-300), 1e300)) for b in best]))
        chosen_rate = min(scores, key=scores.__getitem__) if scores else None
        if scores:
            grid = ", ".join(f"{rate:g}: {score:.2f}" for rate, score in scores.items())
            print(f"{contender.label}: log10 of the lowest loss in {tuning:g} s by rate: {grid}", flush=True)
        return Row(contender, chosen_rate, scores, [trained(seed, chosen_rate, arguments.seconds) for seed in seeds])
    finally:
        if bar is not None:
            bar.close()


def table(rows: Sequence[Row], seconds: float, goal: float) -> tuple[list[str], list[list[str]]]:
    """Return a header and cells: medians, and the worst seed in parentheses."""
    facts = list(dict.fromkeys(name for row in rows for trace in row.traces for name in trace.facts))
    header = [
        "median (worst seed)",
        *(f"after {k} steps" for k in _STEPS),
        f"after {seconds / 4:g} s",
        f"after {seconds:g} s",
    ]
    header += [f"≤ {_BELOW:.0e}", f"≤ {goal:.0e}", *facts]
    cells = []
    for row in rows:
        traces = row.traces
        line = [row.label, *(_spread([t.best_by(steps=k) for t in traces]) for k in _STEPS)]
        line += [_spread([t.best_by(seconds=s) for t in traces]) for s in (seconds / 4, math.inf)]
        line += [_reached(traces, _BELOW), _reached(traces, goal)]
        cells.append(line + [_spread([t.facts.get(name, math.inf) for t in traces]) for name in facts])
    return header, cells


def _spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.1e} ({max(values):.1e})"


def _reached(traces: Sequence[Trace], goal: float) -> str:
    """On how many seeds, and after how many steps and seconds at worst."""
    hits = [hit for trace in traces if (hit := trace.first_below(goal)) is not None]
    worst = f", {max(k for k, _ in hits):,} steps, {max(s for _, s in hits):.1f} s" if hits else ""
    return f"{len(hits)}/{len(traces)}{worst}"


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns are aligned."""
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
