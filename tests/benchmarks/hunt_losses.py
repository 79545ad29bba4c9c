"""Random losses for `hunt.py`, of two arguments and, with penalties on parameters, of three."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as f

Loss = Callable[..., Tensor]


def tensors(output: Any) -> list[Tensor]:
    """Those of a tensor, tuple or dict."""
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)


def matrix(output: Any, samples: int) -> Tensor:
    """All outputs as one matrix, samples by columns where that fits."""
    flat = torch.cat([t.reshape(-1) for t in tensors(output)])
    return flat.reshape(samples, -1) if flat.numel() % samples == 0 else flat[None]


def draw_loss(draw: random.Random, output: Any, samples: int, names: list[str]) -> tuple[Loss, Tensor, str]:
    """A loss, its targets and its name for an output of that form."""
    z = matrix(output, samples)
    B, C = z.shape
    real = torch.randn(B, C, dtype=torch.float64)
    label = torch.randint(C, (B,))
    spread = real.softmax(1)
    reduction = draw.choice(["mean", "mean", "sum"])
    weight, smoothing = torch.rand(C) + 0.5, draw.choice([0.0, 0.1])
    ignored = label.clone()
    if B > 1:
        ignored[0] = -100
    entropy: dict[str, tuple[Loss, Tensor]] = {
        "ce": (lambda z, t: f.cross_entropy(z, t, reduction=reduction, label_smoothing=smoothing), label),
        "ce weighted": (
            lambda z, t: f.cross_entropy(z, t, weight.to(z), reduction=reduction, label_smoothing=smoothing),
            label,
        ),
        "ce ignoring": (
            lambda z, t: f.cross_entropy(z, t, weight.to(z), ignore_index=-100, reduction=reduction),
            ignored,
        ),
        "ce soft": (lambda z, t: f.cross_entropy(z, t, reduction=reduction), spread),
        "nll": (lambda z, t: f.nll_loss(z.log_softmax(1), t, weight.to(z), reduction=reduction), label),
        "multi margin": (lambda z, t: f.multi_margin_loss(z, t, p=2), label),
        "focal": (lambda z, t: ((1 - z.softmax(1)) ** 2 * -z.log_softmax(1)).gather(1, t[:, None]).mean(), label),
        "chosen": (lambda z, t: -z.log_softmax(1)[torch.arange(len(t)), t].sum(), label),
    }
    positive = real.abs()
    others: dict[str, tuple[Loss, Tensor]] = {
        "mse": (lambda z, t: f.mse_loss(z, t, reduction=reduction), real),
        "l1": (lambda z, t: f.l1_loss(z, t, reduction=reduction), real),
        "bce": (
            lambda z, t: f.binary_cross_entropy_with_logits(z, t, pos_weight=weight.to(z), reduction=reduction),
            spread,
        ),
        "bce plain": (lambda z, t: f.binary_cross_entropy(z.sigmoid(), t, weight=weight.to(z)), spread),
        "huber": (lambda z, t: f.huber_loss(z, t, delta=0.7, reduction=reduction), real),
        "smooth l1": (lambda z, t: f.smooth_l1_loss(z, t, beta=0.5), real),
        "kl": (lambda z, t: f.kl_div(z.log_softmax(1), t, reduction="batchmean"), spread),
        "poisson": (lambda z, t: f.poisson_nll_loss(0.3 * z, t), positive),
        "gaussian": (lambda z, t: f.gaussian_nll_loss(z, t, (0.3 * z).exp() + 0.1), real),
        "sum": (lambda z, t: (z * t).sum(), real),
        "squares": (lambda z, t: (z * t).square().sum() / 2, real),
        "coupled": (lambda z, t: (z.sum() - 1).square() + (z * t).sum().sin(), real),
        "log of sums": (lambda z, t: (z - t).square().sum(1).mean().add(0.3).log(), real),
        "all in one": (lambda z, t: z.reshape(-1).logsumexp(0) * t.sum(), real),
        "logdet": (lambda z, t: torch.logdet(z @ z.T + torch.eye(len(z)).to(z) * (1 + t.square().sum())), real),
        "contrastive": (lambda z, t: f.cross_entropy(z @ t.T, torch.arange(len(z))), real),
        "self contrastive": (lambda z, t: f.cross_entropy(z @ z.T / 2, torch.arange(len(z)).flip(0)), real),
        "cosine": (lambda z, t: 1 - f.cosine_similarity(z, t, dim=1, eps=1e-3).mean(), real),
        "hinge": (lambda z, t: f.relu(1 - z * t.sign()).square().mean(), real),
        "soft margin": (lambda z, t: f.soft_margin_loss(z, t.sign()), real),
        "worst": (lambda z, t: (z - t).square().max(), real),
        "worst sample": (lambda z, t: (z - t).square().sum(1).max(), real),
        "product": (lambda z, t: (1 + (z - t).square().mean(1)).prod(), real),
        "spread": (lambda z, t: (z - t).var() + (z - t).mean().square(), real),
        "in place": (lambda z, t: z.sub(t).pow_(2).mul_(t.abs()).sum(), real),
        "accumulated": (accumulated, real),
        "by sample": (
            lambda z, t: torch.stack([(a - b).square().sum().sqrt() for a, b in zip(z, t, strict=True)]).mean(),
            real,
        ),
        "masked": (lambda z, t: ((z - t).square() * (t > 0)).sum() / (t > 0).sum().clamp(min=1), real),
        "quantile": (lambda z, t: torch.maximum(0.3 * (t - z), -0.7 * (t - z)).mean() + z.square().mean(), real),
    }
    choices = {**others, **(entropy if C > 1 else {})}
    name = draw.choice(list(choices))
    inner, targets = choices[name]
    scale = draw.choice([1.0, 1.0, 1.0, 1e-3, 1e3])

    def plain(output: Any, target: Tensor) -> Tensor:
        return scale * inner(matrix(output, samples), target)

    if draw.random() > 0.25:
        return plain, targets, f"{name} {reduction}"
    kind, some = draw.randrange(len(PENALTIES)), names[:: draw.choice([1, 2])]

    def penalized(output: Any, target: Tensor, params: dict[str, Tensor]) -> Tensor:
        chosen = [params[n] for n in some if n in params] or list(params.values())
        return plain(output, target) + PENALTIES[kind](chosen)

    penalized.penalizes = True  # type: ignore[attr-defined]
    return penalized, targets, f"{name} {reduction}, penalty {kind}"


def accumulated(z: Tensor, t: Tensor) -> Tensor:
    total = torch.zeros((), dtype=z.dtype)
    for a, b in zip(z, t, strict=True):
        total += (a - b).square().sum()
    return total / len(z)


PENALTIES: list[Callable[[list[Tensor]], Tensor]] = [
    lambda ps: 0.1 * sum((p.square().sum() for p in ps), start=ps[0].new_zeros(())),
    lambda ps: 0.1 * sum(((p.square() + 0.01).sqrt().sum() for p in ps), start=ps[0].new_zeros(())),
    lambda ps: 0.1 * sum(((p.square().sum() + 0.1).sqrt() for p in ps), start=ps[0].new_zeros(())),
    lambda ps: 0.1 * ps[0].sum() * ps[-1].sum(),
    lambda ps: 0.1 * sum(((p.T @ p - 1).square().sum() for p in ps if p.dim() == 2), start=ps[0].sum().square()),
    lambda ps: 0.1 * sum((p.abs().sum() for p in ps), start=ps[0].new_zeros(())),
    lambda ps: 0.1 * torch.cat([p.reshape(-1) for p in ps]).square().sum().add(1).log(),
    lambda ps: 0.1 * torch.cat([p.reshape(-1) for p in ps]).logsumexp(0),
    lambda ps: 0.1 * torch.nn.utils.parameters_to_vector(ps).norm(3).square(),
    lambda ps: 0.1 * sum((p.reshape(-1)[:2].prod() for p in ps), start=ps[0].new_zeros(())),
]
