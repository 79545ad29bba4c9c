"""The Hessian and the Gauss-Newton matrix of any torch model by automatic differentiation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from linop_hess.autograd.calling import of_the_output_alone, takes_parameters
from linop_hess.autograd.differentiate import Gradients, differentiate, joined
from linop_hess.autograd.empirical_risk import RiskCurvature
from linop_hess.autograd.recording import Recording


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
        Any module that maps a batch of inputs to an output, twice differentiable. At a kink, as ReLU's, the
        second derivative is the one that holds almost everywhere (zero). The output may be anything that
        `loss_fn` takes.
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
        other than through the model and its third argument, an operation has no second derivative, or the model
        cannot be copied or is parallel, compiled or scripted.
    ValueError
        No trainable or an unknown parameter, parameters on several devices or without data, no batch, several
        batches without a known reduction, several summed with a loss of three arguments, a loss that is no
        scalar, not finite, or does not depend on the parameters.
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

    def _record(self, inputs: Any, targets: Any) -> Recording:
        parameters = self.parameters
        loss = self._loss(self._output(inputs), targets)
        gradient = joined(differentiate([loss], parameters, create_graph=True), parameters)

        def product(v: Tensor, batched: bool) -> Gradients:
            return differentiate([gradient], parameters, [v], retain_graph=True, batched=batched)

        return Recording(product, [gradient], parameters)


class GaussNewton(RiskCurvature):
    r"""The generalized Gauss-Newton matrix of a model's loss.

    .. math:: G v = J^\top \, \nabla^2_z \ell \, J v, \qquad J = \partial z / \partial \theta

    with z the model's output: all tensors of it, be it one or a nest of tuples, lists and dicts. Jv is the derivative
    of the linear map u ↦ Jᵀu, so all is double backward. For a loss convex in z, G is positive semidefinite. Of a loss
    of three arguments, the parameters count among z, so that a penalty has its full Hessian. Parameters, attributes and
    errors are those of `Hessian`; a loss that differentiates the model has none (UnsupportedModelError).

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

    def _record(self, inputs: Any, targets: Any) -> Recording:
        parameters = self.parameters
        leaves, nest = pytree.tree_flatten(self._output(inputs))
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        outputs = [leaves[k] for k in places]
        cotangents = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        pullback = joined(differentiate(outputs, parameters, cotangents, create_graph=True), parameters)
        states = [output.detach().requires_grad_() for output in outputs]
        direct = [p.detach().requires_grad_() for p in parameters] if takes_parameters(self.loss_fn) else []
        for k, state in zip(places, states, strict=True):
            leaves[k] = state.clone()  # which a loss may change in place
        with of_the_output_alone():
            loss = self._loss(pytree.tree_unflatten(leaves, nest), targets, direct or None)
            slopes = differentiate([loss], [*states, *direct], create_graph=True)

        def product(v: Tensor, batched: bool) -> Gradients:
            pushed = differentiate([pullback], cotangents, [v], retain_graph=True, batched=batched)
            lead = v.shape[:1] if batched else ()
            along = [v.new_zeros(*lead, *s.shape) if p is None else p for p, s in zip(pushed, states, strict=True)]
            parts = v.split([d.numel() for d in direct], -1) if direct else ()
            along += [part.reshape(*lead, *d.shape) for part, d in zip(parts, direct, strict=True)]
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
