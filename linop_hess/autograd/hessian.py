"""The Hessian and the Gauss-Newton matrix of any torch model by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess.autograd.differentiate import Gradients, differentiate, joined, once_differentiable_graphs
from linop_hess.autograd.empirical_risk import Computation, RiskCurvature
from linop_hess.autograd.finite import Differenced, step_size
from linop_hess.autograd.recording import Product, Recording
from linop_hess.autograd.snapshot import frozen_copy
from linop_hess.errors import UnsupportedModelError


class Hessian(RiskCurvature):
    r"""The Hessian of a model's loss, by Pearlmutter products.

    .. math:: H v = \nabla_\theta \big( \nabla_\theta \ell(\theta)^\top v \big)

    The graph of the gradient is recorded once and kept, so that a product is one backward pass through it; no
    matrix is formed. Blocks are multiplied by batched backward passes where those are right and faster. The operator
    keeps its own copy of the model, so later changes of the model do not change it; the data are referred to, and
    where they have changed the graph is recorded anew.

    Parameters
    ----------
    model : torch.nn.Module
        Any module that maps a batch of inputs to an output, twice differentiable but for kinks, see `nonsmooth`.
    loss_fn : callable
        ``loss_fn(output, targets)`` returns a scalar tensor.
    data : tuple or iterable of tuples
        One batch ``(inputs, targets)``, or a re-iterable of batches (a list, a DataLoader). The operator is
        that of the loss of all data at once, also for batches of unequal sizes.
    params : iterable of str, optional
        Names of the parameters to differentiate by; the others are constants. By default all that require a
        gradient. Flat vectors are in the order of `model.named_parameters()`.
    reduction : {"sum", "mean"}, optional
        How `loss_fn` combines the samples of a batch. Read from ``loss_fn.reduction`` where there is one, and
        not needed for a single batch.
    progress : bool, optional
        Show a progress bar over batches (needs tqdm).
    check_deterministic : bool, optional
        Evaluate loss and gradient twice and raise where they differ.
    check_symmetric : bool, optional
        Apply the operator to two random vectors and raise where uᵀHv and vᵀHu differ. torch's second
        derivatives of some fused operations are wrong without a word (`torch.nn.utils.weight_norm`), and this
        shows it.
    retain_graph : bool, optional
        Keep the graphs between products, each batch's while half of the memory that was free when the operator
        was made stays free; `release` frees them. Products are the same without, and take about 1.6 times as
        long. By default they are kept where `check_deterministic` has shown that the loss is a fixed function. A
        graph is used for data equal to those it was recorded with, so a DataLoader that shuffles gains nothing;
        after changing anything else that `loss_fn` refers to, call `release`.
    nonsmooth : {"generalized", "smooth", "error"}, optional
        What happens at kinks, as those of ReLU, |x|, clamp and max-pooling. "generalized": the second derivative is the one
        that holds almost everywhere, so that kinks add none. "smooth": they have the curvature of a smooth surrogate,
        as softplus for ReLU; loss, gradient and all first derivatives stay the model's. "error": there must be none;
        what drives one by comparing, sorting, indexing or branching counts.
    sharpness : float, optional
        β > 0 of the surrogates, for "smooth" only: kinks are spread over a width of about 1/β. By default 5, for inputs
        of unit scale and some hundred samples.
    differentiation : {"autograd", "finite"}, optional
        "finite": products by fourth-order differences of the gradient, four gradients a column, for models with
        operations that have no second derivative in torch (fused attention, `torch.cdist`, functions marked
        `once_differentiable`). The model runs with its own kernels. About 1e-11 of ‖Hv‖ in float64 and 1e-4 in float32 for
        smooth models; with kinks near the parameters less, or an error. Nothing is kept from product to product.

    Attributes
    ----------
    loss : float
        The loss at the parameters.
    gradient : numpy.ndarray, shape (n,)
        Its gradient.
    names : tuple of str
        The parameters, in order.
    retained_graphs : int
        The number of batches whose graphs are kept at present.

    Raises
    ------
    UnsupportedModelError
        If the loss is not a fixed function of the parameters (Dropout or BatchNorm in training mode), uses them
        other than through the model, an operation has no second derivative, or the model cannot be copied; if there are
        kinks, and `nonsmooth` forbids them or has no surrogate; if differences of the gradient do not converge.
    ValueError
        An unknown `nonsmooth` or `differentiation`, a sharpness that is not positive and finite or not asked for, smooth
        together with finite; no trainable or an unknown parameter, parameters on several devices, no batch, several batches without
        a known reduction, a loss that is no scalar, not finite, or does not depend on the parameters.
    TypeError
        Parameters that are neither float32 nor float64 or of mixed dtypes, a one-shot iterator of batches, a loss that is
        no tensor.
    ImportError
        If `progress` is set and tqdm is not installed.

    References
    ----------
    B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).

    Examples
    --------
    >>> import torch
    >>> from linop_hess.autograd import Hessian
    >>> from linop_hess.operators import to_dense
    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> H = Hessian(torch.nn.Linear(1, 1), torch.nn.MSELoss(reduction="sum"), (x, y))
    >>> to_dense(H)
    array([[10.,  6.],
           [ 6.,  4.]], dtype=float32)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        params: Iterable[str] | None = None,
        reduction: str | None = None,
        progress: bool = False,
        check_deterministic: bool = True,
        check_symmetric: bool = True,
        retain_graph: bool | None = None,
        nonsmooth: str = "generalized",
        sharpness: float | None = None,
        differentiation: str = "autograd",
    ) -> None:
        if differentiation not in ("autograd", "finite"):
            raise ValueError(
                f'expected differentiation to be "autograd" or "finite", got {differentiation!r}: pass one of the two'
            )
        if differentiation == "finite" and nonsmooth == "smooth":
            raise ValueError(
                'expected nonsmooth="generalized" or "error" with differentiation="finite", got "smooth": differences of the '
                "model's gradient know no surrogate"
            )
        self.differentiation = differentiation
        self._shrink = 1.0
        super().__init__(
            model,
            loss_fn,
            data,
            params=params,
            reduction=reduction,
            progress=progress,
            check_deterministic=check_deterministic,
            check_symmetric=check_symmetric,
            retain_graph=False if self._is_finite else retain_graph,
            nonsmooth=nonsmooth,
            sharpness=sharpness,
        )

    @property
    def _is_finite(self) -> bool:
        return self.differentiation == "finite"

    def _computation(self, inputs: Any, targets: Any) -> Computation:
        return Computation(lambda: self.loss_fn(self._output(inputs), targets), self.parameters)

    def _record(self, inputs: Any, targets: Any) -> Product:
        if self._is_finite:
            return self._differenced(inputs, targets)
        parameters = self.parameters
        loss, points, slopes = self._smoothed(self._computation(inputs, targets))
        gradient = joined(
            differentiate([loss, *points], parameters, [None, *slopes], create_graph=True),
            parameters,
        )

        def product(v: Tensor, batched: bool) -> Gradients:
            return differentiate([gradient], parameters, [v], retain_graph=True, batched=batched)

        return Recording(product, [gradient], parameters)

    def _differenced(self, inputs: Any, targets: Any) -> Differenced:
        """The products of one batch, at a copy of the model that is moved about."""
        twin = frozen_copy(self.model)
        named = dict(twin.named_parameters())
        moved = [named[name].requires_grad_() for name in self.names]
        sizes = [parameter.numel() for parameter in moved]

        def gradient(point: Tensor) -> Tensor:
            with torch.no_grad():
                for parameter, part in zip(moved, point.split(sizes), strict=True):
                    parameter.copy_(part.view_as(parameter))
            with self._differentiable():
                loss = self._loss(twin(inputs), targets)
                return joined(differentiate([loss], moved), moved).detach()

        return Differenced(gradient, self._origin, self._shrink)

    @property
    def _origin(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])

    def _differentiable(self) -> Any:
        return once_differentiable_graphs(self.device) if self._is_finite else super()._differentiable()

    def _refuse_graph(self, loss: Tensor) -> None:
        if self._is_finite:
            self._refuse_direct(loss)
        else:
            super()._refuse_graph(loss)

    def _check_symmetric(self, scale: float) -> None:
        if not self._is_finite:
            super()._check_symmetric(scale)
            return
        eps = torch.finfo(self.torch_dtype).eps
        step = step_size(self._origin, self._probes()[:, 0])
        found = {}
        for shrink in (1.0, 2.0**-4, 2.0**-8):
            self._shrink = shrink
            found[shrink] = self._differences_agree(1e3 * eps * scale / (step * shrink))
            if found[shrink] <= eps**0.6:
                return
        self._shrink = min(found, key=lambda shrink: found[shrink])
        if found[self._shrink] > eps**0.4:
            raise UnsupportedModelError(
                "expected differences of the gradient to converge to a symmetric matrix, got a relative gap of "
                f"{found[self._shrink]:.1g}: there are kinks near the parameters (ReLU, max-pooling), which "
                'differentiation="autograd" does not see, or the backward pass of some operation is not its derivative'
            )

    def _differences_agree(self, floor: float) -> float:
        """Return by what products with random vectors differ from those with half the step, and from symmetry."""
        probes = self._probes()
        products, shrink = self._apply(probes), self._shrink
        self._shrink = shrink / 2
        halved = self._apply(probes)
        self._shrink = shrink
        gap = torch.linalg.vector_norm(products - halved, dim=0)
        asymmetry = (probes[:, 0] @ products[:, 1] - probes[:, 1] @ products[:, 0]).abs()
        lengths, images = torch.linalg.vector_norm(probes, dim=0), torch.linalg.vector_norm(products, dim=0)
        sizes = images + floor
        return float(torch.maximum((gap / sizes).max(), asymmetry / (lengths * sizes.flip(0)).sum()))


class GaussNewton(RiskCurvature):
    r"""The generalized Gauss-Newton matrix of a model's loss.

    .. math:: G v = J^\top \, \nabla^2_z \ell \, J v, \qquad J = \partial z / \partial \theta

    with z the model's output, a tensor. Jv is the derivative of the linear map u ↦ Jᵀu, so all is double
    backward. For a loss convex in z, G is positive semidefinite. Parameters, attributes and errors are those
    of `Hessian`, but for `differentiation`; `nonsmooth` is about kinks of the loss, as of the model there are no second
    derivatives.

    References
    ----------
    N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
    Computation 14 (2002).
    """

    def _output(self, inputs: Any) -> Tensor:
        output = self.model(inputs)
        if not isinstance(output, Tensor):
            raise TypeError(
                "expected a model whose output is one tensor, as the Gauss-Newton matrix needs, got "
                f"{type(output).__name__}: wrap the model so that it returns the tensor the loss is taken of"
            )
        return output

    def _computation(self, inputs: Any, targets: Any) -> Computation:
        leaf = self._output(inputs).detach().requires_grad_()
        return Computation(lambda: self.loss_fn(leaf, targets), [leaf])

    def _record(self, inputs: Any, targets: Any) -> Product:
        parameters = self.parameters
        output = self._output(inputs)
        cotangent = torch.zeros_like(output, requires_grad=True)
        pullback = joined(differentiate([output], parameters, [cotangent], create_graph=True), parameters)
        leaf = output.detach().requires_grad_()
        loss, points, slopes = self._smoothed(Computation(lambda: self.loss_fn(leaf, targets), [leaf]))
        slope = differentiate([loss, *points], [leaf], [None, *slopes], create_graph=True)

        def product(v: Tensor, batched: bool) -> Gradients:
            pushed = differentiate([pullback], [cotangent], [v], retain_graph=True, batched=batched)
            if pushed[0] is None:
                return [None] * len(parameters)
            curved = differentiate(slope, [leaf], pushed, retain_graph=True, batched=batched)
            if curved[0] is None:
                return [None] * len(parameters)
            return differentiate([output], parameters, curved, retain_graph=True, batched=batched)

        return Recording(product, [pullback, *(s for s in slope if s is not None)], parameters)
