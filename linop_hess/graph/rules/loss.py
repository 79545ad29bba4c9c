"""The loss as the last stage: value, gradient, and Hessian with respect to the output, block diagonal where it is.

The derivatives are taken in float64 where the loss allows it, for a float32 model too: samples of very different weight
meet in the loss, and what is lost there no solve brings back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from linop_hess import _memory
from linop_hess._validate import checked_loss, require_dtype
from linop_hess.autograd.backward_graph import coarsest_eps, refuse_direct_parameters, saved_bytes
from linop_hess.autograd.calling import constant, in_double, of_the_output_alone, takes_parameters
from linop_hess.autograd.differentiate import (
    differentiate,
    symmetric,
    twice_differentiable,
    unit_cotangents,
    vjps,
)
from linop_hess.autograd.kinks.watch import KinkWatch
from linop_hess.autograd.untouched import untouched_randomness
from linop_hess.errors import NotFiniteError, UnsupportedModelError
from linop_hess.lq.stages.objective import ObjectiveStage

# A Hessian this small is computed whole: one backward pass, whether samples interact or not.
_DENSE_UP_TO = 16

# So few backward passes take less time one by one than together, which is a transform of each operation.
_ONE_BY_ONE = 4

# Arrays of the Hessian's size that exist at once while it is made symmetric.
_COPIES = 5

# What backward passes done at once may take, where that is more than the Hessian.
_AT_ONCE_BYTES = 2**26


@dataclass(frozen=True)
class LossParts:
    """A loss with its first two derivatives.

    Attributes
    ----------
    value : float
    stage : ObjectiveStage
        Gradient and Hessian over n state entries; `stage.samples` is the number of samples that do not interact through the
        loss (1: they do, or the output has no axis of samples).
    apart : int
        Number of samples where the output has an axis of them and they do not interact; else 0.
    order : Tensor, shape (n,)
        State entry i is entry ``order[i]`` of the outputs' floating tensors, flattened (row-major) and concatenated as
        `torch.utils._pytree.tree_leaves` gives them. One tensor keeps its order. Several that agree in their first dimension
        are interleaved so that each sample's entries lie together; others follow one another.
    """

    value: float
    stage: ObjectiveStage
    apart: int
    order: Tensor


def linearize_loss(
    loss_fn: Callable[[Any, Any], Tensor],
    output: Any,
    target: Any,
    dtype: torch.dtype | None = None,
    sharpness: float | None = None,
    again: bool = False,
    in_primitives: bool = True,
) -> LossParts:
    """Evaluate a loss with its first two derivatives by all floating tensors of the output.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(output, target)`` gives a scalar.
    output : Tensor, or a nest of tuples, lists and dicts of tensors
        Output of the model. What is no floating tensor is a constant.
    target : object
        Passed on; tensors in it are constants, whatever graph they carry.
    dtype : torch.dtype, optional
        Of the stage; by default the widest of the output's tensors.
    sharpness : float, optional
        That of the surrogates whose curvature kinks of the loss get; by default they add none.
    again : bool
        Whether this loss function has been seen to give the same value each time; else it is called twice.
    in_primitives : bool
        Whether it may call functions of torch's that must be written in others; see `twice_differentiable`.

    Returns
    -------
    LossParts
        The Hessian is kept per sample where samples do not interact. That is decided exactly: the product with a vector on
        some samples must be zero on all others, for as many choices of samples as separate every two.

    Raises
    ------
    ValueError
        If the loss is not a scalar; if it does not depend on the output, or the output has no entries.
    NotFiniteError
        If it or its derivatives are NaN or Inf.
    TypeError
        If loss or output is no tensor, or a tensor of the output is neither in float32 nor in float64.
    UnsupportedModelError
        If it gives another value each time, uses parameters besides the model's output, or differentiates the model.
    MemoryError
        If its Hessian would not fit.
    """
    if takes_parameters(loss_fn):
        raise UnsupportedModelError(
            "expected a loss of the model's output and the targets alone, got one of three arguments: pass it with the "
            "parameters filled in, or use linop_hess.Hessian"
        )
    state = _State(output)
    with (
        untouched_randomness(state.device),
        twice_differentiable("the loss", state.device, in_primitives=in_primitives),
        of_the_output_alone(),
    ):
        value, gradient, u = _first_derivative(loss_fn, state, constant(target), sharpness, again)
        C = _hessian_blocks(gradient, u, state.samples)
    dtype = state.dtype if dtype is None else dtype
    row, C = gradient.detach().reshape(1, -1).to(dtype), C.to(dtype)
    for what, array in (("gradient", row), ("Hessian", C)):
        if not bool(torch.isfinite(array).all()):
            raise NotFiniteError(f"the {what} of the loss with respect to the model's output holds NaN or Inf")
    C = symmetric(C, "the loss", float(row.abs().max()), coarsest_eps(gradient))
    apart = state.samples if state.together and C.shape[1] == state.samples else 0
    return LossParts(value, ObjectiveStage(row, C), apart, state.order())


class _State:
    """The floating tensors of an output as one flat vector, sample after sample where all have as many."""

    def __init__(self, output: Any) -> None:
        self.leaves, self.nest = pytree.tree_flatten(output)
        self.places = [k for k, leaf in enumerate(self.leaves) if _is_real(leaf)]
        tensors = [self.leaves[k] for k in self.places]
        if not tensors:
            kinds = sorted(
                {str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in self.leaves}
            )
            raise TypeError(
                "expected a model that returns a floating tensor, or tuples, lists and dicts of some, got "
                f"{', '.join(kinds) or 'nothing'}: return tensors of dtype float32 or float64"
            )
        for tensor in tensors:
            require_dtype(tensor.dtype, "the model's output")
        self.device = tensors[0].device
        self.single = any(t.dtype == torch.float32 for t in tensors)
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        if any(tensor.device != self.device for tensor in tensors):
            raise ValueError("expected outputs on one device, got several: move them to one in the model")
        first = tensors[0].shape[0] if tensors[0].ndim else 1
        self.together = all(t.ndim > 0 and t.shape[0] == first for t in tensors)
        self.samples = first if self.together else 1
        self.widths = [t.numel() // max(self.samples, 1) for t in tensors]
        if not sum(t.numel() for t in tensors):
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
            raise ValueError(
                f"expected at least one sample and one output, got an output of shape {shapes} (an empty batch?): leave "
                "empty batches out"
            )

    def flat(self) -> Tensor:
        """The state, shape (n,)."""
        return self._joined([self.leaves[k].detach().to(self.dtype) for k in self.places])

    def output(self, u: Tensor, dtype: torch.dtype | None) -> Any:
        """The output at state u, in tensors that a loss may change in place; in `dtype`, or in those it came in."""
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        parts = u.view(self.samples, -1).split(self.widths, 1)
        for k, part in zip(self.places, parts, strict=True):
            leaf = self.leaves[k]
            leaves[k] = part.reshape(leaf.shape).to(leaf.dtype if dtype is None else dtype).clone()
        return pytree.tree_unflatten(leaves, self.nest)

    def order(self) -> Tensor:
        """For each entry of the state its index in the concatenated tensors, shape (n,)."""
        indices = torch.arange(sum(self.widths) * self.samples, device=self.device)
        return self._joined(list(indices.split([width * self.samples for width in self.widths])))

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(self.samples, -1) for t in tensors], 1).reshape(-1)


def _is_real(leaf: Any) -> bool:
    if isinstance(leaf, Tensor) and leaf.is_complex():
        raise TypeError(f"expected real outputs, got {leaf.dtype}: split them into real and imaginary parts")
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _first_derivative(
    loss_fn: Callable[..., Any], state: _State, target: Any, sharpness: float | None, again: bool
) -> tuple[float, Tensor, Tensor]:
    """The loss, its gradient with a graph, and the flat state it is a function of; in float64 where the loss can."""
    u = state.flat()
    if state.single:
        try:
            return _evaluate(in_double(loss_fn), state, in_double(target), u.double(), torch.float64, sharpness, again)
        except Exception:  # noqa: BLE001  a loss that takes float32 alone; if it fails for another reason, it does again
            pass
    return _evaluate(loss_fn, state, target, u, None, sharpness, again)


def _evaluate(
    loss_fn: Callable[..., Any],
    state: _State,
    target: Any,
    u: Tensor,
    dtype: torch.dtype | None,
    sharpness: float | None,
    again: bool,
) -> tuple[float, Tensor, Tensor]:
    u.requires_grad_()
    watch = KinkWatch([u])
    with nullcontext() if sharpness is None else watch.watching():
        seen = loss_fn(state.output(u, dtype), constant(target, copy=True))
    value = checked_loss(seen)
    if not value.requires_grad:
        raise ValueError(
            "the loss does not depend on the model's output: loss_fn(output, target) must compute it from output, "
            "without detach() or .item()"
        )
    refuse_direct_parameters(value)
    if not again:
        once_more = loss_fn(state.output(u, dtype), constant(target, copy=True)).reshape(())
        if not torch.equal(value, once_more):
            raise UnsupportedModelError("loss_fn gives another value each time; remove its randomness")
    points, slopes = ([], []) if sharpness is None else watch.corrections(value, sharpness)
    (gradient,) = differentiate([value, *points], [u], [None, *slopes], create_graph=True)
    return float(value.detach()), torch.zeros_like(u) if gradient is None else gradient, u


def _hessian_blocks(gradient: Tensor, u: Tensor, samples: int) -> Tensor:
    """Hessian of the loss, shape (1, m, i, i): m samples where they do not interact, else m = 1."""
    n = u.numel()
    width = n // samples
    small = n <= _DENSE_UP_TO
    blocks = None if small or samples == 1 else _blocks_apart(gradient, u, samples)
    if blocks is None:
        if not small:
            coupled = ", whose samples interact through the loss," if samples > 1 else ""
            _require(n**2, f"the loss's Hessian by {n} outputs{coupled}", u)
        at_once = (1 if n <= _ONE_BY_ONE else n) if small else _rows_at_once(gradient, n)
        whole = vjps(gradient, [u], unit_cotangents(u), at_once)[0]
        if samples == 1 or not small:
            return whole[None, None]
        blocks = whole.view(samples, width, samples, width).permute(0, 2, 1, 3)
        between = ~torch.eye(samples, dtype=torch.bool, device=u.device)
        return whole[None, None] if bool((blocks[between] != 0).any()) else blocks[~between][None].contiguous()
    return blocks


def _rows_at_once(gradient: Tensor, rows: int) -> int:
    """How many backward passes may be done at once: those that take no more memory together than the Hessian does."""
    budget = max(rows * gradient.numel() * gradient.element_size(), _AT_ONCE_BYTES)
    return max(1, min(256, budget // max(1, saved_bytes([gradient]))))


def _require(entries: int, what: str, like: Tensor) -> None:
    _memory.require(_COPIES * entries * like.element_size(), what, _memory.available_on(like.device))


def _blocks_apart(gradient: Tensor, u: Tensor, samples: int) -> Tensor | None:
    """The Hessian's blocks by sample, (1, samples, i, i); None unless derivatives by entries of two samples are zero, to the last bit.

    For each bit of a sample's number H is multiplied with a random vector on the samples that have it set. Two samples differ
    in some bit, and H is symmetric, so what couples them appears on a sample without that bit; where nothing couples,
    reverse mode adds nothing to the zeros there. Rounding that is no coupling counts as one: that is slower, never wrong.
    Products with what gives the rows of all blocks are taken in the same backward pass.
    """
    n = u.numel()
    width = n // samples
    _require(n * width, f"the loss's Hessian of {samples} samples by {width} outputs each", u)
    bits = torch.arange((samples - 1).bit_length(), device=u.device)[:, None]
    has = (torch.arange(samples, device=u.device) >> bits) % 2 == 1
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(samples, width, generator=generator, dtype=torch.float64, device="cpu").to(u)
    vectors = (v * has[:, :, None]).reshape(len(bits), -1)
    probes = torch.eye(width, dtype=u.dtype, device=u.device)[:, None].expand(width, samples, width).reshape(width, n)
    at_once = _rows_at_once(gradient, len(bits) + width)
    products = vjps(gradient, [u], torch.cat([vectors, probes]), at_once)[0].reshape(-1, samples, width)
    if not _are_apart(products[: len(bits)], has):
        return None
    return products[len(bits) :].transpose(0, 1)[None].contiguous()


def _are_apart(products: Tensor, has: Tensor) -> bool:
    """Whether products (bits, samples, i) with vectors on the samples that have a bit are zero on all others."""
    return not bool((products != 0).any(2)[~has].any())
