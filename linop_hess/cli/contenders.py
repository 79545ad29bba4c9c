"""The optimizers of ``train`` and ``bench-train``, each as a function that takes steps until its trace ends it."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess import tasks
from linop_hess.cli.kfac import KFAC
from linop_hess.cli.trace import Finished, Trace
from linop_hess.optim import DelayedGratification, GaussNewton, HessianFree, PreconditionedSGD, SaddleFree, TrustRegion
from linop_hess.optim.trial_optimizer import TrialOptimizer
from linop_hess.tasks import ControlRecord, LearningTask, ShootingTask

Task = LearningTask | ShootingTask


@dataclass(frozen=True)
class Contender:
    """An optimizer.

    Attributes
    ----------
    label : str
        As tables and figures have it.
    run : callable
        ``run(task, trace, rate)`` adds losses to the trace until that ends it.
    rates : tuple of float
        The grid its rate is chosen from, the middle by default; empty where steps have a length of their own.
    has_rate : bool
        Whether steps can be multiplied.
    why_not : callable
        Why it cannot run on a task; empty where it can.
    """

    label: str
    run: Callable[[Any, Trace, float | None], None]
    rates: tuple[float, ...] = ()
    has_rate: bool = True
    why_not: Callable[[Any], str] = lambda _: ""

    @property
    def rate(self) -> float | None:
        """The rate where none is said; None where steps have a length of their own."""
        return self.rates[len(self.rates) // 2] if self.rates else None


def run(contender: Contender, task: Task, trace: Trace, rate: float | None = None) -> Trace:
    """Let an optimizer train a task from where it is until the trace ends it, or it stops by itself; measure where it ended.

    A first step is made on a copy before the clock starts: it pays for what torch and this package set up once a process.
    """
    try:
        with suppress(Finished):
            contender.run(copy.deepcopy(task), Trace(most=1), rate)
        trace.start()
        contender.run(task, trace, rate)
    except Finished:
        pass
    except KeyboardInterrupt:
        trace.ended = "interrupted"
    if isinstance(task, LearningTask):
        trace.facts.update(task.measured())
    return trace


def contenders_of(task: Task) -> dict[str, Contender]:
    """Return the optimizers that are for a task, by name."""
    return CONTROL if isinstance(task, ShootingTask) else LEARNING


def _first_order(make: Callable[..., torch.optim.Optimizer]) -> Callable[[LearningTask, Trace, float | None], None]:
    def steps(task: LearningTask, trace: Trace, rate: float | None) -> None:
        opt = make(task.model.parameters(), lr=rate)
        while True:
            opt.zero_grad()
            loss = task.loss()
            trace.add(float(loss.detach()))
            loss.backward()
            opt.step()

    return steps


def _lbfgs(task: LearningTask, trace: Trace, rate: float | None) -> None:
    """With a strong Wolfe line search, started again where it stops; a step is an evaluation."""
    everything: dict[str, Any] = {"max_iter": 10**6, "max_eval": 10**7, "tolerance_grad": 0.0, "tolerance_change": 0.0}

    def closure() -> Tensor:
        opt.zero_grad()
        loss = task.loss()
        loss.backward()
        trace.add(float(loss.detach()))
        return loss

    before = -10
    while trace.steps - before >= 3:  # else it is at the end of its digits
        before = trace.steps
        opt = torch.optim.LBFGS(task.model.parameters(), history_size=20, line_search_fn="strong_wolfe", **everything)
        opt.step(closure)


def _curved(
    make: Callable[..., Any], after: Callable[[Any], None] = lambda _: None
) -> Callable[[LearningTask, Trace, float | None], None]:
    """Of optimizers that know the model; where steps may go uphill, it ends where the loss was least."""

    def steps(task: LearningTask, trace: Trace, rate: float | None) -> None:
        opt = make(task.model, task.loss_fn, **({} if rate is None else {"lr": rate}))
        trace.add(float(task.loss().detach()))
        try:
            while True:
                opt.step(task.inputs, task.targets)
                loss = opt.last.new_loss
                trace.add(loss if math.isfinite(loss) else float(task.loss().detach()), str(opt.last))
                after(opt)
        except Finished:
            if isinstance(opt, TrialOptimizer) and any(record.accepted for record in opt.records):
                opt.return_to_least()
            raise

    return steps


def _sharper(opt: SaddleFree) -> None:
    if opt.last.accepted and opt.sharpness is not None:
        opt.sharpness = min(_SHARPER * opt.sharpness, _SHARPEST)


# Sharpness of surrogates for kinks: at first, by how much it rises a step that is taken, and at most.
_BLUNT, _SHARPER, _SHARPEST = 2.0, 1.1, 1e3


def _smooth(model: nn.Module, loss_fn: Any, **how: Any) -> SaddleFree:
    return SaddleFree(model, loss_fn, nonsmooth="smooth", sharpness=_BLUNT, **how)


def _geodesic(model: nn.Module, loss_fn: Any, **how: Any) -> GaussNewton:
    return GaussNewton(model, loss_fn, geodesic=True, **how)


def _uphill(kind: Callable[..., Any], model: nn.Module, loss_fn: Any, **how: Any) -> Any:
    return kind(model, loss_fn, damping=DelayedGratification(1.0), **how)


def _early(model: nn.Module, loss_fn: Any, **how: Any) -> HessianFree:
    """CG that ends early, which damps by itself, so that λ may fall as far as it will."""
    return HessianFree(model, loss_fn, damping=DelayedGratification(), tolerance=_EARLY, **how)


_EARLY = 5e-3


def _control(method: Callable[..., Any], **how: Any) -> Callable[[ShootingTask, Trace, float | None], None]:
    def steps(task: ShootingTask, trace: Trace, rate: float | None) -> None:
        def watch(record: ControlRecord) -> None:
            note = f"|gradient| {record.gradient_norm:.1e}, damping {record.damping:.1e}, length {record.length:.2g}"
            trace.facts = {"gradient norm": record.gradient_norm}
            trace.add(record.cost, note)

        method(task.control, task.controls, most=10**6, watch=watch, **how)

    return steps


def _sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def _why_no_kfac(task: LearningTask) -> str:
    if importlib.util.find_spec("curvlinops") is None:
        return "needs curvlinops, which is not installed: pip install curvlinops-for-pytorch"
    if not isinstance(task.loss_fn, nn.CrossEntropyLoss | nn.MSELoss) or not isinstance(task.inputs, Tensor):
        return "curvlinops knows cross entropy and mean squared error alone"
    return ""


def _why_no_tensor(task: LearningTask) -> str:
    with torch.no_grad():
        return "" if isinstance(task.model(task.inputs), Tensor) else "is for models whose output is one tensor"


LEARNING: dict[str, Contender] = {
    "sgd": Contender("SGD + momentum", _first_order(_sgd), (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "adam": Contender("Adam", _first_order(torch.optim.Adam), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "lbfgs": Contender("L-BFGS", _lbfgs, has_rate=False),
    "hessian-free": Contender("Hessian-free CG", _curved(HessianFree), why_not=_why_no_tensor),
    "kfac": Contender("K-FAC", _curved(KFAC), why_not=_why_no_kfac),
    "saddle-free": Contender("SaddleFree", _curved(SaddleFree)),
    "gauss-newton": Contender("GaussNewton", _curved(GaussNewton)),
    "gauss-newton-geodesic": Contender("GaussNewton, geodesic", _curved(_geodesic)),
    "saddle-free-uphill": Contender("SaddleFree, uphill", _curved(partial(_uphill, SaddleFree))),
    "gauss-newton-uphill": Contender("GaussNewton, uphill", _curved(partial(_uphill, GaussNewton))),
    "hessian-free-uphill": Contender("Hessian-free CG, uphill", _curved(_early), why_not=_why_no_tensor),
    "saddle-free-smooth": Contender("SaddleFree, smooth", _curved(_smooth, _sharper)),
    "trust-region": Contender("TrustRegion", _curved(TrustRegion)),
    "preconditioned-sgd": Contender("PreconditionedSGD", _curved(PreconditionedSGD), (3e-2, 1e-1, 3e-1)),
}
"""For learning tasks; those that are compared where nothing else is said come first."""

COMPARED = ("sgd", "adam", "lbfgs", "hessian-free", "kfac", "saddle-free", "gauss-newton")

CONTROL: dict[str, Contender] = {
    "newton": Contender("exact Newton", _control(tasks.newton), has_rate=False),
    "gauss-newton": Contender("iLQR (Gauss-Newton)", _control(tasks.newton, curvature="gauss-newton"), has_rate=False),
    "lbfgs": Contender("L-BFGS", _control(tasks.lbfgs), has_rate=False),
}
"""For optimal control."""
