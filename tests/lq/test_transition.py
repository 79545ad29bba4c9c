"""M and M⁻¹, against the dense matrix."""

import numpy as np
import pytest
import torch

from linop_hess.lq import transition as transition_module
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.dense import DenseStage
from linop_hess.lq.transition import Transition
from tests.lq.methods.conformance import DTYPES, SIZES, setting
from tests.lq.problems import random_blocks


def dense(blocks):
    n = [F.shape[0] for F in blocks.F]
    M, starts = np.eye(sum(n)), np.cumsum([0, *n])
    for l in range(1, len(n)):
        M[starts[l] : starts[l + 1], starts[l - 1] : starts[l]] = -blocks.F[l]
    return M


@pytest.mark.parametrize("banded", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES)
def test_products_and_substitution(shape, dtype, banded, monkeypatch):
    monkeypatch.setattr(transition_module, "_ENTRIES_PER_CALL", 10**9 if banded else 0)
    problem, M = setting(shape, dtype).problem, dense(random_blocks(*SIZES[shape], seed=7).rounded(dtype))
    found = Transition(problem.blocks, problem.layout)
    assert found.is_banded == (banded or not M.size) and (found.nbytes > 0) == (found.is_banded and M.size > 0)
    v = np.random.default_rng(0).standard_normal((len(M), 2))
    given = torch.from_numpy(v).to(dtype)
    kept, inverse = given.clone(), np.linalg.inv(M)
    v = given.double().numpy()
    for ours, matrix in (
        (found.apply, M),
        (found.apply_adjoint, M.T),
        (found.substitute, inverse),
        (found.substitute_adjoint, inverse.T),
    ):
        x = ours(given)
        atol = 100 * torch.finfo(dtype).eps * (np.abs(matrix) @ np.abs(v)).max(initial=1.0)
        np.testing.assert_allclose(x.double().numpy(), matrix @ v, rtol=0, atol=atol)
        assert x.dtype == dtype and torch.equal(given, kept)
    assert found.substitute(given[:, :0]).shape == (len(M), 0)
    # Columns that lie one after the other in memory.
    columns = given.T.contiguous().T
    torch.testing.assert_close(found.substitute(columns), found.substitute(given))
    assert torch.equal(columns, kept)


def test_bandwidth():
    assert setting("equal").problem.transition.bandwidth == 5
    assert setting("one stage").problem.transition.bandwidth == 0


@pytest.mark.parametrize("banded", [True, False])
def test_stacked_stages(banded, monkeypatch):
    """Stages of one stack that are not neighbours."""
    monkeypatch.setattr(transition_module, "_ENTRIES_PER_CALL", 10**9 if banded else 0)
    F = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    other = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    stacks = [DenseStage.plain(part, None, None, None, None) for part in (F, other)]
    problem = Problem(stacks, np.array([(0, 0), (1, 0), (0, 1), (0, 2)]))
    v = torch.eye(8).double()
    d = problem.transition.substitute(v)
    expected, before = [], torch.zeros(2, 8).double()
    for l, block in enumerate((F[0], other[0], F[1], F[2])):
        before = block @ before + v[2 * l : 2 * l + 2]
        expected.append(before)
    torch.testing.assert_close(d, torch.cat(expected))
    torch.testing.assert_close(problem.transition.substitute_adjoint(v), d.mT.contiguous())
