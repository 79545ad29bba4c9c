"""Any other module that maps one tensor to one tensor: dense blocks by double backward."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from linop_hess import _memory
from linop_hess.autograd.differentiate import symmetric, twice_differentiable, unit_cotangents, vjps
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.rules.base import Kind, Layer
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.dense import DenseStage

# Arrays of the curvature's size that exist at once while it is made symmetric and cut.
_COPIES = 4


class Generic(Kind):
    """A module without known structure. Cost: n_out + n_in + p backward passes; memory (n_in + p)²."""

    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        return object()  # never stacked, even where one module stands in two places

    def forward(self, layer: Layer, z: Tensor) -> Tensor:
        y = layer.module(z.clone())
        if not isinstance(y, Tensor):
            raise UnsupportedModelError(
                f"{_title(layer)} returns {type(y).__name__}; a layer of a chain maps "
                "one tensor to one tensor: wrap it in a module that does"
            )
        return y

    def _record(self, layer: Layer, z: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        params = {name: layer.module.get_parameter(name).detach().clone().requires_grad_() for name in layer.params}
        u = z.detach().clone()
        if u.is_floating_point():
            u.requires_grad_()
        y = functional_call(layer.module, params, (u * 1 if u.requires_grad else u,))
        again = functional_call(layer.module, params, (u * 1 if u.requires_grad else u,))
        if not torch.equal(y, again):
            raise UnsupportedModelError(
                f"{_title(layer)} gives another output each time; call model.eval() or remove its randomness"
            )
        return u, list(params.values()), y

    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        with twice_differentiable(_title(layers[0]), Z.device, layers[0].module):
            u, params, y = self._record(layers[0], Z[0])
            sources = [u, *params] if u.requires_grad else params
            _require_memory(layers[0], y, sources)
            rows = vjps(y, sources, unit_cotangents(y)) if sources else []
        n = y.numel()
        F = rows.pop(0) if u.requires_grad else Z.new_zeros(n, 0, dtype=y.dtype)
        G = torch.cat(rows, 1) if rows else None
        return DenseStage.plain(F[None], None if G is None else G[None], None, None, None)

    def curve(self, stages: Stage, layers: Sequence[Layer], Z: Tensor, beta: Tensor) -> Stage:
        layer = layers[0]
        with twice_differentiable(_title(layer), Z.device, layer.module):
            u, params, y = self._record(layer, Z[0])
            sources = [*params, u] if u.requires_grad else params
            if not y.requires_grad:
                return stages
            firsts = torch.autograd.grad(
                y, sources, beta[0].reshape(y.shape), create_graph=True, allow_unused=True, materialize_grads=True
            )
            first = torch.cat([part.reshape(-1) for part in firsts])
            curvature = torch.cat(vjps(first, sources, unit_cotangents(first)), 1)
        curvature = symmetric(curvature, _title(layer), float(first.detach().abs().max()))
        p = stages.p
        A, B, C = curvature[:p, :p], curvature[:p, p:], curvature[p:, p:]
        a, b, c = (block[None] if bool(block.any()) else None for block in (A, B, C))
        return DenseStage.plain(stages.dense_F(), stages.dense_G(), a, b, c)


def _require_memory(layer: Layer, y: Tensor, sources: Sequence[Tensor]) -> None:
    """Raise before the Jacobian, or the curvature after it, is computed in more memory than there is."""
    columns = sum(source.numel() for source in sources)
    entries = max(2 * y.numel() * columns, y.numel() * columns + _COPIES * columns**2)
    _memory.require(
        entries * y.element_size(),
        f"{_title(layer)}, whose structure is not known, with {y.numel()} outputs by {columns} inputs and parameters,",
        _memory.available_on(y.device),
    )


def _title(layer: Layer) -> str:
    return f"layer {layer.name!r} ({type(layer.module).__name__})"
