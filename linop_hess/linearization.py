"""`linearize`: a network's first and second derivatives at its current parameters, as operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess._validate import finite_real
from linop_hess.autograd.calling import NOT_GIVEN, as_module, explained, refuse_batches, refuse_empty, refuse_sparse
from linop_hess.autograd.snapshot import select_parameters
from linop_hess.autograd.untouched import exclusively, untouched_randomness
from linop_hess.curvature import ChainCurvature
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.build import Chain, build_chain
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.graph.verification import PrimitiveNorms, Reference
from linop_hess.lq.accuracy import BACKWARD_CONSTANTS, VERIFIED
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.lq.problem import Problem
from linop_hess.operators import pieces
from linop_hess.operators.convert import plain_arithmetic
from linop_hess.operators.inverse import HessianInverse, MethodName
from linop_hess.operators.operator import Operator
from linop_hess.operators.parameters import Named, ParameterTable
from linop_hess.operators.permutation import Permutation
from linop_hess.per_sample import SampleGradients
from linop_hess.stored import Storable
from linop_hess.tables import NetworkPlan, StageTable


def linearize(
    model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any = NOT_GIVEN,
    *,
    params: str | Iterable[str] | Mapping[str, Tensor] | None = None,
    verify: bool | None = None,
    nonsmooth: str = "generalized",
    sharpness: float | None = None,
    differentiation: str = "autograd",
) -> Linearization:
    """Compute first and second derivatives of loss_fn(model(inputs), targets), operation by operation.

    Parameters
    ----------
    model : torch.nn.Module or callable
        Any feed-forward model. A plain function is called as ``model(params, inputs)``, and `params` gives its parameters. An
        `nn.Sequential` of known layers is taken layer by layer; of any other model one run is recorded (docs/models.md).
    loss_fn : callable
        ``loss_fn(output, target)`` gives a scalar; one of three arguments is called as ``loss_fn(output, target, params)`` with the
        dict of parameters, for penalties on them. Separable ones, as weight decay, cost nothing: they are a diagonal of H.
    inputs : object
        Of one batch: a tensor, a tuple of what the model takes, ``model(*inputs)``, or anything else that it takes, as ``model(inputs)``.
    targets : object
        Of the same batch; passed to `loss_fn`.
    params : str, iterable of str, or mapping of str to Tensor, optional
        Names or glob patterns of the parameters to differentiate; the others are constants. Default: all that require gradients. Of a
        function the parameters themselves, by name.
    verify : bool, optional
        Whether to compare with double-backward products on random vectors (`Linearization.verify`). Default: where torch's own
        second derivatives of whole operations were taken. The gradient is always compared with autograd's.
    nonsmooth : {"generalized", "smooth", "error"}, optional
        What happens at kinks, as those of ReLU, |x|, clamp and max-pooling. "generalized": the second derivative is the one that holds
        almost everywhere, so that kinks add none. "smooth": they have the curvature of a smooth surrogate, as softplus for ReLU; loss,
        gradient and all first derivatives stay the model's. "error": there must be none; what drives one by comparing, sorting,
        indexing or branching counts. The same as in `linop_hess.Hessian`.
    sharpness : float, optional
        β > 0 of the surrogates, for "smooth" only: kinks are spread over a width of about 1/β. By default 5.
    differentiation : {"autograd", "finite"}, optional
        "finite": an operation that has no second derivative in torch, as `torch.cdist`, gets its own by differences of its first
        derivatives, with about ten digits in float64; all others stay exact. Its stage's name says "by differences".

    Returns
    -------
    Linearization
        A snapshot: later changes of the model do not change it.

    Raises
    ------
    UnsupportedModelError
        If the model is random, changes its buffers or parameters, has operations without a second derivative, or is parallel, compiled
        or scripted; if there are kinks, and `nonsmooth` forbids them or has no surrogate; if differences do not converge.
    ValueError
        If `nonsmooth` or `differentiation` is unknown, a sharpness is not positive and finite or not asked for, or smooth comes together
        with finite; if the loss is not scalar, nothing is trainable, the batch is empty, or a value or derivative is NaN or Inf (the
        layer is named).
    TypeError
        If inputs or parameters have an unusable dtype, inputs are sparse, or several batches, as a DataLoader, or there are no targets.
    MemoryError
        If the derivatives of an operation, or the states between operations, do not fit; nothing has been allocated.
    """
    refuse_batches(inputs, targets)
    second = SecondDerivatives.of(nonsmooth, sharpness, differentiation)
    with exclusively(model, loss_fn):
        return _linearized(model, loss_fn, inputs, targets, params, verify, second)


def _linearized(
    model: Any, loss_fn: Any, inputs: Any, targets: Any, params: Any, verify: bool | None, second: SecondDerivatives
) -> Linearization:
    """The same, of a model that no other thread runs meanwhile."""
    if not isinstance(model, nn.Module):
        model, params = as_module(model, params), None
    if isinstance(params, Mapping):
        raise TypeError(
            "expected names of the model's parameters in params, got a mapping: pass its keys, or a plain function as model"
        )
    names = select_parameters(model, params)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(output, target), got {type(loss_fn).__name__}")
    for what, value in (("inputs", inputs), ("targets", targets)):
        refuse_sparse(value, what)
        refuse_empty(value, what)
    parameter = model.get_parameter(names[0])
    device = parameter.device
    with explained(inputs, parameter), untouched_randomness(device), plain_arithmetic(device):
        chain = build_chain(model, loss_fn, inputs, targets, names, second)
    lin = Linearization(chain, Reference(model, loss_fn, inputs, targets, chain.names, second, bool(chain.differenced)))
    # What is left to differences has been compared with those of other steps.
    if verify or (verify is None and set(chain.unverified) - set(chain.differenced)):
        lin.verify()
    return lin


class Linearization(Named, Storable, SampleGradients):
    """First and second derivatives of a network, as operators. Made by `linearize`.

    Attributes
    ----------
    loss : float
    names : tuple of str
        The parameters, in the order of the flat vectors, which is that of `model.named_parameters()`.
    problem : lq.Problem
        The LQ problem behind every operator.
    parameter_table : ParameterTable
        Names and shapes of the parameters.
    analysis : lq.Analysis
        What all factorizations of H share.
    """

    def __init__(self, chain: Chain, reference: Reference | None = None) -> None:
        self.problem: Problem = chain.problem
        self.analysis = Analysis(chain.problem)
        self.loss = chain.loss
        self.parameter_table = ParameterTable(chain.names, chain.shapes, self.problem.dtype, self.problem.device)
        self._chain = chain
        self._reference = reference

    @property
    def gradient(self) -> np.ndarray:
        """Gradient of the loss, shape (N,), a fresh array."""
        return self._chain.gradient.cpu().numpy().copy()

    @property
    def gradient_tensor(self) -> Tensor:
        """The same as a fresh tensor, on the device of the parameters."""
        return self._chain.gradient.clone()

    @cached_property
    def M(self) -> Operator:
        """M, unit lower block bidiagonal with −F_l."""
        return pieces.Transition(self.problem)

    @cached_property
    def M_inv(self) -> Operator:
        """M⁻¹, by substitution."""
        return pieces.InverseTransition(self.problem)

    @cached_property
    def P(self) -> Operator:
        """P, the block down-shift (z_1..z_L) to (z_0..z_{L−1})."""
        return pieces.Shift(self.problem)

    @cached_property
    def D_x(self) -> Operator:
        """D_x, block diagonal with G_l."""
        return pieces.ParameterJacobian(self.problem)

    @cached_property
    def DD_xx(self) -> Operator:
        """D_D D_xx, block diagonal with A_l."""
        return pieces.ParameterCurvature(self.problem)

    @cached_property
    def DD_zx(self) -> Operator:
        """D_D D_zx, block diagonal with B_l."""
        return pieces.MixedCurvature(self.problem)

    @property
    def DM_xz(self) -> Operator:
        """D_M D_xz, the adjoint of `DD_zx`."""
        return self.DD_zx.H

    @cached_property
    def DM_zz(self) -> Operator:
        """D_M D_zz, block diagonal with C_l."""
        return pieces.StateCurvature(self.problem)

    @cached_property
    def H(self) -> ChainCurvature:
        """The Hessian, shape (N, N)."""
        return ChainCurvature(self.analysis, self.parameter_table, self._chain.cuts)

    @cached_property
    def _gauss_newton(self) -> ChainCurvature:
        return ChainCurvature(self.analysis.gauss_newton(), self.parameter_table, self._chain.cuts)

    def gauss_newton(self) -> ChainCurvature:
        """Return the generalized Gauss-Newton matrix, shape (N, N): of all curvature only the loss's is kept.

        The loss counts as a function of the model's output and, where it reads them, of the parameters, so that a penalty has its full
        Hessian, as in `linop_hess.GaussNewton`.

        Raises
        ------
        UnsupportedModelError
            If the loss reads what the model computed before its output, as one that differentiates the output does: then no output
            tells model and loss apart.
        """
        if self._chain.looks_inside:
            raise UnsupportedModelError(
                "expected a loss of the model's output and the parameters for a Gauss-Newton matrix, got one that reads what the model "
                f"computed before its output, in {self._chain.looks_inside}, as losses do that differentiate the output: use H, or "
                "return from the model what the loss needs"
            )
        return self._gauss_newton

    def damped(self, damping: float) -> Operator:
        """H + damping·I; see `ChainCurvature.damped`."""
        return self.H.damped(damping)

    @cached_property
    def stages(self) -> StageTable:
        """The stages, a row each: name in the model, operation, sizes, samples, live entries after it, and where derivatives come from."""
        return StageTable(self.problem)

    def plan(self, damping: float = 1.0) -> NetworkPlan:
        """Cost of each method, the widest cuts and what lives there; see `ChainCurvature.plan`."""
        return self.H.plan(damping)

    def inverse(self, damping: float, method: MethodName = "auto", *, tolerance: float | None = None) -> HessianInverse:
        """(H + damping·I)⁻¹, exactly; see `HessianInverse` for parameters and errors."""
        return self.H.inverse(damping, method, tolerance=tolerance)

    def inertia(self, damping: float) -> Inertia:
        """Signs of the eigenvalues of H + damping·I; see `ChainCurvature.inertia`."""
        return self.H.inertia(damping)

    def count_eigenvalues(self, a: float, b: float) -> int:
        """Count the eigenvalues of H in (a, b]; see `ChainCurvature.count_eigenvalues`."""
        return self.H.count_eigenvalues(a, b)

    def smallest_convex_damping(self, margin: float = 0.0, rtol: float = 1e-3) -> float:
        """Return the least damping that makes H + damping·I positive definite; see `ChainCurvature.smallest_convex_damping`."""
        return self.H.smallest_convex_damping(margin, rtol)

    def extreme_eigenvalues(self, rtol: float = 1e-8) -> tuple[float, float]:
        """Smallest and largest eigenvalue of H; see `ChainCurvature.extreme_eigenvalues`."""
        return self.H.extreme_eigenvalues(rtol)

    def condition_number(self, damping: float) -> float:
        """‖H + damping·I‖·‖(H + damping·I)⁻¹‖; see `ChainCurvature.condition_number`."""
        return self.H.condition_number(damping)

    def augmented(self, damping: float) -> Operator:
        """𝒦 at `damping`, in the unknowns (x, y, z).

        Raises
        ------
        ValueError, TypeError
            If damping is not a finite real number.
        """
        return pieces.Augmented(self.problem, finite_real(damping, "damping"))

    @cached_property
    def permutation(self) -> Permutation:
        """Π, which regroups (x, y, z) layer by layer."""
        return pieces.layerwise_permutation(self.problem)

    def block_tridiagonal(self, damping: float) -> Operator:
        """𝒦' = Π 𝒦 Πᵀ, block tridiagonal with the blocks of `block_sizes`.

        Raises
        ------
        ValueError, TypeError
            If damping is not a finite real number.
        """
        return self.permutation @ self.augmented(damping) @ self.permutation.T

    @property
    def block_sizes(self) -> np.ndarray:
        """Sizes p_l + 2 n_l of the blocks of 𝒦', shape (L,)."""
        return self.problem.layout.p + 2 * self.problem.layout.n_out

    def verify(self, probes: int = 2) -> float:
        """Compare `H` with double-backward products on random vectors.

        They must agree parameter by parameter to what rounding explains: how far an ulp in the parameters moves the products,
        and an ulp of the whole. Where an operation was left to differences, differences of the gradient are compared with, to
        what these move when their step is halved.

        Parameters
        ----------
        probes : int
            Number of random vectors.

        Returns
        -------
        float
            The largest relative difference, about 1e-13 in float64 when all is well.

        Raises
        ------
        ArithmeticError
            If they disagree; the message names the layers suspected.
        RuntimeError
            If the model changed since, or there is no model to compare with.
        ValueError
            If `probes` is less than 1.
        """
        if probes < 1:
            raise ValueError(f"probes must be at least 1, got {probes}")
        if self._reference is None:
            raise RuntimeError("this linearization was stored without its model, so it cannot be compared with it")
        with exclusively(self._reference.model, self._reference.loss_fn):
            return self._verified(self._reference, probes)

    def _verified(self, compared: Reference, probes: int) -> float:
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.problem.size, probes, generator=generator, dtype=torch.float64, device="cpu")
        v = v.to(self.problem.dtype).to(self.problem.device)
        with untouched_randomness(self.problem.device), PrimitiveNorms():
            reference = compared.hessian()
            theirs = reference @ v
            moved = reference.moved_by_rounding(v, theirs)
            sizes = [p.numel() for p in reference.parameters]
        gap = self.H @ v - theirs
        scale, worst = float(theirs.abs().max()), float(gap.abs().max())
        unit = reference.coarsest_eps
        if reference.differentiation == "finite":
            unit = max(unit, reference.differences_gap, BACKWARD_CONSTANTS)
        is_rounding = _is_rounding(gap, theirs, moved, sizes, unit)
        if not is_rounding:
            # What the parameters' last digits do not explain those of all that is computed from them may.
            with untouched_randomness(self.problem.device), PrimitiveNorms():
                moved = reference.moved_by_any_rounding(v, theirs)
        if is_rounding or _is_rounding(gap, theirs, moved, sizes, unit):
            return worst / scale if scale else 0.0
        gap = gap.abs()
        raise ArithmeticError(
            f"the Hessian differs from double backward by {worst:.1e} of {scale:.1e}; suspected: {self._suspects(gap)}. "
            "Do not use this linearization; rewrite those layers in primitive operations"
        )

    def _suspects(self, gap: Tensor) -> str:
        if self._chain.unverified:
            return ", ".join(map(repr, self._chain.unverified))
        layout, table = self.problem.layout, self.parameter_table
        largest = gap.max(1).values
        by_control = np.append(layout.in_chain_order(largest).cpu().numpy(), 0.0)
        by_stage = np.add.reduceat(by_control, layout.x_offsets[:-1]) * (layout.p > 0)
        parts = table.unflatten(largest)
        parameter = max(parts, key=lambda name: float(parts[name].sum()))
        return f"at or after stage {self.problem.name(int(by_stage.argmax()))}, where parameter {parameter} is used"

    def __repr__(self) -> str:
        stages, dtype = len(self.stages), str(self.problem.dtype).removeprefix("torch.")
        return (
            f"<Linearization of {self.problem.size:,} parameters in {stages:,} stages, {dtype}, loss {self.loss:.6g}>"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model, which may not pickle, and without operators; everything but `verify` survives."""
        kept = ("problem", "analysis", "loss", "parameter_table", "_chain")
        return {**{name: self.__dict__[name] for name in kept}, "_reference": None}


def _is_rounding(gap: Tensor, products: Tensor, moved: Tensor, sizes: Sequence[int], unit: float) -> bool:
    """Whether a gap between products is within what rounding explains, in each parameter's entries; all of shape (N, k)."""
    if (
        gap.is_cuda
        and gap.dtype == torch.float32
        and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    ):
        unit = max(unit, 2.0**-11)  # products in TensorFloat-32 have ten bits
    floor = unit * torch.linalg.vector_norm(products, dim=0)
    pieces = zip(gap.split(sizes), moved.split(sizes), strict=True)
    norms = ((torch.linalg.vector_norm(g, dim=0), torch.linalg.vector_norm(m, dim=0)) for g, m in pieces)
    return all(bool((seen <= VERIFIED * (explained + floor)).all()) for seen, explained in norms)
