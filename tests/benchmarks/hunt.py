"""Random models, batches, losses, dtypes and dampings against double backward and LAPACK: no wrong answer may be silent.

Run: python tests/benchmarks/hunt.py --seeds 0:1000 [--minutes 10]

Prints a line a failure, with its seed; `--seeds s:s+1 --trace` runs that one again and shows the traceback.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hunt_losses import draw_loss
from hunt_models import PLAIN, Program, grow
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import linop_hess as lh
from linop_hess.errors import FactorizationError, NotPositiveDefiniteError, UnsupportedModelError


class Wrong(Exception):
    """An answer that the truth does not bear out."""


@dataclass
class Case:
    """A model with its loss and batch, in float64 as in the precision under test."""

    model: Program
    loss_fn: Callable[..., Tensor]
    inputs: tuple[Tensor, Tensor]
    targets: Any
    params: list[str] | None
    dtype: torch.dtype
    label: str

    def cast(self, dtype: torch.dtype) -> tuple[Program, tuple[Tensor, Tensor], Any]:
        """The model and data in a precision; values are those of `dtype`."""
        x, tokens = self.inputs
        targets = self.targets.to(dtype) if self.targets.is_floating_point() else self.targets
        return self.model.to(dtype), (x.to(dtype), tokens), targets

    def names(self) -> list[str]:
        named = [n for n, p in self.model.named_parameters() if p.requires_grad]
        return named if self.params is None else [n for n in named if n in self.params]


def make(seed: int) -> Case:
    """The case of a seed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    samples = draw.choice([1, 2, 3, 3, 4, 5, 6])
    x = torch.randn(samples, draw.choice([1, 2, 3, 4, 4]), dtype=torch.float64)
    tokens = torch.randint(4, (samples, 2))
    if samples > 2 and draw.random() < 0.4:
        x[1], tokens[1] = x[0], tokens[0]
    if samples > 3 and draw.random() < 0.2:
        x[-1] = 0
    model = grow(draw, x, tokens)
    output = model(x, tokens)
    loss_fn, targets, label = draw_loss(draw, output, samples, [n for n, _ in model.named_parameters()])
    dtype = draw.choice([torch.float64, torch.float64, torch.float64, torch.float32])
    case = Case(model, loss_fn, (x, tokens), targets, None, dtype, label)
    names = case.names()
    if len(names) > 1 and draw.random() < 0.15:
        case.params = sorted(draw.sample(names, draw.randint(1, len(names) - 1)))
    if dtype == torch.float32:  # both precisions get values of float32
        case.model, case.inputs, case.targets = case.cast(torch.float32)
    return case


@dataclass
class Truth:
    """Loss, gradient and Hessian in float64 by double backward, and how far an ulp in the parameters moves them."""

    loss: float
    gradient: np.ndarray
    H: np.ndarray
    gn: np.ndarray | None


def truth(case: Case, moved: float = 0.0, with_gn: bool = False) -> Truth:
    """What double backward gives; with parameters moved relatively by so much."""
    model, inputs, targets = case.cast(torch.float64)
    names, named = case.names(), dict(model.named_parameters())
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    generator = torch.Generator().manual_seed(1)
    PLAIN[0] = True
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            values = {
                n: (
                    p.detach() * (1 + moved * torch.randn(p.shape, generator=generator, dtype=p.dtype))
                    if n in names
                    else p.detach()
                )
                for n, p in named.items()
            }
            leaves = [values[n].clone().requires_grad_() for n in names]
            given = {**values, **dict(zip(names, leaves, strict=True))}
            output = torch.func.functional_call(model, {**buffers, **given}, inputs)
            loss = call(case.loss_fn, output, targets, dict(zip(names, leaves, strict=True)))
            first = flat(
                torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
            )
            H = rows(first, leaves)
            gn = gauss_newton(case, output, targets, leaves, names) if with_gn else None
    finally:
        PLAIN[0] = False
        case.cast(case.dtype)
    return Truth(float(loss), first.detach().numpy(), H, gn)


def gauss_newton(case: Case, output: Any, targets: Tensor, leaves: list[Tensor], names: list[str]) -> np.ndarray:
    """JᵀCJ with C the Hessian of the loss by output and parameters."""
    parts = [output] if isinstance(output, Tensor) else list(output.values() if isinstance(output, dict) else output)
    theta = flat(leaves).detach()
    J = np.concatenate([rows(flat(parts), leaves), np.eye(theta.numel())])
    free = [o.detach().clone().requires_grad_() for o in parts]
    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    if isinstance(output, Tensor):
        again: Any = free[0]
    else:
        again = dict(zip(output, free, strict=True)) if isinstance(output, dict) else tuple(free)
    loss = call(case.loss_fn, again, targets, dict(zip(names, own, strict=True)))
    leaves = [*free, *own]
    C = rows(
        flat(torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)), leaves
    )
    return J.T @ C @ J


def differences(case: Case, step: float = 1e-4) -> np.ndarray:
    """H by central differences of the gradient."""
    model, inputs, targets = case.cast(torch.float64)
    named = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [named[n].numel() for n in case.names()]

    def gradient(theta: Tensor) -> Tensor:
        leaves = [
            part.reshape(named[n].shape).clone().requires_grad_()
            for n, part in zip(case.names(), theta.split(sizes), strict=True)
        ]
        given = dict(zip(case.names(), leaves, strict=True))
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        output = torch.func.functional_call(model, {**buffers, **named, **given}, inputs)
        return flat(
            torch.autograd.grad(
                call(case.loss_fn, output, targets, given), leaves, allow_unused=True, materialize_grads=True
            )
        )

    try:
        theta = flat(named[n] for n in case.names())
        units = step * torch.eye(theta.numel(), dtype=theta.dtype)
        return torch.stack([(gradient(theta + u) - gradient(theta - u)) / (2 * step) for u in units]).numpy()
    finally:
        case.cast(case.dtype)


def call(loss_fn: Callable[..., Tensor], output: Any, targets: Tensor, params: dict[str, Tensor]) -> Tensor:
    return loss_fn(output, targets, params) if getattr(loss_fn, "penalizes", False) else loss_fn(output, targets)


def flat(parts: Any) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parts])


def rows(y: Tensor, leaves: list[Tensor]) -> np.ndarray:
    """Jacobian of y by the leaves, a backward pass a row."""
    count = sum(leaf.numel() for leaf in leaves)
    if not y.requires_grad:
        return np.zeros((y.numel(), count))
    found = [
        flat(torch.autograd.grad(v, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)) for v in y
    ]
    return torch.stack(found).detach().numpy() if found else np.zeros((0, count))


def require(condition: Any, kind: str, **numbers: Any) -> None:
    if not condition:
        told = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in numbers.items())
        raise Wrong(f"{kind}: {told}")


class Check:
    """All questions to one case."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed + 10**9)
        self.case = make(seed)
        self.eps = 2.0**-52 if self.case.dtype == torch.float64 else 2.0**-23

    def run(self) -> str:
        case = self.case
        size = sum(dict(case.model.named_parameters())[n].numel() for n in case.names())
        if not size or size > 150:
            return "no parameters"
        with_gn = self.draw.random() < 0.3
        model, inputs, targets = case.cast(case.dtype)
        try:
            true = truth(case, with_gn=with_gn)
        except (RuntimeError, NotImplementedError) as error:
            return self.without_truth(error, model, inputs, targets)
        finite = all(np.isfinite(a).all() for a in (true.loss, true.gradient, true.H))
        if not np.any(true.gradient) and not np.any(true.H):
            dependent = "flat"
        else:
            dependent = "depends"
        try:
            lin = lh.linearize(model, case.loss_fn, inputs, targets, params=case.params)
        except UnsupportedModelError as error:
            return f"refused: {str(error)[:110]}"
        except ArithmeticError as error:
            if "came out asymmetric" in str(error) and np.abs(true.H - true.H.T).max() > 1e-3 * np.abs(true.H).max():
                return f"asymmetric in torch too: {str(error)[:60]}"
            raise
        except ValueError as error:
            if not finite:
                return "not finite, told"
            if dependent == "flat" and "does not depend" in str(error):
                return "independent, told"
            raise
        if not finite:
            return f"not finite by autograd, H finite: {bool(np.isfinite(lh.to_dense(lin.H)).all())}"
        self.lin, self.true, self.N = lin, true, size
        self.derivatives()
        self.products(model, inputs, targets)
        for damping in self.dampings():
            self.inverse(damping)
        return "fine"

    def without_truth(self, reason: Exception, model: nn.Module, inputs: Any, targets: Any) -> str:
        """What is independent of the parameters, or has no double backward, must be refused."""
        try:
            lin = lh.linearize(model, self.case.loss_fn, inputs, targets, params=self.case.params)
        except UnsupportedModelError as error:
            return f"refused where autograd fails: {str(error)[:110]}"
        except ValueError as error:
            told = "does not depend" in str(error) or "NaN or Inf" in str(error)
            require(told, "no truth", autograd=str(reason)[:80], ours=str(error)[:150])
            return "independent, told"
        except RuntimeError as error:
            require(str(error)[:60] == str(reason)[:60], "no truth", autograd=str(reason)[:80], ours=str(error)[:150])
            return f"refused by torch in both: {str(error)[:60]}"
        H, seen = lh.to_dense(lin.H), differences(self.case)
        off = float(np.abs(H - seen).max())
        require(
            off <= 1e-5 * (1 + np.abs(H).max()) or self.eps > 1e-10,
            "H without truth",
            off=off,
            autograd=str(reason)[:80],
        )
        return f"right where autograd fails: {str(reason)[:60]}"

    def derivatives(self) -> None:
        """Loss, gradient and Hessian, and that verify() does not raise."""
        lin, true, case = self.lin, self.true, self.case
        require(lin.names == tuple(case.names()), "names", got=lin.names)
        slack = 200 * self.eps * (1 + abs(true.loss))
        if abs(lin.loss - true.loss) > slack:  # the user's loss is what the model gives, in its own precision
            plain = self.plain_loss()
            require(
                abs(lin.loss - plain) <= 2 * self.eps * abs(plain), "loss", got=lin.loss, want=true.loss, plain=plain
            )
        try:
            lin.verify()
        except ArithmeticError as error:
            raise Wrong(f"verify raises: {error}") from error
        H = lh.to_dense(lin.H).astype(np.float64)
        self.scale = float(np.abs(true.H).max())
        g_scale = float(np.abs(true.gradient).max())
        self.gap = float(np.linalg.norm(H - true.H))
        floor = 500 * self.eps * (self.scale + g_scale + 0.01 * abs(true.loss)) + 5 * self.eps * self.case_size()
        gaps = float(np.abs(lin.gradient - true.gradient).max())
        off = float(np.abs(H - true.H).max())
        if off > floor or gaps > floor:  # then what rounding explains
            moved = [truth(case, t * self.eps) for t in (1, -1, 3)]
            by = max(float(np.abs(m.H - true.H).max()) for m in moved)
            by_g = max(float(np.abs(m.gradient - true.gradient).max()) for m in moved)
            require(
                off <= 100 * by + floor,
                "H",
                off=off,
                scale=self.scale,
                moved=by,
                asymmetry=float(np.abs(true.H - true.H.T).max()),
            )
            require(gaps <= 100 * by_g + floor, "gradient", off=gaps, scale=g_scale, moved=by_g)
        require(np.abs(H - H.T).max() <= 2 * off + floor, "asymmetric H", off=float(np.abs(H - H.T).max()))
        self.off, self.g_scale = off, g_scale

    def plain_loss(self) -> float:
        """What the model as it is gives, with torch's own kernels."""
        model, inputs, targets = self.case.cast(self.case.dtype)
        named = {n: p for n, p in model.named_parameters() if n in self.case.names()}
        # With gradients: some models differentiate inside.
        output = torch.func.functional_call(model, {n: b.clone() for n, b in model.named_buffers()}, inputs)
        return float(call(self.case.loss_fn, output, targets, named).detach())

    def case_size(self) -> float:
        """Size of terms that may cancel in all derivatives."""
        return max(1.0, abs(self.true.loss)) if self.eps > 1e-10 else 1e-2

    def products(self, model: nn.Module, inputs: Any, targets: Any) -> None:
        case, true, lin = self.case, self.true, self.lin
        v = np.random.default_rng(0).standard_normal((self.N, 2))
        norm = float(np.linalg.norm(true.H)) + self.g_scale
        slack = 5e3 * self.eps * norm * self.N**0.5 + 20 * self.off * self.N
        slack += 50 * self.eps * max(1.0, abs(true.loss))  # terms that cancel
        if self.draw.random() < 0.5:
            hessian = lh.Hessian(model, case.loss_fn, (inputs, targets), params=case.params)
            off = float(np.abs(hessian @ v - true.H @ v).max())
            # torch's own fused norms lose digits here
            require(off <= 1e3 * slack, "lh.Hessian", off=off, norm=norm)
            if off > slack and not any("norm" in str(type(m)).lower() for m in model.modules()):
                by = max(float(np.abs(truth(case, t * self.eps).H - true.H).max()) for t in (1, -1))
                require(off <= slack + 1e3 * by, "lh.Hessian", off=off, norm=norm, moved=by)
        if true.gn is None:
            return
        try:
            gn = lh.to_dense(lin.gauss_newton()).astype(np.float64)
        except UnsupportedModelError:
            return
        g_norm = float(np.abs(true.gn).max()) + self.scale + self.g_scale
        off = float(np.abs(gn - true.gn).max())
        if off > 1e3 * self.eps * g_norm:
            by = max(float(np.abs(truth(case, t * self.eps, True).gn - true.gn).max()) for t in (1, -1))
            require(off <= 1e3 * self.eps * g_norm + 100 * by, "gauss_newton", off=off, scale=g_norm, moved=by)
        product = lh.GaussNewton(model, case.loss_fn, (inputs, targets), params=case.params) @ v
        off = float(np.abs(product - true.gn @ v).max())
        require(off <= 1e6 * self.eps * g_norm * self.N**0.5 + 1e3 * self.off, "lh.GaussNewton", off=off, scale=g_norm)

    def dampings(self) -> list[float]:
        values = np.linalg.eigvalsh((self.true.H + self.true.H.T) / 2)
        self.values = values
        near = float(self.draw.choice(list(values)))
        return [
            10.0 ** self.draw.uniform(-8, -1),
            self.draw.choice(
                [
                    -(10.0 ** self.draw.uniform(-8, -1)),
                    0.0,
                    10.0 ** self.draw.uniform(-1, 3),
                    10.0 ** self.draw.uniform(-13, -8),
                ]
            ),
            -near + self.draw.choice([1, -1]) * max(abs(near), 1e-3) * 10.0 ** self.draw.uniform(-14, -3),
        ]

    def inverse(self, damping: float) -> None:
        N, true = self.N, self.true
        self.where = f"damping={damping!r}"
        A = (true.H + true.H.T) / 2 + damping * np.eye(N)
        values = self.values + damping
        norm, least = float(np.abs(values).max()), float(np.abs(values).min())
        off = self.gap + 30 * self.eps * (norm + self.scale)  # by how much our matrix may differ
        near = least <= 1e3 * off or least <= 1e-11 * norm or norm <= 0.1 * abs(damping) or off >= 30 * self.eps * norm
        method = self.draw.choice(["auto", "auto", "riccati", "dense", "banded", "ldu"])
        self.where += f" method={method}"
        try:
            inverse = self.lin.inverse(damping, method)
            g = np.random.default_rng(1).standard_normal((N, 2)) * 10.0 ** self.draw.randint(-3, 3)
            solution = inverse.solve(g)
            x = solution.x.astype(np.float64)
            r = g - A @ x
            error = max(np.linalg.norm(r, axis=0) / (norm * np.linalg.norm(x, axis=0) + np.linalg.norm(g, axis=0)))
            limit = 5e-14 if self.eps < 1e-10 else 2e-6
            require(
                error <= limit + 3 * off / max(norm, 1e-300),
                "solve",
                error=error,
                off=off,
                norm=norm,
                least=least,
                method=solution.method,
            )
        except (FactorizationError, ValueError) as error:
            if isinstance(error, ValueError) and "cannot be used here" in str(error):
                return
            near = near or method == "ldu"  # no other method may stand in for it
            require(near, f"refused solve ({str(error)[:90]})", least=least, norm=norm, off=off)
            return
        kappa = norm / max(least, 1e-300)
        try:
            inertia = inverse.inertia()
            got = (inertia.negative, inertia.zero, inertia.positive)
            want = (int((values < 0).sum()), 0, int((values > 0).sum()))
            require(near or got == want, "inertia", got=got, want=want, least=least, off=off, norm=norm)
            other = self.lin.inertia(damping)
            require(
                near or (other.negative, other.zero, other.positive) == want,
                "lin.inertia",
                got=other,
                want=want,
                least=least,
            )
            sign, log = inverse.slogdet()
            want_sign, want_log = np.linalg.slogdet(A)
            slack = 1e-8 * (self.eps / 2**-52) ** 0.5 + 10 * float((off / np.abs(values)).sum())
            require(
                near or (sign == want_sign and abs(log - want_log) <= slack),
                "slogdet",
                got=(sign, log),
                want=(want_sign, want_log),
                slack=slack,
            )
        except FactorizationError as error:
            require(near, f"refused inertia or slogdet ({str(error)[:90]})", least=least, norm=norm, off=off)
            return
        if near:
            return
        B = np.linalg.inv(A)
        size = float(np.abs(B).max())
        slack = size * (1e-10 * (self.eps / 2**-52) + kappa * (1e-13 + 5 * off / norm))
        self.entries(inverse, B, slack, size)
        self.positive(inverse, A, B, values, slack, kappa, off / norm)

    def entries(self, inverse: Any, B: np.ndarray, slack: float, size: float) -> None:
        off = float(np.abs(inverse.diagonal() - np.diag(B)).max())
        require(off <= slack, "diagonal", off=off, size=size, slack=slack)
        off = abs(inverse.trace() - float(np.trace(B)))
        require(off <= slack * self.N, "trace", off=off, size=size)
        named, at, places = dict(self.case.model.named_parameters()), 0, {}
        for name in self.case.names():
            places.setdefault(name.rpartition(".")[0], []).extend(range(at, at + named[name].numel()))
            at += named[name].numel()
        blocks = inverse.block_diagonal()
        require(
            {n: len(b) for n, b in blocks.items()} == {n: len(p) for n, p in places.items() if p},
            "blocks",
            got=list(blocks),
        )
        for name, block in blocks.items():
            off = float(np.abs(block - B[np.ix_(places[name], places[name])]).max())
            require(off <= slack, "block_diagonal", off=off, size=size, name=name)

    def positive(
        self, inverse: Any, A: np.ndarray, B: np.ndarray, values: np.ndarray, slack: float, kappa: float, off: float
    ) -> None:
        P = lh.to_dense(inverse.positive()).astype(np.float64)
        size = float(np.abs(P).max())
        require(
            np.abs(P - P.T).max() <= 1e-9 * (self.eps / 2**-52) * size + slack,
            "positive is asymmetric",
            off=float(np.abs(P - P.T).max()),
            size=size,
        )
        if values[0] > 0:
            require(
                np.abs(P - B).max() <= slack, "positive is not the inverse", off=float(np.abs(P - B).max()), size=size
            )
        fuzz = kappa * (1e-12 + 5 * off + 100 * (self.eps if self.eps > 1e-10 else 0))
        if fuzz < 1e-3:
            ours = np.linalg.eigvalsh((P + P.T) / 2)
            require(ours[0] > -slack, "positive is not definite", least=float(ours[0]), size=size, slack=slack)
            signs = np.linalg.eigvals(P @ A)
            require(
                np.abs(np.abs(signs) - 1).max() <= 1e-5 + fuzz,
                "positive does not turn eigenvalues into ±1",
                worst=float(np.abs(np.abs(signs) - 1).max()),
                kappa=kappa,
            )
            require(int((signs.real < 0).sum()) == int((values < 0).sum()), "positive has another inertia", kappa=kappa)
        if self.draw.random() < 0.1 and values[0] > 0:
            inverse.sample(2)
        elif self.draw.random() < 0.1 and values[0] < 0:
            try:
                inverse.sample(2)
            except NotPositiveDefiniteError:
                return
            raise Wrong("sample of what is not definite")


def main() -> None:
    """Run the seeds asked for and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:1000")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--trace", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    first, last = map(int, options.seeds.split(":"))
    end, outcomes, failures, run = time.monotonic() + 60 * options.minutes, Counter(), Counter(), 0
    example: dict[str, int] = {}
    for seed in range(first, last):
        if time.monotonic() > end:
            break
        run += 1
        check = None
        try:
            check = Check(seed)
            outcome = check.run()
        except Exception as error:  # every one is a finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = str(error).split(":")[0] if isinstance(error, Wrong) else type(error).__name__
            outcome = f"FAILED {kind}"
            failures[kind] += 1
            told = f"{type(error).__name__}: {str(error)[:260]}"
            place = "" if isinstance(error, Wrong) else f" at {where.filename.split('/')[-1]}:{where.lineno}"
            at = (
                ""
                if check is None
                else f" [{check.case.label}, {str(check.case.dtype)[6:]}] {getattr(check, 'where', '')}"
            )
            print(f"seed {seed}: {told}{place}{at}  (--seeds {seed}:{seed + 1})", flush=True)
            if options.trace:
                traceback.print_exc(file=sys.stdout)
        outcomes[outcome] += 1
        example.setdefault(outcome, seed)
    print(f"{run} cases from seed {first}")
    for outcome, count in outcomes.most_common():
        print(f"{count:6} {outcome} (seed {example[outcome]})")


if __name__ == "__main__":
    main()
