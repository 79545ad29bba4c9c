"""A residual network of one's own: the spectrum, a Newton step, and which training images a test image hangs on.

The network is a class with layer norms and skip connections, given to `linop_hess.linearize` as it is. Three questions, each put
to the exact Hessian H of Σ ℓ_i, the summed loss of the training images:

**Spectrum**, early in training: how many eigenvalues are negative, zero and positive, the extreme ones, and where all lie.

**A Newton step** −(H + εI)⁻¹∇ from there. Where H is indefinite, −H⁻¹∇ may lead to a saddle; the damping ε is chosen by inertia:
twice the least that makes H + εI positive definite, so that the step begins downhill. Its length is another matter: in trials with 30
images and damping just above the least, the step went too far, and the loss grew.

**Influence.** With λ the weight decay, the network is trained to a minimum w of F = Σ ℓ_i + ½ λ|w|², so ∇²F = H + λI: the weight
decay is the damping, and no penalty belongs in ``loss_fn``. Without image i the gradient at w is −g_i, g_i = ∇ℓ_i(w), so w moves by
about (H + λI)⁻¹g_i, and the loss ℓ of a test image, which is no part of F, grows by about

    ∇ℓ(w)ᵀ (H + λI)⁻¹ g_i,

positive where image i helps. One solve with ∇ℓ answers for all images. But H still holds the curvature H_i of the image that is
left out; a Newton step of what is left, (H − H_i + λI)⁻¹g_i, does not, at one factorization an image. The truth is retraining,
which may lead further away than any derivative at w can tell, to another minimum for instance. The defaults
(λ, the test image in doubt, the five images of most help and the five of least) are a case where both predictions do well:
``--decay 1`` is one where they do less well.

Run it with ``python examples/residual_network.py``; ``--figure residual_network.png`` also draws it.
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

CLASSES = (3, 8, 9)
LOSS = nn.CrossEntropyLoss(reduction="sum")  # not the mean: λ is weighed against all data


class Block(nn.Module):
    """x + W₂ tanh(W₁ norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(self.norm(x))))


class Net(nn.Module):
    """A Linear, residual blocks, a Linear."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def digits() -> tuple[Tensor, Tensor]:
    """Return all of scikit-learn's digits of three classes, in random order, reduced to 4 × 4 pixels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(np.isin(labels, CLASSES)))
    coarse = pixels[chosen].reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 8 - 1
    return torch.from_numpy(coarse), torch.from_numpy(np.searchsorted(CLASSES, labels[chosen]))


def at(model: nn.Module, w: np.ndarray) -> nn.Module:
    vector_to_parameters(torch.tensor(w), model.parameters())  # a copy, which training may change
    return model


def value(model: nn.Module, w: np.ndarray, data: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return float(LOSS(at(model, w)(data[0]), data[1]))


def gradient(model: nn.Module, w: np.ndarray, data: Sequence[Tensor]) -> np.ndarray:
    at(model, w)
    parts = torch.autograd.grad(LOSS(model(data[0]), data[1]), list(model.parameters()))
    return parameters_to_vector(parts).numpy()


def newton_step(model: nn.Module, w: np.ndarray, data: Sequence[Tensor]) -> dict[str, Any]:
    """What the Hessian at w looks like, and what steps from there lead to."""
    lin = lh.linearize(at(model, w), LOSS, *data)
    pairs = lh.spectrum.density(lin)
    smallest, largest = lin.extreme_eigenvalues()
    damping = lin.smallest_convex_damping(margin=1.0)
    inverse = lin.inverse(damping)
    solution = inverse.solve(lin.gradient)
    after = {
        "Newton step": value(model, w - solution.x, data),
        "gradient step": value(model, w - lin.gradient / largest, data),  # as long as is stable
    }
    negative = int(pairs.counts[pairs.edges[1:] <= 0].sum())
    print(
        f"{lin.problem.size} parameters, {lin.problem.length} stages, the widest state {lin.problem.layout.n_out.max()}"
    )
    print(f"eigenvalues: {negative} negative, {pairs.nullity} within {pairs.null:.0e} of zero,", end=" ")
    print(f"{pairs.counts.sum() - negative} positive; from {smallest:.3g} to {largest:.4g}")
    print(f"H + {damping:.3g} I is positive definite: inertia {inverse.inertia()}")
    print(f"solved by {solution.method!r}, backward error {solution.backward_error:.0e}")
    print(f"loss {lin.loss:.3f}; after the Newton step {after['Newton step']:.3f},", end=" ")
    print(f"after a gradient step {after['gradient step']:.3f}")
    return {
        "spectrum": pairs,
        "ends": (smallest, largest),
        "damping": damping,
        "step": -solution.x,
        "before": lin.loss,
    } | after


def train(model: nn.Module, w: np.ndarray, data: Sequence[Tensor], decay: float, steps: int, rate: float) -> np.ndarray:
    """Take steps of Adam on Σ ℓ_i + ½ λ|w|² at a rate that falls to zero."""
    optimizer = torch.optim.Adam(at(model, w).parameters(), lr=rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        penalty = decay / 2 * sum(parameter.square().sum() for parameter in model.parameters())
        (LOSS(model(data[0]), data[1]) + penalty).backward()
        optimizer.step()
        falling.step()
    return parameters_to_vector(model.parameters()).detach().numpy()


def minimize(
    model: nn.Module, w: np.ndarray, data: Sequence[Tensor], decay: float
) -> tuple[np.ndarray, lh.Linearization]:
    """Return a minimum of Σ ℓ_i + ½ λ|w|²: gradient below 1e-9, Hessian positive definite; and the derivatives there."""
    for _ in range(500):
        lin = lh.linearize(at(model, w), LOSS, *data)
        inverse, slope = lin.inverse(decay), lin.gradient + decay * w
        if np.linalg.norm(slope) < 1e-9 and inverse.is_positive_definite:
            return w, lin
        # Newton's step where H + λI is positive definite, and where it is not, one that still leads down.
        step, length, now = -(inverse.positive() @ slope), 1.0, lin.loss + decay / 2 * w @ w
        while length > 1e-10:
            there = w + length * step
            if (
                value(model, there, data) + decay / 2 * there @ there
                <= now * (1 + 1e-12) + 1e-4 * length * slope @ step
            ):
                break
            length /= 2
        w = w + length * step
    raise RuntimeError(f"no minimum found: the gradient is still {np.linalg.norm(slope):.1e}")


def main(
    images: int = 60, blocks: int = 4, width: int = 6, early: int = 10, steps: int = 1500, decay: float = 2.0,
    retrained: int = 10, figure: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    torch.manual_seed(0)
    (pictures, labels), model = digits(), Net(blocks, width).double()
    data, held_out = (pictures[:images], labels[:images]), (pictures[images:], labels[images:])
    start = train(model, parameters_to_vector(model.parameters()).detach().numpy(), data, decay, early, 3e-3)
    print(f"{images} images of the digits 3, 8 and 9, after {early} steps of Adam")
    found = newton_step(model, start, data)

    w, lin = minimize(model, train(model, start, data, decay, steps, 1e-2), data, decay)
    inverse = lin.inverse(decay)
    with torch.no_grad():
        each = nn.functional.cross_entropy(at(model, w)(held_out[0]), held_out[1], reduction="none")
    asked = int((each - np.log(len(CLASSES))).abs().argmin())
    test = held_out[0][asked : asked + 1], held_out[1][asked : asked + 1]
    before = value(model, w, test)
    accuracy = float((model(held_out[0]).argmax(1) == held_out[1]).double().mean())
    print(
        f"\ntrained with λ = {decay:g}: loss {lin.loss:.3f}, gradient {np.linalg.norm(lin.gradient + decay * w):.0e},",
        end=" ",
    )
    print(f"{accuracy:.1%} of {len(each)} other images right")
    print(f"one in doubt, a {CLASSES[int(test[1])]}, has a loss of {before:.3f}; how much it grows without image i:")

    own = np.stack([gradient(model, w, (data[0][i : i + 1], data[1][i : i + 1])) for i in range(images)], axis=1)
    predicted = (inverse @ gradient(model, w, test)) @ own  # H is symmetric: one solve for all images
    order = np.argsort(-predicted)
    chosen = np.concatenate(
        [order[: retrained // 2], order[images - (retrained + 1) // 2 :]]
    )  # of most help, and of least
    newton, actual = np.empty(len(chosen)), np.empty(len(chosen))
    for k, i in enumerate(chosen):
        others = [torch.cat([part[:i], part[i + 1 :]]) for part in data]
        left = lh.linearize(at(model, w), LOSS, *others)
        newton[k] = value(model, w + left.inverse(decay) @ own[:, i], test) - before
        actual[k] = value(model, minimize(model, w, others, decay)[0], test) - before
    print("image  digit  influence  Newton step  retrained")
    for i, step, truth in zip(chosen, newton, actual, strict=True):
        print(f"{i:5d} {CLASSES[int(labels[i])]:6d} {predicted[i]:10.4f} {step:12.4f} {truth:10.4f}")
    guesses = {"influence": predicted[chosen], "Newton step": newton}
    for name, guess in guesses.items():
        slope = guess @ actual / (guess @ guess)  # of actual = slope * guess
        print(f"{name}: correlation {np.corrcoef(guess, actual)[0, 1]:.3f} with retraining, slope {slope:.2f}")
    if figure:
        draw(found["spectrum"], guesses, actual, figure)
    influence = {"w": w, "test": test, "predicted": predicted, "chosen": chosen, "newton": newton, "actual": actual}
    return found | influence | {"model": model, "start": start, "data": data}


def draw(spectrum: lh.spectrum.Density, guesses: dict[str, np.ndarray], actual: np.ndarray, file: str) -> None:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(13, 4.6), dpi=140, layout="constrained")
    left, right = canvas.subplots(1, 2, width_ratios=(2.2, 1))
    lh.plot.spectrum(spectrum, ax=left)
    everything = np.concatenate([actual, *guesses.values()])
    ends = np.array([everything.min(), everything.max()])
    ends = ends + 0.08 * (ends[1] - ends[0]) * np.array([-1, 1])
    right.plot(ends, ends, color="0.5", linewidth=1)
    for (name, guess), colour in zip(guesses.items(), lh.plot.COLOURS, strict=False):
        right.scatter(guess, actual, color=colour, s=28, alpha=0.8, label=name)
    right.legend(frameon=False)
    right.set(xlim=ends, ylim=ends, aspect="equal", xlabel="predicted", ylabel="retrained")
    right.set_title("growth of a test image's loss without image i", fontsize=10)
    right.grid(color="0.92")
    right.set_axisbelow(True)
    right.spines[["top", "right"]].set_visible(False)
    canvas.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Spectrum, Newton step and influence with a residual network.")
    parser.add_argument("--blocks", type=int, default=4, help="residual blocks")
    parser.add_argument("--decay", type=float, default=2.0, help="weight decay of the summed loss")
    parser.add_argument("--figure", metavar="FILE", help="draw it there, for instance residual_network.png")
    main(**vars(parser.parse_args()))
