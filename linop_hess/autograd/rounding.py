"""What rounding does to second derivatives: how far they move where parameters, or all that is computed, change in the last place."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from linop_hess.autograd.backward_graph import in_memory
from linop_hess.autograd.recording import Recordings
from linop_hess.lq.accuracy import ROUNDINGS
from linop_hess.operators.convert import plain_arithmetic
from linop_hess.operators.operator import Operator


class Rounded(TorchDispatchMode):
    """Results of all operations, those of backward passes too, moved by a few ulp, as rounding in another order would move them.

    Of linear algebra, and of fused norms and softmax with their backward passes, what they read is moved too, normwise, as entries
    cancel with others inside. What is an entry of another tensor stays one: derivatives of maxima look for it.

    Parameters
    ----------
    seed : int
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator(device="cpu").manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if "norm" in name or "softmax" in name or (name.startswith("linalg_") and "cholesky" not in name):
            args = pytree.tree_map(self._moved_normwise, args)
        out = in_memory(func)(*args, **(kwargs or {}))
        if any(r.alias_info is not None for r in func._schema.returns):  # views, and what is written in place
            return out
        if name not in _SELECTIONS:
            for y in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(y, Tensor) and y.dtype in _ROUNDED:
                    y.mul_(1 + self._noise(y))
        return out

    def _moved_normwise(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in _ROUNDED or x.ndim < 2 or not x.numel():
            return x
        finite = torch.where(torch.isfinite(x), x, 0.0)  # a mask is −∞ and stays so
        return x + self._noise(x) * finite.abs().amax((-2, -1), keepdim=True)

    def _noise(self, like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=self._generator, dtype=like.dtype, device="cpu")
        return (2 * torch.finfo(like.dtype).eps * noise).to(like.device)


_ROUNDED = (torch.float32, torch.float64)
_SELECTIONS = frozenset(
    "amax amin aminmax max min maximum minimum median nanmedian kthvalue mode sort topk cummax cummin".split()
)


class MovedByRounding(Operator):
    """An operator of second derivatives by parameters, which can be moved."""

    parameters: list[Tensor]

    def release(self) -> None:
        """Free what is kept of the parameters as they are."""
        raise NotImplementedError

    def _products(self, X: Tensor, recordings: Recordings) -> Tensor:
        raise NotImplementedError

    def moved_by_rounding(self, X: Tensor, products: Tensor) -> Tensor:
        """Return how far products with a block move when the parameters change by a few units in the last place.

        Parameters
        ----------
        X : torch.Tensor, shape (n, k)
        products : torch.Tensor, shape (n, k)
            Those at the parameters as they are.

        Returns
        -------
        torch.Tensor, shape (n, k)
        """
        generator = torch.Generator().manual_seed(1)
        saved = [parameter.detach().clone() for parameter in self.parameters]
        ulp = torch.finfo(self.torch_dtype).eps
        self.release()  # the graphs are those of the parameters before the change
        with plain_arithmetic(self.device):
            try:
                for parameter in self.parameters:
                    change = torch.randn(parameter.shape, generator=generator, dtype=self.torch_dtype, device="cpu")
                    parameter.mul_(1 + 2 * ulp * change.to(self.device))
                return self._products(X, Recordings(self.device, keep=False)) - products
            finally:
                for parameter, value in zip(self.parameters, saved, strict=True):
                    parameter.copy_(value)

    def moved_by_any_rounding(self, X: Tensor, products: Tensor) -> Tensor:
        """Return the size of the same where all that is computed changes by a few units in the last place, the largest of some tries."""
        moved = self.moved_by_rounding(X, products).abs()
        for seed in range(ROUNDINGS):
            # Errors at the edge of where it is defined or differentiable, such as torch's of a probability that became more than one.
            with suppress(ValueError, RuntimeError), Rounded(seed):
                moved = torch.maximum(moved, self.moved_by_rounding(X, products).abs())
        return moved
