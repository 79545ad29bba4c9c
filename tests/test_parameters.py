"""Names to places in flat vectors and back, named blocks, and the choice of parameters: one implementation for all classes."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess import lq
from linop_hess.operators.block import Block
from linop_hess.operators.parameters import ParameterTable
from tests.autograd.settings import gauss_newton_truth
from tests.helpers import make_batch, oracle_hessian
from tests.lq.problems import backward_error
from tests.operators.conformance import check_operator


class Gate(nn.Module):
    """One generic stage with parameters of its own and modules inside."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.gain * torch.tanh(self.inner(x)) + self.outer(x)


def make_network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), Gate(5), nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh())
        model = nn.Sequential()
        model.add_module("blocks", blocks)
        model.add_module("head", nn.Linear(4, 3))
        model = model.double()
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.orthogonal_(p, gain=1.4)
    return model


WHOLE, FROZEN, SUBSET = "whole", "frozen", "subset"
KEPT = ("blocks.0.weight", "blocks.2.gain", "blocks.2.outer.weight", "blocks.3.bias", "head.weight")


class Setting:
    """A network, what is differentiated, its operators and the dense truth."""

    def __init__(self, kind):
        model, (self.x, self.y) = make_network(), make_batch(3, 3, 5)
        if kind == FROZEN:
            for name, p in model.named_parameters():
                p.requires_grad_(name in KEPT)
        params = reversed(KEPT) if kind == SUBSET else None
        self.model = model
        self.shapes = {n: p.shape for n, p in model.named_parameters() if kind == WHOLE or n in KEPT}
        self.lin = lh.linearize(model, f.cross_entropy, self.x, self.y, params=params)
        params = KEPT if kind == SUBSET else None
        self.hessian = lh.Hessian(model, f.cross_entropy, (self.x, self.y), params=params)
        self.gauss_newton = lh.GaussNewton(model, f.cross_entropy, (self.x, self.y), params=params)
        self.H = oracle_hessian(model, f.cross_entropy, self.x, self.y, self.shapes)
        assert np.abs(np.linalg.eigvalsh(self.H)).min() < 1.0 and np.linalg.eigvalsh(self.H)[0] < -1e-3
        edges = np.cumsum([0, *(s.numel() for s in self.shapes.values())]).tolist()
        self.places = dict(zip(self.shapes, map(slice, edges[:-1], edges[1:]), strict=True))

    def all(self):
        lin = self.lin
        return [lin, lin.H, lin.gauss_newton(), lin.inverse(0.1), self.hessian, self.gauss_newton]

    def of(self, *names):
        return np.concatenate([np.r_[self.places[name]] for name in names])


@pytest.fixture(scope="module", params=[WHOLE, FROZEN, SUBSET])
def setting(request):
    return Setting(request.param)


@pytest.fixture(scope="module")
def whole():
    return Setting(WHOLE)


def test_slices_of_names(setting):
    for one in setting.all():
        assert one.names == tuple(setting.shapes)
        for name, place in setting.places.items():
            assert one.slice(name) == place
            np.testing.assert_array_equal(one.indices(name), setting.of(name))


def test_slices_of_patterns(whole):
    for one in whole.all():
        assert one.slice("*") == slice(0, len(whole.H))
        gate = one.slice("blocks.2.*")
        assert gate == slice(whole.places["blocks.2.gain"].start, whole.places["blocks.2.outer.weight"].stop)
        assert one.slice(["blocks.0.bias", "blocks.0.weight"]) == one.slice("blocks.0.*") == slice(0, 20)
        weights = [name for name in one.names if name.endswith(".weight") and name.startswith("blocks")]
        assert len(weights) == 5
        np.testing.assert_array_equal(one.indices("blocks.*.weight"), whole.of(*weights))
        np.testing.assert_array_equal(one.indices(["head.bias", "blocks.?.bias"])[-3:], whole.of("head.bias"))
        with pytest.raises(ValueError, match=r"side by side.*indices"):
            one.slice("blocks.*.weight")


def test_unknown_names(whole):
    for one in whole.all():
        with pytest.raises(ValueError, match=r"'blocks.0.wieght'.*nearest are blocks.0.weight"):
            one.slice("blocks.0.wieght")
        with pytest.raises(ValueError, match=r"pass 'blocks.2.inner.\*'"):
            one.indices("blocks.2.inner")
        with pytest.raises(ValueError, match=r"pass one of blocks.0.weight, .*…"):
            one.indices("?")
        with pytest.raises(ValueError, match="got none"):
            one.indices([])
        for bad in (3, None, ["head.bias", 1]):
            with pytest.raises(TypeError, match="string"):
                one.indices(bad)


def test_unflatten_and_flatten_are_inverse(setting):
    N = len(setting.H)
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for one in setting.all():
        for flat in (x[:, 0].contiguous(), x[:, 1], x, x[:, ::2], x[:, :0]):
            parts = one.unflatten(flat)
            assert list(parts) == list(setting.shapes)
            for name, part in parts.items():
                assert part.shape == (*setting.shapes[name], *flat.shape[1:])
                assert torch.equal(part, flat[setting.places[name]].reshape(part.shape))
                assert part.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            assert torch.equal(one.flatten(dict(reversed(parts.items()))), flat)
            again = one.unflatten(flat.numpy())
            assert all(torch.equal(again[name], part) for name, part in parts.items())
            assert torch.equal(one.flatten({name: part.numpy() for name, part in parts.items()}), flat)


def test_memory_and_graphs(whole):
    flat = whole.lin.gradient
    parts = whole.lin.unflatten(flat)
    parts["head.bias"].zero_()
    np.testing.assert_array_equal(flat, whole.lin.gradient)
    flat = torch.zeros(len(flat), dtype=torch.float64, requires_grad=True)
    whole.lin.unflatten(flat)["head.bias"].sum().backward()
    assert flat.grad.sum() == 3
    named = dict(whole.model.named_parameters())
    theta = whole.lin.flatten(named)
    assert not theta.requires_grad and torch.equal(theta, nn.utils.parameters_to_vector(named.values()))
    gradients = torch.autograd.grad(f.cross_entropy(whole.model(whole.x), whole.y), list(named.values()))
    ours = whole.lin.flatten(dict(zip(named, gradients, strict=True)))
    np.testing.assert_allclose(ours, whole.lin.gradient, rtol=0, atol=1e-14)


def test_other_dtypes():
    model = make_network().float()
    lin = lh.linearize(model, f.cross_entropy, *make_batch(3, 3, 5, dtype=torch.float32))
    parts = lin.unflatten(np.arange(lin.H.shape[0]))
    assert {part.dtype for part in parts.values()} == {torch.float32}
    assert torch.equal(lin.flatten(parts), torch.arange(lin.H.shape[0]).float())
    assert lin.unflatten(torch.ones(lin.H.shape[0], dtype=torch.bool))["head.bias"].dtype == torch.bool
    assert lin.unflatten(np.full(lin.H.shape[0], np.nan))["head.bias"].isnan().all()  # they have places too


def test_what_does_not_flatten(whole):
    for one in whole.all():
        N = len(whole.H)
        for bad in (np.zeros(N - 1), torch.zeros(N + 1, 2), np.zeros((N, 2, 2)), 0.0):
            with pytest.raises(ValueError, match=rf"\({N},\) or \({N}, k\)"):
                one.unflatten(bad)
        with pytest.raises(TypeError, match="real"):
            one.unflatten(np.zeros(N, dtype=complex))
        with pytest.raises(TypeError, match="dense"):
            one.unflatten(torch.zeros(N).to_sparse())
        good = one.unflatten(np.zeros(N))
        with pytest.raises(ValueError, match="head.bias missing"):
            one.flatten({name: part for name, part in good.items() if name != "head.bias"})
        with pytest.raises(ValueError, match="tail.bias unknown"):
            one.flatten(good | {"tail.bias": torch.zeros(3)})
        for bad in (torch.zeros(4).double(), torch.zeros(3, 1).double(), torch.zeros(()).double()):
            with pytest.raises(ValueError, match=r"head.bias of shape \(3,\)"):
                one.flatten(good | {"head.bias": bad})
        with pytest.raises(ValueError, match=r"blocks.0.bias of shape \(5, 2\), with .* got \(5,\)"):
            one.flatten(good | {"blocks.0.weight": torch.zeros(5, 3, 2).double()})
        with pytest.raises(ValueError, match="blocks.0.weight of shape"):
            one.flatten({name: part[..., None, None] for name, part in good.items()})
        with pytest.raises(TypeError, match=r"parameter head.bias, got torch.float32"):
            one.flatten(good | {"head.bias": torch.zeros(3)})
        with pytest.raises(TypeError, match="complex"):
            one.flatten(good | {"head.bias": np.zeros(3, dtype=complex)})
        with pytest.raises(ValueError, match="meta"):
            one.flatten(good | {"head.bias": torch.zeros(3, dtype=torch.float64, device="meta")})
        with pytest.raises(TypeError, match="dict"):
            one.flatten(list(good.values()))


def test_tables():
    table = ParameterTable(["a", "b"], [(), (2, 0)])
    assert table.size == 1 and table.slice("b") == slice(1, 1) and table.slice("*") == slice(0, 1)
    assert table.unflatten([3.0])["a"].shape == () and table.unflatten([3.0])["b"].shape == (2, 0)
    assert torch.equal(table.flatten({"a": 3.0, "b": np.zeros((2, 0))}), torch.tensor([3.0], dtype=torch.float64))
    assert ParameterTable([], []).flatten({}).shape == (0,)
    assert ParameterTable(["a[1]", "a1"], [(1,), (1,)]).slice("a[1]") == slice(0, 1)  # a name first, then a pattern
    for names, shapes in ((["a", "a"], [(1,), (1,)]), (["a"], [])):
        with pytest.raises(ValueError, match="different names"):
            ParameterTable(names, shapes)


BLOCKS = [
    ("blocks.0.weight", None),
    ("*.bias", None),
    (["head.weight", "blocks.2.*"], None),
    ("blocks.*", "head.*"),
    ("blocks.*.weight", "*"),
    ("head.*", ["head.weight", "head.bias"]),
]


@pytest.mark.parametrize("rows, columns", BLOCKS)
def test_blocks(whole, rows, columns):
    i = whole.lin.indices(rows)
    j = i if columns is None else whole.lin.indices(columns)
    G = gauss_newton_truth(whole.model, f.cross_entropy, whole.x, whole.y)
    inverse = np.linalg.inv(whole.H + 0.1 * np.eye(len(whole.H)))
    condition = np.linalg.cond(whole.H + 0.1 * np.eye(len(whole.H)))
    for one, dense in zip(whole.all()[1:], [whole.H, G, inverse, whole.H, G], strict=True):
        if one is not whole.lin.H and (rows, columns) not in BLOCKS[2:4]:
            continue  # how names become places is the same for all
        block = one.block(rows, columns)
        bound = (1e-14 * condition if dense is inverse else 1e-13) * np.abs(dense).max()
        np.testing.assert_allclose(lh.to_dense(block), dense[np.ix_(i, j)], rtol=0, atol=bound)
        np.testing.assert_allclose(lh.to_dense(block.T), dense[np.ix_(j, i)], rtol=0, atol=bound)
        assert block.symmetric == np.array_equal(i, j) and (block.T is block) == block.symmetric
        if one is whole.lin.H or (rows, columns) == BLOCKS[3]:
            check_operator(block, dense[np.ix_(i, j)], rtol=bound / np.abs(dense[np.ix_(i, j)]).max())
        again = pickle.loads(pickle.dumps(one)).block(rows, columns) if one is whole.lin.H else block
        v = np.random.default_rng(0).standard_normal(len(j))
        np.testing.assert_array_equal(again @ v, block @ v)


def test_blocks_compose(whole):
    A, B = whole.lin.H.block("blocks.*"), whole.lin.H.block("blocks.*", "head.*")
    D = whole.hessian.block("head.*").damped(2.0)
    i, j = whole.lin.indices("blocks.*"), whole.lin.indices("head.*")
    H = whole.H
    schur = H[np.ix_(i, i)] - H[np.ix_(i, j)] @ (H[np.ix_(j, j)] + 2.0 * np.eye(len(j))) @ H[np.ix_(j, i)]
    np.testing.assert_allclose(lh.to_dense(A - B @ D @ B.T), schur, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        B.damped(1.0)
    for bad in ([0, 0], [-1], [len(H)]):
        with pytest.raises(ValueError, match="different places"):
            Block(whole.lin.H, bad, [0])


@pytest.fixture(params=[True, False], ids=["columns", "factors"])
def route(request, monkeypatch):
    """Blocks from all columns of the inverse, or as if N were too large for that."""
    from linop_hess.lq.inverse import entries

    if not request.param:
        monkeypatch.setattr(entries, "SOLVED_UP_TO", 0)


@pytest.mark.parametrize("method", ["auto", "riccati", "dense"])
def test_block_diagonal_by_name(setting, method, route):
    """Modules that are a stage, and modules inside one."""
    for damping in (0.3, 1e-3, -0.05):
        exact = np.linalg.inv(setting.H + damping * np.eye(len(setting.H)))
        bound = 3 * (1e-13 + 1e-14 * np.linalg.cond(setting.H + damping * np.eye(len(setting.H)))) * np.abs(exact).max()
        blocks = setting.lin.inverse(damping, method).block_diagonal()
        modules = dict.fromkeys(name.rpartition(".")[0] for name in setting.shapes)
        assert list(blocks) == list(modules)
        for module, block in blocks.items():
            i = setting.of(*(name for name in setting.shapes if name.rpartition(".")[0] == module))
            np.testing.assert_allclose(block, exact[np.ix_(i, i)], rtol=0, atol=bound)


def test_block_diagonal_of_scattered_modules(whole, route, monkeypatch):
    """Parameters of one module that belong to several stages and do not lie side by side, some columns at a time."""
    from linop_hess.lq.inverse import entries

    monkeypatch.setattr(entries, "_COLUMNS_BYTES", 8 * len(whole.H) * 7)
    names = list(whole.shapes)
    renamed = [f"{'even' if k % 2 else 'odd'}.p{k}" if k < 6 else names[k] for k in range(len(names))]
    table = ParameterTable(renamed, whole.shapes.values())
    inverse = lh.HessianInverse(whole.lin.analysis, 0.1, table=table)
    exact = np.linalg.inv(whole.H + 0.1 * np.eye(len(whole.H)))
    for one in (inverse, inverse.with_damping(0.1), pickle.loads(pickle.dumps(inverse))):
        blocks = one.block_diagonal()
        assert list(blocks)[:2] == ["odd", "even"]
        for module, block in blocks.items():
            i = one.indices(f"{module}.*") if module in {"odd", "even"} else one.parameter_table.modules()[module]
            np.testing.assert_allclose(block, exact[np.ix_(i, i)], rtol=0, atol=1e-12 * np.abs(exact).max())


def test_a_model_that_is_one_module():
    model = nn.Linear(3, 3).double()
    x, y = make_batch(3, 3, 5)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    (block,) = lin.inverse(0.5).block_diagonal().values()
    exact = np.linalg.inv(oracle_hessian(model, f.cross_entropy, x, y) + 0.5 * np.eye(12))
    assert list(lin.inverse(0.5).block_diagonal()) == [""] and lin.slice("weight") == slice(0, 9)
    np.testing.assert_allclose(block, exact, rtol=0, atol=1e-13)


def test_problems_without_a_network():
    rng = np.random.default_rng(0)
    sizes = [(2, 3), (3, 0), (3, 4)]
    problem = lq.Problem.from_blocks(
        A=[np.eye(p) for _, p in sizes],
        B=[np.zeros((p, n)) for n, p in sizes],
        C=[np.eye(n) for n, _ in sizes],
        F=[rng.standard_normal((3, n)) for n, _ in sizes],
        G=[rng.standard_normal((3, p)) for _, p in sizes],
    )
    inverse = lh.HessianInverse(problem, 0.5)
    assert inverse.names == ("stages.0.x", "stages.2.x") and inverse.slice("stages.2.x") == slice(3, 7)
    blocks = inverse.block_diagonal()
    assert [block.shape for block in blocks.values()] == [(3, 3), (4, 4)] and list(blocks) == ["stages.0", "stages.2"]
    exact = np.linalg.inv(problem.hessian_product(torch.eye(7, dtype=torch.float64), 0.5).numpy())
    np.testing.assert_allclose(blocks["stages.2"], exact[3:, 3:], rtol=0, atol=1e-13)


SELECTIONS = [
    ("blocks.*.weight", lambda n: n.startswith("blocks") and n.endswith("weight")),
    (["head.bias", "blocks.2.*"], lambda n: n == "head.bias" or n.startswith("blocks.2.")),
    ("head.weight", lambda n: n == "head.weight"),
    (iter(["blocks.[03].*", "head.weight"]), lambda n: n[:8] in {"blocks.0", "blocks.3"} or n == "head.weight"),
]


@pytest.mark.parametrize("params, chosen", SELECTIONS)
def test_params_by_pattern(whole, params, chosen):
    params = params if isinstance(params, str) else list(params)
    names = [name for name in whole.shapes if chosen(name)]
    H = whole.H[np.ix_(whole.of(*names), whole.of(*names))]
    lin = lh.linearize(whole.model, f.cross_entropy, whole.x, whole.y, params=params)
    g = np.random.default_rng(0).standard_normal(len(H))
    assert backward_error(H, 0.1, lin.inverse(0.1) @ g, g) <= 1e-14
    for kind in (lh.Hessian, lh.GaussNewton):
        operator = kind(whole.model, f.cross_entropy, (whole.x, whole.y), params=params)
        assert list(operator.names) == list(lin.names) == names and operator.shape == H.shape
        dense = lh.to_dense(lin.H if kind is lh.Hessian else lin.gauss_newton())
        np.testing.assert_allclose(lh.to_dense(operator), dense, rtol=0, atol=1e-13 * np.abs(H).max())


def test_params_that_are_frozen_or_unknown():
    model, (x, y) = make_network(), make_batch(3, 3, 5)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith("blocks.3.") and name != "blocks.0.weight")
    makers = [
        lambda params: lh.linearize(model, f.cross_entropy, x, y, params=params),
        lambda params: lh.Hessian(model, f.cross_entropy, (x, y), params=params),
        lambda params: lh.GaussNewton(model, f.cross_entropy, (x, y), params=params),
    ]
    for make in makers:
        assert make("blocks.0.*").names == ("blocks.0.bias",)  # a pattern passes over what is frozen
        for frozen in ("blocks.3.*", "blocks.0.weight", ["head.*", "blocks.3.bias"]):
            with pytest.raises(ValueError, match="frozen"):
                make(frozen)
        with pytest.raises(ValueError, match=r"'head.wait'.*nearest are head.weight"):
            make(["head.bias", "head.wait"])
        with pytest.raises(ValueError, match="no parameter tail"):
            make("tail.*")
        with pytest.raises(TypeError, match="string"):
            make(["head.bias", 3])


def test_pickles_keep_names(setting):
    for one in (setting.lin, setting.lin.H, setting.lin.inverse(0.1), setting.hessian):
        again = pickle.loads(pickle.dumps(one))
        assert again.names == one.names and again.slice("head.weight") == one.slice("head.weight")
    assert pickle.loads(pickle.dumps(setting.lin)).H.names == setting.lin.names
