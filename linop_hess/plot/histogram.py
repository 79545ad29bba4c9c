"""The histogram of a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from linop_hess.plot.figure import COLOURS, axes_or_new, plain
from linop_hess.spectrum.density import Density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def spectrum(density: Density, ax: Axes | None = None, *, title: str | None = None) -> Figure:
    """Plot the histogram of a spectrum, negative eigenvalues in one colour and positive ones in another.

    Counts are on a logarithmic axis. The null space has a bar of its own at zero, grey, if zero is within the edges; the bars beside it
    leave it room.

    Parameters
    ----------
    density : Density
        What `linop_hess.spectrum.density` returns.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    title : str, optional
        Set above the axes, at the left; without, one that says how many eigenvalues there are, and "" for none.

    Returns
    -------
    matplotlib.figure.Figure
        The figure `ax` belongs to; call its ``savefig``. A notebook shows it.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    TypeError
        If `density` is no Density.
    """
    if not isinstance(density, Density):
        raise TypeError(f"expected what linop_hess.spectrum.density returns, got {type(density).__name__}")
    from matplotlib.ticker import NullLocator

    ax = axes_or_new(ax)
    edges, counts = density.edges, density.counts
    farthest = float(np.abs(edges).max())
    near = float(np.abs(edges[edges != 0]).min()) if (edges != 0).any() else 1.0
    decades = np.log10(farthest / near) if farthest > near else 0.0
    symlog = density.scale == "symlog" and decades > 1.5
    if symlog:
        ax.set_xscale("symlog", linthresh=near, linscale=max(0.1 * decades, 0.2))
    shows_null = bool(density.nullity) and edges[0] <= 0.0 <= edges[-1]
    half = 0.4 * near if symlog else 0.2 * float(np.diff(edges).min())
    signs = (("negative", COLOURS[1], edges[1:] <= 0), ("positive", COLOURS[0], edges[:-1] >= 0))
    for side, colour, chosen in (*signs, ("either sign", "0.6", (edges[:-1] < 0) & (edges[1:] > 0))):
        shown = chosen & (counts > 0)
        if shown.any():
            label = f"{side}: {int(counts[chosen].sum()):,}"
            left, right = edges[:-1][shown], edges[1:][shown]
            if shows_null:  # bars that end at zero end beside that of the null space
                left, right = np.where(left == 0.0, 1.5 * half, left), np.where(right == 0.0, -1.5 * half, right)
            ax.bar(left, counts[shown], right - left, align="edge", color=colour, linewidth=0, label=label)
    limits = edges[[0, -1]]
    if shows_null:
        ax.bar(
            0.0, density.nullity, 2 * half, color="0.55", linewidth=0,
            label=f"null space (|λ| ≤ {density.null:.0e}): {density.nullity:,}",
        )  # fmt: skip
        limits = np.array([min(limits[0], -half), max(limits[1], half)])
    elif density.nullity:
        ax.plot([], [], " ", label=f"null space, not in range: {density.nullity:,}")
    ax.set_yscale("log")
    ax.set_ylim(0.7, 2.0 * max(int(counts.max(initial=1)), density.nullity, 1))
    ax.yaxis.set_minor_locator(NullLocator())
    drawn = ax.xaxis.get_transform()
    low, high = drawn.transform(limits)
    margin = 0.02 * (high - low)
    ax.set_xlim(*drawn.inverted().transform([low - margin, high + margin]))
    if symlog:
        ax.set_xticks(_signed_decades(near, decades, float(edges[0]), float(edges[-1])))
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("number of eigenvalues")
    plain(ax, "")
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4)
    title = f"Spectrum, {density.size:,} eigenvalues" if title is None else title
    if title:
        ax.set_title(title, loc="left", fontsize=13, pad=34)
    return cast("Figure", ax.figure)


def _signed_decades(near: float, decades: float, low: float, high: float) -> list[float]:
    """Ticks at powers of ten on either side of zero, four at most, and zero."""
    first, step = int(np.ceil(np.log10(near))), max(1, int(np.ceil(decades / 4)))
    powers = [10.0**k for k in range(first, first + int(decades) + 2, step)]
    return (
        [-p for p in powers if -p >= low][::-1] + [0.0] * (low <= 0.0 <= high) + [p for p in powers if low <= p <= high]
    )
