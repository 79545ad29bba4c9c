"""The Hessian and the Gauss-Newton matrix of any torch model by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linop_hess._validate import Differentiation, Nonsmooth, Reduction
from linop_hess.autograd.batches import Progress
from linop_hess.autograd.calling import call_model, of_the_output_alone, takes_parameters
from linop_hess.autograd.differentiate import Gradients, differentiate, joined, once_differentiable_graphs
from linop_hess.autograd.empirical_risk import Computation, RiskCurvature
from linop_hess.autograd.finite import Differenced, checked_differentiation, step_size
from linop_hess.autograd.recording import Product, Recording
from linop_hess.autograd.snapshot import frozen_copy
from linop_hess.errors import UnsupportedModelError
from linop_hess.processes import Processes


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
        Any module that maps a batch of inputs to an output, twice differentiable but for kinks, see `nonsmooth`. The
        output may be anything that `loss_fn` takes.
    loss_fn : callable
        ``loss_fn(output, targets)`` returns a scalar tensor. With three positional arguments it is called as
        ``loss_fn(output, targets, params)``, with a dict of the chosen parameters by name, as a penalty on the
        weights needs. It may differentiate the output by inputs that require a gradient.
    data : tuple or iterable of tuples
        One batch ``(inputs, targets)``, or a re-iterable of batches (a list, a DataLoader). The operator is
        that of the loss of all data at once, also for batches of unequal sizes. Inputs that are a tuple are the
        arguments of the model, ``model(*inputs)``; anything else, a dict included, is given as one. Inputs and
        targets are constants: a graph that leads from them to parameters is cut off.
    params : str or iterable of str, optional
        Parameters to differentiate by, by name or glob pattern (``"blocks.*.weight"``); the others are constants. By
        default all that require a gradient; of those that a pattern matches, too, only these are taken. Flat
        vectors are in the order of `model.named_parameters()`.
    reduction : {"sum", "mean"}, optional
        How `loss_fn` combines the samples of a batch. Read from ``loss_fn.reduction`` where there is one, and
        not needed for a single batch.
    progress : bool or callable, optional
        True shows a progress bar over batches where there is a terminal (needs tqdm), as it does everywhere in this package; a callable
        is called with the number of batches done in each pass.
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
    weight_fn : callable, optional
        ``weight_fn(inputs, targets)`` returns what the mean of a batch divides by, a number: of masked targets how many are not
        masked, the sum of the weights of a weighted mean, the number of tokens of sequences. By default the number of samples.
        For losses that average, over several batches.
    group : ProcessGroup, DeviceMesh of one dimension, or "world", optional
        Of torch.distributed: each of its processes gives samples of its own as `data`, as many as it has, and the operator is that of
        all of them, the same to the last bit in all. All make it, and multiply by it, together. See docs/batches.md.

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
    differences_gap : float
        By how much, relatively, products by differences were seen to move when the step is halved; 0 with autograd.
    processes : Processes
        Those that the samples are spread over: `rank`, `size`, and how many messages there were.

    Raises
    ------
    UnsupportedModelError
        If the loss is not a fixed function of the parameters (Dropout or BatchNorm in training mode), uses them
        other than through the model and its third argument, an operation has no second derivative, or the model
        cannot be copied or is parallel, compiled or scripted; if there are kinks, and `nonsmooth` forbids them or has
        no surrogate; if differences of the gradient do not converge.
    ValueError
        An unknown `nonsmooth` or `differentiation`, a sharpness that is not positive and finite or not asked for, smooth
        together with finite; no trainable or an unknown parameter, parameters on several devices or without data, no
        batch, several batches without a known reduction, several summed with a loss of three arguments, a loss that is
        no scalar, not finite, or does not depend on the parameters; several batches whose losses put together are not the
        sum of theirs with these weights; weights that are negative, not finite, all zero, or given with a sum.
    TypeError
        Parameters that are neither float32 nor float64 or of mixed dtypes, a one-shot iterator of batches, a loss that is
        no tensor.
    ImportError
        If `progress` is True and tqdm is not installed.
    ProcessError
        If a process of the group ended, does not answer within the group's timeout, or does something else than the others. An error
        in one process is one in all. What is not alike in all (parameters, buffers, loss, options, number of columns, vectors) is a
        ValueError.

    Notes
    -----
    That the loss of several batches is that of all data at once is checked when the operator is made: of each batch and the
    next, the loss of both together, its slopes by the model's output and its second derivatives, against the weighted sum of
    theirs. The outputs are put together along their first dimension, so this takes three evaluations of the loss a batch and
    none of the model, and a model that couples the samples of a batch is taken as it is. Where the loss is computed inside the
    model, or differentiates it, the inputs are put together and the values of the loss are compared. Batches that do not fit
    together, as sequences of unequal lengths, are compared with their own halves; what a `weight_fn` says of one such batch
    beside another is believed.

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
        reduction: Reduction | None = None,
        progress: Progress = False,
        check_deterministic: bool = True,
        check_symmetric: bool = True,
        retain_graph: bool | None = None,
        nonsmooth: Nonsmooth = "generalized",
        sharpness: float | None = None,
        differentiation: Differentiation = "autograd",
        weight_fn: Callable[[Any, Any], Any] | None = None,
        group: Any = None,
    ) -> None:
        processes = Processes.of(group)
        with processes.together("making Hessian", lambda: {"differentiation": differentiation}, "give the same to all"):
            self._is_finite = checked_differentiation(differentiation, nonsmooth)
        self.differentiation = differentiation
        self.differences_gap = 0.0
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
            weight_fn=weight_fn,
            group=processes,
        )

    def _computation(self, inputs: Any, targets: Any) -> Computation:
        return Computation(lambda: self._loss_as_it_is(self._output(inputs), targets), self.parameters)

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
                loss = self._loss(call_model(twin, inputs), targets, moved)
                return joined(differentiate([loss], moved), moved).detach()

        return Differenced(gradient, self._origin, self._shrink)

    @property
    def _origin(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])

    def _graphs(self) -> Any:
        return once_differentiable_graphs(self.device) if self._is_finite else super()._graphs()

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
                break
        self._shrink = min(found, key=lambda shrink: found[shrink])
        self.differences_gap = found[self._shrink]
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

    with z the model's output: all tensors of it, be it one or a nest of tuples, lists and dicts. Jv is the derivative
    of the linear map u ↦ Jᵀu, so all is double backward. For a loss convex in z, G is positive semidefinite. Of a loss
    of three arguments, the parameters count among z, so that a penalty has its full Hessian. Parameters, attributes and
    errors are those of `Hessian`, but for `differentiation`; `nonsmooth` is about kinks of the loss, as of the model there
    are no second derivatives. A loss that differentiates the model has none (UnsupportedModelError).

    References
    ----------
    N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
    Computation 14 (2002).
    """

    def _output(self, inputs: Any) -> Any:
        output = super()._output(inputs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(output)):
            raise TypeError(
                "expected a model whose output is a tensor, or tuples, lists and dicts of some, as the Gauss-Newton matrix "
                f"needs, got {type(output).__name__}: wrap the model so that it returns the tensors the loss is taken of"
            )
        return output

    def _computation(self, inputs: Any, targets: Any) -> Computation:
        return self._cut(inputs, targets)[3]

    def _cut(self, inputs: Any, targets: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor], Computation]:
        """Return the outputs, leaves in their place, leaves in the place of parameters, and the loss of these leaves."""
        leaves, nest = pytree.tree_flatten(self._output(inputs))
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        outputs = [leaves[k] for k in places]
        states = [output.detach().requires_grad_() for output in outputs]
        direct = [p.detach().requires_grad_() for p in self.parameters] if takes_parameters(self.loss_fn) else []

        def run() -> Any:
            mine = list(leaves)
            for k, state in zip(places, states, strict=True):
                mine[k] = state.clone()  # which a loss may change in place
            return self._loss_as_it_is(pytree.tree_unflatten(mine, nest), targets, direct or None)

        return outputs, states, direct, Computation(run, [*states, *direct])

    def _record(self, inputs: Any, targets: Any) -> Product:
        parameters = self.parameters
        outputs, states, direct, computation = self._cut(inputs, targets)
        # Not zeros: backward passes are linear in them, but torch computes some (logcumsumexp) in ways that have no derivative there.
        cotangents = [_spread(output).requires_grad_() for output in outputs]
        pullback = joined(differentiate(outputs, parameters, cotangents, create_graph=True), parameters)
        with of_the_output_alone():
            loss, points, corrections = self._smoothed(computation)
            slopes = differentiate([loss, *points], [*states, *direct], [None, *corrections], create_graph=True)

        def product(v: Tensor, batched: bool) -> Gradients:
            pushed = differentiate([pullback], cotangents, [v], retain_graph=True, batched=batched)
            lead = v.shape[:1] if batched else ()
            along = [v.new_zeros((*lead, *s.shape)) if p is None else p for p, s in zip(pushed, states, strict=True)]
            parts = v.split([d.numel() for d in direct], -1) if direct else ()
            along += [part.reshape((*lead, *d.shape)) for part, d in zip(parts, direct, strict=True)]
            curved = differentiate(slopes, [*states, *direct], along, retain_graph=True, batched=batched)
            seen = [(o, c) for o, c in zip(outputs, curved, strict=False) if c is not None]
            back = _pulled_back(seen, parameters, batched)
            if not direct:
                return back
            return [_added(b, c) for b, c in zip(back, curved[len(states) :], strict=True)]

        return Recording(product, [pullback, *(s for s in slopes if s is not None)], parameters)


def _pulled_back(pairs: Sequence[tuple[Tensor, Tensor]], parameters: Sequence[Tensor], batched: bool) -> Gradients:
    outputs, cotangents = [output for output, _ in pairs], [cotangent for _, cotangent in pairs]
    return differentiate(outputs, parameters, cotangents, retain_graph=True, batched=batched)


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _spread(like: Tensor) -> Tensor:
    """Numbers from 1 to 2 in the shape of a tensor."""
    return torch.linspace(1.0, 2.0, like.numel(), dtype=like.dtype, device=like.device).view(like.shape)
