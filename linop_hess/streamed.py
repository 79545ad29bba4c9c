"""The Hessian of several batches, linearized one at a time: nothing of the size of the data is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from torch import Tensor, nn

from linop_hess._validate import Differentiation, Reduction
from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.autograd.backward_graph import PrimitiveNorms
from linop_hess.autograd.batches import SameBatches
from linop_hess.autograd.calling import as_data, explained
from linop_hess.autograd.empirical_risk import RiskCurvature
from linop_hess.autograd.untouched import untouched_randomness
from linop_hess.curvature import ChainCurvature, HasHessian
from linop_hess.graph.build import Chain, build_chain, refuse_inside
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.problem import Problem
from linop_hess.lq.summed import SummedProblem
from linop_hess.operators.convert import plain_arithmetic
from linop_hess.operators.parameters import Named
from linop_hess.processes import ALONE, Processes
from linop_hess.tables import Cuts

_OF_STAGES = frozenset(
    "M M_inv P D_x DD_xx DD_zx DM_xz DM_zz augmented permutation block_tridiagonal block_sizes stages sample_gradients save verify".split()
)


class StreamedLinearization(Named, HasHessian):
    """First and second derivatives of a network by several batches. Made by `linearize` of an iterable of batches.

    Batches are gone through again for each product, and once for each dense matrix; what one needs is dropped before the next comes.
    Products are those of `linop_hess.Hessian` on the same batches, and the dense matrix is put together from the stages of each batch:
    either checks the other. Method "dense" is what factors it; the pieces of a chain, and the methods that work on them, need one batch.

    Attributes
    ----------
    loss : float
    names : tuple of str
        The parameters, in the order of the flat vectors, which is that of `model.named_parameters()`.
    batches : int
        How many there are, in this process.
    processes : Processes
        Those that the samples are spread over.
    problem : lq.SummedProblem
        The sum over batches behind every answer.
    parameter_table : ParameterTable
        Names and shapes of the parameters.
    analysis : lq.Analysis
        What all factorizations of H share.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batches: Any,
        names: tuple[str, ...],
        second: SecondDerivatives,
        *,
        reduction: Reduction | None = None,
        weight_fn: Callable[[Any, Any], Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._second = second
        self._risk: dict[str, Any] = {"params": names, "reduction": reduction, "weight_fn": weight_fn}
        self._risk |= {"nonsmooth": second.nonsmooth, "sharpness": second.sharpness, "retain_graph": False}
        self._risk["group"] = processes
        with processes.together("reading batches"):
            self._data = SameBatches(batches)
        how: Differentiation = "finite" if second.finite else "autograd"
        with PrimitiveNorms():
            self._hessian = Hessian(model, loss_fn, self._data, differentiation=how, **self._risk)
        self.loss = self._hessian.loss
        self.batches = self._hessian.batches.count
        self.processes = processes
        self.parameter_table = self._hessian.parameter_table
        self.problem = self._summed(self._hessian, lambda chain: chain.problem)
        self.analysis = Analysis(self.problem)

    def __repr__(self) -> str:
        dtype = str(self.problem.dtype).removeprefix("torch.")
        return f"<StreamedLinearization of {self.problem.size:,} parameters by {self.batches:,} batches, {dtype}, loss {self.loss:.6g}>"

    def __getattr__(self, name: str) -> NoReturn:
        """Tell why what belongs to one chain is absent."""
        if name in _OF_STAGES:
            raise AttributeError(
                f"expected a linearization of one batch for {name}, got one of {self.batches} batches: linearize(model, loss_fn, inputs, "
                "targets) of one has it; a sum over batches has no chain of stages"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _summed(self, products: RiskCurvature, problem_of: Callable[[Chain], Problem]) -> SummedProblem:
        def parts() -> Iterator[tuple[Problem, float]]:
            for inputs, targets, weight in self._hessian.batches:
                yield problem_of(self._chain(inputs, targets)), weight

        def product(x: Tensor) -> Tensor:
            with PrimitiveNorms():
                return products @ x

        modules = self.parameter_table.modules()
        table = self.parameter_table
        return SummedProblem(
            parts,
            self.batches,
            list(modules.values()),
            table.dtype,
            table.device,
            product=product,
            processes=self._hessian.processes,
            names=list(modules),
        )

    def _chain(self, inputs: Any, targets: Any) -> Chain:
        """One batch as a chain."""
        hessian, parameter = self._hessian, self._hessian.parameters[0]
        device = parameter.device
        inputs, targets = as_data((inputs, targets), device)
        with explained(inputs, parameter), untouched_randomness(device), plain_arithmetic(device):
            return build_chain(hessian.model, hessian.loss_fn, inputs, targets, self.names, self._second)[0]

    @property
    def gradient(self) -> np.ndarray:
        """Gradient of the loss, shape (N,), a fresh array."""
        return self._hessian.gradient

    @property
    def gradient_tensor(self) -> Tensor:
        """The same as a fresh tensor, on the device of the parameters."""
        return self._hessian.gradient_tensor

    @cached_property
    def H(self) -> ChainCurvature:
        """The Hessian, shape (N, N)."""
        return ChainCurvature(self.analysis, self.parameter_table, _no_cuts(self.problem))

    @cached_property
    def _gauss_newton(self) -> ChainCurvature:
        with PrimitiveNorms():
            products = GaussNewton(self._hessian.model, self._hessian.loss_fn, self._data, **self._risk)
        problem = self._summed(products, _gauss_newton_of)
        return ChainCurvature(Analysis(problem), self.parameter_table, _no_cuts(problem))

    def gauss_newton(self) -> ChainCurvature:
        """Return the generalized Gauss-Newton matrix, shape (N, N); see `Linearization.gauss_newton`.

        Raises
        ------
        UnsupportedModelError
            If the loss reads what the model computed before its output.
        """
        return self._gauss_newton


def _gauss_newton_of(chain: Chain) -> Problem:
    refuse_inside(chain)
    return chain.problem.gauss_newton()


def _no_cuts(problem: SummedProblem) -> Cuts:
    return Cuts(None, np.zeros(0, dtype=np.int64), problem.dtype.itemsize)
