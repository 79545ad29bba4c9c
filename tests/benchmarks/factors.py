"""What the factors know: accuracy against LAPACK, MINRES with the positive operator, eigenvalues, scaling, the cost of the diagonal.

Run: python tests/benchmarks/factors.py [FILE.png], which draws the spectrum there (docs/images/spectrum.png).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from accuracy import random_network
from common import batch, machine, network, print_table, seconds
from scipy.sparse.linalg import minres
from torch import nn

import linop_hess as lh

NETWORKS = 200
LOSS = nn.CrossEntropyLoss()
FIGURE = sys.argv[1] if len(sys.argv) > 1 else None


def minres_backward_error(A: np.ndarray, norm: float, M: lh.HessianInverse) -> tuple[float, float]:
    """Backward error and relative residual of MINRES after at most three iterations, whatever it would say itself."""
    b = np.random.default_rng(0).standard_normal(A.shape[0])
    iterates: list[np.ndarray] = []
    minres(A, b, M=M, rtol=1e-15, maxiter=3, callback=lambda x: iterates.append(x.copy()))
    residual = np.linalg.norm(b - A @ iterates[-1])
    return residual / (norm * np.linalg.norm(iterates[-1]) + np.linalg.norm(b)), residual / np.linalg.norm(b)


def split_blocks(matrix: np.ndarray, like: list[np.ndarray]) -> list[np.ndarray]:
    """Return the diagonal blocks of a matrix, of the sizes of others."""
    edges = np.cumsum([0, *(len(block) for block in like)])
    return [matrix[a:b, a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]


def asked(
    make: Callable[[], lh.HessianInverse], question: Callable[[lh.HessianInverse], object], repeats: int
) -> float:
    """Median time of a question to an inverse that was not asked anything before."""
    taken = []
    for _ in range(repeats):
        inverse = make()
        start = time.perf_counter()
        question(inverse)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def accuracy() -> None:
    """Random networks, dampings of both signs: inertia, determinant, diagonal, trace, blocks; MINRES where indefinite."""
    rng = np.random.default_rng(0)
    cases = wrong = skipped = indefinite = beyond = 0
    logdet = worst_beyond = 0.0
    errors = dict.fromkeys(("diagonal", "trace", "blocks"), 0.0)
    minres_errors: list[float] = []
    for _ in range(NETWORKS):
        model, x, y = random_network(rng, torch.float64)
        lin = lh.linearize(model, nn.functional.cross_entropy, x, y)
        H = lh.to_dense(lin.H)
        H = (H + H.T) / 2
        spectrum, N = np.linalg.eigvalsh(H), len(H)
        norm = np.abs(spectrum).max()
        for sign in (1.0, -1.0):
            damping = sign * 10.0 ** rng.uniform(-6, 0)
            shifted = spectrum + damping
            if np.abs(shifted).min() <= 1e-12 * norm:
                skipped += 1
                continue
            cases += 1
            K = H + damping * np.eye(N)
            inverse, truth = lin.inverse(damping), np.linalg.inv(K)
            found = inverse.inertia()
            wrong += (found.negative, found.zero, found.positive) != ((shifted < 0).sum(), 0, (shifted > 0).sum())
            log = np.log(np.abs(shifted)).sum()
            gap, doubt = abs(inverse.slogdet()[1] - log), N * np.finfo(float).eps * norm * (1 / np.abs(shifted)).sum()
            logdet = max(logdet, gap / abs(log)) if gap > doubt else logdet
            if gap > 1e-10 * abs(log):
                beyond += 1
                worst_beyond = max(worst_beyond, gap / doubt)
            largest, condition = np.abs(truth).max(), np.abs(shifted).max() / np.abs(shifted).min()
            unit = condition * 1e-14 * largest
            blocks = list(inverse.block_diagonal().values())
            truths = split_blocks(truth, blocks)
            gaps = {
                "diagonal": np.abs(inverse.diagonal() - np.diag(truth)).max(),
                "trace": abs(inverse.trace() - np.trace(truth)) / N,
                "blocks": max(np.abs(b - t).max() for b, t in zip(blocks, truths, strict=True)),
            }
            errors = {key: max(errors[key], gap / unit) for key, gap in gaps.items()}
            if shifted[0] < 0 < shifted[-1]:
                indefinite += 1
                minres_errors.append(minres_backward_error(K, np.abs(shifted).max(), inverse.positive())[0])
    print(
        f"{cases} cases, {indefinite} of them indefinite, {skipped} left out: an eigenvalue within 1e-12‖H‖ of zero\n"
    )
    print_table(
        ["what", "worst", "reach"],
        [
            ["inertia wrong", f"{wrong}", "0"],
            ["log|det|, relative, beyond what LAPACK's eigenvalues know", f"{logdet:.0e}", "1e-10"],
            [f"log|det| beyond 1e-10: {beyond} cases, in terms of what these know", f"{worst_beyond:.2f}", "1"],
            *([f"{key}, in κ·1e-14·max |inverse|", f"{value:.2f}", "1"] for key, value in errors.items()),
            ["MINRES, M = positive(): backward error after 3 iterations", f"{max(minres_errors):.0e}", "1e-8"],
        ],
    )


def singular_blocks() -> None:
    """Wide networks at dampings for which a trailing Hessian has an eigenvalue δ‖H‖."""
    rows = []
    for width, depth in ((24, 5), (40, 4)):
        model, (x, y) = network(depth, width, seed=2), batch(4)
        lin = lh.linearize(model, LOSS, x, y)
        H = lh.to_dense(lin.H)
        spectrum, offsets = np.linalg.eigvalsh((H + H.T) / 2), lin.problem.layout.x_offsets
        norm = np.abs(spectrum).max()
        for delta in (1e-6, 1e-10, 1e-13, 0.0):
            worst = {"η": 0.0, "κ": 0.0, "delayed": 0, "wrong": 0}
            for stage in range(2, 2 * (depth - 1), 2):
                start = offsets[stage]
                values = np.linalg.eigvalsh(H[start:, start:])
                values = values[np.abs(values) > 1e-2 * norm]
                value = values[np.argmax([np.abs(spectrum - v).min() for v in values])]
                damping = float(delta * norm - value)
                inverse = lin.inverse(damping, "riccati")
                solution = inverse.solve(np.random.default_rng(0).standard_normal(len(H)))
                assert solution.method == "riccati"
                worst["η"] = max(worst["η"], solution.backward_error)
                worst["κ"] = max(worst["κ"], norm / np.abs(spectrum + damping).min())
                worst["delayed"] = max(worst["delayed"], sum(row.delayed for row in inverse.factor_report()))
                worst["wrong"] += inverse.inertia().negative != (spectrum + damping < 0).sum()
            rows.append(
                [f"L={depth} width {width} batch 4", f"{delta:.0e}", f"{worst['κ']:.0e}", f"{worst['η']:.0e}"]
                + [f"{worst['delayed']}", f"{worst['wrong']}"]
            )
    print_table(["network", "δ", "κ", "η", "directions delayed", "inertia wrong"], rows)


def preconditioned_minres() -> None:
    """MINRES with the positive operator on larger networks: three iterations at most."""
    rows = []
    for depth, width, size in ((20, 64, 4), (60, 20, 3), (300, 8, 2), (1000, 4, 1)):
        model, (x, y) = network(depth, width), batch(size)
        lin = lh.linearize(model, LOSS, x, y)
        for damping in (0.1, -1e-2, 1e-3, 1e-5):
            inverse = lin.inverse(damping)
            norm = abs(lin.analysis.norm) + abs(damping)
            error, residual = minres_backward_error(lin.damped(damping), norm, inverse.positive())
            condition = lin.condition_number(damping)
            rows.append(
                [f"L={depth} width {width} batch {size}", f"{damping:g}", f"{condition:.0e}", f"{error:.0e}"]
                + [f"{residual:.0e}"]
            )
    print_table(["network", "damping", "κ", "backward error", "‖r‖/‖b‖"], rows)


def eigenvalues() -> None:
    """The ten eigenvalues nearest ±0.1‖H‖ of 20,000 parameters, and the whole spectrum in bins."""
    model, (x, y) = network(1000, 4), batch(1)
    lin = lh.linearize(model, LOSS, x, y)
    rows = []
    for share in (0.1, -0.1):
        start = time.perf_counter()
        pairs = lh.spectrum.eigsh(lin, 10, share * lin.analysis.norm)
        taken = time.perf_counter() - start
        missing = sum(count for *_, count in pairs.missing)
        rows.append(
            [f"{share}", f"{pairs.residuals.max() / pairs.norm:.0e}", f"{missing}", f"{pairs.nullity}", f"{taken:.2f}"]
        )
    print_table(["σ / ‖H‖", "largest residual / ‖H‖", "missing", "in the null space", "seconds"], rows)
    start = time.perf_counter()
    found = lh.spectrum.density(lin)
    print(f"\ndensity of all {found.size} in {found.counts.size} bins: {time.perf_counter() - start:.2f} s")
    if FIGURE:
        title = f"1,000 layers of width 4, {found.size:,} parameters"
        lh.plot.spectrum(found, title=title).savefig(FIGURE)


def scaling() -> None:
    """Inertia and determinant at width 4 against the band factorization."""
    rows, depths = [], (1_000, 10_000, 100_000)
    times: dict[str, list[float]] = {"inertia": [], "slogdet": []}
    for depth in depths:
        model, (x, y) = network(depth, 4), batch(1)
        lin = lh.linearize(model, LOSS, x, y)
        band = seconds(lambda: lh.lq.METHODS["banded"].factor(lin.analysis, 1e-3), 3)
        inertia = seconds(lambda: lin.inertia(1e-3), 3)
        slogdet = asked(lambda: lin.inverse(1e-3), lh.HessianInverse.slogdet, 4)
        times["inertia"].append(inertia)
        times["slogdet"].append(slogdet)
        rows.append(
            [f"{depth}", f"{lin.problem.size}", f"{band:.3f}", f"{inertia:.3f}", f"{inertia / band:.1f}"]
            + [f"{slogdet:.3f}"]
        )
    print_table(["L", "N", "band factorization s", "inertia s", "ratio", "slogdet s"], rows)
    for key, values in times.items():
        print(f"\nlog-log slope of {key}: {np.polyfit(np.log(depths), np.log(values), 1)[0]:.2f}", end="")
    print()


def diagonal_cost() -> None:
    """`diagonal()`, certificate included, in units of one factorization."""
    model, (x, y) = network(20, 64), batch(4)
    lin = lh.linearize(model, LOSS, x, y)
    rows = []
    lin.inverse(0.1).diagonal()  # once to warm up
    for damping in (0.1, 1e-2, 1e-3, 1e-4, 1e-6):
        factor = seconds(lambda: lin.inverse(damping, "riccati"))
        whole = asked(lambda: lin.inverse(damping, "riccati"), lh.HessianInverse.diagonal, 5)
        rows.append([f"{damping:g}", f"{factor * 1e3:.0f} ms", f"{whole * 1e3:.0f} ms", f"{whole / factor:.1f}"])
    print_table(["damping", "factorization", "diagonal()", "ratio"], rows)


def woodbury() -> None:
    """Gauss-Newton inverses, factor and one solve, as the width grows: function space against the recursion."""
    rows, widths = [], (64, 128, 256, 512, 1024)
    times: dict[str, list[float]] = {"woodbury": [], "riccati": []}
    for width in widths:
        model, (x, y) = network(6, width), batch(4)
        ggn = lh.linearize(model, LOSS, x, y).gauss_newton()
        g = np.random.default_rng(0).standard_normal(ggn.shape[0])
        for method, taken in times.items():
            if method == "riccati" and width > 256:
                taken.append(math.nan)
                continue
            taken.append(seconds(lambda: ggn.inverse(1e-3, method).solve(g), 3))
        solution = ggn.inverse(1e-3).solve(g)
        cells = [f"{taken[-1] * 1e3:.1f} ms" if math.isfinite(taken[-1]) else "" for taken in times.values()]
        rows.append([f"{width}", f"{ggn.shape[0]}", *cells, solution.method, f"{solution.backward_error:.0e}"])
    print_table(["width", "N", "woodbury", "riccati", "auto", "η"], rows)
    slope = np.polyfit(np.log(widths[1:]), np.log(times["woodbury"][1:]), 1)[0]
    print(f"\nlog-log slope of woodbury in the width from {widths[1]} on: {slope:.2f} (N grows with 2)")


if __name__ == "__main__":
    print(machine())
    for title, part in {
        f"Against LAPACK, {NETWORKS} random networks": accuracy,
        "Singular trailing blocks": singular_blocks,
        "MINRES, M = positive(), three iterations": preconditioned_minres,
        "Eigenvalues, L=1000 width 4": eigenvalues,
        "Long chains, width 4": scaling,
        "The diagonal of the inverse, L=20 width 64 batch 4": diagonal_cost,
        "Gauss-Newton in function space, L=6 batch 4": woodbury,
    }.items():
        print(f"\n### {title}\n")
        part()
