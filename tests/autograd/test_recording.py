"""Graphs kept between products: the same numbers, freed when asked, and never those of other data."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from linop_hess import _memory
from linop_hess.autograd import GaussNewton, Hessian, recording
from linop_hess.autograd.differentiate import joined, twice_differentiable
from linop_hess.operators import to_dense
from tests.autograd.settings import (
    CE_MEAN,
    CE_SUM,
    CURVATURES,
    Attention,
    Checkpointed,
    Recurrent,
)
from tests.helpers import make_batch, make_mlp, oracle_hessian

MODELS = {
    "perceptron": lambda: make_mlp([4, 6, 3]),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)),
    "group norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.SiLU(), nn.Linear(6, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv1d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
    "attention": lambda: Attention().eval(),
    "recurrent": Recurrent,
    "checkpoint": Checkpointed,
}


def setting(samples=7, dtype=torch.float64):
    return make_mlp([4, 5, 5, 3], dtype=dtype), make_batch(4, 3, samples, dtype=dtype)


def count_recordings(monkeypatch, kind):
    """Return a list that grows with every graph recorded."""
    recorded, record = [], kind._record
    monkeypatch.setattr(kind, "_record", lambda self, x, y: recorded.append(len(x)) or record(self, x, y))
    return recorded


@pytest.mark.parametrize("kind", CURVATURES)
def test_a_graph_is_recorded_once_and_gives_the_same_products(kind, monkeypatch):
    model, (x, y) = setting()
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    without = kind(model, CE_MEAN, data, retain_graph=False)
    H = kind(model, CE_MEAN, data)
    assert H.retained_graphs == 2 and without.retained_graphs == 0
    recorded = count_recordings(monkeypatch, kind)
    V = np.random.default_rng(0).standard_normal((5, H.shape[0]))
    kept = [H @ v for v in V]
    assert not recorded
    for v, product in zip(V, kept, strict=True):
        np.testing.assert_array_equal(product, without @ v)
    assert len(recorded) == 10


@pytest.mark.parametrize("kind", CURVATURES)
def test_release_frees_and_the_next_product_records_again(kind):
    model, batch = setting()
    H = kind(model, CE_MEAN, batch)
    v = np.ones(H.shape[0])
    before = H @ v
    graph = [weakref.ref(tensor) for tensor in H._recordings._kept[0][1].graph]
    assert graph and all(tensor() is not None for tensor in graph)
    H.release()
    assert H.retained_graphs == 0 and all(tensor() is None for tensor in graph)
    np.testing.assert_array_equal(H @ v, before)
    assert H.retained_graphs == 1


@pytest.mark.parametrize("kind", CURVATURES)
def test_a_deleted_operator_frees_its_graphs_without_the_garbage_collector(kind):
    model, batch = setting()
    H = kind(model, CE_MEAN, batch)
    graph = [weakref.ref(tensor) for tensor in H._recordings._kept[0][1].graph]
    gc.disable()
    try:
        del H
        assert all(tensor() is None for tensor in graph)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, change) for kind in CURVATURES for change in ("torch", "numpy")] + [(Hessian, "targets")],
)
def test_data_changed_in_place_are_seen(kind, change):
    model, (x, y) = setting()
    array = x.numpy()
    data = {"x": torch.from_numpy(array)}, y
    H = kind(nn.Sequential(_Entry(), model), CE_MEAN, data)
    v = np.ones(H.shape[0])
    before = H @ v
    if change == "torch":
        data[0]["x"].mul_(2)
    elif change == "numpy":  # of which torch's version counter knows nothing
        array *= 2
    else:
        y.copy_((y + 1) % 3)
    now = H @ v
    assert np.abs(now - before).max() > 1e-3
    np.testing.assert_array_equal(now, kind(nn.Sequential(_Entry(), model), CE_MEAN, data, retain_graph=False) @ v)


class _Entry(nn.Module):
    def forward(self, inputs):
        return inputs["x"]


def test_a_loader_is_compared_by_what_it_gives(monkeypatch):
    model, (x, y) = setting(8)
    for shuffle, again in ((False, 0), (True, 2)):
        H = Hessian(model, CE_SUM, DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle))
        torch.manual_seed(3)
        with monkeypatch.context() as patch:
            recorded = count_recordings(patch, Hessian)
            product = H @ np.ones(H.shape[0])
            assert len(recorded) == again
        np.testing.assert_allclose(product, oracle_hessian(model, CE_SUM, x, y).sum(1), atol=1e-12)


def test_data_that_cannot_be_compared_are_recorded_each_time():
    class Opaque:
        def __init__(self, x):
            self.x = x

    class Open(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, opaque):
            return self.inner(opaque.x)

    model, (x, y) = setting()
    box = Opaque(x)
    H = Hessian(Open(model), CE_MEAN, [(box, y)])
    assert H.retained_graphs == 0
    box.x = 2 * x
    np.testing.assert_allclose(H @ np.eye(H.shape[0]), oracle_hessian(model, CE_MEAN, 2 * x, y), atol=1e-13)


def test_a_random_loss_is_drawn_anew_for_every_product():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double().train()
    H = Hessian(model, CE_MEAN, make_batch(4, 3, 6), check_deterministic=False, check_symmetric=False)
    v = np.ones(H.shape[0])
    assert H.retained_graphs == 0 and np.abs(H @ v - H @ v).max() > 0


def test_a_graph_is_kept_only_while_memory_is_free(monkeypatch):
    model, (x, y) = setting()
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    truth = Hessian(model, CE_MEAN, data) @ np.eye(len(torch.nn.utils.parameters_to_vector(model.parameters())))
    free = 1000
    monkeypatch.setattr(_memory, "available_bytes", lambda: free)
    H = Hessian(model, CE_MEAN, data, check_symmetric=False)
    free = 499
    np.testing.assert_allclose(H @ np.eye(H.shape[0]), truth, atol=1e-14)
    assert H.retained_graphs == 0
    free = 501
    H @ np.ones(H.shape[0])
    assert H.retained_graphs == 2
    free = 0
    np.testing.assert_allclose(H @ np.eye(H.shape[0]), truth, atol=1e-14)
    assert Hessian(model, CE_MEAN, data).retained_graphs == 0


@pytest.mark.parametrize("kind", CURVATURES)
def test_copies_and_pickles_hold_no_graph(kind):
    model, batch = setting()
    H = kind(model, CE_MEAN, batch)
    v = np.ones(H.shape[0])
    expected = H @ v
    for twin in (copy.deepcopy(H), pickle.loads(pickle.dumps(H))):
        assert twin.retained_graphs == 0
        np.testing.assert_array_equal(twin @ v, expected)
        assert twin.retained_graphs == 1
    np.testing.assert_array_equal(copy.copy(H) @ v, expected)


def test_threads_share_a_graph():
    model, batch = setting(32)
    H = Hessian(model, CE_MEAN, batch)
    V = np.random.default_rng(0).standard_normal((8, H.shape[0]))
    expected, found = [H @ v for v in V], {}
    H.release()
    threads = [threading.Thread(target=lambda j=j: found.update({j: H @ V[j]})) for j in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for j in range(8):
        np.testing.assert_array_equal(found[j], expected[j])


def test_a_graph_outlives_the_modes_it_was_recorded_in():
    model, batch = setting(dtype=torch.float32)
    H = Hessian(model, CE_MEAN, batch)
    v = torch.linspace(-1, 1, H.shape[0])
    expected = H @ v
    for release in (False, True):
        if release:
            H.release()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(H @ v, expected)
        with torch.inference_mode():
            assert torch.equal(H @ v.clone(), expected)
        with torch.enable_grad():
            assert not (H @ v.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_their_columns(kind, name):
    torch.manual_seed(0)
    model, (x, y) = MODELS[name]().double(), make_batch(4, 3, 5)
    H = kind(model, CE_MEAN, (x, y))
    X = np.random.default_rng(0).standard_normal((H.shape[0], 6))
    singles = np.stack([H @ column for column in X.T], axis=1)
    assert np.abs(singles).max() > 1e-2
    np.testing.assert_allclose(H @ X, singles, atol=1e-12 * np.abs(singles).max())


def test_an_embeddings_blocks_are_their_columns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    H = Hessian(model, CE_MEAN, (torch.tensor([[0, 1], [1, 4], [4, 4]]), torch.tensor([0, 1, 2])))
    np.testing.assert_allclose(to_dense(H), np.stack([H @ e for e in np.eye(H.shape[0])], axis=1), atol=1e-14)


@pytest.mark.parametrize("free", [0, 60_000, 10**9])
def test_blocks_are_cut_to_fit_memory(free, monkeypatch):
    model, (x, y) = setting()
    H = Hessian(model, CE_MEAN, (x, y))
    columns = []
    at_once = recording.Recording._at_once
    monkeypatch.setattr(
        recording.Recording,
        "_at_once",
        lambda self, rows, out=None: columns.append(len(rows)) or at_once(self, rows, out),
    )
    monkeypatch.setattr(_memory, "available_bytes", lambda: free)
    np.testing.assert_allclose(H @ np.eye(H.shape[0]), oracle_hessian(model, CE_MEAN, x, y), atol=1e-13)
    if free == 0:
        assert not columns
    elif free == 60_000:
        assert 1 < max(columns) < H.shape[0]
    else:
        assert columns == [H.shape[0]]


def test_a_wrong_batching_rule_is_not_used(monkeypatch):
    at_once = recording.Recording._at_once
    monkeypatch.setattr(recording.Recording, "_at_once", lambda self, rows, out=None: 1.01 * at_once(self, rows, out))
    model, (x, y) = setting()
    H = Hessian(model, CE_MEAN, (x, y))
    np.testing.assert_allclose(H @ np.eye(H.shape[0]), oracle_hessian(model, CE_MEAN, x, y), atol=1e-13)


def test_the_bytes_of_a_graph_are_those_of_its_tensors():
    """Of (tanh(Wx))ᵀ(tanh(Wx)): x, W, tanh(Wx), and what the derivative of each has saved."""
    W, x = torch.ones(30, 20, dtype=torch.float64, requires_grad=True), torch.ones(20, 50, dtype=torch.float64)
    with twice_differentiable("it", W.device):
        z = torch.tanh(W @ x)
        assert recording.saved_bytes([z]) == 8 * (x.numel() + z.numel())  # W has no part in its own derivative
        loss = (z * z).sum()
        gradient = joined(torch.autograd.grad(loss, [W], create_graph=True), [W])
    whole = recording.saved_bytes([gradient]) / 8
    assert x.numel() + 2 * z.numel() <= whole <= x.numel() + 6 * z.numel() + W.numel()


def test_saved_tensors_that_were_overwritten_are_left_out():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = x.tanh()
    z = 2 * y.square()
    y.mul_(3)  # a backward pass through either raises; what reads the sum does not need one
    graph = x.sin() + z
    assert recording.saved_bytes([graph]) == 8 * x.numel() + 8  # and the factor of 2


@pytest.mark.parametrize(
    "loss_fn", [nn.functional.l1_loss, lambda z, t: (z - t).norm(1), lambda z, t: (z * z.sgn()).sum()]
)
@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
def test_zeros_without_memory_are_no_garbage(operator, loss_fn):
    # Torch gives the derivative of a sign as zeros without memory, which its batched backward passes read.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    curvature = operator(model, loss_fn, (x, y))
    V = np.random.default_rng(0).standard_normal((curvature.shape[0], 7))
    found = curvature @ V
    if operator is GaussNewton:
        assert not found.any()
    else:
        one_by_one = np.stack([curvature @ v for v in V.T], 1)
        assert np.abs(found - one_by_one).max() <= 1e-14 * np.abs(one_by_one).max() > 0
