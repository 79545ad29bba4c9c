"""`linearize(..., group=)`: the dense method from the samples of all processes, certified, the same in all."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import linop_hess as lh
from linop_hess.lq.accuracy import default_tolerance
from linop_hess.processes import Processes
from tests.autograd.settings import mlp_and_batch
from tests.helpers import make_batch, make_mlp, oracle_hessian
from tests.processes.test_disagreement import still_works
from tests.processes.test_operators import same, shard

DAMPING = 0.05


def answers(rank, group, size, dtype, in_batches):
    model, (x, y) = mlp_and_batch(dtype, samples=13)
    x, y = shard(rank, size, x, y)
    data = ([(x[k : k + 2], y[k : k + 2]) for k in range(0, len(x), 2)],) if in_batches else (x, y)
    lin = lh.linearize(model, nn.CrossEntropyLoss(), *data, group=group)
    inverse = lin.inverse(DAMPING)
    solution = inverse.solve(lin.gradient)
    newton = lin.gauss_newton().inverse(DAMPING).solve(lin.gradient)
    assert solution.backward_error <= default_tolerance(dtype)
    signs = inverse.inertia()
    return (
        solution.x,
        newton.x,
        lin.gradient,
        np.array([lin.loss, *inverse.slogdet(), signs.negative, signs.positive]),
        lh.to_dense(lin.H),
        inverse.diagonal(),
    )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("in_batches", [False, True], ids=["one batch", "batches"])
def test_it_is_that_of_all_samples(pool, size, in_batches):
    x, newton, gradient, numbers, dense, diagonal = same(
        pool.results(answers, size, torch.float64, in_batches, size=size)
    )
    model, batch = mlp_and_batch(samples=13)
    truth = oracle_hessian(model, nn.CrossEntropyLoss(), *batch)
    K = truth + DAMPING * np.eye(len(truth))
    alone = lh.linearize(model, nn.CrossEntropyLoss(), *batch)
    assert np.abs(dense - truth).max() <= 1e-12 * np.abs(truth).max()
    size_x = np.linalg.norm(K, 2) * np.linalg.norm(x) + np.linalg.norm(gradient)
    assert np.linalg.norm(K @ x - gradient) <= 1e-14 * size_x
    values = np.linalg.eigvalsh(K)
    assert (values < 0).any() and list(numbers[3:]) == [(values < 0).sum(), (values > 0).sum()]
    assert numbers[0] == pytest.approx(alone.loss, rel=1e-14)
    assert numbers[2] == pytest.approx(np.log(np.abs(values)).sum(), rel=1e-12)
    assert np.abs(gradient - alone.gradient).max() <= 1e-14
    theirs = alone.gauss_newton().inverse(DAMPING).solve(alone.gradient).x
    assert np.abs(newton - theirs).max() <= 1e-12 * np.abs(theirs).max()
    exact = np.diag(np.linalg.inv(K))
    assert np.abs(diagonal - exact).max() <= 1e-11 * np.abs(exact).max()


def test_single_precision(pool):
    x, *_, gradient = same(pool.results(answers, 2, torch.float32, True, size=2))[:3]
    model, batch = mlp_and_batch(torch.float32, samples=13)
    truth = oracle_hessian(model.double(), nn.CrossEntropyLoss(), batch[0].double(), batch[1])
    residual = truth @ x + DAMPING * x - gradient
    assert np.linalg.norm(residual) <= 1e-5 * (np.linalg.norm(truth, 2) * np.linalg.norm(x) + np.linalg.norm(gradient))


def drawn(rank, group):
    torch.manual_seed(rank)  # as it is where nobody seeds: each process has random numbers of its own
    model, batch = mlp_and_batch(samples=13)
    posterior = lh.linearize(model, nn.CrossEntropyLoss(), *shard(rank, 2, *batch), group=group).inverse(10.0)
    return posterior.sample(2), posterior.sample(2, torch.Generator().manual_seed(rank)), posterior.sample(1)


def test_samples_are_the_same_in_all(pool):
    mine, seeded, next_one = same(pool.results(drawn, size=2))
    assert not np.array_equal(mine[:, :1], next_one)  # the stream of random numbers goes on
    model, batch = mlp_and_batch(samples=13)
    alone = lh.linearize(model, nn.CrossEntropyLoss(), *batch).inverse(10.0, "dense")
    theirs = alone.sample(2, torch.Generator().manual_seed(0))
    assert np.abs(seeded - theirs).max() <= 1e-12 * np.abs(theirs).max()


def of_some_samples(rank, group, samples):
    """Messages of a linearization, of its factors with the first solve, and of another solve; and numbers in all."""
    lin = lh.linearize(make_mlp([4, 3, 2]), nn.CrossEntropyLoss(), *make_batch(4, 2, samples, seed=rank), group=group)
    counts = [lin.processes.messages]
    inverse = lin.inverse(0.5)
    before = lin.processes.numbers
    inverse.solve(lin.gradient)
    counts.append(lin.processes.messages - counts[0])
    return counts, lin.processes.numbers - before, lin.problem.size


def test_messages_do_not_depend_on_the_number_of_samples(pool):
    few, many = (pool.results(of_some_samples, samples, size=2) for samples in (250, 25_000))
    assert [one[0][0] for one in few] == [one[0][0] for one in many]
    # Refinement takes a product a step, of which there may be more or fewer with other data.
    assert all(abs(a[0][1] - b[0][1]) <= 4 for a, b in zip(few, many, strict=True))


def matrix(rank, group, N):
    """A sum of symmetric matrices, and how many numbers were sent."""
    processes = Processes(group)
    parts = [torch.randn(N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(2)]
    parts = [part + part.mT for part in parts]
    before = processes.numbers
    found = processes.summed_symmetric("a test", lambda: parts[rank].clone())
    assert torch.equal(found, found.mT)
    return float((found - sum(parts)).abs().max()) if N else 0.0, processes.numbers - before


def test_symmetric_matrices_are_sent_by_half(pool):
    for N in (0, 1, 2, 3, 8, 127, 129, 260, 391):
        for gap, numbers in pool.results(matrix, N, size=2):
            assert gap == 0.0 and numbers == 8 + N * (N // 2 + 1) * bool(N)


class Cubed(nn.Module):
    """Fails in one process while its second batch is linearized."""

    def __init__(self, fails):
        super().__init__()
        self.layer, self.fails = nn.Linear(4, 3).double(), fails

    def forward(self, x):
        if self.fails and len(x) == 1:
            raise MemoryError("no room")
        return self.layer(x) ** 3


def refused(rank, group):
    x, y = make_batch(4, 3, 6, seed=rank)
    model = make_mlp([4, 5, 3])
    CE, seen = nn.CrossEntropyLoss, []

    def made(loss_fn, x=x, y=y, **options):
        return lh.linearize(model, loss_fn, x, y, group=group, **options)

    for kind, words, make in [
        (ValueError, "nonsmooth", lambda: made(CE(), nonsmooth="?" if rank else "error")),
        (ValueError, "at least one sample", lambda: made(CE(), x[: 6 * rank], y[: 6 * rank])),
        (ValueError, "reduction", lambda: made(functional.cross_entropy)),
        (ValueError, "another loss", lambda: made(CE(label_smoothing=0.1 * rank))),
        (ValueError, 'method "riccati" cannot be used', lambda: made(CE()).inverse(1.0, "riccati")),
    ]:
        with pytest.raises(kind, match=words) as caught:
            make()
        seen.append(str(caught.value))
        still_works(group)
    lin = lh.linearize(model, nn.CrossEntropyLoss(), x, y, group=group)
    with pytest.raises(ValueError, match="same numbers"):
        lin.inverse(0.5).solve(np.ones(lin.problem.size) + rank * np.eye(lin.problem.size)[0])
    torch.manual_seed(0)
    model = Cubed(False)
    lin = lh.linearize(model, nn.CrossEntropyLoss(), [(x[:5], y[:5]), (x[5:], y[5:])], group=group)
    lin._hessian.model.fails = rank == 1
    with pytest.raises(MemoryError, match="no room"):
        lin.inverse(0.5)
    still_works(group)
    return seen


def test_what_fails_in_one_is_an_error_in_all(pool):
    first, second = pool.results(refused, size=2)
    assert first[0].startswith("process 1 of 2 failed in linearize") and second[1].startswith(
        "process 0 of 2 failed in linearize"
    )


def means(rank, group):
    """Of a function as the loss, of several arguments, with weights."""
    model, (x, y) = make_mlp([4, 5, 3]), make_batch(4, 3, 13)
    y = torch.where((torch.arange(13) >= 4) & (torch.arange(13) % 3 == 0), -100, y)
    whole = lh.linearize(model, functional.cross_entropy, x, y)
    mine = slice(None, 4) if rank == 0 else slice(4, None)
    lin = lh.linearize(
        model, functional.cross_entropy, x[mine], y[mine], reduction="mean",
        weight_fn=lambda inputs, targets: (targets >= 0).sum(), group=group,
    )  # fmt: skip
    theirs = lh.to_dense(whole.H)
    return np.abs(lh.to_dense(lin.H) - theirs).max() / np.abs(theirs).max()


def test_weights_are_those_of_all(pool):
    assert max(pool.results(means, size=2)) <= 1e-13
