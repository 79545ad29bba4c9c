"""The convergence plot, read back from what matplotlib would draw."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from linop_hess import krylov, plot
from linop_hess.plot.figure import colours
from linop_hess.plot.labels import spread

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
    assert len({matplotlib.colors.to_hex(line.get_color()) for line in ax.lines}) == 12


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
    heights = spread(wanted, 0.06)
    assert np.all(np.diff(heights) >= 0.06 - 1e-12)
    assert min(heights) >= 0
    assert max(heights) <= 1
    assert spread([0.1, 0.5, 0.9], 0.06) == [0.1, 0.5, 0.9]


@pytest.mark.parametrize("count", [1, 8, 12, 30])
def test_no_colour_is_repeated(count):
    assert len({matplotlib.colors.to_hex(colour) for colour in colours(count)}) == count


def test_one_record_is_drawn_as_several_are(table):
    for records in (table["CG"], [table["CG"]], krylov.Comparison([table["CG"]])):
        (ax,) = plot.convergence(records).axes
        (line,) = ax.lines
        assert np.array_equal(line.get_ydata(), table["CG"].residuals)
        assert ax.get_title(loc="left") == "True residual of CG, 12 unknowns"
    assert plot.convergence(table).axes[0].get_title(loc="left") == "True residual of 3 solves, 12 unknowns"
    assert plot.convergence(table, title="").axes[0].get_title(loc="left") == ""


def test_direct_solves_are_marks_of_their_families_in_a_column_of_their_own(table):
    direct = table["LU"]
    levels = {"inverse, banded": 1e-14, "inverse, dense": 1e-13, "LU": 1e-12, "inverse, riccati": 1e-15}
    rows = [direct.replace(name=name, residuals=np.array([level])) for name, level in levels.items()]
    (ax,) = plot.convergence([table["CG"], *rows]).axes
    cg, inverse, lu = ax.lines
    assert inverse.get_label() == "inverse:\nriccati, banded, dense"
    assert list(inverse.get_ydata()) == [1e-14, 1e-13, 1e-15] and list(lu.get_ydata()) == [1e-12]
    assert inverse.get_marker() != lu.get_marker() and inverse.get_color() != lu.get_color()
    (ours,), (other,) = set(inverse.get_xdata()), set(lu.get_xdata())
    assert cg.get_xdata().max() < ours < other < ax.get_xlim()[1]
    assert [text.get_text() for text in ax.get_xticklabels()][-1] == "direct"
    (alone,) = plot.convergence(table["CG"]).axes
    assert "direct" not in [text.get_text() for text in alone.get_xticklabels()]


def corners(figure):
    """Each leader as a polyline in pixels."""
    figure.canvas.draw()
    (ax,) = figure.axes
    for text in ax.texts:
        path = text.arrow_patch.get_transform().transform_path(text.arrow_patch.get_path())
        yield [tuple(point) for point in path.vertices]


def crosses(a, b, c, d):
    def side(p, q, r):
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < -1e-3 and side(c, d, a) * side(c, d, b) < -1e-3


@pytest.mark.parametrize("seed", range(6))
def test_leaders_do_not_cross_and_names_keep_off_the_axis(table, seed):
    rng = np.random.default_rng(seed)
    records = []
    for k in range(9):
        steps, end = int(rng.integers(1, 400)), 10.0 ** -rng.uniform(0, [2, 14][seed % 2])
        records.append(
            table["CG"].replace(name=f"solver {k}", residuals=np.geomspace(1, end, steps + 1), iterations=steps)
        )
    records += [
        table["LU"].replace(name=f"direct {k}", residuals=np.array([10.0 ** -rng.uniform(12, 15)])) for k in range(4)
    ]
    figure = plot.convergence(records)
    lines = list(corners(figure))
    for i, one in enumerate(lines):
        for other in lines[:i]:
            pairs = [(p, q) for p in zip(one, one[1:], strict=False) for q in zip(other, other[1:], strict=False)]
            assert not any(crosses(*p, *q) for p, q in pairs)
    (ax,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert min(box.y0 for box in boxes) > ax.bbox.y0 and max(box.y1 for box in boxes) < ax.bbox.y1


def test_a_notebook_shows_figures(table):
    figure = plot.convergence(table)
    data, size = figure._repr_png_()
    width, height = (int.from_bytes(data[k : k + 4], "big") for k in (16, 20))
    assert data.startswith(b"\x89PNG") and (width, height) == (2 * size["width"], 2 * size["height"])


def test_bad_input(table):
    with pytest.raises(TypeError, match="expected records"):
        plot.convergence([1.0])
    with pytest.raises(ValueError, match="at least one"):
        plot.convergence([])
    with pytest.raises(ValueError, match="'iterations' or x='seconds'"):
        plot.convergence(table, x="products")


def test_without_matplotlib_the_remedy_is_named(monkeypatch, table):
    for name in [m for m in sys.modules if m.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'linop-hess\[demo\]'"):
        plot.convergence(table)


def histories(count, final):
    return [plot.History([2.0, 3.0, final * (k + 1)], [0.0, 0.5 * (k + 1), 1.0 * (k + 1)]) for k in range(count)]


def test_losses_are_drawn_against_steps_and_seconds_in_one_colour_an_optimizer():
    runs = {f"optimizer {k}": histories(3, 10.0**-k) for k in range(9)}
    figure = plot.losses(runs, title="a task", clock="seconds of the processor")
    left, right = figure.axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("steps", "seconds of the processor")
    assert left.get_ylabel() == "lowest loss so far"
    solid = {ax: [line for line in ax.lines if line.get_linewidth() > 2] for ax in (left, right)}
    assert [line.get_color() for line in solid[left]] == [line.get_color() for line in solid[right]]
    assert len({line.get_color() for line in solid[left]}) == 9
    for k, line in enumerate(solid[left]):  # the median of three seeds, and never above what was reached
        assert np.allclose(line.get_ydata(), [2.0, 2.0, 2 * 10.0**-k])
    worst = [line for line in left.lines if line.get_linewidth() < 1]
    assert np.allclose(worst[3].get_ydata(), [2.0, 2.0, 3e-3])
    figure.canvas.draw()
    width = figure.bbox.width
    names = [text for text in right.texts if text.get_text() in runs]
    assert len(names) == 9
    boxes = [text.get_window_extent() for text in names]
    assert max(box.x1 for box in boxes) <= width
    ordered = sorted(boxes, key=lambda box: box.y0)
    assert all(a.y1 <= b.y0 + 2 for a, b in zip(ordered[:-1], ordered[1:], strict=True))


def test_losses_need_something_to_draw():
    for runs in ({}, {"none": []}):
        with pytest.raises(ValueError, match="a run of each optimizer"):
            plot.losses(runs)
    with pytest.raises(ValueError, match="finite somewhere"):
        plot.losses({"lost": [plot.History([float("nan")] * 2, [0.0, 1.0])]})
    assert plot.losses({"once": [plot.History([1.0], [0.0])]}).axes
