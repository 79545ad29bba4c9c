"""Backward errors of every method over random indefinite networks, against a dense norm of H.

Run: python tests/benchmarks/accuracy.py
"""

from __future__ import annotations

import numpy as np
import torch
from common import machine, print_table
from torch import nn

import linop_hess as lh

NETWORKS = 200


def random_network(rng: np.random.Generator, dtype: torch.dtype) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """Random depth, unequal widths, activation and batch, with repeated samples; orthogonal init with gain 1 to 1.6."""
    torch.manual_seed(int(rng.integers(1 << 31)))
    depth, size = int(rng.integers(1, 9)), int(rng.integers(1, 41))
    widths = [int(w) for w in rng.integers(1, 9, depth)] + [int(rng.integers(2, 5))]
    layers: list[nn.Module] = []
    for a, b in zip([4, *widths], widths, strict=False):
        linear = nn.Linear(a, b, bias=bool(rng.random() < 0.8))
        nn.init.orthogonal_(linear.weight, float(rng.uniform(1.0, 1.6)))
        layers += [linear, [nn.Tanh(), nn.GELU(), nn.Softplus(), nn.SiLU()][int(rng.integers(4))]]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    x = torch.randn(size, 4, dtype=dtype)
    if size > 2:
        x[size // 2] = x[0]
        x[-1] = 0
    return model, x, torch.randint(0, widths[-1], (size,))


def main() -> None:
    """Print, for each method and dtype, the worst backward error, refinements, escalations and reported failures."""
    print(machine(), "\n")
    rows = []
    for dtype in (torch.float64, torch.float32):
        results: dict[str, list[tuple[float, int, str]]] = {m: [] for m in ("banded", "riccati", "dense", "ldu")}
        failures = dict.fromkeys(results, 0)
        indefinite = 0
        rng = np.random.default_rng(0)
        for _ in range(NETWORKS):
            model, x, y = random_network(rng, dtype)
            lin = lh.linearize(model, nn.functional.cross_entropy, x, y)
            H = lh.to_dense(lin.H).astype(np.float64)
            spectrum = np.linalg.eigvalsh((H + H.T) / 2)
            damping = 10.0 ** rng.uniform(-8, 0)
            indefinite += spectrum[0] + damping < 0 < spectrum[-1] + damping
            g = rng.normal(size=len(H))
            for method in results:
                try:
                    solution = lin.inverse(damping, method).solve(g)
                except lh.errors.FactorizationError:
                    failures[method] += 1
                    continue
                x_ = solution.x.astype(np.float64)
                residual = np.linalg.norm(g - H @ x_ - damping * x_)
                norm = np.abs(spectrum + damping).max()
                error = residual / (norm * np.linalg.norm(x_) + np.linalg.norm(g))
                results[method].append((error, solution.refinement_steps, solution.method))
        for method, runs in results.items():
            errors = [run[0] for run in runs]
            rows.append(
                [
                    str(dtype).removeprefix("torch."),
                    method,
                    f"{max(errors):.1e}",
                    f"{np.median(errors):.1e}",
                    f"{np.mean([run[1] for run in runs]):.2f}",
                    f"{sum(run[2] != method for run in runs)}",
                    f"{failures[method]}",
                ]
            )
        print(f"{dtype}: {indefinite} of {NETWORKS} damped Hessians indefinite")
    print()
    print_table(["dtype", "method", "worst η", "median η", "refinements", "escalated", "errors raised"], rows)


if __name__ == "__main__":
    main()
