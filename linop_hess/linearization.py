"""`linearize`: a network's first and second derivatives at its current parameters, as operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess._validate import finite_real
from linop_hess.autograd.calling import as_module, explained, refuse_empty, refuse_sparse, refuse_unusable_model
from linop_hess.autograd.snapshot import select_parameters
from linop_hess.curvature import ChainCurvature
from linop_hess.graph.build import Chain, build_chain
from linop_hess.graph.verification import Reference
from linop_hess.lq.accuracy import VERIFIED
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.methods.plan import Plan
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.lq.problem import Problem
from linop_hess.operators import pieces
from linop_hess.operators.inverse import HessianInverse, MethodName
from linop_hess.operators.operator import Operator
from linop_hess.operators.parameters import Named, ParameterTable
from linop_hess.operators.permutation import Permutation


def linearize(
    model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    *,
    params: str | Iterable[str] | Mapping[str, Tensor] | None = None,
    verify: bool | None = None,
) -> Linearization:
    """Compute first and second derivatives of loss_fn(model(inputs), targets), operation by operation.

    Parameters
    ----------
    model : torch.nn.Module or callable
        Any feed-forward model. A plain function is called as ``model(params, inputs)``, and `params` gives its parameters. An
        `nn.Sequential` of known layers is taken layer by layer; of any other model one run is recorded (docs/models.md).
    loss_fn : callable
        ``loss_fn(output, target)`` gives a scalar; one of three arguments is called as ``loss_fn(output, target, params)`` with the
        dict of parameters, for penalties on them.
    inputs : object
        A tensor, a tuple of what the model takes, ``model(*inputs)``, or anything else that it takes, as ``model(inputs)``.
    targets : object
        Passed to `loss_fn`.
    params : str, iterable of str, or mapping of str to Tensor, optional
        Names or glob patterns of the parameters to differentiate; the others are constants. Default: all that require gradients. Of a
        function the parameters themselves, by name.
    verify : bool, optional
        Whether to compare with double-backward products on random vectors (`Linearization.verify`). Default: where torch's own
        second derivatives of whole operations were taken. The gradient is always compared with autograd's.

    Returns
    -------
    Linearization
        A snapshot: later changes of the model do not change it.

    Raises
    ------
    UnsupportedModelError
        If the model is random, changes its buffers or parameters, has operations without a second derivative, or is parallel, compiled
        or scripted.
    ValueError
        If the loss is not scalar, nothing is trainable, the batch is empty, or a value or derivative is NaN or Inf (the layer is named).
    TypeError
        If inputs or parameters have an unusable dtype, or inputs are sparse.
    MemoryError
        If the derivatives of an operation, or the states between operations, do not fit; nothing has been allocated.

    Notes
    -----
    Kinks, as of ReLU, get the second derivative that holds almost everywhere: zero.
    """
    if not isinstance(model, nn.Module):
        model, params = as_module(model, params), None
    if isinstance(params, Mapping):
        raise TypeError("expected names of the model's parameters in params, got a mapping: pass its keys, or a plain function as model")
    refuse_unusable_model(model)
    names = select_parameters(model, params)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(output, target), got {type(loss_fn).__name__}")
    for what, value in (("inputs", inputs), ("targets", targets)):
        refuse_sparse(value, what)
        refuse_empty(value, what)
    with explained(inputs, dict(model.named_parameters())[names[0]]):
        chain = build_chain(model, loss_fn, inputs, targets, names)
    lin = Linearization(chain, Reference(model, loss_fn, inputs, targets, chain.names))
    if verify or (verify is None and chain.unverified):
        lin.verify()
    return lin


class Linearization(Named):
    """First and second derivatives of a chain, as operators. Made by `linearize`.

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
        return ChainCurvature(self.analysis, self.parameter_table)

    @cached_property
    def _gauss_newton(self) -> ChainCurvature:
        return ChainCurvature(self.analysis.gauss_newton(), self.parameter_table)

    def gauss_newton(self) -> ChainCurvature:
        """Return the generalized Gauss-Newton matrix, shape (N, N): of all curvature only the loss's is kept."""
        return self._gauss_newton

    def damped(self, damping: float) -> Operator:
        """H + damping·I; see `ChainCurvature.damped`."""
        return self.H.damped(damping)

    def plan(self, damping: float) -> Plan:
        """Cost of each method; see `ChainCurvature.plan`."""
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
        and an ulp of the whole.

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
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.problem.size, probes, generator=generator, dtype=torch.float64)
        v = v.to(self.problem.dtype).to(self.problem.device)
        reference = self._reference.hessian()
        theirs = reference @ v
        gap = self.H @ v - theirs
        scale, worst = float(theirs.abs().max()), float(gap.abs().max())
        moved = reference.moved_by_rounding(v, theirs)
        if _is_rounding(gap, theirs, moved, [p.numel() for p in reference.parameters], reference.coarsest_eps):
            return worst / scale if scale else 0.0
        gap = gap.abs()
        raise ArithmeticError(
            f"the Hessian differs from double backward by {worst:.1e} of {scale:.1e}; suspected: {self._suspects(gap)}. "
            "Do not use this linearization; rewrite those layers in primitive operations"
        )

    def _suspects(self, gap: Tensor) -> str:
        if self._chain.unverified:
            return ", ".join(map(repr, self._chain.unverified))
        layout = self.problem.layout
        by_control = np.append(layout.in_chain_order(gap).max(1).values.cpu().numpy(), 0.0)
        by_stage = np.add.reduceat(by_control, layout.x_offsets[:-1]) * (layout.p > 0)
        return f"at or after stage {self.problem.name(int(by_stage.argmax()))}"

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model, which may not pickle; everything but `verify` survives."""
        return {**self.__dict__, "_reference": None}


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
