"""`linearize`: a network's first and second derivatives at its current parameters, as operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
from torch import Tensor, nn

from linop_hess._validate import Differentiation, Nonsmooth, Reduction, told_of_other_shapes, true_or_false
from linop_hess.autograd.calling import (
    NOT_GIVEN,
    FunctionModule,
    are_batches,
    as_module,
    explained,
    refuse_empty,
    refuse_sparse,
)
from linop_hess.autograd.snapshot import Contents, select_parameters
from linop_hess.autograd.untouched import exclusively, untouched_randomness, without_collector
from linop_hess.curvature import ChainCurvature, HasHessian
from linop_hess.graph.build import Chain, Known, build_chain, refuse_inside
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.graph.verification import Reference, Told, Verified
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.problem import Problem
from linop_hess.operators.convert import plain_arithmetic
from linop_hess.operators.parameters import Named, ParameterTable
from linop_hess.operators.pieces import HasPieces
from linop_hess.per_sample import SampleGradients
from linop_hess.processes import Processes
from linop_hess.stored import Storable
from linop_hess.streamed import StreamedLinearization
from linop_hess.tables import StageTable


@overload
def linearize(
    model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    *,
    params: str | Iterable[str] | Mapping[str, Tensor] | None = ...,
    verify: bool | None = ...,
    nonsmooth: Nonsmooth = ...,
    sharpness: float | None = ...,
    differentiation: Differentiation = ...,
    reduction: Reduction | None = ...,
    weight_fn: Callable[[Any, Any], Any] | None = ...,
) -> Linearization: ...
@overload
def linearize(
    model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
    loss_fn: Callable[..., Tensor],
    inputs: Iterable[Any],
    *,
    params: str | Iterable[str] | Mapping[str, Tensor] | None = ...,
    verify: bool | None = ...,
    nonsmooth: Nonsmooth = ...,
    sharpness: float | None = ...,
    differentiation: Differentiation = ...,
    reduction: Reduction | None = ...,
    weight_fn: Callable[[Any, Any], Any] | None = ...,
    group: Any = ...,
) -> StreamedLinearization: ...
@overload
def linearize(
    model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    *,
    params: str | Iterable[str] | Mapping[str, Tensor] | None = ...,
    verify: bool | None = ...,
    nonsmooth: Nonsmooth = ...,
    sharpness: float | None = ...,
    differentiation: Differentiation = ...,
    reduction: Reduction | None = ...,
    weight_fn: Callable[[Any, Any], Any] | None = ...,
    group: Any,
) -> StreamedLinearization: ...
def linearize(
    model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any = NOT_GIVEN,
    *,
    params: str | Iterable[str] | Mapping[str, Tensor] | None = None,
    verify: bool | None = None,
    nonsmooth: Nonsmooth = "generalized",
    sharpness: float | None = None,
    differentiation: Differentiation = "autograd",
    reduction: Reduction | None = None,
    weight_fn: Callable[[Any, Any], Any] | None = None,
    group: Any = None,
) -> Linearization | StreamedLinearization:
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
        Or, without targets, a re-iterable of batches ``(inputs, targets)``, as a list or a DataLoader that does not shuffle: the
        derivatives are those of the loss of all together, and batches are gone through one at a time (docs/batches.md).
    targets : object
        Of the same batch; passed to `loss_fn`. Left out where there are several batches.
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
    reduction : {"sum", "mean"}, optional
        Of several batches: how `loss_fn` combines the samples of one, where its own `reduction` does not tell; as in `linop_hess.Hessian`.
    weight_fn : callable, optional
        Of several batches: what the mean of a batch divides by, ``weight_fn(inputs, targets)``; as in `linop_hess.Hessian`.
    group : ProcessGroup, DeviceMesh of one dimension, or "world", optional
        Each process of it gives samples of its own, in one batch or in several, and has the linearization of all; as in
        `linop_hess.Hessian`.

    Returns
    -------
    Linearization or StreamedLinearization
        The second of several batches, or processes. A snapshot: later changes of the model do not change it.

    Raises
    ------
    UnsupportedModelError
        If the model is random, changes its buffers or parameters, has operations without a second derivative, or is parallel, compiled
        or scripted; if there are kinks, and `nonsmooth` forbids them or has no surrogate; if differences do not converge.
    ValueError
        If `nonsmooth` or `differentiation` is unknown, a sharpness is not positive and finite or not asked for, or smooth comes together
        with finite; if the loss is not scalar, nothing is trainable, the batch is empty, or a value or derivative is NaN or Inf (the
        layer is named); if `verify` is asked of several batches; if several batches are no more what they were in the first pass, as
        with a loader that shuffles, one is empty, or their losses put together are not the sum of theirs, as `linop_hess.Hessian` says.
    TypeError
        If inputs or parameters have an unusable dtype, inputs are sparse, there are no targets, or targets beside several batches, or
        batches can be gone through only once.
    MemoryError
        If the derivatives of an operation, or the states between operations, do not fit; nothing has been allocated.
    ProcessError
        If a process of the group ended, does not answer in time, or does something else than the others.
    """
    processes = Processes.of(group)
    with exclusively(model, loss_fn):
        with processes.together("linearize"):
            several, second, contents, names = _checked(
                model, loss_fn, inputs, targets, params, (nonsmooth, sharpness, differentiation)
            )
            if not (several or processes.are_several) and (reduction is not None or weight_fn is not None):
                raise ValueError(
                    "expected reduction and weight_fn with several batches, got them with one, of which nothing is weighted: leave them out"
                )
            if verify is not None and true_or_false(verify, "verify") and (several or group is not None):
                raise ValueError(
                    "expected verify with one batch, got several or a group: there products are double backward's, and each dense "
                    "matrix is compared with one; leave it out"
                )
        if several or group is not None:
            module, batches = contents.model, inputs if several else [(inputs, targets)]
            return StreamedLinearization(
                module, loss_fn, batches, names, second, reduction=reduction, weight_fn=weight_fn, processes=processes
            )
        return _of_one_batch(contents, loss_fn, inputs, targets, names, verify, second)


def _of_one_batch(
    contents: Contents,
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    names: Sequence[str],
    verify: bool | None,
    second: SecondDerivatives,
    known: Known | None = None,
) -> Linearization:
    verify = None if verify is None else true_or_false(verify, "verify")
    model, parameter = contents.model, contents.parameters[names[0]]
    device = parameter.device
    with explained(inputs, parameter), untouched_randomness(device), plain_arithmetic(device), without_collector():
        chain, found = build_chain(model, loss_fn, inputs, targets, names, second, known, contents)
    reference = Reference(model, loss_fn, inputs, targets, chain.names, second, bool(chain.differenced), contents)
    lin = Linearization(chain, reference)
    lin._known = found
    # What is left to differences has been compared with those of other steps, and the same operations are verified once.
    is_seen = known is not None and known.again and found.structure is known.structure
    if verify or (verify is None and not is_seen and set(chain.unverified) - set(chain.differenced)):
        lin.verify()
    return lin


def _checked(
    model: Any,
    loss_fn: Any,
    inputs: Any,
    targets: Any,
    params: Any,
    how: tuple[Nonsmooth, float | None, Differentiation],
) -> tuple[bool, SecondDerivatives, Contents, tuple[str, ...]]:
    """Whether there are several batches, how to differentiate, the model as a module, and the names of the chosen parameters."""
    several = are_batches(inputs, targets)
    second = SecondDerivatives.of(*how)
    if not isinstance(model, nn.Module):
        model, params = as_module(model, params), None
    if isinstance(params, Mapping):
        raise TypeError(
            "expected names of the model's parameters in params, got a mapping: pass its keys, or a plain function as model"
        )
    contents = Contents.of(model)
    if several:
        names = select_parameters(model, params, contents)
        _require_callable(loss_fn)
        return several, second, contents, tuple(names)
    return several, second, contents, _names(contents, loss_fn, inputs, targets, params)


def _names(contents: Contents, loss_fn: Any, inputs: Any, targets: Any, params: Any) -> tuple[str, ...]:
    """The names of the chosen parameters, of data and a loss that are usable."""
    names = select_parameters(contents.model, params, contents)
    _require_callable(loss_fn)
    for what, value in (("inputs", inputs), ("targets", targets)):
        refuse_sparse(value, what)
        refuse_empty(value, what)
    return tuple(names)


def _require_callable(loss_fn: Any) -> None:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(output, target), got {type(loss_fn).__name__}")


def linearize_again(
    told: Told | None,
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    names: Sequence[str],
    second: SecondDerivatives,
    verify: bool | None = None,
) -> Linearization:
    """Linearize one batch as `linearize` does, and take from another linearization what is the same; see `Linearization.again`.

    Raises
    ------
    UnsupportedModelError, ValueError, TypeError, MemoryError
        As `linearize`.
    """
    with exclusively(model, loss_fn):
        contents = Contents.of(model)
        names = _names(contents, loss_fn, inputs, targets, names)
        known = None if told is None else told.of(model, loss_fn, names, second, (inputs, targets))
        return _of_one_batch(contents, loss_fn, inputs, targets, names, verify, second, known)


class Linearization(Named, HasHessian, HasPieces, Storable, SampleGradients, Verified):
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
        self._known: Known | None = None

    def again(self, inputs: Any = NOT_GIVEN, targets: Any = NOT_GIVEN, *, verify: bool | None = None) -> Linearization:
        """Linearize the same model and loss at the parameters that it has now, in less time than the first.

        What numbers do not change is kept: the order of operations, live sets, and layout. The model runs and is recorded as by
        `linearize`, so that one that goes another way is noticed, and analysed anew; so are data of other shapes. The gradient is compared
        with autograd's as always. Not done again, where the run is alike: that model and loss give the same value twice, and `verify`.

        Parameters
        ----------
        inputs, targets : object, optional
            Another batch; by default the same.
        verify : bool, optional
            As in `linearize`; by default only of operations that have not been verified.

        Returns
        -------
        Linearization
            A snapshot of its own.

        Raises
        ------
        RuntimeError
            If there is no model to linearize: this one was stored without it, or is of a plain function, whose parameters are given.
        TypeError
            If only one of inputs and targets is given, if the model fails on a list of batches, or as from `linearize`.
        UnsupportedModelError, ValueError, MemoryError
            As from `linearize`.
        """
        reference = self._reference
        if reference is None or isinstance(reference.model, FunctionModule):
            raise RuntimeError(
                "expected a linearization of a module, whose parameters may have changed, got one without a model, or of a plain function: "
                "call linearize"
            )
        if (inputs is NOT_GIVEN) != (targets is NOT_GIVEN):
            raise TypeError("expected inputs and targets of another batch, got one of them: pass both, or neither")
        known = reference.inputs, reference.targets
        inputs, targets = known if inputs is NOT_GIVEN else (inputs, targets)
        with told_of_other_shapes((inputs, targets), known):
            return linearize_again(
                self.told, reference.model, reference.loss_fn, inputs, targets, self.names, reference.second, verify
            )

    @property
    def told(self) -> Told | None:
        """What it tells the next one; None where it has no model."""
        if self._known is None or self._reference is None:
            return None
        return Told(self._known, self._reference)

    @property
    def gradient(self) -> np.ndarray:
        """Gradient of the loss, shape (N,), a fresh array."""
        return self._chain.gradient.cpu().numpy().copy()

    @property
    def gradient_tensor(self) -> Tensor:
        """The same as a fresh tensor, on the device of the parameters."""
        return self._chain.gradient.clone()

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
        refuse_inside(self._chain)
        return self._gauss_newton

    @cached_property
    def stages(self) -> StageTable:
        """The stages, a row each: name in the model, operation, sizes, samples, live entries after it, and where derivatives come from."""
        return StageTable(self.problem)

    def __repr__(self) -> str:
        stages, dtype = len(self.stages), str(self.problem.dtype).removeprefix("torch.")
        return (
            f"<Linearization of {self.problem.size:,} parameters in {stages:,} stages, {dtype}, loss {self.loss:.6g}>"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model, which may not pickle, and without operators; everything but `verify` survives."""
        kept = ("problem", "analysis", "loss", "parameter_table", "_chain")
        return {**{name: self.__dict__[name] for name in kept}, "_reference": None, "_known": None}
