"""The gradient sample by sample: what each term of the loss adds to it.

The last stage of a chain is the loss, F = Σ_s row_sᵀ. With the row of one sample in its place the backward substitution that gives the
gradient gives that sample's part, for many samples at once as columns; samples may interact in the model, but not in the loss.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from linop_hess._memory import available_on, require
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.build import Chain
from linop_hess.operators.convert import Arrays, handed, plain_arithmetic, require_arrays

# What the adjoints of the samples that are done at once may take.
_AT_ONCE_BYTES = 2**26

# Arrays of the adjoints' size that exist at once in a substitution.
_COPIES = 4


def gradients_of_terms(chain: Chain) -> Tensor:
    """Gradients of the terms of the loss, shape (samples, N); their sum is the gradient.

    Raises
    ------
    UnsupportedModelError
        If the loss is no sum over samples of the model's output.
    MemoryError
        If they do not fit; nothing has been allocated.
    """
    problem, samples = chain.problem, chain.samples
    layout, item = problem.layout, problem.dtype.itemsize
    columns = max(1, min(samples, _AT_ONCE_BYTES // (layout.size_out * item)))
    needed = (
        2 * samples * layout.size * item + _COPIES * columns * layout.size_out * item + layout.n_in[-1] * samples * item
    )
    require(needed, f"gradients of {samples} samples by {layout.size} parameters", available_on(problem.device))
    rows = problem.stages[-1].rows_by_sample()[0] if samples else None
    if rows is None or rows.shape[1] != samples:
        raise UnsupportedModelError(
            "expected a loss that is a sum over the samples of the model's output, got one whose samples interact, or that reads more "
            "than the output, as a penalty does: linearize the samples one by one, or differentiate the terms of the loss by torch"
        )
    start, stop = (int(edge) for edge in layout.out_offsets[-3:-1])
    out = torch.empty(samples, layout.size, dtype=problem.dtype, device=problem.device)
    for first in range(0, samples, columns):
        some = rows[:, first : first + columns]
        seed = some.new_zeros(layout.size_out, some.shape[1])
        seed[start:stop] = some
        out[first : first + columns] = problem.apply_Gt(problem.transition.substitute_adjoint(seed)).mT
    return out


class SampleGradients:
    """What is made of a chain, and knows the gradients of the terms of its loss."""

    _chain: Chain

    @overload
    def sample_gradients(self, to: Literal["numpy"] = ...) -> np.ndarray: ...
    @overload
    def sample_gradients(self, to: Literal["torch"]) -> Tensor: ...
    def sample_gradients(self, to: Arrays = "numpy") -> Any:
        """Gradients of the terms of the loss, a sample a row; a sample is an entry of the first axis of the model's output.

        The rows add up to `gradient`, with its sign: of a mean loss each has its factor 1/samples in it, of a sum none. Leaving sample i
        out moves the minimum of loss + ½ε‖θ‖² by ``inverse @ rows[i]`` to first order, towards a larger loss of sample i.

        Parameters
        ----------
        to : {"numpy", "torch"}
            What to return: an array, or a tensor on the device of the parameters.

        Returns
        -------
        ndarray or Tensor, shape (samples, N)

        Raises
        ------
        ValueError
            If `to` is none of the two.
        UnsupportedModelError
            If the loss is no sum over samples of the model's output.
        MemoryError
            If they do not fit; nothing has been allocated.
        """
        require_arrays(to)
        with plain_arithmetic(self._chain.problem.device):
            return handed(gradients_of_terms(self._chain), to)
