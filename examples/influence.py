"""Leave one out: how much an image's own loss grows once it is left out, predicted by one exact solve and retrained.

With λ = ``damping`` the weight decay and ℓ_i the loss of image i, the network is trained to a minimum w of

    F(w) = Σ ℓ_i(w) + ½ λ|w|²,      ∇F = 0,      ∇²F = H + λI,

H the Hessian of the sum Σ ℓ_i: weight decay is the damping, and no penalty belongs in ``loss_fn``. (Of a mean over n
images λ/n would be the damping.) Without image i the gradient is −g_i, g_i = ∇ℓ_i, and w moves by about

    influence:     (H + λI)⁻¹ g_i            one factorization for all images,
    Newton step:   (H − H_i + λI)⁻¹ g_i      with the Hessian of the others, one factorization for each image.

The truth is retraining: Newton's method on F − ℓ_i from w to a minimum, which is the nearest one and need not be that
of training from scratch. H − H_i + λI may be indefinite at w where H + λI is not; the Newton step then leads to no
minimum and such images are marked.

Run it with ``python examples/influence.py``; ``--figure influence.png`` also draws it, and
``--classes 3 8 9`` is a harder problem, where the Newton step fails for more images.
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

Data = tuple[Tensor, Tensor]
LOSS = nn.CrossEntropyLoss(reduction="sum")  # not the mean: λ is weighed against all data


def digits(images: int, classes: Sequence[int]) -> Data:
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


def set_parameters(model: nn.Module, w: np.ndarray) -> None:
    vector_to_parameters(torch.from_numpy(w), model.parameters())


def losses(model: nn.Module, w: np.ndarray, data: Data) -> np.ndarray:
    """Return ℓ_i(w) of every image, shape (images,)."""
    set_parameters(model, w)
    with torch.no_grad():
        return nn.functional.cross_entropy(model(data[0]), data[1], reduction="none").numpy()


def minimize(
    model: nn.Module, w: np.ndarray, data: Data, damping: float, iterations: int = 500
) -> tuple[np.ndarray, lh.Linearization]:
    """Return a minimum of Σ ℓ_i + ½ λ|w|², with gradient below 1e-9 and positive definite Hessian, and what is there."""

    def objective(w: np.ndarray) -> float:
        return float(losses(model, w, data).sum() + damping / 2 * w @ w)

    generator = np.random.default_rng(0)
    for _ in range(iterations):
        set_parameters(model, w)
        lin = lh.linearize(model, LOSS, *data)
        inverse, slope = lin.inverse(damping), lin.gradient + damping * w
        if np.linalg.norm(slope) < 1e-9:
            if inverse.is_positive_definite:
                return w, lin
            w = w + 1e-3 * generator.standard_normal(w.size)  # a saddle, which is left
            continue
        # Newton's step where H + λI is positive definite, and where it is not, one that still leads down.
        step, length, value = -(inverse.positive() @ slope), 1.0, objective(w)
        while length > 1e-10 and objective(w + length * step) > value + 1e-4 * length * (slope @ step) + 1e-12 * value:
            length /= 2
        w = w + length * step
    raise RuntimeError(f"no minimum after {iterations} steps: the gradient is {np.linalg.norm(slope):.1e}")


def without(data: Data, i: int) -> Data:
    return torch.cat([data[0][:i], data[0][i + 1 :]]), torch.cat([data[1][:i], data[1][i + 1 :]])


def compare(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    with np.errstate(invalid="ignore"):
        logarithms = np.log(predicted), np.log(actual)
    return {
        "correlation": np.corrcoef(predicted, actual)[0, 1],
        "of logarithms": np.corrcoef(*logarithms)[0, 1],  # NaN where a prediction is negative
        "slope": predicted @ actual / (predicted @ predicted),  # of actual = slope * predicted
        "median error": float(np.median(abs(predicted / actual - 1))),
        "largest error": float(abs(predicted / actual - 1).max()),
    }


def main(
    images: int = 60,
    depth: int = 5,
    width: int = 5,
    classes: Sequence[int] = (3, 8),
    damping: float = 1.0,
    figure: str | None = None,
) -> dict[str, Any]:
    torch.manual_seed(0)
    data, model = digits(images, classes), network(depth, width, len(classes))
    w, lin = minimize(model, parameters_to_vector(model.parameters()).detach().numpy().copy(), data, damping)
    before, inverse = losses(model, w, data), lin.inverse(damping)
    print(f"{w.size} parameters, {images} images of digits {', '.join(map(str, classes))}, λ = {damping:g}")
    print(f"trained: loss {lin.loss:.3f}, gradient {np.linalg.norm(lin.gradient + damping * w):.0e},", end=" ")
    print(f"H + λI positive definite, H itself with {lin.inertia(0.1 * damping).negative} eigenvalues below −λ/10")

    each = [lh.linearize(model, LOSS, data[0][i : i + 1], data[1][i : i + 1]).gradient for i in range(images)]
    G = np.stack(each, axis=1)
    moves = {"influence": inverse @ G, "Gauss-Newton influence": lin.gauss_newton().inverse(damping) @ G}
    newton, truth = np.empty_like(G), np.empty_like(G)
    definite, gradients = np.empty(images, dtype=bool), np.empty(images)
    for i in range(images):
        others = without(data, i)
        set_parameters(model, w)
        left = lh.linearize(model, LOSS, *others).inverse(damping)
        newton[:, i], definite[i] = left @ G[:, i], left.is_positive_definite
        minimum, there = minimize(model, w, others, damping)
        truth[:, i], gradients[i] = minimum - w, np.linalg.norm(there.gradient + damping * minimum)
    moves["Newton step"] = newton

    def own(move: np.ndarray) -> np.ndarray:
        return np.array([losses(model, w + move[:, i], data)[i] - before[i] for i in range(images)])

    actual = own(truth)
    predicted = {"influence, first order": inverse.quadratic_form(G)}  # g_iᵀ(H + λI)⁻¹g_i: no forward pass
    predicted |= {name: own(move) for name, move in moves.items()}
    print(f"retrained {images} times: gradients at most {gradients.max():.0e}, Hessians positive definite;", end=" ")
    print(f"own losses grow by {actual.min():.1e} to {actual.max():.1e}")
    print(f"at w, {images - definite.sum()} of the Hessians without an image are indefinite\n")
    rows = {name: compare(values, actual) for name, values in predicted.items()}
    print(f"{'growth of an own loss':24}{''.join(f'{key:>15}' for key in rows['influence'])}")
    for name, row in rows.items():
        print(f"{name:24}{''.join(f'{value:15.3f}' for value in row.values())}")
    print("\nmove of the parameters: relative error, median and largest")
    for name, move in moves.items():
        errors = np.linalg.norm(move - truth, axis=0) / np.linalg.norm(truth, axis=0)
        rows[name]["move"] = float(np.median(errors))
        print(f"{name:24}{np.median(errors):15.3f}{errors.max():15.3f}")
    if figure:
        draw({name: predicted[name] for name in moves}, actual, definite, figure)
    return {
        "data": data, "model": model, "w": w, "rows": rows, "predicted": predicted, "actual": actual, "moves": moves,
        "truth": truth, "definite": definite, "gradients": gradients,
    }  # fmt: skip


def draw(predicted: dict[str, np.ndarray], actual: np.ndarray, definite: np.ndarray, file: str) -> None:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 4.3), dpi=160, layout="constrained")
    panels = canvas.subplots(1, len(predicted), sharex=True, sharey=True)
    ends = np.array([actual.min() / 3, actual.max() * 3])
    for axes, (name, values), colour in zip(panels, predicted.items(), lh.plot.COLOURS, strict=False):
        axes.plot(ends, ends, color="0.5", linewidth=1)
        for chosen, face, label in ((definite, colour, None), (~definite, "none", "H without the image indefinite")):
            shown = chosen & (values > 0)
            axes.scatter(values[shown], actual[shown], s=26, facecolor=face, edgecolor=colour, alpha=0.8, label=label)
        row = compare(values, actual)
        text = f"correlation {row['correlation']:.3f}\nslope {row['slope']:.2f}\nmedian error {row['median error']:.1%}"
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top")
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal", title=name, xlabel="predicted")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("growth of the own loss, retrained")
    if not definite.all():
        panels[-1].legend(frameon=False, loc="lower right", handletextpad=0.1, fontsize=9)
    canvas.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Influence functions against retraining without each image.")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--classes", type=int, nargs="+", default=(3, 8), help="digits, for instance 3 8 9")
    parser.add_argument("--damping", type=float, default=1.0, help="weight decay of the summed loss")
    parser.add_argument("--figure", metavar="FILE", help="draw it there, for instance influence.png")
    main(**vars(parser.parse_args()))
