"""Linear layers and embeddings: the layers whose parameters enter linearly, once for every row of a batch.

Both become stages that never form a matrix of the size of their parameters squared.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from linop_hess.graph.rules.base import Kind, Layer
from linop_hess.lq.stages.affine import AffineStage
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.embedding import EmbeddingStage


class Linear(Kind):
    """`nn.Linear`, acting on the last axis of an input of any shape: y_b = W z_b + w₀ for every row b of it.

    The parameters come in torch's own order, the weight (outputs × inputs, row-major) before the bias; either may be frozen.
    """

    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        module = layer.module
        return (type(module), z.shape, module.weight.shape, module.bias is None, layer.params)

    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        W = torch.stack([layer.module.weight.detach() for layer in layers])
        rows = Z.reshape(len(layers), Z.shape[1:-1].numel(), W.shape[2])
        return AffineStage(W, rows, None, "weight" in layers[0].params, "bias" in layers[0].params)


class Embedding(Kind):
    """`nn.Embedding` as the first layer: its input are indices, which have no derivative.

    Only the rows of the table that occur in the batch are seen by the output; the row of `padding_idx` has no gradient in torch, and
    none here.
    """

    def signature(self, layer: Layer, z: Tensor) -> Hashable:
        return id(layer.module)

    def linearize(self, layers: Sequence[Layer], Z: Tensor) -> Stage:
        module = layers[0].module
        index = Z[0].reshape(-1)
        seen = torch.ones_like(index, dtype=torch.bool)
        if module.padding_idx is not None:
            seen = index != module.padding_idx
        return EmbeddingStage.of(module.weight.detach(), index, seen, trainable=bool(layers[0].params))
