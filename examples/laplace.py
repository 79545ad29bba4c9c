"""Laplace approximation of a classifier's posterior: evidence and predictive variance from the exact inverse.

The prior is θ ~ N(0, I/τ) and the loss the summed cross-entropy. About a maximum θ of the posterior this is then

    N(θ, (H + τI)⁻¹),      log p(data | τ) ≈ −loss − ½ τ|θ|² + ½ N log τ − ½ log det(H + τI),

H the Hessian of the loss alone: the prior's precision is the damping, and no weight penalty belongs in ``loss_fn``.
The images are scikit-learn's digits 0 to 4; digits 5 to 9, and noise, stand for what the network has never seen.

Run it with ``python examples/laplace.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import linop_hess as lh

CLASSES = 5
KINDS = ("exact", "Gauss-Newton")
LOSS = nn.CrossEntropyLoss(reduction="sum")  # not the mean: τ is weighed against all data


def network(depth: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in in [64] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES)).double()


def maximize_posterior(model: nn.Module, data: tuple[Tensor, Tensor], tau: float, iterations: int) -> float:
    """Move the parameters to where the posterior is stationary, and return the norm of the gradient left there."""
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, history_size=50, line_search_fn="strong_wolfe")

    def penalized() -> Tensor:
        optimizer.zero_grad()
        value = LOSS(model(data[0]), data[1]) + tau / 2 * parameters_to_vector(parameters).square().sum()
        value.backward()
        return value

    optimizer.step(penalized)
    for newton in range(iterations // 10 + 1):
        lin = lh.linearize(model, LOSS, *data)
        slope = lin.gradient + tau * parameters_to_vector(parameters).detach().numpy()
        if newton == iterations // 10 or np.linalg.norm(slope) < 1e-9:
            break
        # Newton's step where H + τI is positive definite. Where it is not, this one still leads down, off a saddle.
        step = torch.from_numpy(lin.inverse(tau).positive() @ slope).split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, change in zip(parameters, step, strict=True):
                parameter.sub_(change.view_as(parameter))
    return float(np.linalg.norm(slope))


def log_evidence(loss: float, theta: np.ndarray, tau: float, log_determinant: float) -> float:
    return float(-loss - tau / 2 * theta @ theta + theta.size / 2 * np.log(tau) - log_determinant / 2)


def dense_precision(kind: str, model: nn.Module, data: tuple[Tensor, Tensor], tau: float) -> np.ndarray:
    """Return H + τI as a matrix, from products by autograd: nothing of the factorizations is in it."""
    products = {"exact": lh.Hessian, "Gauss-Newton": lh.GaussNewton}[kind](model, LOSS, data)
    return lh.to_dense(products) + tau * np.eye(products.shape[0])


def jacobian(model: nn.Module, images: Tensor) -> np.ndarray:
    """Return the derivatives of all logits, shape (images * classes, N)."""
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    blocks = torch.func.jacrev(lambda values: torch.func.functional_call(model, values, (images,)))(values)
    return torch.cat([blocks[name].flatten(0, 1).flatten(1) for name in values], dim=1).numpy()


def confidence(logits: np.ndarray, variances: np.ndarray | float) -> float:
    """Return the mean of the largest class probability, by MacKay's average of the softmax over normal logits."""
    shrunk = torch.from_numpy(logits / np.sqrt(1 + np.pi / 8 * variances))
    return float(shrunk.softmax(1).amax(1).mean())


def main(
    depth: int = 4,
    width: int = 5,
    batch: int = 60,
    taus: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    iterations: int = 400,
    tests: int = 100,
    samples: int = 2000,
) -> dict[str, Any]:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    pixels, classes = load_digits(return_X_y=True)
    shuffled = np.random.default_rng(0).permutation(len(pixels))
    images, labels = torch.from_numpy(pixels[shuffled] / 8 - 1), torch.from_numpy(classes[shuffled])
    known, labels, unseen = images[labels < CLASSES], labels[labels < CLASSES], images[labels >= CLASSES]
    data = known[:batch], labels[:batch]
    held_out = slice(batch, batch + tests)
    groups = {
        "held-out digits 0-4": known[held_out],
        "unseen digits 5-9": unseen[:tests],
        "noise": 2 * torch.rand(tests, 64, dtype=torch.float64) - 1,
    }
    model = network(depth, width)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {batch} images; log evidence:\n")
    print("    τ     loss  gradient    exact H  off dense  Gauss-Newton  off dense")
    rows: list[dict[str, Any]] = []
    for tau in taus:  # each from where the last one ended
        row: dict[str, Any] = {"gradient": maximize_posterior(model, data, tau, iterations)}
        lin = lh.linearize(model, LOSS, *data)
        theta = parameters_to_vector(model.parameters()).detach().numpy()
        for kind, matrix in zip(KINDS, (lin, lin.gauss_newton()), strict=True):
            inverse = row[f"{kind} inverse"] = matrix.inverse(tau)
            row[kind] = row[f"{kind} off"] = np.nan
            if inverse.is_positive_definite:
                row[kind] = log_evidence(lin.loss, theta, tau, inverse.slogdet()[1])
                truth = np.linalg.slogdet(dense_precision(kind, model, data, tau))[1]
                row[f"{kind} off"] = row[kind] - log_evidence(lin.loss, theta, tau, truth)
        rows.append(row | {"tau": tau, "model": copy.deepcopy(model)})
        print(f"{tau:5g} {lin.loss:8.3f} {row['gradient']:9.0e} {row['exact']:10.3f} {row['exact off']:10.0e}", end=" ")
        print(f"{row['Gauss-Newton']:13.3f} {row['Gauss-Newton off']:10.0e}")
        if np.isnan(row["exact"]):
            print(f"      H + τI is not positive definite, so this is no maximum: {row['exact inverse'].inertia()}")
    best, other = (max(rows, key=lambda row: np.nan_to_num(row[kind], nan=-np.inf)) for kind in KINDS)
    if np.isfinite(best["exact"]):
        print(f"largest evidence: exact at τ = {best['tau']:g}, Gauss-Newton at τ = {other['tau']:g}")
    kinds = [kind for kind in KINDS if best[f"{kind} inverse"].is_positive_definite]
    covariances = {kind: np.linalg.inv(dense_precision(kind, best["model"], data, best["tau"])) for kind in kinds}
    print(f"\nat τ = {best['tau']:g}: standard deviation of the logits, its errors, and the mean confidence with it\n")
    print(f"{'':32} deviation  off dense  off samples  confidence")
    predictions: dict[str, dict[str, float]] = {}
    for group, pictures in groups.items():
        J, logits = jacobian(best["model"], pictures), best["model"](pictures).detach().numpy()
        found = predictions[group] = {"θ alone": confidence(logits, 0.0)}
        print(f"{group:19} {'θ alone':45} {found['θ alone']:12.3f}")
        for kind in kinds:
            inverse = best[f"{kind} inverse"]
            variances = inverse.quadratic_form(J.T)  # the diagonal of J (H + τI)⁻¹ Jᵀ
            truth = np.einsum("ij,ij->i", J @ covariances[kind], J)
            sampled = np.square(J @ inverse.sample(samples, torch.Generator().manual_seed(0))).mean(1)
            found[f"{kind} deviation"] = np.sqrt(variances.mean())
            found[f"{kind} off"] = abs(variances / truth - 1).max()
            found[f"{kind} samples off"] = abs(sampled / truth - 1).mean()
            found[kind] = confidence(logits, variances.reshape(logits.shape))
            print(f"{'':19} {kind:12} {found[f'{kind} deviation']:9.2f} {found[f'{kind} off']:10.0e}", end=" ")
            print(f"{found[f'{kind} samples off']:12.1%} {found[kind]:11.3f}")
    accuracy = float((best["model"](known[held_out]).argmax(1) == labels[held_out]).double().mean())
    print(f"\n{accuracy:.0%} of the held-out digits are classified rightly")
    return {"data": data, "rows": rows, "predictions": predictions, "accuracy": accuracy}


if __name__ == "__main__":
    main()
