"""Names beside the ends of curves, moved apart where they would collide, on leaders that do not cross."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Ends within this share of the width have their names beside them, the others right of the axes.
_NEAR = 0.4

# Where columns of names begin: so far right of the axes, or of the rightmost end that is labelled inside.
_COLUMN, _INSIDE = 1.045, 0.05

# Names stay so far from the lower and upper edge, and apart by this at least, in terms of the height.
_EDGE, _GAP = 0.03, 0.062


class End(NamedTuple):
    """Where a curve ends, in data, its name and its colour."""

    across: float
    up: float
    name: str
    colour: Any


def write_labels(ax: Axes, ends: Sequence[End]) -> None:
    """Write each name at the height of its curve's end.

    A leader goes horizontally from the end and then at one angle to the name. Names being in the order of their ends, none crosses
    another.
    """
    ax.get_xlim(), ax.get_ylim()  # settle the limits, which transData alone does not
    inside: list[tuple[float, float, End]] = []
    right: list[tuple[float, float, End]] = []
    for end in ends:
        x, y = ax.transAxes.inverted().transform(ax.transData.transform((end.across, end.up)))
        (inside if x < _NEAR else right).append((float(x), float(y), end))
    if inside:
        _column(ax, inside, max(x for x, _, _ in inside) + _INSIDE)
    _column(ax, right, _COLUMN)


def _column(ax: Axes, ends: list[tuple[float, float, End]], across: float) -> None:
    from matplotlib.patheffects import withStroke

    ends = sorted(ends, key=lambda end: end[1])
    lines = [end.name.count("\n") + 1 for _, _, end in ends]
    wanted = [y for (_, y, _), count in zip(ends, lines, strict=True) for _ in range(count)]
    places = iter(spread(wanted, min(_GAP, (1 - 2 * _EDGE) / max(len(wanted), 1)), _EDGE, 1 - _EDGE))
    for (_, y, end), count in zip(ends, lines, strict=True):
        height = sum(next(places) for _ in range(count)) / count
        slope = 60 if height >= y else -60
        ax.annotate(
            end.name, xy=(end.across, end.up), xycoords="data", xytext=(across, height), textcoords="axes fraction",
            color=end.colour, fontsize=10, va="center", annotation_clip=False, zorder=5,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            arrowprops={
                "arrowstyle": "-", "color": end.colour, "linewidth": 0.8, "alpha": 0.6, "shrinkA": 1, "shrinkB": 5,
                "relpos": (0.0, 0.5), "connectionstyle": f"angle,angleA={slope},angleB=0,rad=0",
            },
        )  # fmt: skip


def spread(wanted: list[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Return heights in [low, high] at least `gap` apart, closest to the ascending `wanted` by least squares."""
    pools: list[tuple[float, int]] = []  # (height of its lowest member, members)
    for height in wanted:
        pool = (min(max(height, low), high), 1)
        while pools and pools[-1][0] + gap * pools[-1][1] > pool[0]:
            lowest, count = pools.pop()
            total = count + pool[1]
            pool = ((lowest * count + (pool[0] - gap * count) * pool[1]) / total, total)
        pools.append(pool)
    heights = [lowest + gap * k for lowest, count in pools for k in range(count)]
    # Push what left the axes back in, from either end.
    for k, height in enumerate(heights):
        heights[k] = max(height, low + gap * k)
    for k in range(len(heights) - 1, -1, -1):
        heights[k] = min(heights[k], high - gap * (len(heights) - 1 - k))
    return heights
