"""Each example runs with small sizes, and what it finds is right."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

import linop_hess as lh
from tests.helpers import dense_hessian

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def restored_generator():
    with torch.random.fork_rng(devices=[]):
        yield


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    tested = {
        "first_steps",
        "influence",
        "influence_on_test",
        "is_it_a_minimum",
        "landscape",
        "laplace",
        "near_inverses",
        "optimal_control",
        "pendulum",
        "physics_informed",
        "preconditioner_clinic",
        "preconditioning",
        "residual_network",
        "swap_adam",
        "transformer",
    }
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_physics_informed(tmp_path):
    picture = tmp_path / "physics_informed.png"
    found = load("physics_informed").main(width=10, side=6, seconds=60.0, steps=50, figure=str(picture))
    assert found["GaussNewton"] <= 1e-2 and found["GaussNewton"] <= 0.1 * min(found["Adam"], found["L-BFGS"])
    assert picture.stat().st_size > 10_000


def test_swap_adam():
    found = load("swap_adam").main(depth=2, width=4, batch=5, seconds=60.0, steps=80, goal=1e-4)
    assert found["SaddleFree"] <= 1e-4 and found["Adam"] < 2.4  # which is what it starts from


@pytest.mark.parametrize(("depth", "width", "batch"), [(5, 3, 4), (3, 6, 10), (1, 2, 1)])
def test_first_steps(depth, width, batch):
    found = load("first_steps").main(depth=depth, width=width, batch=batch, damping=1e-2)
    assert found["composed"] < 1e-13
    assert found["built in"] < 1e-13
    assert found["backward error"] <= 1e-14
    assert found["other damping"] <= 1e-14
    for residual in ("residual", "block", "augmented", "tridiagonal"):
        assert found[residual] < 1e-10, residual


def test_preconditioning():
    comparison = load("preconditioning").main(depth=6, width=4, batch=4, maxiter=60)
    for record in comparison:
        # A record's residual is recomputed from its x, and never above the tolerance where it says so.
        assert record.converged == (record.residual <= 1.1e-8)
    assert comparison["exact inverse"].converged
    assert comparison["GMRES, M = exact inverse"].iterations <= 2
    assert comparison["GMRES, M = exact inverse"].converged
    stale, plain = comparison["GMRES, M = inverse before the step"], comparison["GMRES"]
    assert stale.converged and 1 < stale.iterations < 30
    assert not plain.converged and plain.iterations == 60
    assert not comparison["CG"].converged and comparison["CG"].negative_curvature > 0
    assert comparison["CG, M = Gauss-Newton inverse"].negative_curvature_M == 0
    assert comparison["MINRES, M = Gauss-Newton inverse"].negative_curvature_M == 0


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_optimal_control(steps):
    found = load("optimal_control").main(steps=steps, horizon=0.04 * steps)
    for method in ("banded", "riccati", "dense"):
        assert found[f"{method} backward error"] <= 1e-14
        assert found[f"{method} against KKT"] < 1e-8
        assert found[f"{method} against regulator"] < 1e-8


def test_optimal_control_holds_the_pendulum_up():
    found = load("optimal_control").main(steps=40, horizon=2.0)
    assert found["largest angle without control"] > 10
    assert found["largest angle with control"] < 1e-3


def test_pendulum_step_is_the_exact_solution():
    # Without a torque θ'' = kθ: cosh and sinh; and a constant torque u shifts the balance point by u/k.
    k, dt = 9.81, 0.1
    _, _, _, F, G = load("optimal_control").pendulum(dt, stiffness=k)
    root = np.sqrt(k)
    c, s = np.cosh(root * dt), np.sinh(root * dt)
    assert np.allclose(F, [[c, s / root], [root * s, c]], rtol=1e-13)
    assert np.allclose(G[:, 0], [(c - 1) / k, s / root], rtol=1e-13)


def test_pendulum_cost_is_the_integral():
    q, r, k, dt = 10.0, 0.1, 9.81, 0.1
    A, B, C, _, _ = load("optimal_control").pendulum(dt, k, q, r)
    rng = np.random.default_rng(0)
    (theta, omega), u = rng.standard_normal(2), rng.standard_normal()
    t, weights = np.polynomial.legendre.leggauss(20)
    t, weights = (t + 1) * dt / 2, weights * dt / 2
    root = np.sqrt(k)
    path = theta * np.cosh(root * t) + omega * np.sinh(root * t) / root + u * (np.cosh(root * t) - 1) / k
    integral = weights @ (q * path**2 + r * u**2)
    state = np.array([theta, omega])
    assert np.isclose(A[0, 0] * u * u + 2 * u * (B @ state)[0] + state @ C @ state, integral, rtol=1e-12)


def at_parameters(model: nn.Module, data: Sequence[torch.Tensor], damping: float):
    """The summed cross-entropy with weight decay, as a function of the flat parameters."""
    parameters = dict(model.named_parameters())
    shapes = [parameter.shape for parameter in parameters.values()]

    def objective(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(parameters, parts, shapes, strict=True)}
        logits = torch.func.functional_call(model, values, (data[0],))
        return nn.functional.cross_entropy(logits, data[1], reduction="sum") + damping / 2 * flat @ flat

    return objective


def test_influence(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    damping, images = 1.0, 16
    found = load("influence").main(images, 2, 3, (3, 8), damping, figure=tmp_path / "influence.png")
    assert (tmp_path / "influence.png").stat().st_size > 0
    w, (pictures, labels) = torch.tensor(found["w"]), found["data"]

    def derivatives(data, point):
        objective = at_parameters(found["model"], data, damping)
        return torch.func.grad(objective)(point).numpy(), dense_hessian(objective, point).numpy()

    def loss(i, point):
        return at_parameters(found["model"], (pictures[i : i + 1], labels[i : i + 1]), 0.0)(point).item()

    gradient, hessian = derivatives((pictures, labels), w)
    assert np.linalg.norm(gradient) < 1e-8
    assert np.linalg.eigvalsh(hessian)[0] > 0
    assert found["definite"].all()
    for i in (*range(0, images, 3), int(found["actual"].argmax())):
        kept = torch.arange(images) != i
        others = pictures[kept], labels[kept]
        slope, curvature = derivatives(others, w)
        # At a stationary point the gradient without the image is minus the image's own.
        influence, newton = -np.linalg.solve(hessian, slope), -np.linalg.solve(curvature, slope)
        truth = found["truth"][:, i]
        influence, newton, truth = (torch.from_numpy(move) for move in (influence, newton, truth))
        retrained, there = derivatives(others, w + truth)
        assert np.linalg.norm(retrained) < 1e-8
        assert np.linalg.eigvalsh(there)[0] > 0
        for name, move in (("influence", influence), ("Newton step", newton)):
            assert np.allclose(found["moves"][name][:, i], move, rtol=0, atol=1e-8 * move.norm().item())
            growth = loss(i, w + move) - loss(i, w)
            assert found["predicted"][name][i] == pytest.approx(growth, rel=1e-6)
        assert found["actual"][i] == pytest.approx(loss(i, w + truth) - loss(i, w), rel=1e-8)
    first_order, influence, newton = (
        found["rows"][key] for key in ("influence, first order", "influence", "Newton step")
    )
    assert newton["correlation"] > 0.99 and abs(newton["slope"] - 1) < 0.1
    assert newton["worst"] < 0.2 < influence["worst"]  # it underestimates what matters most
    assert influence["slope"] > 1.5 and first_order["slope"] > influence["slope"]
    assert found["rows"]["Newton step, definite"] == pytest.approx(
        {k: v for k, v in newton.items() if k != "error of move"}
    )
    worst = int(found["actual"].argmax())
    assert found["predicted"]["influence"][worst] < found["actual"][worst] / 2
    assert (found["actual"] > 0).all()


def test_influence_retrains_to_what_scipy_finds():
    pytest.importorskip("sklearn")
    from scipy.optimize import minimize

    example = load("influence")
    torch.manual_seed(0)
    data, model, damping = example.digits(12, (3, 8)), example.network(2, 3, 2), 1.0
    start = parameters_to_vector(model.parameters()).detach().numpy()
    w, lin = example.minimize(model, start, data, damping)
    objective = at_parameters(model, data, damping)
    theirs = minimize(
        lambda x: objective(torch.from_numpy(x)).item(),
        w + 0.05 * np.random.default_rng(0).standard_normal(w.size),
        jac=lambda x: torch.func.grad(objective)(torch.from_numpy(x)).numpy(),
        method="BFGS",
        options={"gtol": 1e-7},
    )
    assert theirs.fun == pytest.approx(objective(torch.from_numpy(w)).item(), abs=1e-10)
    assert np.allclose(theirs.x, w, rtol=0, atol=1e-5)
    assert lin.inverse(damping).is_positive_definite


def test_influence_on_test(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    decay, tests = 0.02, 1500  # 297 samples left to train on
    found = load("influence_on_test").main(1, 4, decay, 100, tests, 30, figure=tmp_path / "influence.png")
    assert (tmp_path / "influence.png").stat().st_size > 10_000
    w = parameters_to_vector(found["model"].parameters()).detach()

    def mean_loss(data):
        return lambda point: at_parameters(found["model"], data, 0.0)(point) / len(data[1])

    H = dense_hessian(mean_loss(found["data"]), w).numpy()
    assert -decay < np.linalg.eigvalsh(H)[0] < -decay / 10
    gradient = torch.func.grad(mean_loss(found["data"]))(w) + decay * w
    assert gradient.norm() < 1e-8
    x = np.linalg.solve(H + decay * np.eye(len(H)), torch.func.grad(mean_loss(found["asked"]))(w).numpy())
    for i in (0, 17, 296, int(found["changed"][0])):
        alone = tuple(part[i : i + 1] for part in found["data"])
        truth = torch.func.grad(mean_loss(alone))(w).numpy() @ x / 297
        assert found["influence"][i] == pytest.approx(truth, rel=1e-7, abs=1e-9 * abs(found["influence"]).max())
    assert found["found"] > 20  # of 30, where chance finds 3


def test_influence_leaves_a_saddle():
    pytest.importorskip("sklearn")
    example = load("influence")
    # From zero Newton's method keeps the weights zero and fits the last bias alone: to a saddle with one hidden layer.
    model, data, damping = example.network(1, 3, 2), example.digits(12, (3, 8)), 1e-2
    start = np.zeros(sum(parameter.numel() for parameter in model.parameters()))
    w, lin = example.minimize(model, start, data, damping)
    gradient = torch.func.grad(at_parameters(model, data, damping))(torch.from_numpy(w))
    assert float(gradient.norm()) < 1e-8 and lin.inertia(damping).negative == 0
    assert lin.loss < 0.1 * 12 * np.log(2)


def test_residual_network(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    sizes = {"images": 10, "blocks": 2, "width": 3, "early": 10, "steps": 100, "decay": 1.0, "retrained": 2}
    found = load("residual_network").main(**sizes, figure=tmp_path / "residual.png")
    assert (tmp_path / "residual.png").stat().st_size > 0
    model, start, w, data = found["model"], *map(torch.from_numpy, (found["start"], found["w"])), found["data"]
    early = at_parameters(model, data, 0.0)
    spectrum = np.linalg.eigvalsh(H := dense_hessian(early, start).numpy())
    scale = abs(spectrum).max()
    counted = found["spectrum"]
    assert counted.nullity == (abs(spectrum) <= counted.null).sum()
    assert np.array_equal(counted.counts, np.histogram(spectrum[abs(spectrum) > counted.null], counted.edges)[0])
    assert found["ends"] == pytest.approx((spectrum[0], spectrum[-1]), abs=1e-6 * scale)
    assert found["damping"] == pytest.approx(-2 * spectrum[0], rel=1e-2)
    g = torch.func.grad(early)(start).numpy()
    step = -np.linalg.solve(H + found["damping"] * np.eye(len(H)), g)
    assert np.allclose(found["step"], step, rtol=0, atol=1e-9 * abs(step).max())
    assert found["Newton step"] == pytest.approx(early(start + torch.from_numpy(step)).item(), rel=1e-8)
    assert found["Newton step"] < found["before"]

    penalized = at_parameters(model, data, 1.0)
    hessian = dense_hessian(penalized, w).numpy()
    assert torch.func.grad(penalized)(w).norm() < 1e-8 and np.linalg.eigvalsh(hessian)[0] > 0
    asked = torch.func.grad(at_parameters(model, found["test"], 0.0))(w).numpy()
    before = at_parameters(model, found["test"], 0.0)(w).item()
    for i, newton in zip(found["chosen"], found["newton"], strict=True):
        own = torch.func.grad(at_parameters(model, (data[0][i : i + 1], data[1][i : i + 1]), 0.0))(w).numpy()
        assert found["predicted"][i] == pytest.approx(asked @ np.linalg.solve(hessian, own), rel=1e-6)
        kept = torch.arange(10) != i
        others = dense_hessian(at_parameters(model, (data[0][kept], data[1][kept]), 1.0), w)
        there = w + torch.from_numpy(np.linalg.solve(others.numpy(), own))
        growth = at_parameters(model, found["test"], 0.0)(there).item() - before
        assert newton == pytest.approx(growth, rel=1e-6, abs=1e-9)


def test_transformer():
    example = load("transformer")
    found = example.main(lines=3, tokens=3, layers=1, width=2, early=10, steps=30, weight=1e-5)
    model, data, asked = found["model"], found["data"], found["asked"]
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)

    def loss(inputs, targets):
        def at(flat):
            parts = flat.split([s.numel() for s in shapes])
            values = {name: part.view(s) for name, part, s in zip(names, parts, shapes, strict=True)}
            return example.loss_fn(torch.func.functional_call(model, values, (inputs,)), targets)

        return at

    def derivatives(at, w):
        (g,) = torch.autograd.grad(at(w := w.clone().requires_grad_()), w)
        return g.numpy()

    start, w = torch.from_numpy(found["start"]), torch.from_numpy(found["w"])
    with sdpa_kernel(SDPBackend.MATH):
        H = dense_hessian(loss(*data), start).numpy()
        spectrum, g = np.linalg.eigvalsh(H), derivatives(loss(*data), start)
        assert found["ends"] == pytest.approx((spectrum[0], spectrum[-1]), rel=1e-6)
        assert found["damping"] == pytest.approx(-2 * spectrum[0], rel=1e-6)
        step = np.linalg.solve(H + found["damping"] * np.eye(len(H)), g)
        assert found["Newton step"] == pytest.approx(loss(*data)(start - torch.from_numpy(step)).item(), rel=1e-8)
        H = dense_hessian(loss(*data), w).numpy() + found["lambda"] * np.eye(len(H))
        own = np.stack([derivatives(loss(data[0][i : i + 1], data[1][i : i + 1]), w) for i in range(3)], axis=1)
        influence = derivatives(loss(*asked), w) @ np.linalg.solve(H, own)
    assert np.linalg.eigvalsh(H)[0] > 0
    assert np.allclose(found["influence"], influence, rtol=0, atol=1e-9 * abs(influence).max())
    assert found["gap"] < 1e-3  # of first order in the weight


@pytest.fixture(scope="module")
def clinic():
    with torch.random.fork_rng(devices=[]):
        example = load("preconditioner_clinic")
        cases, sides = example.main(depth=2, width=2, batch=3, maxiter=20)
    operators = {id(A): A for case in cases for A in (case.A, case.M) if A is not None}  # three solvers have the same
    return example, cases, sides, {key: lh.to_dense(A) for key, A in operators.items()}


def test_clinic_verdicts_are_right(clinic):
    _, cases, _, dense = clinic
    matrices = {case.kind: dense[id(case.A)] for case in cases}
    spectra = {kind: np.linalg.eigvalsh(A) for kind, A in matrices.items()}
    assert spectra["indefinite"][0] < 0 < spectra["definite"][0]
    seen = set()
    for case in cases:
        definite_M = True
        if case.M is not None:
            M = dense[id(case.M)].astype(float)
            assert abs(M - M.T).max() < 1e-4 * abs(M).max()
            definite_M = bool(np.linalg.eigvalsh((M + M.T) / 2)[0] > 0)
        wrong = [
            ("A", case.solver == "cg" and case.kind == "indefinite"),
            ("M", case.solver != "gmres" and not definite_M),
        ]
        blamed = " and ".join(letter for letter, is_wrong in wrong if is_wrong)
        assert case.verdict == (f"illegal: {blamed}" if blamed else "legal"), case[:5]
        seen.add(case.verdict)
    assert seen == {"legal", "illegal: A", "illegal: M", "illegal: A and M"}


def test_clinic_outcomes_are_those_of_scipy(clinic):
    from scipy.sparse.linalg import minres

    example, cases, sides, dense = clinic
    matrices = {case.kind: dense[id(case.A)] for case in cases}
    for case in cases:
        for b, record in zip(sides, case.records, strict=True):
            found = example.outcome(record)
            residual = np.linalg.norm(b - matrices[case.kind] @ record.x) / np.linalg.norm(b)
            assert record.residual == pytest.approx(residual, rel=1e-3, abs=1e-12)
            assert (found == "raised") == (record.info is None)
            assert (found == "solved") == (record.info is not None and record.residual <= 1.1 * example.RTOL)
            if case.solver != "minres":
                assert found != "raised"
                continue
            try:
                _, info = minres(case.A, b, M=case.M, rtol=example.RTOL, maxiter=20)
                assert info == record.info
            except ValueError as error:
                assert found == "raised"
                assert str(error) in ("indefinite preconditioner", "non-symmetric matrix")


def test_clinic_findings(clinic):
    example, cases, _, _ = clinic
    for case in cases:
        caught = sum(record.negative_curvature_M for record in case.records)
        if "raised" in case.outcomes:  # minres alone, and never for nothing
            assert case.solver == "minres" and case.verdict == "illegal: M" and caught > 0
        if case.verdict == "legal" and case.solver != "gmres":
            assert caught == 0
        if case.name == "exact inverse, positive()" and case.verdict == "legal" and case.solver != "gmres":
            assert case.outcomes == {"solved": 3}
            assert max(record.iterations for record in case.records) <= 3
        if case.name == "exact inverse" and case.solver == "gmres":
            assert case.outcomes == {"solved": 3}
            assert max(record.iterations for record in case.records) <= 2
    by_name = {(case.kind, case.name, case.solver): case for case in cases}
    assert by_name["definite", "exact inverse", "cg"].outcomes == {"solved": 3}
    for name in ("stale inverse", "inverse at half the damping", "A itself, by mistake"):
        assert by_name["indefinite", name, "minres"].outcomes["raised"] > 0
        assert "raised" not in by_name["indefinite", name, "cg"].outcomes
    # info == 0 and a residual above the tolerance: a legal minres does that, cg never did.
    assert any(case.outcomes["false success"] for case in cases if case.solver == "minres" and case.verdict == "legal")
    assert not any(case.outcomes["false success"] for case in cases if case.solver == "cg")
    # An illegal M need not fail: nothing but the sign of rᵀMr tells.
    silent = by_name["indefinite", "stale inverse", "cg"]
    assert silent.verdict == "illegal: A and M" and silent.outcomes == {"solved": 3}
    assert sum(record.negative_curvature_M for record in silent.records) > 0


def test_landscape(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    example = load("landscape")
    depth, width, batch, rate, steps, points, damping = 4, 5, 4, 0.1, 300, 8, 1e-3
    path = example.main(depth, width, batch, rate, steps, points, damping, figure=tmp_path / "landscape.png")
    assert (tmp_path / "landscape.png").stat().st_size > 0
    torch.manual_seed(0)
    model, data = example.network(depth, width), example.digits(batch)
    for point, step in zip(path, example.descend(model, data, rate, steps, points), strict=True):
        spectrum = np.linalg.eigvalsh(lh.to_dense(lh.Hessian(model, example.squared_error, data)))
        assert point.step == step
        assert point.loss == pytest.approx(example.squared_error(model(data[0]), data[1]).item(), rel=1e-12)
        assert point.negative == (spectrum < -damping).sum()
        assert point.flat == (abs(spectrum) <= damping).sum()
        assert point.positive == (spectrum > damping).sum()
        assert point.smallest == pytest.approx(spectrum[0], abs=1e-6 * spectrum[-1])
        assert point.largest == pytest.approx(spectrum[-1], rel=1e-6)
        assert point.log_determinant == pytest.approx(np.log(abs(spectrum + damping)).sum(), rel=1e-10)
    assert (path[0].step, path[-1].step) == (0, steps)
    assert len({point.negative for point in path}) > 3


def test_landscape_ends_in_a_minimum_of_the_rank_of_the_data():
    pytest.importorskip("sklearn")
    last = load("landscape").main(depth=2, width=12, batch=2, rate=0.1, steps=3000, points=2, damping=1e-3)[-1]
    assert last.loss < 1e-8
    assert last.negative == 0
    assert last.positive == 2 * 10  # images times outputs


def penalized_loss(example: ModuleType, model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], tau: float):
    """Value, gradient and Hessian of the loss and the prior together, one function of the flat parameters."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]

    def penalized(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return example.LOSS(torch.func.functional_call(model, values, (data[0],)), data[1]) + tau / 2 * flat @ flat

    flat = parameters_to_vector(model.parameters()).detach()
    gradient = torch.func.grad(penalized)(flat).numpy()
    return penalized(flat).item(), gradient, dense_hessian(penalized, flat).numpy()


def test_laplace():
    pytest.importorskip("sklearn")
    example = load("laplace")
    found = example.main(depth=2, width=3, batch=15, taus=(0.1, 1.0), tests=12, samples=4000)
    for row in found["rows"]:
        value, gradient, precision = penalized_loss(example, row["model"], found["data"], row["tau"])
        assert np.linalg.norm(gradient) < 1e-8
        assert row["gradient"] == pytest.approx(np.linalg.norm(gradient), abs=1e-12)
        assert np.linalg.eigvalsh(precision)[0] > 0
        truth = -value + len(precision) / 2 * np.log(row["tau"]) - np.linalg.slogdet(precision)[1] / 2
        assert row["exact"] == pytest.approx(truth, abs=1e-8)
        # Gauss-Newton's matrix from its definition, Jᵀ (diag p − p pᵀ) J summed over the images.
        J = example.jacobian(row["model"], found["data"][0]).reshape(15, example.CLASSES, -1)
        p = row["model"](found["data"][0]).softmax(1).detach().numpy()
        curvature = np.einsum("bi,ij->bij", p, np.eye(example.CLASSES)) - np.einsum("bi,bj->bij", p, p)
        gauss_newton = np.einsum("bim,bij,bjn->mn", J, curvature, J, optimize=True) + row["tau"] * np.eye(
            len(precision)
        )
        gap = np.linalg.slogdet(precision)[1] - np.linalg.slogdet(gauss_newton)[1]
        assert row["Gauss-Newton"] - row["exact"] == pytest.approx(gap / 2, abs=1e-8)
        assert gap > 0.1  # not the same number twice
        for kind in ("exact", "Gauss-Newton"):
            assert abs(row[f"{kind} off"]) < 1e-9
    assert set(found["predictions"]) == {"held-out digits 0-4", "unseen digits 5-9", "noise"}
    for group in found["predictions"].values():
        for kind in ("exact", "Gauss-Newton"):
            assert group[f"{kind} off"] < 1e-9
            assert group[f"{kind} samples off"] < 0.05
            assert group[kind] < group["θ alone"]
    held_out, unseen, noise = found["predictions"].values()
    for kind in ("exact", "Gauss-Newton"):
        assert held_out[f"{kind} deviation"] < unseen[f"{kind} deviation"] < noise[f"{kind} deviation"]
        assert held_out[kind] > max(unseen[kind], noise[kind])
    assert found["accuracy"] > 0.5


def test_laplace_without_a_maximum(capsys):
    pytest.importorskip("sklearn")
    example = load("laplace")
    found = example.main(depth=2, width=3, batch=15, taus=(0.1,), iterations=1, tests=2, samples=10)
    (row,) = found["rows"]
    spectrum = np.linalg.eigvalsh(penalized_loss(example, row["model"], found["data"], 0.1)[2])
    assert (spectrum < 0).sum() == row["exact inverse"].inertia().negative > 0
    assert np.isnan(row["exact"]) and np.isfinite(row["Gauss-Newton"])
    assert "not positive definite" in capsys.readouterr().out
    assert all("exact" not in group and "Gauss-Newton" in group for group in found["predictions"].values())


def test_laplace_evidence_is_exact_for_a_linear_model():
    # y ~ N(Xw, I) with w ~ N(0, I/τ): the evidence is the density of N(0, I + XXᵀ/τ), and Laplace's method is exact.
    from scipy.stats import multivariate_normal

    example = load("laplace")
    rng = np.random.default_rng(0)
    X, y, tau = rng.standard_normal((7, 4)), rng.standard_normal(7), 0.3
    maximum = np.linalg.solve(X.T @ X + tau * np.eye(4), X.T @ y)
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(maximum))
    lin = lh.linearize(model, lambda o, t: ((o[:, 0] - t) ** 2).sum() / 2, torch.from_numpy(X), torch.from_numpy(y))
    ours = example.log_evidence(lin.loss, maximum, tau, lin.inverse(tau).slogdet()[1]) - 7 / 2 * np.log(2 * np.pi)
    assert ours == pytest.approx(multivariate_normal.logpdf(y, cov=np.eye(7) + X @ X.T / tau), rel=1e-12)


def test_laplace_jacobian_and_confidence():
    example = load("laplace")
    torch.manual_seed(0)
    model, images = example.network(2, 3), torch.randn(4, 64, dtype=torch.float64)
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(logit, parameters, retain_graph=True) for logit in model(images).flatten()]
    J = torch.stack([parameters_to_vector(row) for row in rows])
    assert np.allclose(example.jacobian(model, images), J, rtol=0, atol=1e-14)
    # Of two classes and one uncertain logit it is the mean of the sigmoid of a normal, to about a percent.
    logits, variances = np.array([[1.5, 0.0]]), np.array([[4.0, 0.0]])
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    averaged = (weights / (1 + np.exp(-1.5 - 2 * nodes))).sum() / weights.sum()
    assert example.confidence(logits, 0.0) == pytest.approx(1 / (1 + np.exp(-1.5)), rel=1e-12)
    assert example.confidence(logits, variances) == pytest.approx(averaged, rel=0.02)


def test_near_inverses():
    example = load("near_inverses")
    example.TIMES, example.BEFORE = (1, 10), (1, 20)
    found = example.main(width=2, batch=6, steps=25, maxiter=40)
    assert list(found) == ["Gauss-Newton", "Hessian, positive definite", "Hessian, indefinite"]
    for title, rows in found.items():
        without = rows["none", 1.0]
        assert rows["1 steps before", 1] < 0.5 * without, (
            title
        )  # what helps: an inverse from a step before, at the damping of A
        assert rows["1 steps before", 1] < rows["1 steps before", 10], title
        assert rows["another batch", 1] > rows["1 steps before", 1], title
    assert ("Gauss-Newton", 1) not in found["Gauss-Newton"] and ("Gauss-Newton", 1) in found["Hessian, indefinite"]


def test_is_it_a_minimum(tmp_path):
    example = load("is_it_a_minimum")
    file = tmp_path / "minimum.png"
    found = example.main(hidden=2, points=12, figure=str(file))
    assert file.stat().st_size > 10_000
    assert found["start"].verdict == "saddle point"
    assert found["leave"].kind == "hard"
    assert found["leave"].certificate.holds
    assert found["rows"][-1][1] <= 1e-10
    assert found["end"].is_minimum
    model, x, y = example.problem(2, 12)
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.shape for p in model.parameters()]

    def loss(w: torch.Tensor) -> torch.Tensor:
        parts = [part.view(shape) for part, shape in zip(w.split([s.numel() for s in sizes]), sizes, strict=True)]
        params = dict(zip(names, parts, strict=True))
        return example.loss_fn(torch.func.functional_call(model, params, (x,)), y, params)

    values = torch.linalg.eigvalsh(dense_hessian(loss, torch.zeros(7, dtype=torch.float64)))
    assert found["start"].around.negative == int((values < 0).sum())
    assert found["start"].lowest == pytest.approx(float(values[0]), abs=1e-8)


def test_pendulum(tmp_path):
    file = tmp_path / "pendulum.png"
    found = load("pendulum").main(length=50, most=100, figure=str(file))
    assert file.stat().st_size > 10_000
    newton = found["exact Newton"]
    assert newton.is_minimum and newton.records[-1].gradient_norm <= 1e-10
    assert not found["L-BFGS"].is_minimum
