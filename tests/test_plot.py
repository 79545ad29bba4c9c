"""The convergence plot, read back from what matplotlib would draw."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from linop_hess import krylov, plot

matplotlib.use("Agg")

A = np.diag(np.linspace(1, 5, 12))
B = np.ones(12)


@pytest.fixture
def table():
    return krylov.compare(
        {
            "CG": krylov.run("cg", A, B),
            "one step": krylov.run("gmres", A, B, M=np.linalg.inv(A), setup_seconds=2.0),
            "LU": krylov.direct(lambda b: np.linalg.solve(A, b), A, B, setup_seconds=0.5),
        }
    )


def test_the_curves_are_the_true_residuals(table):
    figure = plot.convergence(table)
    (ax,) = figure.axes
    cg, gmres, lu = ax.lines
    assert np.array_equal(cg.get_xdata(), np.arange(table["CG"].iterations + 1))
    assert np.array_equal(cg.get_ydata(), table["CG"].residuals)
    assert len(gmres.get_xdata()) == 2
    assert lu.get_linestyle() == "None"
    assert list(lu.get_ydata()) == [table["LU"].residual]
    assert ax.get_yscale() == "log"
    assert "residual" in ax.get_ylabel()


def test_every_record_is_labelled_in_its_colour_without_collisions(table):
    records = [table["CG"].replace(name=f"row {k}") for k in range(12)]
    figure = plot.convergence(records)
    figure.canvas.draw()
    (ax,) = figure.axes
    assert sorted(t.get_text() for t in ax.texts) == sorted(r.name for r in records)
    for text in ax.texts:
        line = next(line for line in ax.lines if line.get_label() == text.get_text())
        assert text.get_color() == line.get_color()
    boxes = sorted((Text.get_window_extent(t) for t in ax.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))
    looks = {(line.get_color(), line.get_linestyle(), str(line._dash_pattern)) for line in ax.lines}
    assert len(looks) == 12


def test_labels_stay_on_the_canvas_at_their_curves_heights(table):
    figure = plot.convergence(table, title="title")
    figure.canvas.draw()
    (ax,) = figure.axes
    for text in ax.texts:
        box = Text.get_window_extent(text)  # without its leader line
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
    alone = plot.convergence([table["CG"]])
    alone.canvas.draw()
    (ax,) = alone.axes
    (label,) = ax.texts
    at = ax.transAxes.inverted().transform(ax.transData.transform(label.xy))[1]
    assert label.xyann[1] == pytest.approx(at, abs=0.02)


def test_seconds_include_the_setup(table):
    figure = plot.convergence(table, x="seconds")
    cg, gmres, lu = figure.axes[0].lines
    assert cg.get_xdata()[-1] == pytest.approx(table["CG"].seconds)
    assert min(gmres.get_xdata()) == 2.0
    assert lu.get_xdata()[0] == pytest.approx(0.5 + table["LU"].seconds)
    assert min(cg.get_xdata()) > 0


def test_zero_and_nan_residuals_draw(tmp_path, table):
    exact = table["LU"].replace(residuals=np.array([0.0]))
    broken = table["CG"].replace(residuals=np.array([1.0, np.nan]), name="broken")
    plot.convergence([exact, broken]).savefig(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_given_axes_are_used(table):
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.add_subplot()
    assert plot.convergence(table.records, ax) is figure
    assert len(ax.lines) == 3


@pytest.mark.parametrize("count", [1, 3, 16])
def test_spread_keeps_order_gap_and_bounds(count):
    rng = np.random.default_rng(count)
    wanted = sorted(rng.uniform(0.0, 0.2, count))
    heights = plot._spread(wanted, 0.06)
    assert np.all(np.diff(heights) >= 0.06 - 1e-12)
    assert min(heights) >= 0
    assert max(heights) <= 1
    assert plot._spread([0.1, 0.5, 0.9], 0.06) == [0.1, 0.5, 0.9]


def test_bad_input(table):
    with pytest.raises(ValueError, match="at least one"):
        plot.convergence([])
    with pytest.raises(ValueError, match="'iterations' or x='seconds'"):
        plot.convergence(table, x="products")


def test_without_matplotlib_the_remedy_is_named(monkeypatch, table):
    for name in [m for m in sys.modules if m.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'linop-hess\[demo\]'"):
        plot.convergence(table)
