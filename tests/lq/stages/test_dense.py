"""Dense stages, of one sample and of several, and those made of plain arrays."""

import functools

import numpy as np
import pytest
import torch

from linop_hess.lq.stages.dense import DenseStage
from linop_hess.lq.stages.row_space import IdentityRowSpace
from tests.lq.stages.conformance import Case, StageConformance, differentiated, draw, symmetric


def case(K=1, m=1, i=3, o=2, p=4, curved="ABC", shared=False, low_rank=False):
    generator = torch.Generator().manual_seed(m + 10 * p)
    f, g = draw(generator, K, 1 if shared else m, o, i), draw(generator, K, m, o, p)
    if low_rank:
        g[:, :, 0] = 2 * g[:, :, 1]
        g[..., 1] = 0.0
    a, b, c = symmetric(generator, K, p, p), draw(generator, K, p, m, i), symmetric(generator, K, m, i, i)

    def map_of(k):
        blocks = f[k].expand(m, o, i)
        return lambda x, z: torch.cat([blocks[s] @ z.view(m, i)[s] + g[k, s] @ x for s in range(m)])

    def energy_of(k):
        def energy(x, z):
            total = 0.0 * (x.sum() + z.sum()) ** 2
            if "A" in curved:
                total = total + 0.5 * x @ a[k] @ x
            for s, part in enumerate(z.view(m, i)):
                if "B" in curved:
                    total = total + x @ b[k, :, s] @ part
                if "C" in curved:
                    total = total + 0.5 * part @ c[k, s] @ part
            return total

        return energy

    given = (block if name in curved else None for name, block in zip("ABC", (a, b, c), strict=True))
    stage = DenseStage(f, g if p else None, *given, samples=m)
    maps, energies = zip(*((map_of(k), energy_of(k)) for k in range(K)), strict=True)
    return Case(stage, differentiated(maps, energies, f.new_zeros(K, p), f.new_zeros(K, m * i)))


class TestDense(StageConformance):
    cases = {
        name: functools.partial(case, **settings)
        for name, settings in {
            "plain": {},
            "row space": {"p": 9, "curved": "BC"},
            "row space of fewer hidden than states": {"p": 4, "i": 5, "curved": "B"},
            "row space of low rank": {"p": 5, "o": 3, "curved": "BC", "low_rank": True},
            "row space, no coupling": {"p": 5, "curved": "C"},
            "samples": {"m": 3},
            "samples, no state before": {"m": 3, "i": 0, "curved": "A"},
            "samples, no state before, shared": {"m": 3, "i": 0, "curved": "A", "shared": True},
            "samples, shared": {"m": 3, "shared": True, "curved": "BC", "p": 2},
            "samples, row space": {"m": 2, "p": 7, "curved": "B"},
            "no controls": {"p": 0, "curved": "C", "m": 2},
            "no curvature": {"curved": ""},
            "stack": {"K": 3, "m": 2},
            "stack, row space": {"K": 2, "p": 6, "curved": "BC"},
        }.items()
    }


def arrays(**changes):
    generator = torch.Generator().manual_seed(0)
    blocks = {
        "A": symmetric(generator, 3, 3).numpy(),
        "B": draw(generator, 3, 2).numpy(),
        "C": symmetric(generator, 2, 2).numpy(),
        "F": draw(generator, 4, 2).numpy(),
        "G": draw(generator, 4, 3).numpy(),
    }
    return {**blocks, **changes}


def test_stage_from_arrays():
    given = arrays()
    stage = DenseStage.from_arrays(0, **given)
    for name, block in given.items():
        assert np.array_equal(getattr(stage, f"dense_{name}")()[0].numpy(), block)
    given["F"][:] = np.nan  # which was copied
    assert stage.first_not_finite() is None
    assert DenseStage.from_arrays(0, **arrays(A=np.zeros((3, 3)), C=np.zeros((2, 2)))).nonzero == {"B"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"F": np.ones((4, 3))}, ValueError, r"stage 3: F has shape \(4, 3\), expected \(4, 2\)"),
        ({"B": np.ones(3)}, ValueError, r"stage 3: B has shape \(3,\), expected a matrix"),
        ({"A": 1.0}, ValueError, r"stage 3: A has shape \(\), expected a matrix"),
        ({"F": "F"}, TypeError, "stage 3: F has dtype <U1"),
        ({"A": np.triu(np.ones((3, 3)))}, ValueError, "stage 3: A is not symmetric"),
        ({"G": np.full((4, 3), np.nan)}, ValueError, "stage 3: G holds NaN or Inf"),
        ({"G": np.ones((4, 3), dtype=np.float32)}, TypeError, "stage 3: all blocks need one dtype"),
        ({"C": np.ones((2, 2), dtype=int)}, TypeError, "stage 3: C has dtype torch.int64, expected float"),
    ],
)
def test_bad_arrays(changes, error, message):
    with pytest.raises(error, match=message):
        DenseStage.from_arrays(2, **arrays(**changes))


def test_identity_row_space_of_any_stage_costs_nothing():
    stage = case(p=9, curved="BC").stage
    space = IdentityRowSpace(stage)
    assert (space.r, space.hidden, space.coupled) == (9, 0, False)
    assert space.QtB().data_ptr() == stage.b.data_ptr()
    assert space.hidden_coupling().shape == (1, 0, 3) and space.hidden_directions(torch.ones(1, 3, 2)).shape == (
        1,
        9,
        2,
    )
