"""Public reports of faults, each with its whole kind: looking at a model is pure, and what torch runs is taken as it is."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.errors import UnsupportedModelError
from tests.helpers import make_batch, make_mlp, oracle_hessian


class Residual(nn.Module):
    """A model that is no chain of known layers, with some work done on its hidden state."""

    def __init__(self, work=None, width=4):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first, self.second, self.last = (nn.Linear(a, b) for a, b in ((3, width), (width, width), (width, 3)))
            for layer in (self.first, self.second, self.last):
                nn.init.orthogonal_(layer.weight, gain=1.3)
        self.work = work
        self.register_buffer("mean", torch.linspace(-1, 1, width, dtype=torch.float64))
        self.calls, self.log, self.named = 0, [], {"sum": []}
        self.cache = torch.zeros(width, dtype=torch.float64)
        self.double()

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.work is not None:
            h = self.work(self, h)
        return self.last(h + torch.tanh(self.second(h)))


@pytest.fixture
def batch():
    return make_batch(3, 3, 5)


def truth(model, loss, x, y):
    """Dense double backward of a copy of the model as it is."""
    left = [
        v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor) and v.grad_fn is not None
    ]
    model = copy.deepcopy(model, {id(v): v.detach().clone() for v in left})
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(loss(model(x), y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in flat]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).detach().numpy()


def require_exact(lin, H, tolerance=1e-14):
    assert np.abs(H).max() > 1e-2
    found = lh.to_dense(lin.H)
    assert np.linalg.norm(found - H, 2) <= tolerance * np.linalg.norm(H, 2)


class Untouched:
    """All that belongs to a model, its data and the process, before and after."""

    def __init__(self, model, *data):
        self.model, self.data = model, [t for t in data if isinstance(t, torch.Tensor)]
        self.before = self.state()

    def state(self):
        model = self.model
        tensors = [*model.parameters(), *model.buffers(), *self.data, model.cache]
        return {
            "values": [t.detach().clone() for t in tensors],
            "identities": [id(t) for t in tensors],
            "grads": [p.grad for p in model.parameters()],
            "flags": [(p.requires_grad, p.is_leaf, p._backward_hooks) for p in model.parameters()],
            "modes": [m.training for m in model.modules()],
            "hooks": [
                [list(hooks.values()) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
                for m in model.modules()
            ],
            "attributes": [list(vars(m)) for m in model.modules()],
            "python": (model.calls, list(model.log), {k: list(v) for k, v in model.named.items()}),
            "random": (
                torch.get_rng_state(),
                random.getstate(),
                np.random.get_state()[1].copy(),
                np.random.get_state()[2],
            ),
            "switches": (
                torch.is_grad_enabled(),
                torch.backends.mkldnn.enabled,
                torch.backends.cuda.flash_sdp_enabled(),
                torch.get_default_dtype(),
            ),
        }

    def check(self):
        after = self.state()
        for key, value in self.before.items():
            assert same(value, after[key]), f"{key} changed"


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# Looking at a model changes nothing (s01, s03, s07)


def counts(model, h):
    model.calls += 1
    model.log.append(h)
    model.named["sum"].append(float(h.detach().sum()))
    model.last_hidden = h
    return h * (1 + model.calls / 10 + len(model.log))


def caches(model, h):
    with torch.no_grad():
        model.cache.add_(h.mean(0))
    return h * (1 + model.cache)


def caches_active(model, h):
    model.cache = model.cache.clone()
    model.cache[:2] = h[0, :2]
    return h * model.cache


def seeds(model, h):
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    return h * np.random.rand() * random.random()


def draws_and_ignores(model, h):
    np.random.rand(3), random.random()
    return h.sin()


def switches_mode(model, h):
    model.train(not model.training)
    model.first.weight.requires_grad_(True)
    return h.cos() if model.training else h.sin()


def hooks_itself(model, h):
    model.first.register_forward_hook(lambda *args: None)
    return h.exp()


def steps_back(model, h):
    """A backward pass inside, which leaves gradients on the parameters."""
    (model.second(h.detach()).square().sum()).backward()
    return h.sin()


PURE = [counts, caches, caches_active, seeds, draws_and_ignores, switches_mode, hooks_itself, steps_back]


@pytest.mark.parametrize("work", PURE, ids=lambda work: work.__name__)
def test_side_effects_are_undone(work, batch):
    model = Residual(work)
    x, y = batch
    with Randomness():
        H = truth(model, f.cross_entropy, x, y)
    before = Untouched(model, x, y)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    before.check()
    require_exact(lin, H)
    assert lin.verify() <= 1e-12
    before.check()


class Randomness:
    """Random states of the process put back, for the truth."""

    def __enter__(self):
        self.states = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def __exit__(self, *exception):
        torch.set_rng_state(self.states[0])
        random.setstate(self.states[1])
        np.random.set_state(self.states[2])


def moves_a_buffer(model, h):
    with torch.no_grad():
        model.mean.mul_(0.9).add_(0.1 * h.mean(0))
    return h - model.mean


def rebinds_a_buffer(model, h):
    model.mean = 0.9 * model.mean + 0.1 * h.detach().mean(0)
    return h - model.mean


def adds_a_buffer(model, h):
    model.register_buffer("scale", h.detach().std(0))
    return h * 2


def numpy_noise(model, h):
    return h + torch.from_numpy(np.random.randn(*h.shape))


def python_noise(model, h):
    return h * random.random()


def generator_noise(model, h, generator=np.random.default_rng(0)):  # noqa: B008
    return h * generator.uniform()


def noise_on_constants(model, h):
    return h * (model.mean + torch.rand(4, dtype=h.dtype))


def dropout_on_constants(model, h):
    return h + f.dropout(model.mean, 0.5)


def changes_a_parameter(model, h):
    with torch.no_grad():
        model.second.weight.mul_(0.5)
    return h


def complex_inside(model, h):
    return torch.view_as_real(torch.view_as_complex(h.view(-1, 2, 2).contiguous()) ** 2).reshape(h.shape)


def fourier(model, h):
    return torch.fft.fft(h).abs()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(context, gradient):
        return 3 * context.saved_tensors[0] ** 2 * gradient


REFUSED = {
    moves_a_buffer: "leaves its buffers alone.*changes mean: call model.eval",
    rebinds_a_buffer: "leaves its buffers alone.*changes mean",
    adds_a_buffer: "leaves its buffers alone.*changes scale",
    numpy_noise: "two values for the same input",
    python_noise: "two values for the same input",
    generator_noise: "two values for the same input",
    noise_on_constants: r"random operation aten.rand.* in module 'inner'",
    dropout_on_constants: r"random operation aten.bernoulli_.* in module 'inner': call model.eval",
    changes_a_parameter: "parameters that the model leaves alone, got aten.mul_ in module 'inner'",
    complex_inside: "real numbers, got complex ones in aten.* in module 'inner': write it with real and imaginary parts",
    fourier: "real numbers, got complex ones in aten.* in module 'inner'",
    (lambda model, h: Once.apply(h)): "module 'inner.*custom autograd.Function Once.*linop_hess.Hessian",
}


class Outer(nn.Module):
    """So that the module at fault has a name."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("work", REFUSED, ids=lambda work: work.__name__)
def test_what_is_no_function_of_the_parameters_is_refused_and_undone(work, batch):
    model = Residual(work)
    x, y = batch
    before = Untouched(model, x, y)
    words = REFUSED[work].replace("changes ", "changes inner.")
    with pytest.raises(UnsupportedModelError, match=words):
        lh.linearize(Outer(model), f.cross_entropy, x, y)
    before.check()


@pytest.mark.parametrize("at", ["first", "second"])
@pytest.mark.parametrize("change", ["clip", "double", "look"])
def test_backward_hooks_change_no_loss(change, at, batch):
    """Of recorded modules and of plain chains, by linearize and Hessian."""
    x, y = batch
    hook = {
        "clip": lambda m, gi, go: tuple(None if g is None else g.clamp(-1e-2, 1e-2) for g in gi),
        "double": lambda m, gi, go: tuple(None if g is None else 2 * g for g in gi),
        "look": lambda m, gi, go: None,
    }[change]
    for model in (Residual(), make_mlp([3, 4, 4, 3])):
        H = truth(model, f.cross_entropy, x, y)
        where = getattr(model, at) if isinstance(model, Residual) else model[1 if at == "first" else 2]
        where.register_full_backward_hook(hook)
        where.register_full_backward_pre_hook(lambda m, go, hook=hook: hook(m, go, None))
        require_exact(lh.linearize(model, f.cross_entropy, x, y), H)
        np.testing.assert_allclose(lh.to_dense(lh.Hessian(model, f.cross_entropy, (x, y))), H, rtol=0, atol=1e-13)
        assert len(where._backward_hooks) == 1


def test_gradients_changed_within_the_pass_are_seen(batch):
    x, y = batch

    def hooked(model, h):
        h.register_hook(lambda g: 2 * g)
        return h

    with pytest.raises(UnsupportedModelError, match="gradient that follows.*first.weight.*remove hooks"):
        lh.linearize(Residual(hooked), f.cross_entropy, x, y)


def test_hooks_on_parameters_are_no_part_of_the_loss(batch):
    x, y = batch
    model = Residual()
    H = truth(model, f.cross_entropy, x, y)
    model.first.weight.register_hook(lambda g: 3 * g)
    require_exact(lh.linearize(model, f.cross_entropy, x, y), H)


@pytest.mark.parametrize("plain", [True, False])
def test_inputs_and_targets_changed_in_place(plain, batch):
    """By the model and by the loss: of copies."""
    x, y = batch
    target = torch.rand(5, 3, dtype=torch.float64)
    body = make_mlp([3, 4, 3]) if plain else Residual()
    model = nn.Sequential(nn.ELU(inplace=True), body)

    def loss(o, t):
        return (o - t.mul_(2)).square().sum()

    before = x.clone(), target.clone()
    H = truth(nn.Sequential(nn.ELU(), body), lambda o, t: (o - 2 * t).square().sum(), x, target)
    lin = lh.linearize(model, loss, x, target)
    assert torch.equal(x, before[0]) and torch.equal(target, before[1])
    require_exact(lin, H)


def test_memory_of_others_is_copied(batch):
    """Constants that a module or a closure holds may change afterwards."""
    x, y = batch
    scale, mask = torch.rand(4, dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0, 1.0]).double()
    array = np.linspace(1, 2, 4)
    model = Residual(lambda model, h: h * scale + model.cache * h.square() + (h * torch.from_numpy(array)).sin() * mask)
    model.cache += 1.5
    H = truth(model, f.cross_entropy, x, y)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    for tensor in (scale, mask, model.cache, x):
        tensor.fill_(float("nan"))
    array[:] = np.nan
    require_exact(lin, H)
    assert lin.inverse(0.1).solve(lin.gradient).backward_error <= 1e-14


def test_random_layers_in_eval_mode(batch):
    """Operations that draw in training alone."""
    x, y = batch
    for layer in (nn.RReLU(), nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5)):
        model = Residual(lambda model, h, layer=layer: layer(h.unsqueeze(-1)).squeeze(-1))
        layer.eval()
        require_exact(lh.linearize(model, f.cross_entropy, x, y), truth(model, f.cross_entropy, x, y))
        layer.train()
        with pytest.raises(UnsupportedModelError, match="random operation"):
            lh.linearize(model, f.cross_entropy, x, y)


# What lh.Hessian takes, linearize takes (s08, s16 to s20, s23, s27)


def test_inference_tensors_nested(batch):
    x, y = batch

    class Nested(Residual):
        def forward(self, batch):
            return super().forward(batch["x"][0] * batch["scale"])

    with torch.inference_mode():
        data = {"x": [torch.randn(5, 3, dtype=torch.float64)], "scale": torch.rand(3, dtype=torch.float64)}
        soft = ({"p": torch.rand(5, 3, dtype=torch.float64)},)
        made_inside = Nested()
        held = torch.rand(4, dtype=torch.float64)

    def loss(o, t):
        return f.mse_loss(o.sin(), t[0]["p"])

    plain = {"x": [data["x"][0].clone()], "scale": data["scale"].clone()}
    holding = Nested(lambda m, h: h * m.cache)
    holding.cache = held
    for model in (Nested(), made_inside, holding):
        twin = Nested(model.work)
        twin.cache = model.cache.clone()
        twin.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
        H = truth(twin, lambda o, t: loss(o, ({"p": soft[0]["p"].clone()},)), plain, None)
        require_exact(lh.linearize(model, loss, data, soft), H)
        with torch.inference_mode():
            require_exact(lh.linearize(model, loss, data, soft), H)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_around(low, batch):
    """Everything is done in the model's own precision, whatever is switched on outside."""
    x, y = batch
    for model in (make_mlp([3, 6, 4, 3]), Residual()):
        H = truth(model, f.cross_entropy, x, y)
        g = np.linspace(-1, 1, len(H))
        with torch.autocast("cpu", dtype=low):
            lin = lh.linearize(model, f.cross_entropy, x, y)
            solution = lin.inverse(0.1).solve(g)
            assert lin.verify() <= 1e-12
            assert lin.inertia(0.1).negative == (np.linalg.eigvalsh(H) < -0.1).sum()
        require_exact(lin, H)
        assert np.linalg.norm(H @ solution.x + 0.1 * solution.x - g) <= 1e-13 * np.linalg.norm(g)


def test_autocast_inside(batch):
    """A region of the model: its dtypes along the way, to their precision."""
    x, y = batch[0].float(), batch[1]

    def low(model, h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model.second(h).tanh().float()

    model = Residual(low).float()
    full = copy.deepcopy(model)
    full.work = lambda m, h: m.second(h).tanh()
    H = oracle_hessian(full, f.cross_entropy, x, y)
    found = lh.to_dense(lh.linearize(model, f.cross_entropy, x, y).H)
    assert np.linalg.norm(found - H, 2) <= 0.02 * np.linalg.norm(H, 2)


def inner_gradient(model, h):
    """Layers that differentiate inside: one step of a descent on an energy."""
    with torch.enable_grad():
        z = h if h.requires_grad else h.requires_grad_()
        energy = (model.second(z).sin() * z).sum()
        return h - 0.3 * torch.autograd.grad(energy, z, create_graph=True)[0]


def functional_gradient(model, h):
    return h - 0.3 * torch.func.grad(lambda z: (model.second(z).sin() * z).sum())(h)


@pytest.mark.parametrize("work", [inner_gradient, functional_gradient])
def test_layers_that_differentiate_inside(work, batch):
    x, y = batch
    model = Residual(work)
    require_exact(lh.linearize(model, f.cross_entropy, x, y), truth(model, f.cross_entropy, x, y), 1e-13)


@pytest.mark.parametrize("at", ["targets", "closure", "nested"])
@pytest.mark.parametrize("plain", [True, False])
def test_losses_that_differentiate_the_model(plain, at):
    """Physics-informed: the loss does not depend on the output alone."""
    model = make_mlp([3, 6, 1]) if plain else nn.Sequential(Residual(), make_mlp([3, 1]))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def residual(u, x):
        du = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        return (du.sum(1, keepdim=True) + u.sin()).square().mean()

    loss, target = {
        "targets": (residual, x),
        "closure": (lambda u, _: residual(u, x), None),
        "nested": (lambda u, t: residual(u, t["x"][0]), {"x": [x]}),
    }[at]
    lin = lh.linearize(model, loss, x, target)
    require_exact(lin, truth(model, residual, x, x), 1e-13)
    assert lin.verify() <= 1e-11 and x.grad is None
    assert lin.inverse(0.05).solve(lin.gradient).backward_error <= 1e-14


class Integers(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first, self.body = first, Residual()

    def forward(self, i):
        return self.body(self.first(i))


INTEGERS = {
    "one-hot": (lambda i: f.one_hot(i, 3).double(), torch.tensor([0, 2, 1, 1, 0])),
    "bytes": (lambda i: i.double() / 255, torch.randint(256, (5, 3), dtype=torch.uint8)),
    "booleans": (lambda i: i.double() - 0.5, torch.rand(5, 3) > 0.5),
    "embedding": (nn.Embedding(4, 3).double(), torch.tensor([0, 3, 1, 1, 0], dtype=torch.int32)),
    "sparse gradients": (nn.Embedding(4, 3, sparse=True).double(), torch.tensor([0, 3, 1, 1, 0])),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_inputs(name, batch):
    first, i = INTEGERS[name]
    model = Integers(first)
    twin = copy.deepcopy(model)
    if isinstance(first, nn.Embedding):
        twin.first.sparse = False
    require_exact(lh.linearize(model, f.cross_entropy, i, batch[1]), truth(twin, f.cross_entropy, i, batch[1]))
    assert getattr(first, "sparse", False) == (name == "sparse gradients")


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_frozen_parts_in_other_dtypes(low, batch):
    x, y = batch
    backbone = make_mlp([3, 5, 3]).to(low).requires_grad_(False)
    head = Residual()

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = backbone, head

        def forward(self, x):
            features = torch.nan_to_num(self.backbone(x.to(low)).double())
            return self.head(features)

    lin = lh.linearize(Mixed(), f.cross_entropy, x, y)
    require_exact(lin, truth(head, f.cross_entropy, backbone(x.to(low)).double(), y))
    assert lin.names == tuple(f"head.{name}" for name, _ in head.named_parameters())


def test_missing_values_filled_by_the_model(batch):
    x, y = batch
    filled = x.clone()
    filled[0, 1] = 0.0
    x[0, 1] = float("nan")
    model = nn.Sequential(Filled(), Residual())
    require_exact(lh.linearize(model, f.cross_entropy, x, y), truth(model, f.cross_entropy, filled, y))


class Filled(nn.Module):
    def forward(self, x):
        return torch.where(x.isnan(), torch.zeros_like(x), x)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_inputs_and_targets_with_a_graph(batch):
    x, y = batch
    model, teacher = Residual(), Residual()
    for sparse in (x.to_sparse(), x.to_sparse_csr()):
        with pytest.raises(TypeError, match=r"to_dense\(\)"):
            lh.linearize(model, f.cross_entropy, sparse, y)
        with pytest.raises(TypeError, match=r"targets.*to_dense\(\)"):
            lh.linearize(model, f.mse_loss, x, {"t": [sparse]})
    target = teacher(x).softmax(1)
    require_exact(lh.linearize(model, f.cross_entropy, x, target), truth(model, f.cross_entropy, x, target.detach()))
    target.sum().backward()  # the caller's graph is still there
    assert teacher.first.weight.grad is not None


# Shapes (s12, s22) and what has no derivative


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("features, width", [(3, 0), (0, 4)])
def test_widths_of_zero(features, width, batch):
    x, y = batch[0][:, :features], batch[1]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(features, width), nn.Linear(width, 3), nn.Linear(features, 3)

        def forward(self, x):
            return self.b(self.a(x).tanh()) + self.c(x)

    model = Net().double()
    lin = lh.linearize(model, f.cross_entropy, x, y)
    H = truth(model, f.cross_entropy, x, y)
    require_exact(lin, H)
    assert lin.inverse(0.1).solve(np.ones(len(H))).backward_error <= 1e-14


def test_empty_batches(batch):
    x, y = batch
    with pytest.raises(ValueError, match=r"empty batch, inputs of shape \(0, 3\)"):
        lh.linearize(Residual(), f.cross_entropy, x[:0], y[:0])


def test_flat_outputs_are_per_sample():
    """Outputs of shape (N,): the loss is block diagonal over samples."""

    class Flat(Residual):
        def forward(self, x):
            return super().forward(x).sum(-1)

    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, target = Flat(), torch.zeros(60, dtype=torch.float64)
    lin = lh.linearize(model, f.mse_loss, x, target)
    require_exact(lin, truth(model, f.mse_loss, x, target))
    assert lin.problem.stages[-1].samples == 60 or getattr(lin.problem.stages[-1], "inner").samples == 60  # noqa: B009


def test_parameters_that_do_not_matter(batch):
    """Rows of zeros; only a model whose parameters are all idle is refused."""
    x, y = batch
    model = Residual(lambda m, h: h + 0 * m.second(h).detach())
    model.idle = nn.Linear(2, 2).double()
    lin = lh.linearize(model, f.cross_entropy, x, y)
    H = oracle_hessian(model, f.cross_entropy, x, y)
    require_exact(lin, H)
    assert not lh.to_dense(lin.H)[lin.indices("idle.*")].any()
    inverse = lin.inverse(0.3)
    assert inverse.inertia() == lh.Inertia(
        int((np.linalg.eigvalsh(H) < -0.3).sum()), 0, len(H) - int((np.linalg.eigvalsh(H) < -0.3).sum())
    )
    with pytest.raises(ValueError, match="does not depend"):
        lh.linearize(model, f.cross_entropy, x, y, params="idle.*")


@pytest.mark.parametrize("output", ["a string", None, 3.0, [], torch.tensor([1, 2])], ids=repr)
def test_outputs_that_are_no_tensors(output, batch):
    class Net(Residual):
        def forward(self, x):
            super().forward(x)
            return output

    with pytest.raises((TypeError, ValueError), match="floating tensor|depend|scalar tensor"):
        lh.linearize(Net(), lambda o, t: torch.ones((), dtype=torch.float64), *batch)


def test_operations_without_a_second_derivative_name_module_and_remedy(batch):
    x, y = batch
    model = Outer(Residual(lambda m, h: h * torch.cdist(h, h.detach() + 1).mean()))
    try:
        lin = lh.linearize(model, f.cross_entropy, x, y)
    except UnsupportedModelError as error:
        assert "_cdist_forward in module 'inner'" in str(error) and "without a second derivative" in str(error)
        assert "replace it" in str(error)
    else:  # by differences of its own derivative
        assert lin.H is not None


class LateRows(nn.Module):
    """A product with a matrix as its addend, whose rows are read at different times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, 12, dtype=torch.float64))
        self.c = nn.Parameter(torch.randn(12, 2, dtype=torch.float64))
        self.x = torch.randn(8, 3, dtype=torch.float64)

    def forward(self, addend: torch.Tensor) -> torch.Tensor:
        h = torch.addmm(addend, self.x, self.w)
        return torch.tanh(torch.tanh(h[:4]) + h[4:]) @ self.c


def test_a_product_with_a_matrix_as_addend_stays_whole():
    model, addend, y = LateRows(), torch.randn(8, 12, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    theirs = lh.to_dense(lh.Hessian(model, nn.functional.cross_entropy, (addend, y)))
    ours = lh.to_dense(lh.linearize(model, nn.functional.cross_entropy, addend, y).H)
    assert abs(theirs).max() > 1e-2 and abs(ours - theirs).max() <= 1e-14 * abs(theirs).max()


@pytest.mark.parametrize("names", [("a", "a.b"), ("forward",), ("",), ("training",), ("a..b",)])
def test_names_that_no_module_can_have(names):
    params = {name: torch.ones(2, dtype=torch.float64) for name in names}
    with pytest.raises(ValueError, match="names that a module can have"):
        lh.linearize(lambda p, x: x, lambda y, _: y.sum(), torch.ones(1), None, params=params)
