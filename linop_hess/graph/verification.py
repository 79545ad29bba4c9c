"""What `Linearization.verify` compares with: the model by autograd, as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linop_hess.autograd.backward_graph import PrimitiveNorms
from linop_hess.autograd.calling import as_data, as_module, call_loss, call_model
from linop_hess.autograd.differentiate import twice_differentiable
from linop_hess.autograd.hessian import Hessian
from linop_hess.autograd.snapshot import Contents
from linop_hess.autograd.untouched import exclusively, untouched_randomness
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.build import Chain, Known
from linop_hess.graph.recording.stand_ins import StandIns
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.lq.accuracy import BACKWARD_CONSTANTS, VERIFIED
from linop_hess.lq.problem import Problem
from linop_hess.operators.operator import Operator
from linop_hess.operators.parameters import ParameterTable


class Reference:
    """A model with its data, and whether they have changed.

    Nothing is copied: versions of the tensors, and the mode of every module, tell whether the model still is what was linearized.

    Parameters
    ----------
    model : nn.Module
    loss_fn : callable
    inputs : Tensor
    targets : object
    names : sequence of str
        The parameters that are differentiated.
    second : SecondDerivatives
        At kinks; and whether differences of the gradient may be compared with.
    differenced : bool
        Whether they must be; else they are where double backward has no derivative.
    contents : Contents, optional
        The model's, where they are known.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Any], Tensor],
        inputs: Tensor,
        targets: Any,
        names: Any,
        second: SecondDerivatives,
        differenced: bool = False,
        contents: Contents | None = None,
    ) -> None:
        self.second, self._finite = second, differenced
        self.model, self.loss_fn, self.inputs, self.targets, self.names = model, loss_fn, inputs, targets, names
        self.versions = self._versions(Contents.of(model) if contents is None else contents)

    def _versions(self, contents: Contents) -> list[Any]:
        data = [t for t in pytree.tree_leaves((self.inputs, self.targets)) if isinstance(t, Tensor)]
        tensors = [*(t for _, _, t in contents.places), *data]
        try:
            versions = [(t.data_ptr(), t._version) for t in tensors]
        except RuntimeError:  # some have no place or no version
            versions = [(_place(t), _version(t)) for t in tensors]
        return [*versions, *(m.training for m in contents.modules.values())]

    def hessian(self) -> Hessian:
        """Return the Hessian by double backward, or by differences where autograd has none and they were asked for.

        Raises
        ------
        RuntimeError
            If the model changed since.
        """
        if self._versions(Contents.of(self.model)) != self.versions:
            raise RuntimeError(
                "expected the model and data of linearize() to compare with, got some that changed since linearize(): the "
                "linearization is still right for what they were; verify before changing them"
            )
        try:
            return self._hessian()
        except UnsupportedModelError:
            if self._finite or not self.second.finite:
                raise
        self._finite = True
        return self._hessian()

    def _hessian(self) -> Hessian:
        named = dict(self.model.named_parameters())

        def value(
            params: dict[str, Tensor], data: Any
        ) -> Tensor:  # not the method, which would be copied with its model
            return self._value(params, data)

        function = as_module(value, {name: named[name] for name in self.names})
        return Hessian(
            function,
            lambda value, _: value,
            ((self.inputs, self.targets), None),
            check_deterministic=False,
            nonsmooth=self.second.nonsmooth,
            sharpness=self.second.sharpness,
            differentiation="finite" if self._finite else "autograd",
        )

    def _value(self, params: dict[str, Tensor], data: Any) -> Tensor:
        """The loss with other parameters in the model, which a loss may refer to as well."""
        named = dict(self.model.named_parameters())
        stand_ins = {id(p): params.get(name, p.detach()) for name, p in named.items()}
        stand_ins |= {id(b): b.detach().clone() for b in self.model.buffers()}
        device = next(iter(params.values())).device
        inputs, targets = as_data(data, copy=True)
        twice = nullcontext() if self._finite else twice_differentiable("the model", device, self.model)
        with twice, StandIns(Contents.of(self.model), stand_ins):
            # Not checked here: what is read of it would count as a branch.
            return cast(Tensor, call_loss(self.loss_fn, call_model(self.model, inputs), targets, params))


def _place(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)


def _version(tensor: Tensor) -> int:
    """What changes when a tensor is changed in place; those of inference mode do not count it, so it is their contents."""
    if not tensor.is_inference():
        return tensor._version
    return hash(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def compare(H: Operator, source: Reference, v: Tensor) -> tuple[Tensor, float, bool]:
    """Compare products of an operator with those by double backward.

    Parameters
    ----------
    H : Operator
    source : Reference
    v : Tensor, shape (N, k)

    Returns
    -------
    gap : Tensor, shape (N, k)
        By how much they differ, entry by entry.
    scale : float
        The largest entry of the products.
    is_rounding : bool
        Whether rounding explains that.
    """
    with untouched_randomness(v.device), PrimitiveNorms():
        reference = source.hessian()
        theirs = reference @ v
        moved = reference.moved_by_rounding(v, theirs)
        sizes = [p.numel() for p in reference.parameters]
    gap = H @ v - theirs
    unit = reference.coarsest_eps
    if reference.differentiation == "finite":
        unit = max(unit, reference.differences_gap, BACKWARD_CONSTANTS)
    is_rounding = _is_rounding(gap, theirs, moved, sizes, unit)
    if not is_rounding:
        # What the parameters' last digits do not explain those of all that is computed from them may.
        with untouched_randomness(v.device), PrimitiveNorms():
            moved = reference.moved_by_any_rounding(v, theirs)
    is_rounding = is_rounding or _is_rounding(gap, theirs, moved, sizes, unit)
    return gap.abs(), float(theirs.abs().max()), is_rounding


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


@dataclass(frozen=True)
class Told:
    """What a linearization tells the next one of the same model; it holds no numbers of it.

    Attributes
    ----------
    known : Known
    reference : Reference
        Of its model and loss.
    """

    known: Known
    reference: Reference

    def of(
        self, model: nn.Module, loss_fn: Any, names: Sequence[str], second: SecondDerivatives, data: Any
    ) -> Known | None:
        """What is known where a model and a loss are linearized that may be others; None on data of other shapes."""
        mine = self.reference
        if _shapes((mine.inputs, mine.targets)) != _shapes(data):
            return None
        is_same = mine.model is model and mine.loss_fn is loss_fn and mine.second == second
        return replace(self.known, again=is_same and tuple(mine.names) == tuple(names))


def _shapes(data: Any) -> list[Any]:
    return [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in pytree.tree_leaves(data)]


class Verified:
    """What compares its Hessian with its model's by double backward."""

    H: Any
    problem: Problem
    parameter_table: ParameterTable
    _chain: Chain
    _reference: Reference | None

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
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.problem.size, probes, generator=generator, dtype=torch.float64, device="cpu")
        v = v.to(self.problem.dtype).to(self.problem.device)
        with exclusively(self._reference.model, self._reference.loss_fn):
            gap, scale, is_rounding = compare(self.H, self._reference, v)
        worst = float(gap.max())
        if is_rounding:
            return worst / scale if scale else 0.0
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
