"""One unusual operation of torch between two linear layers: what no rule of its own can be expected for."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.utils.checkpoint import checkpoint

from tests.graph.case import Case, classifier, normal
from tests.helpers import torch_differentiates_twice

SAMPLES, WIDTH = 3, 4
# Their gradient, as autograd takes it, is of no function: what is detached moves in differences and not in second derivatives.
DETACHING = ("detach", "no_grad")


class Between(nn.Module):
    """Linear, the operation on (samples, 4), linear."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.operation = nn.Linear(3, WIDTH), operation
        outputs = operation(torch.randn(SAMPLES, WIDTH)).reshape(SAMPLES, -1).shape[1]
        self.last = nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x)).reshape(x.shape[0], -1))


def between(name: str) -> Case:
    """Make the case of an operation, in float64, the same one each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model = Between(OPERATIONS[name])
        size = sum(parameter.numel() for parameter in model.parameters())
        return classifier(model, normal(SAMPLES, 3), SAMPLES, size)


def _beside(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda u: torch.cat([u, function(u)], 1)


def _definite(u: Tensor) -> Tensor:
    return torch.einsum("bi,bj->bij", u, u) + torch.diag(torch.arange(3.0, 3 + WIDTH)).to(u)


def _image(u: Tensor) -> Tensor:
    return u.view(SAMPLES, 1, 2, 2)


def _row(u: Tensor) -> Tensor:
    return u.view(SAMPLES, 1, WIDTH)


def _constant(u: Tensor, *shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=u.dtype, device=u.device).sin().view(shape)


def _sample_grid(u: Tensor) -> Tensor:
    picture = _constant(u, 1, 1, 4, 4).expand(SAMPLES, -1, -1, -1)
    return f.grid_sample(picture, torch.tanh(u).view(SAMPLES, 1, 2, 2), align_corners=False)


# The release of torch may have no second derivative of it.
HAS_GRID = torch_differentiates_twice(
    lambda z: f.grid_sample(torch.ones(1, 1, 4, 4, dtype=z.dtype), z, align_corners=False), 1, 1, 2, 2
)


def _written(u: Tensor) -> Tensor:
    z = u.clone()
    z[:, 1] = z[:, 0].clone() * z[:, 2].clone()
    z[0] = z[1].clone()
    return z


def _without_grad(u: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.sigmoid(u)
    return u * scale.mean() + u.sin()


def _differentiated(u: Tensor) -> Tensor:
    with torch.enable_grad():
        x = u * 1.0 if u.requires_grad else u.detach().requires_grad_()
        return torch.autograd.grad(x.sin().pow(3).sum(), x, create_graph=True)[0]


def _edges(u: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tensor([0, 1, 2, 2], device=u.device), torch.tensor([1, 2, 0, 1], device=u.device)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # Reductions and scans.
    "cumsum": lambda u: u.sin().cumsum(1),
    "cumprod": lambda u: u.cumprod(1),
    "logcumsumexp": lambda u: u.logcumsumexp(1),
    "logsumexp": _beside(lambda u: u.logsumexp(1, True)),
    "prod": _beside(lambda u: u.prod(1, True)),
    "std": _beside(lambda u: u.std(1, keepdim=True)),
    "var_over_samples": lambda u: u * u.var(0),
    "norm": lambda u: u / torch.linalg.vector_norm(u),
    "trapezoid": lambda u: torch.trapezoid(u, dim=1)[:, None] * u,
    # Gathering and scattering.
    "index_add": lambda u: torch.zeros_like(u).index_add(0, _edges(u)[1], torch.tanh(u[_edges(u)[0]])),
    "scatter_reduce": lambda u: torch.zeros_like(u).scatter_reduce(
        0, _edges(u)[1][:, None].expand(-1, WIDTH), u[_edges(u)[0]].sin(), "mean"
    ),
    "index_put": lambda u: u.clone().index_put((_edges(u)[1],), u[_edges(u)[0]].square(), accumulate=True),
    "embedding_of_activations": lambda u: f.embedding(_edges(u)[0][:SAMPLES], u) * u,
    "masked": lambda u: u * u.masked_select(torch.eye(SAMPLES, WIDTH, dtype=torch.bool, device=u.device))[0],
    "bucketize": lambda u: u * torch.bucketize(u.detach(), u.new_zeros(1)) + u.sin(),
    # Linear algebra.
    "solve": lambda u: torch.linalg.solve(_definite(u), u),
    "inv": lambda u: torch.linalg.inv(_definite(u)),
    "cholesky": lambda u: torch.linalg.cholesky(_definite(u)),
    "logdet": _beside(lambda u: torch.logdet(_definite(u))[:, None]),
    "matrix_exp": lambda u: torch.linalg.matrix_exp(0.1 * _definite(u)),
    "eigvalsh": lambda u: torch.linalg.eigvalsh(_definite(u)),
    "eigh": lambda u: torch.linalg.eigh(_definite(u))[1].square(),
    "svdvals": lambda u: torch.linalg.svdvals(_definite(u)),
    "qr": lambda u: torch.linalg.qr(_definite(u))[1],
    "bilinear_of_itself": lambda u: f.bilinear(u, u, _constant(u, 4, 4, 4)),
    "einsum_of_three": lambda u: torch.einsum("bi,bj,bk->bijk", u, u, u[:, :2]),
    "einsum_over_samples": lambda u: torch.einsum("bi,bj,ci->cj", u, u, u),
    "outer_trace": lambda u: torch.einsum("bi,bj->b", u, u)[:, None] * u,
    "kron": lambda u: torch.kron(u, u[:1]),
    "tril": lambda u: torch.tril(torch.einsum("bi,bj->bij", u, u)),
    "baddbmm": lambda u: torch.baddbmm(u[:, None], u[:, None], _definite(u)),
    "addcmul": lambda u: torch.addcmul(u, u, u.flip(1)),
    "cosine_similarity": lambda u: f.cosine_similarity(u[:, None], u[None] + 1, dim=2),
    "normalize": lambda u: f.normalize(u, dim=1),
    # Images and sequences.
    "interpolate_bilinear": lambda u: f.interpolate(_image(u).sin(), scale_factor=2, mode="bilinear"),
    "interpolate_bicubic": lambda u: f.interpolate(_image(u), scale_factor=2, mode="bicubic").sin(),
    "interpolate_nearest": lambda u: f.interpolate(_image(u).sin(), scale_factor=2),
    "grid_sample": _sample_grid if HAS_GRID else torch.tanh,
    "pad_circular": lambda u: f.pad(_row(u).sin(), (1, 1), mode="circular"),
    "pad_reflect": lambda u: f.pad(_row(u).sin(), (1, 1), mode="reflect"),
    "pad_replicate": lambda u: f.pad(_row(u).sin(), (1, 1), mode="replicate"),
    "pixel_shuffle": lambda u: f.pixel_shuffle(u.sin().view(SAMPLES, WIDTH, 1, 1), 2),
    "unfold": lambda u: f.unfold(_image(u).sin(), 2, padding=1),
    "fold": lambda u: f.fold(u.sin().view(SAMPLES, WIDTH, 1), (2, 2), 2),
    "convolution_of_itself": lambda u: f.conv1d(u[None], u[:, None], groups=SAMPLES, padding=2)[0],
    "avg_pool": lambda u: f.avg_pool2d(_image(u).sin(), 2, 1),
    "lp_pool": lambda u: f.lp_pool1d(_row(u), 2.0, 2),
    "max_pool1d": lambda u: f.max_pool1d(_row(u).sin(), 2),
    "adaptive_max_pool": lambda u: f.adaptive_max_pool1d(_row(u).sin(), 2),
    # Order statistics and kinks.
    "topk": lambda u: u.topk(2, 1)[0].sin(),
    "sort": lambda u: u.sort(1)[0].sin(),
    "median": _beside(lambda u: u.median(1, True)[0].sin()),
    "quantile": _beside(lambda u: u.quantile(0.4, dim=1, keepdim=True).sin()),
    "amax": _beside(lambda u: u.amax(1, True).sin()),
    "maximum": lambda u: torch.maximum(u, u.flip(1).sin()),
    "clamp": lambda u: u.sin().clamp(-0.5, 0.5),
    "where": lambda u: torch.where(u > 0, u.sin(), u.cos()),
    # Elementwise.
    "hardswish": f.hardswish,
    "elu": f.elu,
    "celu": lambda u: f.celu(u, 2.0),
    "selu": f.selu,
    "mish": f.mish,
    "logsigmoid": f.logsigmoid,
    "gelu_tanh": lambda u: f.gelu(u, approximate="tanh"),
    "softplus_threshold": lambda u: f.softplus(u, 2.0, 1.5),
    "glu": lambda u: f.glu(u, 1),
    "softmin": lambda u: f.softmin(u, 1),
    "tempered_softmax": lambda u: (u / 0.5).log_softmax(1),
    "atan2_and_hypot": lambda u: torch.cat([torch.atan2(u, u.roll(1, 1)), torch.hypot(u, u.roll(1, 1))], 1),
    "erf_and_erfinv": lambda u: torch.cat([torch.erf(u), torch.erfinv(0.5 * torch.tanh(u))], 1),
    "power_of_tensors": lambda u: (u.abs() + 1) ** u,
    "lerp": lambda u: torch.lerp(u, u.flip(1), torch.sigmoid(u)),
    "xlogy": lambda u: torch.xlogy(u, u.square() + 1),
    # Norms.
    "rms_norm": lambda u: f.rms_norm(u, (WIDTH,)) if hasattr(f, "rms_norm") else f.normalize(u, dim=1),
    "instance_norm": lambda u: f.instance_norm(u.view(SAMPLES, 1, WIDTH)),
    "local_response_norm": lambda u: f.local_response_norm(u.view(SAMPLES, WIDTH, 1), 2, alpha=1.0),
    "batch_norm": lambda u: f.batch_norm(u, None, None, training=True),
    "renorm": lambda u: u.renorm(2, 0, 1.0),
    # Views and writing.
    "written": _written,
    "in_place_chain": lambda u: u.clone().mul_(2).sin_().add_(u),
    "chunks": lambda u: torch.stack([a * b for a, b in zip(u.chunk(2, 1), u.split(2, 1)[::-1], strict=True)], 1),
    "tensor_split": lambda u: torch.cat(u.tensor_split(3, 1)[::-1], 1).sin(),
    "roll_flip_repeat": lambda u: u.sin().roll(1, 1).flip(0).repeat(1, 2),
    "as_strided": lambda u: u.sin().as_strided((SAMPLES, 2, 3), (WIDTH, 1, 1)),
    "detach": lambda u: u * u.detach().mean() + u.sin(),
    "no_grad": _without_grad,
    "vmap": torch.vmap(lambda a: torch.outer(a, a)),
    "func_grad": torch.vmap(torch.func.grad(lambda a: a.sin().pow(3).sum())),
    "func_jvp": lambda u: torch.func.jvp(torch.sin, (u,), (u.cos(),))[1],
    "autograd_grad": _differentiated,
    "checkpoint": lambda u: checkpoint(lambda a: torch.tanh(a) * a, u, use_reentrant=False),
}
