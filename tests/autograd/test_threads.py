"""Several threads may ask for derivatives of one model at once; those of other models go on meanwhile."""

import sys
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.autograd.untouched import exclusively
from tests.autograd.settings import worst
from tests.helpers import make_batch, oracle_hessian


class Residual(nn.Module):
    """Recorded, not taken layer by layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(6, 3)
        nn.init.orthogonal_(self.head.weight, 1.5)

    def forward(self, x):
        h = f.pad(x, (0, 2))
        return self.head((h + self.inner(h).sin()).tanh())


def at_once(jobs: list) -> list:
    """What all jobs give, each by a thread of its own, that take turns a hundred times as often as usual."""
    ready, found = threading.Barrier(len(jobs)), [None] * len(jobs)

    def work(k: int) -> None:
        ready.wait(20)
        try:
            found[k] = jobs[k]()
        except Exception as error:
            found[k] = error

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(len(jobs))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    for one in found:
        assert one is not None, "a thread hangs"
        if isinstance(one, Exception):
            raise one
    return found


class Holder:
    """An object whose method is a model: the module is one of its attributes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, params, x):
        return torch.func.functional_call(self.model, params, x)

    def method(self, params, x):
        return self(params, x)


def function_kinds(model: nn.Module) -> dict:
    nets = {"student": [model]}
    call = torch.func.functional_call
    return {
        "closure": lambda params, x: call(model, params, x),
        "container": lambda params, x: call(nets["student"][0], params, x),
        "partial": partial(call, model),
        "object": Holder(model),
        "method": Holder(model).method,
    }


def test_threads_that_ask_about_one_model_get_what_one_thread_gets():
    torch.manual_seed(0)
    inner, x, y = nn.Linear(6, 6), *make_batch(4, 3, 5)
    one, other = Residual(inner).double(), Residual(inner).double()  # of which a part is shared
    params = {name: p.detach() for name, p in one.named_parameters()}
    entropy = nn.CrossEntropyLoss()
    truths = [oracle_hessian(model, f.cross_entropy, x, y) for model in (one, other)]
    head = truths[0][42:, 42:]  # inner's 42 come first
    functions = [
        (lambda g=g: lh.linearize(g, f.cross_entropy, x, y, params=params).H, truths[0])
        for g in function_kinds(one).values()
    ]
    jobs = [
        (lambda: lh.linearize(one, f.cross_entropy, x, y).H, truths[0]),
        (lambda: lh.linearize(other, f.cross_entropy, x, y).H, truths[1]),
        (lambda: lh.linearize(one, entropy, x, y, verify=True).H, truths[0]),
        (lambda: lh.linearize(other, entropy, x, y, verify=True).H, truths[1]),
        (lambda: lh.linearize(one, entropy, x, y, params="head.*").H, head),
        (lambda: lh.Hessian(one, entropy, (x, y)), truths[0]),
        (lambda: lh.GaussNewton(one, entropy, (x, y)), None),
        *functions,
    ]
    before = {name: (id(p), p.detach().clone()) for name, p in one.named_parameters()}
    found = at_once([job for job, _ in jobs])
    for operator, (_, truth) in zip(found, jobs, strict=True):
        assert truth is None or worst(operator, truth) <= 1e-14
    after = dict(one.named_parameters())
    assert all(id(after[name]) == key and torch.equal(after[name], p) for name, (key, p) in before.items())


def overlap(first: list, second: list) -> bool:
    """Whether a thread that wants the second gets it while another has the first."""
    inside, tried, entered = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        with exclusively(*first):
            inside.set()
            tried.wait(20)

    def want() -> None:
        with exclusively(*second):
            entered.set()

    holder, wanting = threading.Thread(target=hold), threading.Thread(target=want)
    holder.start()
    assert inside.wait(20)
    wanting.start()
    wanting.join(0.05)
    together = entered.is_set()
    tried.set(), holder.join(20), wanting.join(20)
    assert entered.is_set()
    return together


MODEL = nn.Sequential(nn.Linear(2, 2))


def of_the_file(params, x):
    return torch.func.functional_call(MODEL, params, x)


def by_another_function(params, x):
    return of_the_file(params, x)


@pytest.mark.parametrize(
    "seen", [*function_kinds(MODEL).values(), of_the_file, by_another_function, MODEL[0], Holder(MODEL).method]
)
def test_who_wants_a_part_of_a_model_that_another_has_waits(seen):
    assert not overlap([MODEL], [seen])
    assert not overlap([seen], [nn.Linear(1, 1), MODEL])


def test_models_and_losses_without_a_common_part_do_not_wait():
    assert overlap([MODEL, f.cross_entropy], [nn.Linear(2, 2), f.cross_entropy])
    assert overlap([MODEL, torch.sum], [nn.CrossEntropyLoss(), lambda output, target: output.sum()])


def test_a_thread_does_not_wait_for_itself():
    torch.manual_seed(0)
    model, (x, y) = Residual(nn.Linear(6, 6)).double(), make_batch(4, 3, 5)

    def loss(output, target):
        with exclusively(model):
            return f.cross_entropy(output, target)

    with exclusively(model.head):
        assert worst(lh.linearize(model, loss, x, y).H, oracle_hessian(model, f.cross_entropy, x, y)) <= 1e-14


def test_two_threads_that_would_wait_for_each_other_forever_are_told():
    one, other, both = nn.Linear(1, 1), nn.Linear(1, 1), threading.Barrier(2)
    told = []

    def work(outer: nn.Module, inner: nn.Module) -> None:
        with exclusively(outer):
            both.wait(20)
            try:
                with exclusively(inner):
                    told.append("entered")
            except RuntimeError as error:
                told.append(str(error))

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in ((one, other), (other, one))]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert len(told) == 2 and told[1] == "entered" and "each waits for a model" in told[0]
