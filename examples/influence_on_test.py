"""Which training samples a test loss depends on: influence of every sample of a full batch, from one solve.

With ℓ_i the loss of training sample i, the network is trained on the mean over all of them. Weighing sample i by −1/n more, which is to
leave it out, moves a minimum of the mean loss with weight decay λ by (H + λI)⁻¹∇ℓ_i/n, and a test loss t to first order by

    influence_i = ∇tᵀ (H + λI)⁻¹ ∇ℓ_i / n.

H is symmetric, so that one solve, with ∇t, serves all samples. Some labels are changed first: samples whose removal lowers the test loss
most should be those. Adam ends at no minimum, by far, and the formula is of a minimum; so Newton's method goes on from there, on the same
full batch: saddle-free steps by `positive()`, which leave saddle points.

Run it with ``python examples/influence_on_test.py``; ``--figure influence_on_test.png`` also draws it.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import linop_hess as lh

LOSS = nn.CrossEntropyLoss()


def digits(tests: int, wrong: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], np.ndarray]:
    """Training samples and test samples, of scikit-learn's digits, and which of the former have a wrong label."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(y))
    X, y = torch.from_numpy(X[order] / 16.0), torch.from_numpy(y[order])
    changed = rng.choice(len(y) - tests, wrong, replace=False)
    y[tests + changed] = (y[tests + changed] + torch.from_numpy(rng.integers(1, 10, wrong))) % 10
    return (X[tests:], y[tests:]), (X[:tests], y[:tests]), changed


def train(data: tuple[Tensor, Tensor], depth: int, width: int, decay: float, steps: int) -> nn.Sequential:
    """A tanh network after so many Adam steps on all samples, with weight decay in the loss."""
    torch.manual_seed(0)
    sizes, layers = [64] + [width] * depth, list[nn.Module]()
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        penalty = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
        (LOSS(model(data[0]), data[1]) + decay / 2 * penalty).backward()
        optimizer.step()
        schedule.step()
    return model


def polish(model: nn.Module, data: tuple[Tensor, Tensor], decay: float, most: int) -> tuple[np.ndarray, float, int]:
    """Go on to a minimum by saddle-free Newton steps: the parameters, the norm of the gradient there, and the number of steps."""

    def value(w: np.ndarray) -> float:
        vector_to_parameters(torch.from_numpy(w), model.parameters())
        with torch.no_grad():
            return float(LOSS(model(data[0]), data[1])) + decay / 2 * float(w @ w)

    w = parameters_to_vector(model.parameters()).detach().numpy().copy()
    for taken in range(most + 1):
        here = value(w)
        lin = lh.linearize(model, LOSS, *data)
        slope = lin.gradient + decay * w
        if np.linalg.norm(slope) < 1e-9 or taken == most:
            break
        step, length = -(lin.inverse(decay, precision="double").positive() @ slope), 1.0
        while length > 1e-8 and value(w + length * step) > here * (1 + 1e-14) + 1e-4 * length * slope @ step:
            length /= 2
        w = w + length * step
    return w, float(np.linalg.norm(slope)), taken


def slopes(model: nn.Module, direction: np.ndarray, data: tuple[Tensor, Tensor]) -> np.ndarray:
    """∇ℓ_iᵀ v for all samples at once: a derivative of the losses along v, forward."""
    names, parts, start = [], {}, 0
    for name, p in model.named_parameters():
        names.append(name)
        parts[name] = torch.from_numpy(direction[start : start + p.numel()]).view(p.shape)
        start += p.numel()

    def losses(parameters: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(model, parameters, (data[0],))
        return nn.functional.cross_entropy(outputs, data[1], reduction="none")

    at = {name: p.detach() for name, p in model.named_parameters()}
    return torch.func.jvp(losses, (at,), (parts,))[1].numpy()


def main(
    depth: int = 2, width: int = 8, decay: float = 1e-2, steps: int = 300, tests: int = 300, wrong: int = 75,
    newton: int = 100, figure: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    data, asked, changed = digits(tests, wrong)
    model = train(data, depth, width, decay, steps)
    weights, left, taken = polish(model, data, decay, newton)
    lin, test = lh.linearize(model, LOSS, *data), lh.linearize(model, LOSS, *asked)
    n, inverse = len(data[1]), lin.inverse(decay)
    solution = inverse.solve(test.gradient)
    influence = slopes(model, solution.x, data) / n
    print(f"{weights.size} parameters, {n} training samples, {wrong} labels changed")
    print(
        f"{steps} steps of Adam and {taken} of Newton's method: gradient {left:.1e}, H + λI with {inverse.inertia().negative} negative",
        end=" ",
    )
    print(f"eigenvalues, H with {lin.inertia(decay / 10).negative} below −λ/10")
    print(f"loss {lin.loss:.3f}, on {tests} test samples {test.loss:.3f}; solved by {solution}")
    suspects = np.argsort(influence)[:wrong]  # whose removal lowers the test loss most
    found = np.isin(suspects, changed).sum()
    print(
        f"of the {wrong} samples whose removal helps most, {found} have a changed label ({wrong**2 / n:.0f} by chance)"
    )
    if figure:
        draw(influence, changed, figure)
    return {
        "model": model,
        "data": data,
        "asked": asked,
        "influence": influence,
        "changed": changed,
        "found": found,
        "x": solution.x,
    }


def draw(influence: np.ndarray, changed: np.ndarray, file: str) -> None:
    """Influences in order, and how many changed labels are among the first so many."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(10, 4), dpi=160, layout="constrained")
    values, counts = canvas.subplots(1, 2)
    order = np.argsort(influence)
    is_changed = np.isin(order, changed)
    places = np.arange(1, len(order) + 1)
    for chosen, colour, size, label in (
        (~is_changed, "0.7", 6, "right label"),
        (is_changed, "C3", 14, "changed label"),
    ):
        values.scatter(places[chosen], influence[order][chosen], s=size, color=colour, label=label)
    limit = float(np.abs(influence).max())
    values.set_yscale("symlog", linthresh=limit / 100)
    values.set(xlabel="training samples, most harmful first", ylabel="test loss without the sample, change")
    values.legend(frameon=False)
    counts.plot(places, is_changed.cumsum(), label="by influence")
    counts.plot(places, places * len(changed) / len(order), color="0.6", linestyle="--", label="by chance")
    counts.set(xlabel="samples looked at, most harmful first", ylabel="changed labels found", ylim=(0, None))
    counts.legend(frameon=False)
    for axes in (values, counts):
        axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Influence of every training sample on a test loss.")
    parser.add_argument("--figure", metavar="FILE", help="draw it there, for instance influence_on_test.png")
    main(**vars(parser.parse_args()))
