"""A process that fails, does something else or ends: an error in all, and the group goes on where it can."""

import os
import re
import time

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import device_mesh, fsdp
from torch.distributed.fsdp import FullyShardedDataParallel

import linop_hess as lh
from linop_hess import _memory
from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.errors import NotFiniteError, ProcessError, UnsupportedModelError
from linop_hess.operators import Identity, to_dense
from tests.autograd.settings import CE_MEAN
from tests.helpers import make_batch, make_mlp, oracle_hessian
from tests.processes.pool import GROUPS, Failed, Last, Pool

SETTINGS = {
    "a parameter": (ValueError, r"another parameter '0\.weight' in process 1"),
    "a frozen parameter": (ValueError, r"another parameter '2\.bias' in process 1"),
    "a buffer": (ValueError, r"another buffer '1\.running_mean' in process 1"),
    "the dtype": (ValueError, "another parameter"),
    "the number of parameters": (ValueError, "another model|another parameter"),
    "the choice": (ValueError, "another choice of params"),
    "the model": (ValueError, "another model"),
    "a loss": (ValueError, "another loss_fn"),
    "a loss in code": (ValueError, "another loss_fn"),
    "a loss that refers": (ValueError, "the loss of samples of process 0"),
    "an option": (ValueError, "another nonsmooth"),
    "differentiation": (ValueError, "another differentiation"),
    "nothing to call": (TypeError, "callable"),
    "no batch": (ValueError, "at least one batch"),
    "a kind": (ProcessError, "process 0 in making Hessian and process 1 in making GaussNewton"),
    "a reduction": (ValueError, "another loss_fn"),
    "targets": (ValueError, "another shape of a sample's targets|shape"),
    "an unknown option": (ValueError, "nonsmooth"),
}


class Scaled:
    """A loss whose factor no code shows."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, output, target):
        return self.factor * nn.functional.cross_entropy(output, target)


def disagreeing(rank, group, what):
    torch.manual_seed(0)
    kind, odd = Hessian, rank == 1
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Tanh()).double().eval()
    model[2].bias.requires_grad_(False)
    x, y = make_batch(4, 3, 6, seed=rank)
    loss_fn, data, options = CE_MEAN, (x, y), {}
    with torch.no_grad():
        if what == "a parameter" and odd:
            model[0].weight[1, 2] += 1e-15
        if what == "a frozen parameter" and odd:
            model[2].bias[0] += 1.0
        if what == "a buffer" and odd:
            model[1].running_mean[0] += 1e-9
    if what == "the dtype" and odd:
        model, data = model.float(), (x.float(), y)
    if what == "the number of parameters" and odd:
        model = model[:3]
    if what == "the choice" and odd:
        options["params"] = "0.*"
    if what == "the model" and odd:
        model[3] = nn.ReLU()
    if what == "a loss" and odd:
        loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    if what == "a loss in code":
        losses = [lambda z, t: CE_MEAN(z, t), lambda z, t: 2 * CE_MEAN(z, t)]
        loss_fn, options["reduction"] = losses[rank], "mean"
    if what == "a loss that refers":
        loss_fn, options["reduction"] = Scaled(1.0 + rank), "mean"
    if what == "an option" and odd:
        options["nonsmooth"] = "smooth"
    if what == "an unknown option" and odd:
        options["nonsmooth"] = "rough"
    if what == "differentiation" and odd:
        options["differentiation"] = "finite"
    if what == "nothing to call" and odd:
        loss_fn = 3
    if what == "no batch" and odd:
        data = []
    if what == "a kind" and odd:
        kind = GaussNewton
    if what == "a reduction" and odd:
        loss_fn = nn.CrossEntropyLoss(reduction="sum")
    if what == "targets" and odd:
        data = (x, nn.functional.one_hot(y, 3).double())
    begin = time.perf_counter()
    try:
        kind(model, loss_fn, data, group=group, **options)
    except Exception as error:
        assert time.perf_counter() - begin < 10.0
        answer = type(error), str(error)
    else:
        answer = None
    still_works(group)
    return answer


def still_works(group):
    """The group is in step: all can go on with something right."""
    model, (x, y) = make_mlp([4, 3]), make_batch(4, 3, 6)
    mine = slice(dist.get_rank(group), None, dist.get_world_size(group))
    truth = oracle_hessian(model, CE_MEAN, x, y)
    assert np.abs(to_dense(Hessian(model, CE_MEAN, (x[mine], y[mine]), group=group)) - truth).max() <= 1e-14


@pytest.mark.parametrize("what", SETTINGS)
def test_what_is_not_alike_is_an_error_in_all(pool, what):
    kind, words = SETTINGS[what]
    for answer in pool.results(disagreeing, what, size=2):
        assert answer is not None and issubclass(answer[0], kind), answer
        assert re.search(words, answer[1]), answer


def vectors(rank, group):
    """Products whose vectors are not those of the others."""
    model, (x, y) = make_mlp([4, 5, 3]), make_batch(4, 3, 6, seed=rank)
    H = Hessian(model, CE_MEAN, (x, y), group=group)
    n = H.shape[0]
    right, seen = np.linspace(-1.0, 1.0, n), []
    for mine in (
        right + (rank == 1) * 1e-3 * np.eye(n)[n // 2],
        right[: n - (rank == 1)],
        np.where(rank == 1, np.nan, right),
        right.astype(complex) if rank == 1 else right,
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            H @ mine
        seen.append(str(caught.value))
    H @ (right * (1 + rank * 1e-15))  # rounding on other machines is no disagreement
    return seen, H @ right


def test_other_vectors_are_an_error_in_all(pool):
    (first, a), (second, b) = pool.results(vectors, size=2)
    assert np.array_equal(a, b)
    for words, mine, theirs in zip(["same numbers", "shape", "NaN|finite", "complex"], second, first, strict=True):
        for text in (mine, theirs):
            assert re.search(words, text), text
    assert "process 1 of 2 failed" in first[1]


class Changing:
    """Batches of which there are fewer from some pass on, as of a broken loader."""

    def __init__(self, batches, passes):
        self.batches, self.passes = batches, passes

    def __iter__(self):
        self.passes -= 1
        yield from self.batches[: len(self.batches) - (self.passes < 0)]


def failing(rank, group):
    model, (x, y) = make_mlp([4, 5, 3]), make_batch(4, 3, 6, seed=rank)
    data = Changing([(x[:2], y[:2]), (x[2:], y[2:])], 5 if rank == 1 else 1000)
    H = Hessian(model, CE_MEAN, data, group=group)
    seen = []
    for _ in range(8):
        try:
            H @ np.ones(H.shape[0])
            seen.append("")
        except ValueError as error:
            seen.append(str(error))
    still_works(group)
    return seen


def test_an_error_within_a_product_is_one_in_all(pool):
    first, second = pool.results(failing, size=2)
    assert [bool(text) for text in first] == [bool(text) for text in second] and first[-1] and not first[0]
    assert first[-1].startswith("process 1 of 2 failed in Hessian @ 1 columns: expected the 2 batches")
    assert second[-1].startswith("expected the 2 batches")


def not_finite(rank, group):
    model, (x, y) = make_mlp([4, 5, 3]), make_batch(4, 3, 6, seed=rank)
    inputs = x * np.nan if rank == 1 else x
    raised = []
    for make in (Hessian, lh.linearize):
        try:
            make(model, CE_MEAN, [(inputs, y)], group=group)
        except Exception as error:
            raised.append(type(error))
    still_works(group)
    return raised


def test_numbers_that_are_not_finite_are_the_same_error_in_all(pool):
    first, second = pool.results(not_finite, size=2)
    assert first == second == [NotFiniteError] * 2


def short_of_memory(rank, group):
    model, (x, y) = make_mlp([4, 5, 3]), make_batch(4, 3, 6, seed=rank)
    operators = [Hessian(model, CE_MEAN, (x, y), group=group), lh.linearize(model, CE_MEAN, [(x, y)], group=group).H]
    operators += [
        2.0 * operators[0] + Identity(operators[0].shape[0]),
        operators[1].damped(0.1),
        operators[0].T @ operators[0],
    ]
    told = []
    for op in operators:
        with pytest.MonkeyPatch.context() as patched:
            if rank == 1:
                patched.setattr(_memory, "available_bytes", lambda: 1000)
            try:
                to_dense(op)
            except Exception as error:
                told.append((type(error), "process 1 of 2 failed" in str(error)))
    still_works(group)
    return told


def test_a_process_without_memory_for_a_dense_matrix_is_an_error_in_all(pool):
    first, second = pool.results(short_of_memory, size=2)
    assert first == [(MemoryError, True)] * 5 and second == [(MemoryError, False)] * 5


class Odd(Exception):
    pass


def out_of_step(rank, group):
    model, (x, y) = make_mlp([4, 5, 3]), make_batch(4, 3, 6, seed=rank)
    H = Hessian(model, CE_MEAN, (x, y), group=group)
    with pytest.raises(ProcessError, match="process 0 in Hessian @ 1 columns and process 1 in Hessian @ 2"):
        H @ np.ones((H.shape[0], 1 + rank))
    with pytest.raises(Odd if rank else ProcessError, match="so it is" if rank else "Odd: so it is"):
        with H.processes.together("something"):
            if rank:
                raise Odd("so it is")
    with pytest.raises(TypeError, match="make it anew in each process"):
        torch.save(H, "/dev/null")
    return True


def test_processes_out_of_step_are_told(pool):
    assert all(pool.results(out_of_step, size=2))


def wrapped(rank, group):
    model, (x, y) = make_mlp([4, 5, 3]), make_batch(4, 3, 6)
    with pytest.raises(UnsupportedModelError, match=r"model\.module, the model inside, and group="):
        Hessian(nn.parallel.DistributedDataParallel(model, process_group=group), CE_MEAN, (x, y), group=group)
    mesh = device_mesh.init_device_mesh("cpu", (4,))
    models = []
    if hasattr(fsdp, "fully_shard"):  # torch 2.6
        whole = nn.Sequential(make_mlp([4, 5, 3]))
        fsdp.fully_shard(whole[0][0], mesh=mesh)
        models = [fsdp.fully_shard(make_mlp([4, 5, 3]), mesh=mesh), whole]
    for model in (*models, FullyShardedDataParallel(make_mlp([4, 5, 3]), device_id=torch.device("cpu"))):
        for make in (Hessian, GaussNewton):
            with pytest.raises(UnsupportedModelError, match="full_state_dict=True.*and group="):
                make(model, CE_MEAN, (x, y), group=group)
        with pytest.raises(UnsupportedModelError, match="full_state_dict=True.*and group="):
            lh.linearize(model, CE_MEAN, x, y)
    return True


@pytest.mark.filterwarnings("ignore")
def test_sharded_models_say_what_to_pass(pool):
    assert all(pool.results(wrapped))


def test_groups_that_are_none():
    model, (x, y) = make_mlp([4, 3]), make_batch(4, 3, 6)
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="torchrun"):
        Hessian(model, CE_MEAN, (x, y), group="world")


def groups(rank, group):
    model, (x, y) = make_mlp([4, 3]), make_batch(4, 3, 6)
    with pytest.raises(TypeError, match='"world", a process group or a DeviceMesh'):
        Hessian(model, CE_MEAN, (x, y), group="all")
    others = dist.new_group([0, 1])
    if rank > 1:
        with pytest.raises(ValueError, match="of others"):
            Hessian(model, CE_MEAN, (x, y), group=others)
    return Hessian(model, CE_MEAN, (x, y), group="world").processes.size


def test_what_a_group_may_be(pool):
    assert pool.results(groups) == [4] * 4


def waiting(rank, group):
    model, (x, y) = make_mlp([4, 3]), make_batch(4, 3, 6, seed=rank)
    H = Hessian(model, CE_MEAN, (x, y), group=GROUPS["impatient"])
    if rank == 1:
        time.sleep(2.5)
        return 0.0
    begin = time.perf_counter()
    with pytest.raises(ProcessError, match="longer than the timeout"):
        H @ np.ones(H.shape[0])
    return time.perf_counter() - begin


def dying(rank, group, last):
    model, (x, y) = make_mlp([4, 3]), make_batch(4, 3, 6, seed=rank)
    H = Hessian(model, CE_MEAN, (x, y), group=group)
    if rank == last:
        os._exit(3)
    begin = time.perf_counter()
    with pytest.raises(ProcessError, match="has ended"):
        H @ np.ones(H.shape[0])
    return Last(time.perf_counter() - begin)  # as a script does that meets an error: it ends, and its neighbours see it


def test_a_process_that_does_not_come_is_an_error_in_time():
    pool = Pool(2)
    try:
        assert 1.0 < pool.results(waiting)[0] < 10.0
        first, second = pool.run(dying, 1)
        assert isinstance(second, Failed) and first < 10.0
    finally:
        pool.stop()


def test_a_process_that_ends_is_an_error_in_all_others():
    pool = Pool(4)
    try:
        *others, last = pool.run(dying, 3)
        assert isinstance(last, Failed) and max(others) < 20.0
    finally:
        pool.stop()
