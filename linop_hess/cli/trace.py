"""The losses of one run, step by step, and when it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Finished(Exception):
    """The run has reached its goal or its limit."""


@dataclass
class Trace:
    """Losses of one run with their seconds, from the initial point on.

    Attributes
    ----------
    budget : float
        Seconds after which it ends.
    most : int or None
        Steps after which it ends.
    goal : float
        Loss at which it ends.
    watch : callable or None
        ``watch(trace, note)`` after each loss; its own time is not counted.
    clock : callable
        Of the seconds: `time.perf_counter`, or `time.process_time` on a machine that others use too.
    losses, seconds : list of float
        The first loss is that of the initial point.
    ended : str
        Why it ended.
    facts : dict of str to float
        What else was measured, at the end.
    """

    budget: float = math.inf
    most: int | None = None
    goal: float = -math.inf
    watch: Callable[[Trace, str], Any] | None = None
    clock: Callable[[], float] = time.perf_counter
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ended: str = "by itself"
    facts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Let the clock begin now."""
        self._start = self.clock()

    def add(self, loss: float, note: str = "") -> None:
        """Take down the loss after a step.

        Raises
        ------
        Finished
            If the run is over.
        """
        now = self.clock()
        self.losses.append(loss)
        self.seconds.append(now - self._start)
        if self.watch is not None:
            self.watch(self, note)
        if why := self._why():
            self.ended = why
            raise Finished
        self._start += self.clock() - now

    def _why(self) -> str:
        if not math.isfinite(self.losses[-1]):
            return "not finite"
        if self.losses[-1] <= self.goal:
            return "goal"
        if self.seconds[-1] > self.budget:
            return "time"
        return "steps" if self.most is not None and self.steps >= self.most else ""

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.losses) - 1

    @property
    def best(self) -> float:
        """The lowest loss."""
        return self.best_by()

    def first_below(self, goal: float) -> tuple[int, float] | None:
        """Return the step and the seconds at which the loss was first at most this."""
        for step, (loss, seconds) in enumerate(zip(self.losses, self.seconds, strict=True)):
            if loss <= goal:
                return step, seconds
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return numbers for a file; what is not finite is None."""
        losses = [loss if math.isfinite(loss) else None for loss in self.losses]
        best = self.best if math.isfinite(self.best) else None
        facts = {name: value if math.isfinite(value) else None for name, value in self.facts.items()}
        return {
            "ended": self.ended,
            "steps": self.steps,
            "best": best,
            **facts,
            "losses": losses,
            "seconds": [round(second, 6) for second in self.seconds],
        }

    def best_by(self, *, steps: float = math.inf, seconds: float = math.inf) -> float:
        """Return the lowest loss within so many steps and seconds."""
        pairs = enumerate(zip(self.losses, self.seconds, strict=True))
        found = (loss for step, (loss, second) in pairs if step <= steps and second <= seconds and math.isfinite(loss))
        return min(found, default=math.inf)
