"""What the curvature operators of any torch model share: the snapshot, the checks, the sum over batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess._validate import Nonsmooth, Reduction, checked_loss, require_loss_fn, true_or_false
from linop_hess.autograd.additivity import Additivity, Part, differences_told, form
from linop_hess.autograd.backward_graph import (
    carefully,
    coarsest_eps,
    differentiating_inside,
    refuse_direct_parameters,
    refuse_once_differentiable,
)
from linop_hess.autograd.batches import Batches, Progress
from linop_hess.autograd.calling import as_data, call_loss, call_model
from linop_hess.autograd.differentiate import differentiate, joined, twice_differentiable
from linop_hess.autograd.kinks.surrogates import checked_sharpness
from linop_hess.autograd.kinks.watch import KinkWatch
from linop_hess.autograd.recording import Product, Recordings
from linop_hess.autograd.rounding import MovedByRounding
from linop_hess.autograd.snapshot import buffers_of, changed_buffers, frozen_copy, select_parameters
from linop_hess.autograd.untouched import exclusively
from linop_hess.errors import UnsupportedModelError
from linop_hess.operators.block import NamedOperator
from linop_hess.operators.convert import all_finite, plain_arithmetic
from linop_hess.operators.operand import Fold
from linop_hess.operators.operator import Operator, damped
from linop_hess.operators.parameters import ParameterTable
from linop_hess.processes import Processes
from linop_hess.processes.fingerprint import fingerprint, of_model


@dataclass(frozen=True)
class Computation:
    """A loss still to be computed, by `run`, and the tensors whose kinks on the way to it matter."""

    run: Callable[[], Any]
    sources: Sequence[Tensor]


class RiskCurvature(NamedOperator, MovedByRounding):
    """A symmetric curvature matrix of a model's empirical risk Σ_b w_b ℓ(f(x_b; θ), y_b), matrix-free.

    A subclass implements `_record`. See `Hessian` for the parameters and what is raised.

    Attributes
    ----------
    loss : float
        The risk at the parameters.
    gradient : numpy.ndarray, shape (n,)
        Its gradient, in the order of `names`.
    names : tuple of str
        The parameters, in the order of the flat vectors.
    parameter_table : ParameterTable
        Their names and shapes.
    coarsest_eps : float
        Unit of rounding of the coarsest dtype that is computed in, where model or loss cast to another.
    processes : Processes
        Those that the samples are spread over.
    """

    symmetric = True
    fresh = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        data: Any,
        *,
        params: str | Iterable[str] | None = None,
        reduction: Reduction | None = None,
        progress: Progress = False,
        check_deterministic: bool = True,
        check_symmetric: bool = True,
        retain_graph: bool | None = None,
        nonsmooth: Nonsmooth = "generalized",
        sharpness: float | None = None,
        weight_fn: Callable[[Any, Any], Any] | None = None,
        group: Any = None,
    ) -> None:
        self.processes = Processes.of(group)
        options = {"reduction": reduction, "nonsmooth": nonsmooth, "sharpness": sharpness}
        options |= {"check_deterministic": check_deterministic, "check_symmetric": check_symmetric}
        making = f"making {type(self).__name__}"
        with self.processes.together(making, lambda: options | self._in_common(), "give the same to all"):
            require_loss_fn(loss_fn)
            true_or_false(check_deterministic, "check_deterministic")
            true_or_false(check_symmetric, "check_symmetric")
            keep = check_deterministic if retain_graph is None else true_or_false(retain_graph, "retain_graph")
            self.nonsmooth, self.sharpness = nonsmooth, checked_sharpness(nonsmooth, sharpness)
            with exclusively(model, loss_fn):  # no other thread's tensors stand in for theirs
                names = select_parameters(model, params)
                self.batches = Batches(data, loss_fn, reduction, progress, weight_fn, self.processes)
                with torch.inference_mode(False):
                    self.model = frozen_copy(model)
                self.loss_fn = copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
            named = dict(self.model.named_parameters())
            self.parameters = [named[name].requires_grad_() for name in names]
            self.parameter_table = ParameterTable.of_tensors(dict(zip(names, self.parameters, strict=True)))
            size = self.parameter_table.size
            super().__init__((size, size), self.parameters[0].dtype, self.parameters[0].device)
            self._recordings = Recordings(self.device, keep)
        self._differentiates = False  # whether model and loss are seen to differentiate inside
        self.batches.join()
        self.coarsest_eps = torch.finfo(self.torch_dtype).eps
        with plain_arithmetic(self.device):
            before = buffers_of(self.model)
            additivity = self._additivity() if self.batches.are_several else None
            self.loss, self._gradient, scale = self._evaluate(first=True, additivity=additivity)
            self.coarsest_eps = self.processes.largest(self.coarsest_eps)
            if check_deterministic:
                self._check_deterministic(before, scale)
            if self.processes.are_several and additivity is not None:
                self._compare_with_first(additivity, check_deterministic)
            if additivity is not None:
                with self.processes.together("comparing the loss of batches put together with the sum of theirs"):
                    additivity.require(self.batches, self.loss_fn)
            if nonsmooth == "error":
                self._refuse_kinks()
            if check_symmetric:
                self._check_symmetric(scale)

    def _in_common(self) -> dict[str, Any]:
        """Fingerprints of what all processes must have in common, by name."""
        return {
            "choice of params": fingerprint(list(self.names)),
            **of_model(self.model),
            "loss_fn": fingerprint(self.loss_fn),
            **self.batches.in_common(),
        }

    @property
    def gradient(self) -> np.ndarray:
        """The gradient of the risk, a fresh array of shape (n,)."""
        return self._gradient.cpu().numpy().copy()

    @property
    def gradient_tensor(self) -> Tensor:
        """The same as a fresh tensor, on the device of the parameters."""
        return self._gradient.clone()

    def damped(self, damping: float) -> Operator:
        """Return this operator plus ``damping`` times the identity.

        Parameters
        ----------
        damping : float
            ε, real and finite.

        Returns
        -------
        Operator, shape (n, n)

        Raises
        ------
        TypeError, ValueError
            If `damping` is not a finite real number.
        """
        return damped(self, damping)

    @property
    def retained_graphs(self) -> int:
        """The number of batches whose graphs are kept at present."""
        return len(self._recordings)

    def release(self) -> None:
        """Free the memory of the graphs that are kept; the next product records them anew."""
        self._recordings.release()

    def _record(self, inputs: Any, targets: Any) -> Product:
        """Record the graph of one batch's matrix."""
        raise NotImplementedError

    def _computation(self, inputs: Any, targets: Any) -> Computation:
        """What the matrix takes second derivatives of."""
        raise NotImplementedError

    def _smoothed(self, computation: Computation) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Compute a loss; return it with the points and slopes that give its gradient the curvature of surrogates."""
        if self.sharpness is None:
            return checked_loss(computation.run()), [], []
        loss, watch = self._watched(computation)
        return loss, *watch.corrections(loss, self.sharpness)

    def _refuse_kinks(self) -> None:
        with self.processes.together("looking for kinks"):
            for inputs, targets, _ in self.batches.tracked("kinks"):
                with RiskCurvature._graphs(self):  # unfused kernels show what they do
                    loss, watch = self._watched(self._computation(*as_data((inputs, targets), self.device)))
                    watch.refuse(loss)

    def _watched(self, computation: Computation) -> tuple[Tensor, KinkWatch]:
        watch = KinkWatch(computation.sources, self.model)
        with watch.watching():
            value = computation.run()
        return checked_loss(value), watch

    def _record_batch(self, batch: Any) -> Product:
        with self._differentiable():
            return self._record(*as_data(tuple(batch), self.device))

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        with self._graphs(), differentiating_inside() if self._differentiates else nullcontext():
            yield

    def _graphs(self) -> Any:
        return twice_differentiable("the model and the loss", self.device, self.model)

    def _multiply(self, x: Any, fold: Fold, *, adjoint: bool = False) -> Any:
        with self.processes.telling(f"a product of {type(self).__name__}"):
            return super()._multiply(x, fold, adjoint=adjoint)

    def _apply(self, X: Tensor) -> Tensor:
        return self._products(X, self._recordings)

    def _products(self, X: Tensor, recordings: Recordings) -> Tensor:
        title = f"{type(self).__name__} @ {X.shape[1]} columns"
        # A row a column, as recordings give them.
        total = self.processes.summed(title, lambda: self._own_products(X, recordings, title).T, alike=X).T
        self._require_finite(total, "a product")
        return total

    def _own_products(self, X: Tensor, recordings: Recordings, title: str) -> Tensor:
        """The products of this process's samples."""
        total: Tensor | None = None
        for index, (inputs, targets, weight) in enumerate(self.batches.tracked(title)):
            recording = recordings.recording(index, (inputs, targets), self._record_batch)
            try:
                part = recording(X)
            except RuntimeError:  # such as that of a checkpoint, whose forward pass runs within the backward pass
                with self._differentiable():
                    part = recording(X)
            if weight != 1.0:
                part *= weight
            total = part if total is None else total.add_(part)
        return torch.zeros_like(X) if total is None else total  # the weights of one process may all be zero

    def _refuse_graph(self, loss: Tensor) -> None:
        """Raise where the graph of a loss is not one to differentiate twice, or has parameters of its own."""
        refuse_once_differentiable(loss)
        self._refuse_direct(loss)

    def _refuse_direct(self, loss: Tensor) -> None:
        refuse_direct_parameters(loss, self.parameters)

    def _output(self, inputs: Any) -> Any:
        return call_model(self.model, inputs)

    def _loss(self, output: Any, targets: Any, parameters: Sequence[Tensor] | None = None) -> Tensor:
        """Return the loss; a loss of three arguments is given the operator's own parameters unless others are."""
        return checked_loss(self._loss_as_it_is(output, targets, parameters))

    def _loss_as_it_is(self, output: Any, targets: Any, parameters: Sequence[Tensor] | None = None) -> Any:
        """What `loss_fn` returns; nothing is read from it, which would look like a branch on its value."""
        own = self.parameters if parameters is None else parameters
        return call_loss(self.loss_fn, output, targets, dict(zip(self.names, own, strict=True)))

    def _check_deterministic(self, before: dict[str, Tensor], scale: float) -> None:
        """Raise where the first evaluation changed a buffer, or a second one gives other values."""
        with self.processes.together("looking for changed buffers"):
            changed = changed_buffers(self.model, before)
            if changed:
                raise UnsupportedModelError(
                    "expected a loss that is a fixed function of the parameters, got a model whose evaluation changes its "
                    f"buffer {changed[0]!r}, as BatchNorm does in training mode: call model.eval() first, or pass "
                    "check_deterministic=False to take it as it is"
                )
        again, gradient, _ = self._evaluate()
        tolerance = torch.finfo(self.torch_dtype).eps ** 0.5
        moved = float(torch.linalg.vector_norm(gradient - self._gradient))
        if abs(self.loss - again) > tolerance * abs(self.loss) or moved > tolerance * scale:
            raise UnsupportedModelError(
                "expected a loss that is a fixed function of the parameters, got two evaluations with losses "
                f"{self.loss:.8g} and {again:.8g} and gradients that differ by {moved:.3g}: call model.eval() first if "
                "Dropout does that, or keep a DataLoader that shuffles from dropping the last batch"
            )

    def _probes(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.shape[0], 2, generator=generator, dtype=self.torch_dtype, device="cpu").to(self.device)

    def _check_symmetric(self, scale: float) -> None:
        """Raise where uᵀHv and vᵀHu differ, for random u and v, by more than rounding explains."""
        probes = self._probes()
        products = self._apply(probes)
        asymmetry = float((probes[:, 0] @ products[:, 1] - probes[:, 1] @ products[:, 0]).abs())
        if asymmetry <= self.coarsest_eps ** (2 / 3) * _crossed_norms(probes, products):
            return
        # A saturated network's Hessian is itself all rounding: see how far an ulp in the parameters moves it.
        noise = _crossed_norms(probes, self.moved_by_rounding(probes, products))
        if asymmetry > 10 * noise:
            noise = _crossed_norms(probes, self.moved_by_any_rounding(probes, products))
        if asymmetry > 10 * noise:
            raise UnsupportedModelError(
                f"expected uᵀHv and vᵀHu to agree, got a difference of {asymmetry:.3g}, where rounding explains "
                f"{noise:.1g}: torch's second derivatives of this model are wrong, as torch.nn.utils.weight_norm and "
                "custom backward functions make them; write the operation out in elementary ones, or restrict `params` "
                "to leave its parameters out"
            )

    def _evaluate(self, *, first: bool = False, additivity: Additivity | None = None) -> tuple[float, Tensor, float]:
        """Return the risk, its gradient (n,), and the sum of the norms of the batches' gradients.

        The first time the graph of the loss is looked at: it must be twice differentiable and use no parameters but
        the model's.
        """
        sums = self.processes.summed("loss and gradient", lambda: self._own_evaluation(first, additivity))
        total, scale, used = sums[:3].tolist()
        if not used:
            raise ValueError(
                "expected a loss that depends on the parameters, got one that does not depend on any of the chosen "
                f"({', '.join(self.names[:4])}, …): see that neither model nor loss detaches its tensors, and that "
                "`params` names the right ones"
            )
        gradient = sums[3:].to(self.device, self.torch_dtype)
        self._require_finite(gradient, "the gradient")
        return total, gradient, scale

    def _own_evaluation(self, first: bool, additivity: Additivity | None) -> Tensor:
        """What this process's samples add: loss, norms, whether it depends on the parameters, gradient; in one tensor."""
        first_form, number, total, scale, used = None, 0, 0.0, 0.0, False
        gradient = torch.zeros(self.shape[0], dtype=self.torch_dtype, device=self.device)
        for inputs, targets, weight in self.batches.tracked("loss and gradient"):
            first_form, number = first_form or form(inputs, targets), number + 1
            with differences_told(first_form, inputs, targets, number), self._differentiable():
                inputs, targets = as_data((inputs, targets), self.device)
                output, loss = self._seen(inputs, targets)
                if first:
                    self._refuse_graph(loss)
                    self.coarsest_eps = max(self.coarsest_eps, coarsest_eps(loss))
                gradients = differentiate([loss], self.parameters)
                if additivity is not None:
                    additivity.take(Part(inputs, targets, output, weight))
            used = used or any(g is not None for g in gradients)
            part = weight * joined(gradients, self.parameters)
            total += weight * float(loss.detach())
            gradient += part
            scale += float(torch.linalg.vector_norm(part))
        return torch.cat(
            [torch.tensor([total, scale, float(used)], dtype=torch.float64, device="cpu"), gradient.double().cpu()]
        )

    def _seen(self, inputs: Any, targets: Any) -> tuple[Any, Tensor]:
        """Output and loss; anew where they turn out to be differentiated inside, as they are from then on."""

        def compute() -> tuple[Any, Tensor]:
            output = self._output(inputs)
            return output, self._loss(output, targets)

        if self._differentiates:
            return compute()
        found, self._differentiates = carefully(compute, lambda found: found[1])
        return found

    def _compare_with_first(self, additivity: Additivity, is_fixed: bool) -> None:
        """Compare with a few samples of process 0: the first batch, put together with them, and what model and loss give for them."""
        few = additivity.from_first(self.processes, self.device)
        with self.processes.together("comparing losses"), self._differentiable():
            seen = additivity.beside(few)
        if is_fixed:
            advice = "give the same model and loss to all"
            self.processes.close("the loss of samples of process 0", seen, self.coarsest_eps, advice)

    def _additivity(self) -> Additivity:
        weight_fn = self.batches.weight_of if self.batches.reduction == "mean" else None
        return Additivity(self._loss, self._output, weight_fn, torch.finfo(self.torch_dtype).eps)

    def _require_finite(self, flat: Tensor, what: str) -> None:
        if all_finite(flat):
            return
        for name, part in zip(self.names, flat.split([p.numel() for p in self.parameters]), strict=True):
            if not all_finite(part):
                raise ValueError(
                    f"expected finite derivatives, but {what} is NaN or Inf in the entries of parameter {name!r}: the loss "
                    "is finite but not twice differentiable here (a square root or logarithm at zero, an overflow); move "
                    "the parameters"
                )


def _crossed_norms(probes: Tensor, products: Tensor) -> float:
    """Return ‖u‖‖Hv‖ + ‖v‖‖Hu‖ for columns u, v and their products."""
    lengths, images = torch.linalg.vector_norm(probes, dim=0), torch.linalg.vector_norm(products, dim=0)
    return float(lengths[0] * images[1] + lengths[1] * images[0])
