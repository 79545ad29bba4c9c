"""A small language model: the spectrum, a Newton step, and which lines of a poem another line hangs on.

A decoder of two layers, `nn.TransformerEncoderLayer` with a causal mask, learns to guess the next letter of Shakespeare's eighteenth
sonnet. Its embedding is tied: the same matrix reads letters and scores them, so it is a parameter that is used twice. The model is a
class of its own and is given to `linop_hess.linearize` as it is; H is the exact Hessian of L = Σ ℓ_i, the summed loss of the lines.

**Spectrum and Newton step** are taken early in training. The damping ε of −(H + εI)⁻¹∇L is twice the size of the smallest
eigenvalue, which inertia has confirmed to be the smallest; so H + εI is positive definite and the step begins downhill (its length
is another matter: after two or five steps of Adam instead of ten, the same step went too far and the loss grew).

**Influence** is asked of a network that training has not brought to a minimum, as is usual. Let w₀ be where it stands, and λ the damping
chosen as above. Then w₀ is a minimum of

    Φ(w) = L(w) − ∇L(w₀)ᵀ(w − w₀) + ½ λ|w − w₀|²,        ∇²Φ(w₀) = H + λI,

the loss without the slope that is left, held near w₀. If line i counts less by t, in Φ − t ℓ_i, that minimum moves by
t (H + λI)⁻¹g_i + O(t²), g_i = ∇ℓ_i(w₀), and the loss ℓ of a line that is no part of L grows by t times

    ∇ℓ(w₀)ᵀ (H + λI)⁻¹ g_i,

positive where line i helps. It is checked by carrying it out, for a small t. λ is part of the question: it says how near is near.

Run it with ``python examples/transformer.py``.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import linop_hess as lh

LINES = """\
shall i compare thee to a summers day
thou art more lovely and more temperate
rough winds do shake the darling buds of may
and summers lease hath all too short a date
sometime too hot the eye of heaven shines
and often is his gold complexion dimmd
and every fair from fair sometime declines
by chance or natures changing course untrimmd
but thy eternal summer shall not fade
nor lose possession of that fair thou owst
nor shall death brag thou wanderst in his shade
when in eternal lines to time thou growst
so long as men can breathe or eyes can see
so long lives this and this gives life to thee""".splitlines()
LETTERS = " abcdefghijklmnopqrstuvwxyz"


class Decoder(nn.Module):
    """Letters to scores of the next letter, (batch, tokens) to (batch, letters, tokens), as cross-entropy takes them."""

    def __init__(self, layers: int, width: int, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(LETTERS), width)
        self.position = nn.Parameter(torch.randn(tokens, width) / 2)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.5)

    def forward(self, letters: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(letters.shape[1], dtype=self.position.dtype)
        x = self.embed(letters) + self.position
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return (self.norm(x) @ self.embed.weight.T).mT  # tied


def loss_fn(scores: Tensor, letters: Tensor) -> Tensor:
    """Sum over lines of the mean loss of their letters."""
    return nn.functional.cross_entropy(scores, letters, reduction="sum") / letters.shape[1]


def windows(tokens: int) -> tuple[Tensor, Tensor]:
    """Return the beginnings of the lines and the letters that follow each letter there."""
    encoded = torch.tensor([[LETTERS.index(letter) for letter in line[: tokens + 1]] for line in LINES])
    return encoded[:, :-1], encoded[:, 1:]


def at(model: nn.Module, w: np.ndarray) -> nn.Module:
    vector_to_parameters(torch.tensor(w), model.parameters())
    return model


def value(model: nn.Module, w: np.ndarray, inputs: Tensor, targets: Tensor) -> float:
    with torch.no_grad():
        return float(loss_fn(at(model, w)(inputs), targets))


def gradient(model: nn.Module, w: np.ndarray, inputs: Tensor, targets: Tensor) -> np.ndarray:
    loss = loss_fn(at(model, w)(inputs), targets)
    return parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()))).numpy()


def train(model: nn.Module, inputs: Tensor, targets: Tensor, steps: int) -> np.ndarray:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
    return parameters_to_vector(model.parameters()).detach().numpy()


def describe(lin: lh.Linearization) -> tuple[float, float, lh.HessianInverse]:
    """Print the spectrum in short; return its ends, and the inverse at twice the least damping that makes H definite."""
    smallest, largest = lin.extreme_eigenvalues()
    near = 1e-3 * largest
    damping = 2 * max(-smallest, near)
    inverse = lin.inverse(damping)
    print(f"loss {lin.loss:.3f}; eigenvalues from {smallest:.4g} to {largest:.4g},", end=" ")
    print(f"{lin.count_eigenvalues(-near, near)} of {lin.problem.size} within {near:.1e} of zero")
    print(f"H + {damping:.3g} I by {inverse.method!r}: inertia {inverse.inertia()}")
    return smallest, largest, inverse


def moved(
    model: nn.Module, w: np.ndarray, train: tuple[Tensor, Tensor], line: int, weight: float, inverse: lh.HessianInverse
) -> np.ndarray:
    """Minimize Φ − weight·ℓ_line from w, by Newton steps with the inverse of ∇²Φ(w)."""
    slope, there = gradient(model, w, *train), w
    own = train[0][line : line + 1], train[1][line : line + 1]
    for _ in range(20):
        pull = (
            gradient(model, there, *train)
            - slope
            + inverse.damping * (there - w)
            - weight * gradient(model, there, *own)
        )
        there = there - inverse @ pull
    return there


def main(
    lines: int = 6,
    tokens: int = 6,
    layers: int = 2,
    width: int = 4,
    early: int = 10,
    steps: int = 150,
    weight: float = 1e-3,
) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs, targets = windows(tokens)
    data, asked = (inputs[:lines], targets[:lines]), (inputs[-1:], targets[-1:])
    model = Decoder(layers, width, tokens).double()

    start = train(model, *data, early)
    lin = lh.linearize(model, loss_fn, *data)
    print(f"{lin.problem.size} parameters, {lines} lines of {tokens} letters: {lin.problem.length} stages,", end=" ")
    print(f"the widest state {lin.problem.layout.n_out.max()}\n\nafter {early} steps of Adam:")
    smallest, largest, inverse = describe(lin)
    solution = inverse.solve(lin.gradient)
    newton, descent = value(model, start - solution.x, *data), value(model, start - lin.gradient / largest, *data)
    print(f"after the Newton step {newton:.3f} (solved to a backward error of {solution.backward_error:.0e}),", end=" ")
    print(f"after a gradient step {descent:.3f}")
    found = {
        "start": start,
        "ends": (smallest, largest),
        "damping": inverse.damping,
        "Newton step": newton,
        "before": lin.loss,
    }

    w = train(at(model, start), *data, steps)
    print(f"\nafter {steps} more steps of Adam:")
    *_, inverse = describe(trained := lh.linearize(model, loss_fn, *data))
    print(f"the gradient is {np.linalg.norm(trained.gradient):.1e}: no minimum")
    own = np.stack([gradient(model, w, data[0][i : i + 1], data[1][i : i + 1]) for i in range(lines)], axis=1)
    influence = (inverse @ gradient(model, w, *asked)) @ own  # H is symmetric: one solve for all lines
    before, carried_out = value(model, w, *asked), np.empty(lines)
    for i in range(lines):
        carried_out[i] = (value(model, moved(model, w, data, i, weight, inverse), *asked) - before) / weight
    print(
        f"\n{LINES[-1][: tokens + 1]!r} has a loss of {before:.3f}; it grows, for each unit of weight that a line loses, by"
    )
    for i in np.argsort(-influence):
        print(f"{influence[i]:10.5f}  (carried out: {carried_out[i]:10.5f})  {LINES[i][: tokens + 1]!r}")
    gap = abs(carried_out - influence).max() / abs(influence).max()
    print(f"largest difference {gap:.0e} of the largest influence, at a weight of {weight:g}")
    return found | {
        "model": model,
        "data": data,
        "asked": asked,
        "w": w,
        "lambda": inverse.damping,
        "influence": influence,
        "gap": gap,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Spectrum, Newton step and influence with a small transformer.")
    parser.add_argument("--lines", type=int, default=6, help="lines of the sonnet in the loss, at most 13")
    parser.add_argument("--steps", type=int, default=150, help="steps of Adam")
    main(**vars(parser.parse_args()))
