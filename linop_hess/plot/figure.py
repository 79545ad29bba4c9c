"""Figures that a notebook shows once, and what all plots look like."""

from __future__ import annotations

from colorsys import hsv_to_rgb
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without the yellow, which is lost on white, then four of Paul Tol's.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F",
    "#882255", "#999933", "#332288", "#44AA99",
)  # fmt: skip

_DPI = 160


def colours(count: int) -> list[Any]:
    """Return so many colours, no two alike."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [hsv_to_rgb(k / count, 0.85, (0.55, 0.85)[k % 2]) for k in range(count)]


def axes_or_new(ax: Axes | None) -> Axes:
    """Return the axes given, or those of a new figure.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "linop_hess.plot needs matplotlib, which is not installed: pip install 'linop-hess[demo]'"
        ) from error
    # Not pyplot's: a figure made here is not kept alive nor shown by a notebook twice. It shows itself there instead.
    figure = Figure(figsize=(9.6, 5.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    vars(figure)["_repr_png_"] = partial(_png, figure)
    return figure.add_subplot()


def _png(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """What a notebook asks for: the picture, to be shown at half its size in pixels, so that it is sharp on any screen."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    width, height = figure.get_size_inches() * _DPI / 2
    return file.getvalue(), {"width": round(width), "height": round(height)}


def plain(ax: Axes, title: str) -> None:
    """Light lines for reading heights off, no frame, the title at the left."""
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if title:
        ax.set_title(title, loc="left", fontsize=13, pad=12)
