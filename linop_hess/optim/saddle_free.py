"""SaddleFree: steps −(|H| + λI)⁻¹g from one complex factorization, or by Lanczos products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess._validate import Nonsmooth, finite_real, whole
from linop_hess.lq.methods.plan import METHODS, make_plan
from linop_hess.optim.absolute import Subspace, krylov_subspace, rational_subspace
from linop_hess.optim.damping import Damping, Searched, as_damping, iterations
from linop_hess.optim.objective import Loss, Objective
from linop_hess.optim.quadratic.chain import ChainModel
from linop_hess.optim.quadratic.products import ProductModel
from linop_hess.optim.record import Tally
from linop_hess.optim.trial_optimizer import LocalModel, TrialOptimizer

_METHODS = ("auto", "rational", "lanczos")

# The subspace of one damping holds the steps of those that are larger by less than this.
_FAR = 1000.0


class SaddleFree(TrialOptimizer):
    """Saddle-free Newton: s = −(|H| + λI)⁻¹g, with the exact Hessian H of the batch.

    Of H + iλI one complex factorization is made a step, in time linear in depth. A few solves with it from g span a rational Krylov space
    in which |H| is free; there the step is found again at any other damping, so that refusals cost evaluations of the loss alone.
    Where factorizations are dear, the space is that of Lanczos products.

    Parameters
    ----------
    model : torch.nn.Module
    loss_fn : callable or None
    params : iterable, optional
        See `CurvatureOptimizer`.
    lr : float
        By which steps are multiplied.
    damping : Damping or float, optional
        By default `Searched()`, as another damping costs an evaluation of the loss alone; an object is one optimizer's alone.
    method : {"auto", "rational", "lanczos"}
        "auto" compares the plan's cost of a factorization with that of Lanczos products.
    poles : sequence of float
        Where H is factored, in terms of iλ: one factorization each.
    solves : int
        With each factorization.
    products : int, optional
        Lanczos products of a step; by default min(100, 2L), L being the number of stages.
    max_trials : int
        Points tried in a step.
    extrapolate : bool
        Whether a step is doubled while the loss falls, where it fell by more than the model promised: an evaluation of the loss each.
    nonsmooth, sharpness
        As in `linop_hess.linearize`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not usable.

    References
    ----------
    Y. Dauphin et al., "Identifying and attacking the saddle point problem in high-dimensional non-convex optimization", NeurIPS 2014.

    Examples
    --------
    >>> import torch
    >>> from linop_hess.optim import SaddleFree
    >>> _ = torch.manual_seed(0)
    >>> layers = [torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)]
    >>> model = torch.nn.Sequential(*layers).double()
    >>> x, y = torch.randn(4, 3).double(), torch.randn(4, 1).double()
    >>> opt = SaddleFree(model, torch.nn.functional.mse_loss)
    >>> for _ in range(60):
    ...     loss = opt.step(x, y)
    >>> loss < 1e-9
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss | None,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1.0,
        damping: Damping | float | None = None,
        method: str = "auto",
        poles: Sequence[float] = (1.0,),
        solves: int = 5,
        products: int | None = None,
        max_trials: int = 12,
        extrapolate: bool = True,
        nonsmooth: Nonsmooth = "generalized",
        sharpness: float | None = None,
    ) -> None:
        if method not in _METHODS:
            raise ValueError(f"expected method to be one of {list(_METHODS)}, got {method!r}: choose one")
        self.method = method
        self.poles = tuple(finite_real(pole, "a pole") for pole in poles)
        if not self.poles or min(self.poles) <= 0.0:
            raise ValueError(f"expected positive poles, got {list(poles)}: pass (1.0,) for one at the damping")
        self.solves = whole(solves, "solves", least=1)
        self.products = None if products is None else whole(products, "products", least=1)
        self._chosen: dict[tuple[Any, ...], str] = {}
        super().__init__(
            model,
            loss_fn,
            params,
            as_damping(damping, Searched()),
            max_trials,
            extrapolate,
            lr=lr,
            nonsmooth=nonsmooth,
            sharpness=sharpness,
        )

    def _local_model(self, objective: Objective, tally: Tally) -> LocalModel:
        if not objective.has_output:
            if self.method == "rational":
                objective.linearize()  # which says what is wrong
            count = self.products or iterations(sum(1 for _ in self.model.modules()))
            return _Products(*objective.gradient(), tally, count)
        lin = self._linearize(objective)
        chain = ChainModel(lin.analysis, lin.loss, lin.gradient_tensor, tally)
        count = self.products or iterations(lin.problem.length)
        key = (lin.problem.size, lin.problem.layout.n_out.tobytes())
        if key not in self._chosen:
            self._chosen[key] = self._choice(chain, count)
        return _SaddleFree(chain, self._chosen[key], self.poles, self.solves, count)

    def _choice(self, chain: ChainModel, count: int) -> str:
        """A method of the plan for complex factorizations, or "lanczos"."""
        if self.method == "lanczos":
            return "lanczos"
        plan = make_plan(chain.analysis, 1j)
        if self.method == "rational":
            return plan.choice
        v = chain.gradient[:, None]
        chain.product(v)
        start = time.perf_counter()
        chain.product(v)
        product = time.perf_counter() - start
        rational = len(self.poles) * (plan.costs[plan.choice].seconds + 4 * self.solves * product)
        return plan.choice if plan.fits(plan.choice) and rational <= count * product else "lanczos"


class _SaddleFree:
    """A subspace, made at the first damping asked for and again after several refusals."""

    def __init__(self, chain: ChainModel, method: str, poles: Sequence[float], solves: int, products: int) -> None:
        self.loss, self.curvature, self.change = chain.loss, chain, chain.change
        self._chain, self._method, self._poles, self._solves, self._products = chain, method, poles, solves, products
        self._space: Subspace | None = None
        self._made_at = 0.0

    def propose(self, damping: float) -> tuple[Tensor, float]:
        if not bool(self._chain.gradient.any()):
            return torch.zeros_like(self._chain.gradient), 0.0
        if self._space is None or (self._method != "lanczos" and damping > _FAR * self._made_at):
            self._space, self._made_at = self._made(damping), damping
        return self._space.step(damping)

    def _made(self, damping: float) -> Subspace:
        chain, tally = self._chain, self._chain.tally
        if self._method == "lanczos":
            tally.method = "lanczos"
            return krylov_subspace(chain.product, chain.gradient, self._products)
        firsts: list[Tensor] = []
        factored = []
        for pole in self._poles:
            with tally.factoring(self._method):
                factored.append(self._factored(complex(0.0, pole * damping), firsts))
        space = rational_subspace(factored, chain.product, chain.gradient, self._solves)
        tally.backward_error = _backward_error(space, firsts[0], complex(0.0, self._poles[0] * damping))
        return space

    def _factored(self, damping: complex, solutions: list[Tensor]) -> Callable[[Tensor], Tensor]:
        """Solves with H + damping·I, each of which is added to a list."""
        change = self._chain.analysis.at(damping)
        factors = METHODS[self._method].factor(change.analysis, change.damping)

        def solve(g: Tensor) -> Tensor:
            solutions.append(change.solve(factors, g))
            return solutions[-1]

        return solve


def _backward_error(space: Subspace, z: Tensor, damping: complex) -> float:
    """Of the first solve (H + damping·I) z = g/‖g‖, with Hz from the subspace, which holds z.

    Steps are right whatever it is, since H is applied by products: it tells how good the subspace is. ‖Kz‖ stands for ‖K‖‖z‖, which is
    no smaller: the norm of H would take as many products as half a factorization.
    """
    basis, image = space.basis.to(z.dtype), space.image.to(z.dtype)
    product = image @ (basis.mT @ z) + damping * z
    return float((basis[:, :1] - product).norm()) / (float(product.norm()) + 1.0)


class _Products(ProductModel):
    """|H| from products of a loss that no chain is known of."""

    def __init__(
        self, loss: float, gradient: Tensor, product: Callable[[Tensor], Tensor], tally: Tally, count: int
    ) -> None:
        super().__init__(loss, gradient, product, tally)
        self._count = count
        self._space: Subspace | None = None

    def propose(self, damping: float) -> tuple[Tensor, float]:
        if not bool(self.gradient.any()):
            return torch.zeros_like(self.gradient), 0.0
        if self._space is None:
            self.tally.method = "lanczos"
            self._space = krylov_subspace(self.product, self.gradient, self._count)
        return self._space.step(damping)

    def norm(self) -> float:
        """Largest |eigenvalue| within the subspace."""
        self.propose(1.0)
        return 0.0 if self._space is None else float(self._space.values.abs().max())

    def smallest_convex_damping(self) -> float:
        """Least damping that is convex within the subspace, from below."""
        self.propose(1.0)
        return 0.0 if self._space is None else max(0.0, -float(self._space.values.min()))
