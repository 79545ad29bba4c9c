"""Embeddings with indices that repeat, and a padding index."""

import functools

import torch
from torch.nn import functional as f

from linop_hess.lq.stages.embedding import EmbeddingStage
from tests.lq.stages.conformance import Case, StageConformance, draw, with_adjoint


def case(index=(2, 0, 2, 5), vocabulary=6, width=3, padding=None, trainable=True):
    generator = torch.Generator().manual_seed(0)
    table, index = draw(generator, vocabulary, width), torch.tensor(index)

    def map_(x, z):
        own = x.view(vocabulary, width) if trainable else table
        y = f.embedding(index, own, padding_idx=padding).reshape(-1)
        return y + 0.0 * (x.sum() + z.sum()) ** 2

    seen = torch.ones_like(index, dtype=torch.bool) if padding is None else index != padding
    stage = EmbeddingStage.of(table, index, seen, trainable=trainable)
    x = table.reshape(1, -1) if trainable else table.new_zeros(1, 0)
    return Case(stage, with_adjoint([map_], x, x.new_zeros(1, 0), draw(generator, 1, stage.n_out)))


class TestEmbedding(StageConformance):
    cases = {
        "repeated": case,
        "padding": functools.partial(case, index=(1, 4, 1, 0, 3), padding=1),
        "all rows": functools.partial(case, index=(0, 1, 2, 1), vocabulary=3),
        "one": functools.partial(case, index=(3,)),
        "constant": functools.partial(case, trainable=False),
    }


def test_samples_are_the_outputs_and_rows_that_do_not_occur_are_hidden():
    stage = case().stage
    space = stage.row_space()
    assert (stage.samples, stage.n_in, space.r, space.hidden) == (4, 0, 9, 9)
