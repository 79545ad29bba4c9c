"""Every kind of layer: the Hessian of a small network around it against double backward."""

import copy
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import linop_hess as lh
from linop_hess.graph.layers import flatten
from linop_hess.graph.rules.affine import Linear
from linop_hess.graph.rules.pointwise import ELEMENTWISE, Pointwise
from tests.helpers import differenced_hessian, oracle_gradient, oracle_hessian

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


def weighted(output: Tensor, target: Tensor) -> Tensor:
    """A curved loss that treats every output differently."""
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)
    return (weights * (output - target).tanh().square()).sum() + 0.1 * (output * weights).sum()


def perturbed(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Orthogonal weights of gain 1.3, and noise on every parameter and running statistic."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.orthogonal_(module.weight, gain=1.3)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(std=0.4)
                module.running_var.uniform_(0.5, 2.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, dtype=torch.float64).to(parameter.dtype))
    return model.eval()


def check(model, x, *, params=None, target=None, tolerance=None, dtype=torch.float64, loss=weighted):
    """Compare H, gradient and loss of the linearization with autograd, and return it."""
    model = model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        output = model(x)
    if target is None:
        target = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape).to(dtype)
    before = copy.deepcopy(model.state_dict()), x.clone()
    lin = lh.linearize(model, loss, x, target, params=params)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    assert torch.equal(x, before[1])
    with sdpa_kernel(SDPBackend.MATH):
        expected = oracle_hessian(model, loss, x, target, params)
    tolerance = tolerance or TOLERANCE[dtype]
    assert np.abs(expected).max() > 1e-3, "the case has no curvature to speak of"
    ours = lh.to_dense(lin.H)
    assert ours.dtype == lin.H.dtype == np.dtype(str(dtype).removeprefix("torch."))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    gradient = oracle_gradient(model, loss, x, target, params)
    np.testing.assert_allclose(lin.gradient, gradient, rtol=0, atol=tolerance * np.abs(gradient).max())
    np.testing.assert_allclose(lin.loss, float(loss(output, target)), rtol=tolerance)
    return lin


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def around(layer: nn.Module, before: int = 4, after: int | None = None) -> nn.Module:
    """The layer between two linear ones, so that its F, C and B all count."""
    return perturbed(nn.Sequential(nn.Linear(3, before), layer, nn.Linear(after or before, 2)).double())


# Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 2, 5, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias, samples, dtype):
    layers = [nn.Linear(3, 5, bias=bias), nn.Tanh(), nn.Linear(5, 2, bias=bias), nn.Tanh(), nn.Linear(2, 4, bias=bias)]
    check(perturbed(nn.Sequential(*layers).double()), normal(samples, 3), dtype=dtype)


def test_linear_next_to_linear():
    check(
        perturbed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1, bias=False), nn.Linear(1, 3)).double()), normal(4, 3)
    )


def test_single_linear():
    model = perturbed(nn.Linear(3, 2).double())
    assert check(model, normal(4, 3)).names == ("weight", "bias")


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3), (2, 1, 2, 3)])
def test_inputs_of_any_number_of_axes(shape):
    model = perturbed(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    check(model, normal(*shape))


def test_repeated_and_zero_rows():
    x = normal(6, 3)
    x[1] = x[0]
    x[3] = 0
    x[5] = x[0]
    model = perturbed(nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)).double())
    check(model, x)
    check(model, torch.zeros_like(x[:1]))


def test_state_whose_size_changes_within_stacks():
    """Same-shaped layers far apart, one of them first, one last, share a stack."""
    widths = [3, 3, 5, 3, 3, 5, 3, 3]
    layers = [m for a, b in zip(widths[:-1], widths[1:], strict=True) for m in (nn.Linear(a, b), nn.Tanh())]
    check(perturbed(nn.Sequential(*layers[:-1]).double()), normal(3, 3))


# Activations


def activation(kind: type[nn.Module]) -> nn.Module:
    return kind(0.1, 0.7) if kind is nn.Threshold else kind()


@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_activation(kind):
    model = around(activation(kind))
    x = 1.5 * normal(5, 3)
    if kind is nn.Hardsigmoid:  # torch has no second derivative of it, so no oracle but differences
        lin = lh.linearize(model, weighted, x, torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(5, 2))
    else:
        lin = check(model, x)
    output = model(x)
    target = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    differences = differenced_hessian(model, weighted, x, target)
    np.testing.assert_allclose(lh.to_dense(lin.H), differences, rtol=0, atol=1e-6 * np.abs(differences).max())


@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_second_derivative_of_activation_on_every_piece(kind):
    """From saturation through every piece to saturation, kinks left out; against differences of φ'."""
    module = activation(kind).eval()
    u = torch.linspace(-8.03, 8.11, 300, dtype=torch.float64)
    kinks = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.1, 0.5, 1.0, 3.0, 6.0], dtype=torch.float64)
    u = u[(u[:, None] - kinks).abs().min(1).values > 1e-2]
    lin = lh.linearize(
        nn.Sequential(OneByOne(u), module),
        lambda o, _: (torch.arange(1.0, 1 + len(u)) / 100 * o).sum(),
        u,
        None,
        verify=False,
    )

    def slope(v):
        v = v.clone().requires_grad_()
        return torch.autograd.grad(module(v).sum(), v)[0].detach()

    second = (slope(u + 1e-5) - slope(u - 1e-5)) / 2e-5 * torch.arange(1.0, 1 + len(u)).double() / 100
    np.testing.assert_allclose(lin.H @ np.ones(len(u)), second.numpy(), rtol=0, atol=1e-7)


class OneByOne(nn.Module):
    """x ↦ x + w, so that the Hessian by w is that by the state."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros_like(like))

    def forward(self, x):
        return x + self.w


def test_in_place_activation_changes_nothing():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ELU(inplace=True), nn.Linear(4, 2), nn.ReLU(inplace=True), nn.Linear(2, 2)
    )
    check(perturbed(model.double()), normal(4, 3))


def test_activation_that_comes_first_or_last():
    check(perturbed(nn.Sequential(nn.Tanh(), nn.Linear(3, 2), nn.Sigmoid()).double()), normal(4, 3))


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(3 * x + 0.1)


class Gaussian(nn.Module):
    def forward(self, x):
        return torch.exp(-x.square()) / 2


class Snake(nn.Module):
    def forward(self, x):
        return x + torch.where(x > 0, torch.sin(x) ** 2, 0.3 * x)


@pytest.mark.parametrize("module", [Sine(), Gaussian(), Snake()], ids=lambda m: type(m).__name__)
def test_custom_elementwise_module(module):
    check(around(module), normal(4, 3))


class Shifted(nn.Module):
    """Elementwise but for a buffer that differs along the state: still elementwise, with another function each entry."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(-1, 1, 4, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(x * self.shift + self.shift)


def test_elementwise_with_a_buffer():
    check(around(Shifted()), normal(4, 3))


def test_two_shifted_activations_are_not_confused():
    a, b = Shifted(), Shifted()
    b.shift.mul_(-2)
    model = nn.Sequential(nn.Linear(3, 4), a, nn.Linear(4, 4), b, nn.Linear(4, 4), a, nn.Linear(4, 2))
    check(perturbed(model.double()), normal(4, 3))


class TimesMean(nn.Module):
    def forward(self, x):
        return x * x.mean()


class Cumulative(nn.Module):
    def forward(self, x):
        return x.cumsum(-1).tanh()


class Reversed(nn.Module):
    def forward(self, x):
        return x * x.flip(-1)


class Transposed(nn.Module):
    """Shape kept only because samples and features are equally many."""

    def forward(self, x):
        return torch.sin(x * x.T)


class Outer(nn.Module):
    def forward(self, x):
        return x + x[:, :1] * x[:, 1:2]


@pytest.mark.parametrize(
    "module",
    [TimesMean(), Cumulative(), Reversed(), Transposed(), Outer(), nn.Softmax(-1), nn.Softmin(-1), nn.LogSoftmax(-1)],
    ids=lambda m: type(m).__name__,
)
def test_what_only_looks_elementwise_is_not_taken_for_it(module):
    check(around(module), normal(4, 3))


class Branching(nn.Module):
    """A control flow on a value of the whole batch: elementwise here, and only here is what counts."""

    def forward(self, x):
        return x.tanh() if x.sum() > 1e6 else x.sin()


def test_branching_module():
    check(around(Branching()), normal(4, 3))


# Convolutions and pooling


def conv_net(spatial: int, **options) -> nn.Module:
    Conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial]
    first = Conv(2, 4, 3, **options)
    return nn.Sequential(first, nn.Tanh(), Conv(first.out_channels, 2, 2, padding=1), nn.Flatten())


CONVOLUTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "padding": {"padding": 2},
    "same": {"padding": "same"},
    "same, dilated": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "stride": {"stride": 2},
    "stride, padding": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 1},
    "all": {"stride": 3, "padding": 2, "dilation": 2},
    "groups": {"groups": 2},
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("spatial", [1, 2])
def test_convolution(spatial, case):
    options = CONVOLUTIONS[case]
    model = perturbed(conv_net(spatial, **options).double())
    check(model, normal(2, model[0].in_channels, *[6, 5][:spatial]))


@pytest.mark.parametrize("case", ["padding", "same", "replicate", "circular", "stride, padding", "dilation"])
def test_convolution_in_three_dimensions(case):
    model = nn.Sequential(nn.Conv3d(1, 2, (2, 3, 1), **CONVOLUTIONS[case]), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
    x = normal(2, 1, 4, 5, 3)
    model = model.double()
    model(x)
    check(perturbed(model), x)


def test_convolution_with_unequal_kernel_stride_and_padding():
    model = nn.Sequential(nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), nn.Tanh())
    check(perturbed(model.double()), normal(2, 2, 7, 5))


def test_convolution_without_a_batch_axis():
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 2))
    check(perturbed(model.double()), normal(2, 6))


def test_convolutions_in_a_row_are_stacked():
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Conv1d(2, 2, 3, padding=1), nn.Tanh())])
    lin = check(perturbed(model.double()), normal(2, 2, 5))
    assert len(lin.problem.blocks) == 3


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False, padding=1),
        nn.AvgPool2d((1, 2), divisor_override=3),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((2, 3)),
    ],
    ids=str,
)
def test_average_pooling(pool):
    check(perturbed(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), pool, nn.Flatten()).double()), normal(2, 1, 6, 5))


@pytest.mark.parametrize("pool", [nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(3)], ids=str)
def test_average_pooling_of_signals(pool):
    check(perturbed(nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), pool, nn.Flatten()).double()), normal(2, 1, 7))


@pytest.mark.parametrize("pool", [nn.AvgPool3d(2), nn.AdaptiveAvgPool3d((1, 2, 1))], ids=str)
def test_average_pooling_of_volumes(pool):
    check(perturbed(nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), pool, nn.Flatten()).double()), normal(2, 1, 4, 5, 3))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.LPPool2d(2, 2)], ids=str)
def test_other_pooling(pool):
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), pool, nn.Flatten(), nn.LazyLinear(2)).double()
    x = normal(2, 1, 6, 5)
    model(x)
    check(perturbed(model), x)


# Layers that only rename


def test_reshaping_layers_are_no_stages():
    model = nn.Sequential(
        nn.Identity(), nn.Flatten(), nn.Linear(6, 8), nn.Dropout(0.5), nn.Unflatten(1, (2, 4)), nn.Tanh(),
        nn.Conv1d(2, 3, 2), nn.Dropout1d(0.3), nn.AlphaDropout(0.2), nn.Flatten(),
    )  # fmt: skip
    lin = check(perturbed(model.double()), normal(3, 2, 3))
    assert lin.problem.length == 4


def test_dropout_of_probability_zero_in_training_mode():
    model = perturbed(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.0), nn.Linear(4, 2)).double())
    check(model.train(), normal(4, 3))


def test_nested_and_empty_sequentials():
    inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Sequential()))
    model = nn.Sequential(nn.Linear(3, 4), inner, nn.Sequential(nn.Linear(4, 2)))
    lin = check(perturbed(model.double()), normal(4, 3))
    assert lin.names == ("0.weight", "0.bias", "1.0.weight", "1.0.bias", "2.0.weight", "2.0.bias")


# Normalizations: torch's own second derivatives of these are not to be trusted, hence the finite differences


NORMS = {
    "layer": lambda: nn.LayerNorm(6),
    "layer, last two axes": lambda: nn.LayerNorm((2, 6)),
    "layer, no affine": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "layer, no bias": lambda: nn.LayerNorm(6, bias=False),
    "layer, large eps": lambda: nn.LayerNorm(6, eps=0.5),
    "group": lambda: nn.GroupNorm(1, 2),
    "group, one each": lambda: nn.GroupNorm(2, 2),
    "group, no affine": lambda: nn.GroupNorm(1, 2, affine=False),
    "batch": lambda: nn.BatchNorm1d(2),
    "batch, no affine": lambda: nn.BatchNorm1d(2, affine=False),
    "instance": lambda: nn.InstanceNorm1d(2, affine=True),
}
if hasattr(nn, "RMSNorm"):  # torch 2.4
    NORMS |= {
        "rms": lambda: nn.RMSNorm(6),
        "rms, last two axes": lambda: nn.RMSNorm((2, 6), eps=0.1),
        "rms, no affine": lambda: nn.RMSNorm(6, elementwise_affine=False),
    }


@pytest.mark.parametrize("name", NORMS)
def test_normalization(name):
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), NORMS[name](), nn.Tanh(), nn.Linear(6, 2))
    model = perturbed(model.double())
    x = normal(3, 2, 3)
    lin = check(model, x)
    target = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 2, 2)
    differences = differenced_hessian(model, weighted, x, target)
    np.testing.assert_allclose(lh.to_dense(lin.H), differences, rtol=0, atol=1e-6 * np.abs(differences).max())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm((3, 2))], ids=str)
def test_normalization_of_images(norm):
    check(perturbed(nn.Sequential(nn.Conv2d(1, 2, 2), norm, nn.Tanh(), nn.Flatten()).double()), normal(3, 1, 4, 3))


def test_batch_norm_of_vectors_and_volumes():
    check(
        perturbed(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()), normal(5, 3)
    )
    check(perturbed(nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Tanh()).double()), normal(2, 1, 3, 3, 2))


@pytest.mark.parametrize("params", [["1.weight"], ["1.bias"], ["0.weight", "1.weight"], ["1.bias", "3.bias"]])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_part_of_a_normalization(norm, params):
    model = perturbed(nn.Sequential(nn.Linear(3, 4), norm(4), nn.Tanh(), nn.Linear(4, 2)).double())
    check(model, normal(5, 3), params=params)


def test_norms_as_first_and_last_layers():
    last = getattr(nn, "RMSNorm", nn.LayerNorm)
    check(perturbed(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4), last(4)).double()), normal(5, 3))


@pytest.mark.parametrize("name", sorted({"layer", "group", "batch", "rms"} & NORMS.keys()))
def test_normalization_in_float32(name):
    model = perturbed(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), NORMS[name](), nn.Tanh(), nn.Linear(6, 2)).double())
    check(model, normal(3, 2, 3), dtype=torch.float32)


# Embeddings


@pytest.mark.parametrize("index", [[[0, 1, 4]], [[2, 2, 0], [3, 2, 4]], [[1, 1, 1], [1, 1, 1]]])
@pytest.mark.parametrize("padding", [None, 1, -1])
def test_embedding(padding, index):
    model = nn.Sequential(
        nn.Embedding(5, 2, padding_idx=padding), nn.Flatten(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)
    )
    lin = check(perturbed(model.double()), torch.tensor(index))
    x = lin.inverse(1e-3).solve(lin.gradient)
    assert x.backward_error <= 1e-14


def test_embedding_of_one_index_and_by_itself():
    check(perturbed(nn.Sequential(nn.Embedding(4, 3), nn.Tanh()).double()), torch.tensor([0, 3, 3]))


def test_frozen_embedding_and_int32_indices():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    check(perturbed(model), torch.tensor([0, 3, 3], dtype=torch.int32), params=["1.weight", "3.bias"])


# Modules of many operations


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 3), nn.Linear(3, width)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return x + self.scale * self.b(torch.tanh(self.a(x)))


class NormedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.group, self.linear = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.group(self.linear(self.norm(x)).tanh())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(3, 2, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Square(nn.Module):
    """Curved in its parameter: A ≠ 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.8, 1.1, 0.2]))

    def forward(self, x):
        return x * self.w**3 + torch.sin(self.w * x)


OF_MANY_OPERATIONS = {
    "prelu": (lambda: around(nn.PReLU()), (4, 3)),
    "prelu, a channel each": (lambda: around(nn.PReLU(4)), (4, 3)),
    "glu": (lambda: around(nn.GLU(), 4, 2), (4, 3)),
    "bilinear in w and x": (lambda: around(Square()), (4, 3)),
    "residual": (lambda: around(Residual(4)), (4, 3)),
    "residual only": (lambda: perturbed(nn.Sequential(Residual(3)).double()), (2, 3)),
    "attention": (lambda: perturbed(nn.Sequential(nn.Linear(3, 4), Attention(), nn.Linear(4, 1)).double()), (2, 3, 3)),
    "transformer": (
        lambda: perturbed(nn.Sequential(nn.TransformerEncoderLayer(2, 1, 3, batch_first=True), nn.Tanh()).double()),
        (2, 2, 2),
    ),
    "residual with norm": (lambda: around(nn.Sequential(NormedResidual())), (4, 3)),
    "gru": (lambda: perturbed(nn.Sequential(Recurrent(nn.GRU), nn.Tanh(), nn.Linear(2, 2)).double()), (2, 3, 3)),
    "rnn": (lambda: perturbed(nn.Sequential(Recurrent(nn.RNN), nn.Linear(2, 2)).double()), (2, 3, 3)),
    "lstm": (lambda: perturbed(nn.Sequential(Recurrent(nn.LSTM), nn.Linear(2, 2)).double()), (2, 2, 3)),
    "transposed convolution": (
        lambda: perturbed(nn.Sequential(nn.ConvTranspose1d(2, 2, 2), nn.Tanh(), nn.ConvTranspose1d(2, 1, 2)).double()),
        (2, 2, 3),
    ),
    "local response": (
        lambda: perturbed(nn.Sequential(nn.Conv1d(2, 3, 2), nn.LocalResponseNorm(2), nn.Tanh()).double()),
        (2, 2, 4),
    ),
}


@pytest.mark.parametrize("name", OF_MANY_OPERATIONS)
def test_module_of_many_operations(name):
    build, shape = OF_MANY_OPERATIONS[name]
    lin = check(build(), normal(*shape))
    solution = lin.inverse(1e-2).solve(lin.gradient)
    assert solution.backward_error <= 1e-14
    assert lin.verify() <= 1e-10


@pytest.mark.parametrize("params", [["1.scale"], ["1.a.weight", "1.b.bias"], ["0.weight", "1.b.weight"]])
def test_part_of_a_module_of_many_operations(params):
    check(around(Residual(4)), normal(4, 3), params=params)


def test_module_of_many_operations_in_float32():
    check(around(Residual(4)), normal(4, 3), dtype=torch.float32)


class SubclassedLinear(nn.Linear):
    """Looks like a linear layer, is none."""

    def forward(self, x):
        return super().forward(x).tanh() * 2


class SubclassedTanh(nn.Tanh):
    def forward(self, x):
        return super().forward(x.cumsum(-1))


def test_subclasses_are_not_taken_for_their_parents():
    model = nn.Sequential(SubclassedLinear(3, 4), SubclassedTanh(), nn.Linear(4, 2))
    assert all(flatten(model[k : k + 1], []) is None for k in (0, 1))
    check(perturbed(model.double()), normal(4, 3))


def test_parametrization_is_respected():
    model = perturbed(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    nn.utils.parametrize.register_parametrization(model[0], "weight", Sine())
    check(model, normal(4, 3))


def test_wrong_second_derivative_of_torch_is_not_passed_on():
    """The double backward of torch's fused weight norm is asymmetric (2.13): its formula is differentiated."""
    model = perturbed(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    nn.utils.parametrizations.weight_norm(model[0])
    x, target = normal(4, 3), torch.zeros(4, 2, dtype=torch.float64)
    lin = lh.linearize(model, weighted, x, target)
    differences = differenced_hessian(model, weighted, x, target)
    assert np.abs(differences).max() > 0.1
    np.testing.assert_allclose(lh.to_dense(lin.H), differences, rtol=0, atol=1e-6 * np.abs(differences).max())
    assert lin.verify() <= 1e-12


def squared(module, args, output):
    return output.square()


def accumulated(module, args, output):
    return output.cumsum(-1)


@pytest.mark.parametrize("hook", [squared, accumulated])
def test_hooked_activation_next_to_a_plain_one(hook):
    """Of one class and one shape, but not one function."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for position in (1, 3):
        hooked = copy.deepcopy(perturbed(model))
        hooked[position].register_forward_hook(hook)
        check(hooked, normal(4, 3))


@pytest.mark.parametrize("hooked", [False, True])
def test_forward_replaced_on_the_instance(hooked):
    model = perturbed(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2))).double())
    replaced = model[1] if hooked else model[0]
    replaced.forward = types.MethodType(lambda self, x: type(self).forward(self, x).sin(), replaced)
    check(model, normal(4, 3))


class OverBatch(nn.Module):
    """Elementwise, with a factor from the shape it is given."""

    def forward(self, x):
        return torch.sin(x * x.shape[0] / x.ndim)


def test_elementwise_module_that_looks_at_the_shape():
    check(around(OverBatch()), normal(5, 3))


@pytest.mark.parametrize(
    "module", [nn.Softmax(-1), TimesMean(), Branching(), Sine(), nn.Tanh(), nn.AvgPool1d(1)], ids=str
)
def test_module_without_parameters_in_two_places(module):
    model = nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 4), module, nn.Linear(4, 2))
    check(perturbed(model.double()), normal(4, 3))


@pytest.mark.parametrize("target", ["linear", "sequential"])
def test_hook_of_another_place(target):
    """A hook of a linear layer, and of the container that is taken apart."""
    model = perturbed(nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)).double())
    hooked = model[0][0] if target == "linear" else model[0]
    hooked.register_forward_hook(lambda module, args, output: output.sin())
    check(model, normal(4, 3))


# Subsets of the parameters


MLP_PARTS = {
    "weights": ["0.weight", "2.weight", "4.weight"],
    "biases": ["0.bias", "2.bias", "4.bias"],
    "first layer": ["0.weight", "0.bias"],
    "last layer": ["4.weight", "4.bias"],
    "one weight inside": ["2.weight"],
    "one bias inside": ["2.bias"],
    "mixed": ["0.bias", "2.weight", "4.weight", "4.bias"],
    "in another order": ["4.bias", "0.weight"],
}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("part", MLP_PARTS)
def test_subset(part, freeze):
    """Chosen by `params=`, or by freezing all the others."""
    names = MLP_PARTS[part]
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model = perturbed(model.double())
    if freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    lin = check(model, normal(4, 3), params=None if freeze else names)
    assert lin.names == tuple(name for name, _ in model.named_parameters() if name in names)
    for method in ("banded", "riccati", "dense"):
        assert lin.inverse(1e-3, method).solve(lin.gradient).backward_error <= 1e-14


def test_frozen_convolutions_and_batch_norms():
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Conv1d(2, 2, 2), nn.Flatten())
    model = perturbed(model.double())
    model[1].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    check(model, normal(3, 1, 5))


def test_kinds_named_by_flatten():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Sine())
    assert [type(layer.kind) for layer in flatten(model[:2], [])] == [Linear, Pointwise]
    assert flatten(model, []) is None


@pytest.mark.parametrize("samples", [1, 17, 40])
def test_batches(samples):
    model = perturbed(nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 2), nn.SiLU(), nn.Linear(2, 3)).double())
    check(model, normal(samples, 3))


def test_saturated_activations():
    model = perturbed(
        nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    )
    with torch.no_grad():
        model[0].weight[:2] *= 200
        model[2].bias[0] = 40
    lin = check(model, normal(6, 3))
    for method in ("banded", "riccati", "dense"):
        assert lin.inverse(1e-4, method).solve(lin.gradient).backward_error <= 1e-14
