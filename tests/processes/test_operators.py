"""`Hessian` and `GaussNewton` over processes: one operator, the same in all, that of one process with all samples."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import minres
from torch import distributed as dist
from torch import nn
from torch.distributed import device_mesh
from torch.nn import functional

from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.operators import to_dense
from tests.autograd.settings import CE_MEAN, CE_SUM, gauss_newton_truth, mlp_and_batch
from tests.helpers import make_batch, make_mlp, oracle_hessian

SIZES = [2, 4]
CUTS = {2: [1, 12], 4: [1, 3, 2, 7]}


def shard(rank, size, *tensors):
    """This process's samples, very unequal numbers of them."""
    return tuple(tensor.split(CUTS[size])[rank] for tensor in tensors)


def same(found):
    """What all processes have, where that is equal to the last bit."""
    for one in found[1:]:
        for ours, theirs in zip(found[0], one, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    return found[0]


def products(rank, group, kind, loss_fn, dtype, size, in_batches):
    model, (x, y) = mlp_and_batch(dtype, samples=13)
    x, y = shard(rank, size, x, y)
    data = [(x[k : k + 2], y[k : k + 2]) for k in range(0, len(x), 2)] if in_batches else (x, y)
    H = kind(model, loss_fn, data, group=group)
    v = np.random.default_rng(0).standard_normal(H.shape[0]).astype(H.dtype)
    solution = minres(H.damped(5.0), v, rtol=1e-10, maxiter=12)[0]
    return to_dense(H), H @ v, H.block("0.*") @ v[: H.block("0.*").shape[1]], H.gradient, np.array(H.loss), solution


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss_fn", [CE_MEAN, CE_SUM], ids=["mean", "sum"])
@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_it_is_the_operator_of_all_samples(pool, kind, loss_fn, size):
    for in_batches in (False, True) if loss_fn is CE_MEAN else (True,):
        found = pool.results(products, kind, loss_fn, torch.float64, size, in_batches, size=size)
        dense, product, block, gradient, loss, solution = same(found)
        model, (x, y) = mlp_and_batch(samples=13)
        alone = kind(model, loss_fn, (x, y))
        truth = (oracle_hessian if kind is Hessian else gauss_newton_truth)(model, loss_fn, x, y)
        v = np.random.default_rng(0).standard_normal(len(truth))
        rows = alone.slice("0.*")
        for ours, theirs in [
            (dense, truth),
            (product, truth @ v),
            (block, truth[rows, rows] @ v[rows]),
            (gradient, alone.gradient),
            (loss, alone.loss),
        ]:
            assert np.abs(ours - theirs).max() <= 1e-12 * np.abs(theirs).max()
        theirs = minres(alone.damped(5.0), v, rtol=1e-10, maxiter=12)[0]
        assert np.abs(solution - theirs).max() <= 1e-9 * np.abs(theirs).max()


def test_single_precision_and_a_mesh(pool):
    dense, *_, solution = same(pool.results(on_a_mesh))
    model, (x, y) = mlp_and_batch(torch.float32, samples=13)
    truth = oracle_hessian(model.double(), CE_MEAN, x.double(), y)
    assert dense.dtype == np.float32 and np.abs(dense - truth).max() <= 1e-5 * np.abs(truth).max()
    assert np.isfinite(solution).all()


def on_a_mesh(rank, group):
    mesh = device_mesh.init_device_mesh("cpu", (4,))
    plane = device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match=r"one dimension.*got 2.*mesh\[name\]"):
        Hessian(*mlp_and_batch()[:1], CE_MEAN, [mlp_and_batch()[1]], group=plane)
    return products(rank, mesh, Hessian, CE_MEAN, torch.float32, 4, True)


def masked(rank, group, weight_fn):
    model, (x, y) = mlp_and_batch(samples=13)
    y = hidden(y)
    x, y = x.split([4, 9])[rank], y.split([4, 9])[rank]
    H = Hessian(model, nn.CrossEntropyLoss(ignore_index=-1), (x, y), weight_fn=weight_fn, group=group)
    return to_dense(H), H.gradient


def hidden(y):
    """Of four targets none are masked, of the others every third, so that any three of these in a row look alike."""
    return torch.where((torch.arange(13) >= 4) & (torch.arange(13) % 3 == 0), -1, y)


def not_hidden(inputs, targets):
    return (targets >= 0).sum()


def test_means_are_weighted_by_what_they_divide_by(pool):
    found = same(pool.results(masked, not_hidden, size=2))
    model, (x, y) = mlp_and_batch(samples=13)
    truth = oracle_hessian(model, nn.CrossEntropyLoss(ignore_index=-1), x, hidden(y))
    assert np.abs(found[0] - truth).max() <= 1e-12 * np.abs(truth).max()
    for error in pool.run(masked, None, size=2):  # each process's mean by itself is one by numbers of samples
        assert isinstance(error, ValueError) and "ignore_index=-1" in str(error)


def of_some_samples(rank, group, samples):
    """How often messages were sent, and how long they were, as torch.distributed sees it and as the operator counts."""
    model, (x, y) = make_mlp([4, 3, 2]), make_batch(4, 2, samples, seed=rank)
    seen = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast")}

    def counted(name):
        def call(*args, **options):
            tensor = args[1] if name == "all_gather" else args[0]
            seen.append((name, tensor.numel()))
            return originals[name](*args, **options)

        return call

    try:
        for name in originals:
            setattr(dist, name, counted(name))
        H = Hessian(model, CE_MEAN, (x, y), group=group)
        made = len(seen)
        H @ np.ones((H.shape[0], 3))
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    assert H.processes.messages == len(seen) and H.processes.numbers == sum(count for _, count in seen)
    return [seen[:made], seen[made:], H.shape[0]]


def test_messages_do_not_depend_on_the_number_of_samples(pool):
    few, many = (pool.results(of_some_samples, samples, size=2) for samples in (250, 25_000))
    assert few == many
    _, of_a_product, n = few[0]
    assert of_a_product == [("all_reduce", 8), ("all_reduce", 3 * n)]


def of_parts(rank, group):
    """Losses of three arguments, functions as losses, penalties, differences and surrogates, over processes."""
    relu, (x, y) = make_mlp([4, 5, 3], nn.ReLU), make_batch(4, 3, 13)
    mine = shard(rank, 2, x, y)

    def penalized(output, target, params):
        return functional.cross_entropy(output, target) + 0.1 * sum(p.square().sum() for p in params.values())

    found = []
    for loss_fn, options in [
        (penalized, {"reduction": "mean"}),
        (functional.cross_entropy, {"reduction": "mean", "nonsmooth": "smooth"}),
        (CE_MEAN, {"differentiation": "finite"}),
        (CE_MEAN, {"params": "0.*", "check_deterministic": False}),
    ]:
        alone = to_dense(Hessian(relu, loss_fn, (x, y), **options))
        together = to_dense(Hessian(relu, loss_fn, mine, group=group, **options))
        found.append(np.abs(alone - together).max() / np.abs(alone).max())
    return found


def test_options_are_those_of_one_process(pool):
    *exact, by_differences, of_some = np.max(pool.results(of_parts, size=2), 0)
    assert max(*exact, of_some) <= 1e-12 and by_differences <= 1e-9
