"""The operator's own copy of the model, and the choice of its parameters."""

import numpy as np
import pytest
import torch
from torch import nn

from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.errors import UnsupportedModelError
from tests.autograd.settings import (
    CE_MEAN,
    CURVATURES,
    gauss_newton_truth,
    mlp_and_batch,
    worst,
)
from tests.helpers import (
    make_batch,
    make_mlp,
    oracle_gradient,
    oracle_hessian,
)


def test_a_subset_of_parameters_is_a_block():
    model, (x, y) = mlp_and_batch()
    whole = oracle_hessian(model, CE_MEAN, x, y)
    sizes = np.cumsum([0] + [p.numel() for p in model.parameters()])
    chosen = np.r_[sizes[1] : sizes[2], sizes[4] : sizes[5]]
    H = Hessian(model, CE_MEAN, (x, y), params=iter(["4.weight", "0.bias"]))
    assert H.names == ("0.bias", "4.weight")
    assert worst(H, whole[np.ix_(chosen, chosen)]) < 1e-13
    np.testing.assert_allclose(H.gradient, oracle_gradient(model, CE_MEAN, x, y)[chosen], atol=1e-14)
    for name, p in model.named_parameters():
        p.requires_grad_(name in H.names)
    assert worst(Hessian(model, CE_MEAN, (x, y)), whole[np.ix_(chosen, chosen)]) < 1e-13
    assert worst(GaussNewton(model, CE_MEAN, (x, y)), gauss_newton_truth(model, CE_MEAN, x, y)) < 1e-13


@pytest.mark.parametrize("kind", CURVATURES)
def test_an_operator_is_a_snapshot(kind):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3))
    model = model.double().eval()
    x, y = make_batch(4, 3, 6)
    op = kind(model, CE_MEAN, (x, y))
    v = np.ones(op.shape[0])
    before, gradient, state = op @ v, op.gradient, {k: t.clone() for k, t in model.state_dict().items()}
    op @ v
    op.gradient[:] = 0
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.train()
    model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    model[4] = nn.Linear(5, 3)
    np.testing.assert_array_equal(op @ v, before)
    np.testing.assert_array_equal(op.gradient, gradient)


def test_sparse_embeddings_are_differentiated_densely():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    x = torch.tensor([[0, 1], [1, 4], [4, 4]])
    y = torch.tensor([0, 1, 2])
    H = Hessian(model, CE_MEAN, (x, y))
    model[0].sparse = False
    assert worst(H, oracle_hessian(model, CE_MEAN, x, y)) < 1e-13


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(4)], ids=["dropout", "batch norm"])
def test_a_loss_that_is_no_function_of_the_parameters(kind, layer):
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).double().train()
    batch = make_batch(4, 3, 6)
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        kind(model, CE_MEAN, batch)
    kind(model, CE_MEAN, batch, check_deterministic=False, check_symmetric=False)
    kind(model.eval(), CE_MEAN, batch)


@pytest.mark.parametrize("kind", CURVATURES)
def test_bad_parameters(kind):
    model, batch = mlp_and_batch()
    with pytest.raises(ValueError, match="no parameter 9.weight"):
        kind(model, CE_MEAN, batch, params=["0.weight", "9.weight"])
    with pytest.raises(ValueError, match="at least one"):
        kind(model, CE_MEAN, batch, params=[])
    with pytest.raises(TypeError, match="string"):
        kind(model, CE_MEAN, batch, params=[0])
    with pytest.raises(ValueError, match="at least one"):
        kind(nn.Tanh(), CE_MEAN, batch)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        kind(model, CE_MEAN, batch, params=["0.weight", "0.bias"])
    with pytest.raises(ValueError, match="at least one"):
        kind(model.requires_grad_(False), CE_MEAN, batch)
    with pytest.raises(TypeError, match="Module"):
        kind(lambda x: x, CE_MEAN, batch)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=str(dtype)):
            kind(make_mlp([4, 3], dtype=dtype), CE_MEAN, batch)
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).double())
    with pytest.raises(TypeError, match="one dtype"):
        kind(mixed, CE_MEAN, batch)
    scattered = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, device="meta"))
    with pytest.raises(ValueError, match="meta device"):
        kind(scattered, CE_MEAN, batch)
    with pytest.raises(ValueError, match="no shape"):
        kind(nn.LazyLinear(3), CE_MEAN, batch)
    counts = nn.Linear(4, 3)
    counts.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match="int64"):
        kind(counts, CE_MEAN, batch, params=["weight"])
