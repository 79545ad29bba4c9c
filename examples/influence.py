"""Leave one out: how much an image's own loss grows once it is left out, predicted by exact solves, and retrained.

With λ = ``damping`` the weight decay and ℓ_i the loss of image i, the network is trained to a minimum w of

    F(w) = Σ ℓ_i(w) + ½ λ|w|²,      ∇F = 0,      ∇²F = H + λI,

H the Hessian of the sum Σ ℓ_i: weight decay is the damping, and no penalty belongs in ``loss_fn``. (Of the mean over n
images the damping would be λ/n.) The gradient without image i is −g_i, g_i = ∇ℓ_i(w), so that w moves by about

    influence:     (H + λI)⁻¹ g_i            one factorization for all images,
    Newton step:   (H − H_i + λI)⁻¹ g_i      one for each, of the Hessian of the others.

The truth is retraining: Newton's method on F − ℓ_i, from w to a minimum, which need not be that of training from
scratch. Where H − H_i + λI is indefinite the Newton step leads to no minimum; those images are told apart.

Run it with ``python examples/influence.py``; ``--figure influence.png`` also draws it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import linop_hess as lh

LOSS = nn.CrossEntropyLoss(reduction="sum")  # not the mean: λ is weighed against all data


def digits(images: int, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return that many of scikit-learn's digits, reduced to 4 × 4 pixels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(np.isin(labels, classes)))[:images]
    coarse = pixels[chosen].reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 8 - 1
    return torch.from_numpy(coarse), torch.from_numpy(np.searchsorted(sorted(classes), labels[chosen]))


def network(depth: int, width: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in in [16] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, classes)).double()


def at(model: nn.Module, w: np.ndarray) -> nn.Module:
    vector_to_parameters(torch.from_numpy(w), model.parameters())
    return model


def losses(model: nn.Module, w: np.ndarray, data: Sequence[Tensor]) -> np.ndarray:
    """Return ℓ_i(w) of every image, shape (images,)."""
    with torch.no_grad():
        return nn.functional.cross_entropy(at(model, w)(data[0]), data[1], reduction="none").numpy()


def minimize(
    model: nn.Module, w: np.ndarray, data: Sequence[Tensor], damping: float
) -> tuple[np.ndarray, lh.Linearization]:
    """Return a minimum of Σ ℓ_i + ½ λ|w|²: gradient below 1e-9, Hessian positive definite; and the derivatives there."""

    def objective(w: np.ndarray) -> float:
        return float(losses(model, w, data).sum() + damping / 2 * w @ w)

    generator = np.random.default_rng(0)
    for _ in range(500):
        lin = lh.linearize(at(model, w), LOSS, *data)
        inverse, slope, value = lin.inverse(damping), lin.gradient + damping * w, objective(w)
        if np.linalg.norm(slope) < 1e-9:
            if inverse.is_positive_definite:
                return w, lin
            w = w + 1e-3 * generator.standard_normal(w.size)  # a saddle, which is left
            continue
        # Newton's step where H + λI is positive definite, and where it is not, one that still leads down.
        step, length = -(inverse.positive() @ slope), 1.0
        while length > 1e-10 and objective(w + length * step) > value * (1 + 1e-12) + 1e-4 * length * slope @ step:
            length /= 2
        w = w + length * step
    raise RuntimeError(f"no minimum found: the gradient is still {np.linalg.norm(slope):.1e}")


def compare(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    errors = abs(predicted / actual - 1)
    slope = predicted @ actual / (predicted @ predicted)  # of actual = slope * predicted
    correlation = np.corrcoef(predicted, actual)[0, 1]
    return {"correlation": correlation, "slope": slope, "median error": np.median(errors), "worst": errors.max()}


def main(
    images: int = 60, depth: int = 5, width: int = 5, classes: Sequence[int] = (3, 8, 9),
    damping: float = 1.0, figure: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    torch.manual_seed(0)
    data, model = digits(images, classes), network(depth, width, len(classes))
    w, lin = minimize(model, parameters_to_vector(model.parameters()).detach().numpy(), data, damping)
    inverse, before = lin.inverse(damping), losses(model, w, data)
    print(f"{w.size} parameters, {images} images of the digits {', '.join(map(str, classes))}, λ = {damping:g}")
    print(f"trained: loss {lin.loss:.3f}, gradient {np.linalg.norm(lin.gradient + damping * w):.0e}, Hessian", end=" ")
    print(f"positive definite, {lin.inertia(damping / 10).negative} eigenvalues of H itself below −λ/10")

    each = [lh.linearize(model, LOSS, data[0][i : i + 1], data[1][i : i + 1]).gradient for i in range(images)]
    G = np.stack(each, axis=1)
    newton, truth, gradients, definite = np.empty_like(G), np.empty_like(G), np.empty(images), np.empty(images, bool)
    for i in range(images):
        others = [torch.cat([part[:i], part[i + 1 :]]) for part in data]
        left = lh.linearize(at(model, w), LOSS, *others).inverse(damping)
        newton[:, i], definite[i] = left @ G[:, i], left.is_positive_definite
        minimum, there = minimize(model, w, others, damping)
        truth[:, i], gradients[i] = minimum - w, np.linalg.norm(there.gradient + damping * minimum)
    rough = lin.gauss_newton().inverse(damping)
    moves = {"influence": inverse @ G, "Gauss-Newton influence": rough @ G, "Newton step": newton}

    def growth(move: np.ndarray) -> np.ndarray:
        return np.array([losses(model, w + move[:, i], data)[i] - before[i] for i in range(images)])

    actual, predicted = growth(truth), {name: growth(move) for name, move in moves.items()}
    rows = {name: compare(values, actual) for name, values in predicted.items()}
    for name, move in moves.items():
        errors = np.linalg.norm(move - truth, axis=0) / np.linalg.norm(truth, axis=0)
        rows[name]["error of move"] = np.median(errors)
    rows["influence, first order"] = compare(inverse.quadratic_form(G), actual)  # g_iᵀ(H + λI)⁻¹g_i: no forward pass
    rows["Newton step, definite"] = compare(predicted["Newton step"][definite], actual[definite])
    print(
        f"retrained {images} times: gradients at most {gradients.max():.0e}, Hessians positive definite; own", end=" "
    )
    print(f"losses grow by {actual.min():.1e} to {actual.max():.1e}")
    print(f"H − H_i + λI is indefinite for {images - definite.sum()} of the images\n")
    print(f"{'':24}{''.join(f'{key:>15}' for key in rows['influence'])}")
    for name, row in rows.items():
        print(f"{name:24}{''.join(f'{value:15.3f}' for value in row.values())}")
    if figure:
        draw(predicted, actual, definite, figure)
    found = {"data": data, "model": model, "w": w, "moves": moves, "truth": truth, "definite": definite}
    return found | {"rows": rows, "predicted": predicted, "actual": actual}


def draw(predicted: dict[str, np.ndarray], actual: np.ndarray, definite: np.ndarray, file: str) -> None:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 4.3), dpi=160, layout="constrained")
    panels = canvas.subplots(1, len(predicted), sharex=True, sharey=True)
    ends = np.array([actual.min() / 3, actual.max() * 3])  # what lies outside is drawn on the edge
    for axes, (name, values), colour in zip(panels, predicted.items(), lh.plot.COLOURS, strict=False):
        axes.plot(ends, ends, color="0.5", linewidth=1)
        for chosen, face, label in ((definite, colour, None), (~definite, "none", "indefinite without the image")):
            dots = {"s": 26, "facecolor": face, "edgecolor": colour, "alpha": 0.8, "clip_on": False}
            axes.scatter(values.clip(*ends)[chosen], actual[chosen], label=label, **dots)
        row = compare(values, actual)
        text = f"correlation {row['correlation']:.3f}\nslope {row['slope']:.2f}\nmedian error {row['median error']:.1%}"
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top")
        axes.set(
            xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal", title=name, xlabel="predicted growth"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("growth of the own loss, retrained")
    if not definite.all():
        for axes in panels:
            axes.legend(frameon=False, loc="lower right", handletextpad=0.1)
    canvas.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Influence functions against retraining without each image.")
    parser.add_argument("--classes", type=int, nargs="+", default=(3, 8, 9), help="which digits, for instance 3 8")
    parser.add_argument("--damping", type=float, default=1.0, help="weight decay of the summed loss")
    parser.add_argument("--figure", metavar="FILE", help="draw it there, for instance influence.png")
    main(**vars(parser.parse_args()))
