"""`linearize` of several batches: the same answers as of all data at once, or an error."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f
from torch.utils.data import DataLoader, TensorDataset

import linop_hess as lh
from linop_hess.errors import UnsupportedModelError
from linop_hess.lq.matrix.assembly import assemble
from linop_hess.lq.problem import Problem
from tests.helpers import make_batch, make_mlp, oracle_hessian

CE = nn.CrossEntropyLoss()
DAMPING = 1e-2


class Residual(nn.Module):
    """Recorded, not taken layer by layer; a parameter is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        z = torch.tanh(self.first(x))
        z = z + torch.tanh(self.shared(z))
        return self.last(z + torch.tanh(self.shared(z)))


def model_of(name: str) -> nn.Module:
    if name == "layers":
        return make_mlp([6, 7, 5, 4])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Residual().double()


def unequal(x, y):
    """Batches of 11, 1, 20 and the rest; the last samples twice."""
    cuts = [0, 11, 12, 32, len(x)]
    return [(x[a:b], y[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


@pytest.fixture
def data():
    x, y = make_batch(6, 4, 45)
    return torch.cat([x, x[-5:]]), torch.cat([y, y[-5:]])


# Every two of model, reduction and precision meet.
@pytest.mark.parametrize(
    ("name", "reduction", "dtype"),
    [
        ("layers", "mean", torch.float64),
        ("layers", "sum", torch.float32),
        ("recorded", "sum", torch.float64),
        ("recorded", "mean", torch.float32),
    ],
    ids=str,
)
def test_batches_are_the_whole(name, reduction, dtype, data):
    model, loss = model_of(name).to(dtype), nn.CrossEntropyLoss(reduction=reduction)
    x, y = data[0].to(dtype), data[1]
    truth = oracle_hessian(model, loss, x.double(), y)
    scale, eps = np.linalg.norm(truth, 2), torch.finfo(dtype).eps
    values = np.linalg.eigvalsh(truth)
    assert values[0] < -1e-3 * scale
    lin = lh.linearize(model, loss, unequal(x, y))
    whole = lh.linearize(model, loss, x, y)
    assert lin.batches == 4 and lin.names == whole.names
    assert lin.loss == pytest.approx(whole.loss, rel=100 * eps)
    assert np.abs(lin.gradient - whole.gradient).max() < 100 * eps * np.abs(whole.gradient).max()
    for dense in (
        assemble(lin.problem).double().numpy(),
        (lin.H @ np.eye(len(truth), dtype=lin.H.dtype)).astype(float),
    ):
        assert np.abs(dense - truth).max() < 100 * eps * scale
    damping = DAMPING * scale
    inverse = lin.inverse(damping)
    solution = inverse.solve(lin.gradient)
    residual = (truth + damping * np.eye(len(truth))) @ solution.x.astype(float) - lin.gradient
    size = (scale + damping) * np.linalg.norm(solution.x) + np.linalg.norm(lin.gradient)
    assert np.linalg.norm(residual) < 100 * eps * size and inverse.method == "dense"
    assert inverse.inertia().negative == int((values + damping < 0).sum())
    G = lin.gauss_newton()
    theirs = lh.to_dense(lh.GaussNewton(model, loss, (x, y)))
    assert np.abs(assemble(G.problem).numpy() - theirs).max() < 100 * eps * np.abs(theirs).max()
    assert G.inverse(damping).solve(lin.gradient).backward_error < (1e-14 if dtype == torch.float64 else 1e-6)


def test_other_questions(data):
    model = model_of("layers")
    lin, whole = lh.linearize(model, CE, unequal(*data)), lh.linearize(model, CE, *data)
    one, other = lin.inverse(0.05), whole.inverse(0.05)
    assert one.slogdet() == pytest.approx(other.slogdet(), abs=1e-11)
    np.testing.assert_allclose(one.diagonal(), other.diagonal(), rtol=0, atol=1e-11 * np.abs(other.diagonal()).max())
    blocks = other.block_diagonal()
    assert one.block_diagonal().keys() == blocks.keys()
    for name, block in one.block_diagonal().items():
        np.testing.assert_allclose(block, blocks[name], rtol=0, atol=1e-11 * np.abs(blocks[name]).max())
    assert lin.count_eigenvalues(-1.0, 0.01) == whole.count_eigenvalues(-1.0, 0.01)
    assert lin.smallest_convex_damping() == pytest.approx(whole.smallest_convex_damping(), rel=1e-3)
    assert lin.condition_number(0.05) == pytest.approx(whole.condition_number(0.05), rel=1e-5)
    assert "widest cuts" not in str(lin.plan())
    P = lin.inverse(0.05).positive()
    v = np.ones(lin.gradient.size)
    assert v @ (P @ v) > 0


def test_a_penalty_counts_once(data):
    model = model_of("layers")

    def loss(output, target, params):
        return f.cross_entropy(output, target) + 0.05 * sum(p.square().sum() for p in params.values())

    whole = lh.to_dense(lh.linearize(model, loss, *data).H)
    lin = lh.linearize(model, loss, unequal(*data), reduction="mean")
    np.testing.assert_allclose(assemble(lin.problem).numpy(), whole, rtol=0, atol=1e-14 * np.abs(whole).max() * 10)
    assert lin.inverse(0.1).solve(lin.gradient).backward_error < 1e-14


def test_masked_targets_have_weights(data):
    model, (x, y) = model_of("layers"), data
    y = y.clone()
    y[::3] = -100
    lin = lh.linearize(model, CE, unequal(x, y)[2:], weight_fn=lambda _, t: int((t != -100).sum()))
    truth = oracle_hessian(model, CE, x[12:], y[12:])
    assert np.abs(assemble(lin.problem).numpy() - truth).max() < 1e-13 * np.abs(truth).max()
    with pytest.raises(ValueError, match="pass weight_fn"):
        lh.linearize(model, CE, unequal(x, y)[2:])


def test_nothing_of_a_batch_is_kept(data, monkeypatch):
    """Of all 50 chains that an assembly makes some three exist at once: one is done with while the next is made, in two steps."""
    alive, most = weakref.WeakSet(), [0]
    made = Problem.__init__

    def counted(self, *args, **keywords):
        made(self, *args, **keywords)
        alive.add(self)
        most[0] = max(most[0], len({id(p.transition) for p in alive}))

    lin = lh.linearize(model_of("layers"), CE, [(x[None], y[None]) for x, y in zip(*data, strict=True)])
    gc.collect()
    monkeypatch.setattr(Problem, "__init__", counted)
    inverse = lin.inverse(0.1)
    assert inverse.solve(lin.gradient).backward_error < 1e-14
    assert most[0] <= 3
    gc.collect()
    assert not alive


def test_the_model_may_change_afterwards(data):
    model = model_of("layers")
    lin = lh.linearize(model, CE, unequal(*data))
    H = assemble(lin.problem)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    assert torch.equal(assemble(lin.problem), H)
    assert lin.inverse(0.1).solve(lin.gradient).backward_error < 1e-14
    assert all(p.grad is None for p in model.parameters())


def test_batches_that_change_are_refused(data):
    model, (x, y) = model_of("layers"), data
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    with torch.random.fork_rng(devices=[]), pytest.raises(ValueError, match="that does not shuffle"):
        torch.manual_seed(0)
        lh.linearize(model, CE, loader)
    batches = unequal(x.clone(), y)
    lin = lh.linearize(model, CE, batches)
    batches[1][0][0, 0] += 1e-9
    with pytest.raises(ValueError, match="got another batch 2 than in the first"):
        lin.inverse(0.1)
    del batches[2:]
    batches[1][0][0, 0] = x[11, 0]
    with pytest.raises(ValueError, match="expected the same 4 batches on every pass, got 2"):
        lin.H @ lin.gradient


class Scaled(nn.Module):
    """Takes an array and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of("layers")

    def forward(self, batch):
        return batch["scale"] * self.inner(torch.as_tensor(batch["x"]))


@pytest.mark.parametrize("what", ["x", "scale"])
def test_arrays_and_numbers_that_change_are_refused(data, what):
    x, y = data
    batches = [
        ({"x": x[:20].numpy().copy(), "scale": 1.0}, y[:20]),
        ({"x": x[20:].numpy().copy(), "scale": 1.0}, y[20:]),
    ]
    lin = lh.linearize(Scaled(), CE, batches)
    assert lin.inverse(0.1).solve(lin.gradient).backward_error <= 1e-14
    batches[1][0][what] = batches[1][0][what] + 1e-9  # less than what two passes may differ by in rounding
    with pytest.raises(ValueError, match="got another batch 2 than in the first"):
        lin.H @ lin.gradient


def test_data_that_are_indexed_are_gone_through(data):
    model, (x, y) = model_of("layers"), data

    class Indexed:
        def __getitem__(self, k):
            return unequal(x, y)[k]

    assert lh.linearize(model, CE, Indexed()).loss == lh.linearize(model, CE, unequal(x, y)).loss


def test_what_cannot_be_streamed_is_refused(data):
    model, (x, y) = model_of("layers"), data
    batches = unequal(x, y)
    with pytest.raises(ValueError, match="got an empty batch, inputs of batch 2"):
        lh.linearize(model, CE, [batches[0], (x[:0], y[:0])])
    with pytest.raises(ValueError, match="expected at least one batch"):
        lh.linearize(model, CE, [])
    with pytest.raises(ValueError, match="pass reduction="):
        lh.linearize(model, f.cross_entropy, batches)
    with pytest.raises(ValueError, match="leave them out"):
        lh.linearize(model, CE, x, y, reduction="mean")

    def coupled(output, target):  # the samples of a batch interact
        return CE(output, target) * (1 + output.square().mean())

    with pytest.raises(ValueError, match="expected a loss that averages over samples"):
        lh.linearize(model, coupled, batches, reduction="mean")
    block = lh.linearize(model, coupled, [(x, y)])  # one batch is one block, whatever its loss
    truth = oracle_hessian(model, coupled, x, y)
    assert np.abs(assemble(block.problem).numpy() - truth).max() < 1e-13 * np.abs(truth).max()


def test_what_needs_a_chain_is_absent_and_says_why(data):
    lin = lh.linearize(model_of("layers"), CE, unequal(*data))
    for name in ("M", "P", "D_x", "stages", "augmented", "sample_gradients", "save"):
        assert not hasattr(lin, name)
        with pytest.raises(AttributeError, match=f"of one batch for {name}, got one of 4 batches"):
            getattr(lin, name)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = lin.nonsense
    for method in ("riccati", "banded", "woodbury", "ldu"):
        with pytest.raises(ValueError, match="a sum over batches, made one at a time, has no stages"):
            lin.inverse(0.1, method)
    with pytest.raises(UnsupportedModelError, match="a sum over batches"):
        lin.inverse(0.1).factor_report()


def test_verification_is_of_one_batch_and_a_sum_says_what_it_is(data):
    batches = unequal(*data)
    with pytest.raises(ValueError, match="expected verify with one batch"):
        lh.linearize(model_of("layers"), CE, batches, verify=True)
    assert repr(lh.linearize(model_of("layers"), CE, batches)).startswith(
        "<StreamedLinearization of 113 parameters by 4 batches"
    )


def test_iterating_needs_no_stages(data):
    lin, whole = (lh.linearize(model_of("layers"), CE, *batches) for batches in ([unequal(*data)], data))
    solution = lin.inverse(0.5, "iterative").solve(lin.gradient)
    assert solution.method == "iterative" and solution.iterations > 1 and solution.backward_error <= 1e-14
    x = whole.inverse(0.5, "riccati") @ whole.gradient
    assert np.linalg.norm(solution.x - x) <= 1e-12 * np.linalg.norm(x)


def test_memory_is_asked_for_before_anything_is_allocated(data, monkeypatch):
    lin = lh.linearize(model_of("layers"), CE, unequal(*data))
    monkeypatch.setattr("linop_hess.lq.methods.plan.available_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match='method "dense" for 113 parameters needs about .*or model$'):
        lin.inverse(0.1)


class Nested(nn.Module):
    """A model of two inputs in a dict."""

    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Linear(4, 3).double(), nn.Linear(2, 3).double()

    def forward(self, inputs):
        return (self.u(inputs["u"]) + self.v(inputs["v"])).tanh()


def _other_batches():
    x, y, t = torch.randn(6, 4).double(), torch.arange(6) % 3, torch.randn(6, 3).double()
    plain, nested, sums = nn.Linear(4, 3).double(), Nested(), nn.MSELoss(reduction="sum")
    both = {"u": x, "v": torch.randn(6, 2).double()}
    ce = nn.CrossEntropyLoss()
    return {
        "width": (
            plain,
            ce,
            (x, y),
            (x[:, :3], y),
            ValueError,
            r"shape \(6, 3\) beside the first one's \(6, 4\) in the inputs of batch 2",
        ),
        "dimensions": (plain, ce, (x, y), (x[0], y[:1]), ValueError, "shape"),
        "dtype": (
            plain,
            ce,
            (x, y),
            (x.float(), y),
            TypeError,
            "torch.float32 in place of the first one's torch.float64",
        ),
        "array": (plain, ce, (x, y), (x.numpy(), y), TypeError, "ndarray in place of the first one's torch.float64"),
        "device": (plain, ce, (x, y), (x.to("meta"), y), ValueError, "on meta in place of the first one's on cpu"),
        "targets' dtype": (plain, ce, (x, y), (x, y.int()), TypeError, "torch.int32 in place of .* in the targets"),
        "targets' width": (plain, sums, (x, t), (x, t[:, :2]), ValueError, "in the targets of batch 2"),
        "targets' number": (plain, ce, (x, y), (x, y[:4]), ValueError, r"first dimensions \[4, 6\]"),
        "nested width": (nested, ce, (both, y), ({"u": x, "v": x}, y), ValueError, "in the inputs of batch 2"),
        "nested dtype": (nested, ce, (both, y), ({"u": x, "v": x[:, :2].float()}, y), TypeError, "torch.float32"),
        "names": (nested, ce, (both, y), ({"u": x}, y), ValueError, "another nesting"),
        "no dict": (nested, ce, (both, y), (x, y), ValueError, "another nesting"),
    }


@pytest.mark.filterwarnings("ignore:Using a")
@pytest.mark.parametrize("make", [lh.linearize, lh.Hessian, lh.GaussNewton])
@pytest.mark.parametrize("what", list(_other_batches()))
def test_a_later_batch_of_another_form_is_told(make, what):
    model, loss_fn, first, other, kind, words = _other_batches()[what]
    with pytest.raises(kind, match=words):
        make(model, loss_fn, [first, other])


def test_batches_of_other_forms_are_taken_where_the_model_takes_them():
    model = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Linear(4, 3)).double()
    images, y = [torch.randn(6, size).double() for size in (8, 12)], torch.arange(6) % 3
    assert lh.linearize(model, nn.CrossEntropyLoss(), [(x, y) for x in images]).batches == 2
