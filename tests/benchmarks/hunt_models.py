"""Random models of the recorder's world for `hunt.py`: programs of torch operations on a pool of tensors, their losses and batches.

A program is grown step by step. A step is drawn at random and tried; one that fails, grows too large or leaves the finite numbers is
thrown away, so that steps need not fit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.utils.checkpoint import checkpoint

Step = Callable[["Program", list[Tensor]], Tensor]
PLAIN = [False]
"""Whether norms run in primitive operations: torch's double backward of the fused ones loses digits, so that the truth avoids it."""

LARGEST, PARAMETERS = 48, 90


class Program(nn.Module):
    """Steps on a pool of tensors that starts with the input; the last ones are the output."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.outputs: list[int] = [-1]
        self.nest = "tensor"

    def forward(self, x: Tensor, tokens: Tensor) -> Any:
        self.tokens = tokens
        pool = [x]
        for step in self.steps:
            pool.append(step(self, pool))
        out = [pool[i] for i in self.outputs]
        if self.nest == "tensor":
            return torch.cat([o.reshape(-1) for o in out]) if len(out) > 1 else out[0]
        return {str(k): o for k, o in enumerate(out)} if self.nest == "dict" else tuple(out)


@dataclass
class Builder:
    """Grows a program; draws are those of one seed."""

    draw: random.Random
    samples: int
    model: Program = field(default_factory=Program)
    made: int = 0
    names: list[str] = field(default_factory=list)

    def parameter(self, *shape: int, gain: float = 1.0) -> str:
        name = f"p{self.made}"
        self.made += 1
        value = gain * torch.randn(shape, dtype=torch.float64) / max(1, shape[-1] if shape else 1) ** 0.5
        self.model.register_parameter(name, nn.Parameter(value, requires_grad=self.draw.random() > 0.04))
        self.names.append(name)
        return name

    def buffer(self, value: Tensor) -> str:
        name = f"b{self.made}"
        self.made += 1
        self.model.register_buffer(name, value)
        return name

    def module(self, module: nn.Module) -> str:
        name = f"m{self.made}"
        self.made += 1
        module = module.double()
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn_like(p) * (1.2 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.4))
                if p.dim() == 1 and "norm" in type(module).__name__.lower():
                    p.add_(1.0)
        self.model.add_module(name, module)
        return name

    def pick(self, *choices: Any) -> Any:
        return self.draw.choice(choices)

    def matrix(self, rows: int, columns: int) -> Callable[[Program], Tensor]:
        """A weight of that shape: a parameter, part of an older one, or some function of one."""
        old = [n for n in self.names if getattr(self.model, n).dim() == 2]
        kind = self.draw.random()
        fitting = [
            n for n in old if getattr(self.model, n).shape[0] >= rows and getattr(self.model, n).shape[1] >= columns
        ]
        turned = [
            n for n in old if getattr(self.model, n).shape[1] >= rows and getattr(self.model, n).shape[0] >= columns
        ]
        if kind < 0.2 and fitting:
            name = self.draw.choice(fitting)
            return lambda m: getattr(m, name)[:rows, :columns]
        if kind < 0.3 and turned:
            name = self.draw.choice(turned)
            return lambda m: getattr(m, name).T[:rows, :columns]
        name = self.parameter(rows, columns, gain=1.4)
        if kind < 0.65:
            return lambda m: getattr(m, name)
        mask = self.buffer((torch.rand(rows, columns) > 0.4).double())
        functions: list[Callable[[Program, Tensor], Tensor]] = [
            lambda m, w: w / w.norm(),
            lambda m, w: w * w.square().sum(1, keepdim=True).add(0.1).rsqrt(),
            lambda m, w: w * getattr(m, mask),
            lambda m, w: torch.tanh(w),
            lambda m, w: w.softmax(1),
            lambda m, w: w.tril(),
            lambda m, w: w.exp() - 1,
            lambda m, w: torch.where(getattr(m, mask) > 0, w, w.square()),
            lambda m, w: w - w.mean(0),
            lambda m, w: w.flip(0) + w.roll(1, 1),
            lambda m, w: w @ w.T @ w,
            lambda m, w: w.reshape(-1).sin().view_as(w),
            lambda m, w: torch.cat([w[:1], w[1:] * w[:-1]]),
            lambda m, w: w[torch.arange(w.shape[0]) // 2],
        ]
        function = self.draw.choice(functions)
        return lambda m: function(m, getattr(m, name))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if not PLAIN[0]:
        return f.layer_norm(x, x.shape[-1:], weight, bias)
    y = x - x.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    if not PLAIN[0]:
        return f.rms_norm(x, x.shape[-1:], weight)
    return x * (x.square().mean(-1, True) + torch.finfo(x.dtype).eps).rsqrt() * weight


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if not PLAIN[0]:
        return f.group_norm(x, groups, weight, bias)
    y = layer_norm(x.reshape(x.shape[0], groups, -1), None, None).reshape(x.shape)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _written(x: Tensor, k: int) -> Tensor:
    y = x.clone()
    if k == 0:
        y[..., 0] = x[..., -1] * x[..., 0]
    elif k == 1:
        y.mul_(2.0).sin_().add_(x)
    elif k == 2:
        y[0] = y[-1].clone()
        y[..., -1:] += y[..., :1].square()
    elif k == 3:
        y = torch.zeros_like(x)
        for j in range(x.shape[-1]):
            y[..., j] = x[..., j] * (y[..., j - 1].clone() if j else 1.0)
    elif k == 4:
        v = y.view(-1)
        v[::2] = torch.tanh(v[::2])
        v[1:3].copy_(v[:2].clone())
    elif k == 5:
        y[y > 0.3] = 0.5
        y = y * x
    elif k == 6:
        y.fill_(0.3)
        y.addcmul_(x, x)
        y.transpose(0, -1)[0].zero_()
    elif k == 7:
        y.clamp_(-1, 1).div_(x.square() + 1)
        y.unsqueeze_(0).squeeze_(0)
    elif k == 8:
        y[torch.arange(len(y)), torch.arange(len(y)) % y.shape[1]] *= x.sum()
    elif k == 9:
        y.tanh_()
        y.detach()[0] = 0.1
        y = y + x
    else:
        with torch.no_grad():
            y[:, 0] = x[:, -1]
        y = y.square()
    return y


def _selected(x: Tensor, y: Tensor, k: int) -> Tensor:
    n = x.shape[0]
    index = torch.arange(n) % max(1, n - 1)
    many = index.view(-1, *[1] * (x.ndim - 1)).expand_as(x)
    return [
        lambda: torch.zeros_like(x).index_add(0, index, x.sin()),
        lambda: torch.zeros_like(x).scatter_add(0, many, x * y),
        lambda: x.gather(0, many) * x,
        lambda: x.clone().index_put((index,), y, accumulate=True),
        lambda: x.scatter(0, many, y),
        lambda: x.index_copy(0, torch.arange(n).flip(0), y),
        lambda: torch.zeros_like(x).scatter_reduce(0, many, x, "mean", include_self=False),
        lambda: x.index_select(0, index) + x[index.flip(0)],
        lambda: x[x.detach() > 0].square().sum() * x,
        lambda: x.masked_fill(y.detach() > 0, 0.7) * y,
        lambda: torch.where(x > y, x * y, y.sin()),
        lambda: x.take(torch.tensor([0, 0, x.numel() - 1])),
        lambda: x.scatter_reduce(0, many, y, "amax"),
        lambda: x.scatter_reduce(0, many, y.sigmoid() + 1, "prod"),
        lambda: torch.index_fill(x, 0, index[:1], 0.4) * y,
        lambda: x.sort(0)[0] * x.argsort(0),
        lambda: x.topk(min(2, n), 0)[0].sin(),
    ][k]()


UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.tanh,
    torch.sigmoid,
    f.gelu,
    f.silu,
    f.softplus,
    torch.sin,
    lambda x: (0.3 * x).exp(),
    torch.square,
    torch.relu,
    torch.abs,
    lambda x: x.clamp(-0.7, 0.9),
    f.leaky_relu,
    f.elu,
    f.mish,
    lambda x: x.softmax(-1),
    lambda x: x.log_softmax(0),
    lambda x: x.softmax(0),
    lambda x: x.cumsum(-1),
    lambda x: x / (x.norm() + 0.1),
    lambda x: x - x.logsumexp(-1, True),
    lambda x: x.sort(-1)[0],
    lambda x: x.flip(0),
    lambda x: x.roll(1, -1) * x,
    lambda x: x.transpose(0, -1),
    lambda x: x.reshape(-1),
    lambda x: x[..., ::2],
    lambda x: x.select(0, 0),
    lambda x: x.narrow(-1, 0, 1),
    lambda x: x.unsqueeze(1),
    lambda x: x.squeeze(),
    lambda x: x[:, None].expand(-1, 2, *x.shape[1:]),
    lambda x: x.repeat(2, *[1] * (x.ndim - 1)),
    lambda x: f.pad(x, (1, 0), value=0.5),
    lambda x: x.tril(),
    lambda x: x.detach() * x,
    lambda x: x + x,
    lambda x: x.sum(0),
    lambda x: x.mean(-1, keepdim=True),
    lambda x: x.var(0),
    lambda x: x.amax(-1, keepdim=True) * x,
    lambda x: x.prod(-1),
    lambda x: x.std(-1),
    lambda x: x.sum(),
    lambda x: x.max(0)[0],
    lambda x: x.cumprod(-1),
    lambda x: x.view(x.shape[0], -1, 2),
    lambda x: x.reciprocal().tanh(),
    lambda x: (x.square() + 1).log(),
    lambda x: (x.abs() + 0.1).sqrt(),
    lambda x: x.pow(3),
    lambda x: torch.erf(x),
    lambda x: x.atan(),
    lambda x: x.sigmoid().logit(),
    lambda x: x.diagonal(dim1=0, dim2=-1),
    lambda x: x.unfold(-1, 2, 1),
    lambda x: x.median(-1)[0],
    lambda x: torch.stack(x.unbind(0)[::-1]),
    lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    lambda x: x[..., :0].sum(-1, True) + x,
    lambda x: torch.cat([x[:0], x]),
    lambda x: f.normalize(x, dim=-1),
    lambda x: x.T @ x,
    lambda x: x @ x.T,
    lambda x: f.glu(x, -1),
    lambda x: torch.linalg.inv(x @ x.T + 2 * torch.eye(len(x)).to(x)),
    lambda x: torch.logdet(x.T @ x + torch.eye(x.shape[1]).to(x)),
    lambda x: torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).to(x), x.T),
    lambda x: checkpoint(lambda a: a.tanh() * a, x, use_reentrant=False),
    lambda x: torch.linalg.cholesky(x.T @ x + torch.eye(x.shape[1]).to(x)),
    lambda x: x.mul(x.numel()).cos(),
    lambda x: x ** x.detach().abs(),
    lambda x: torch.einsum("i...,i...->...", x, x),
    f.hardtanh,
    lambda x: f.logsigmoid(x),
    lambda x: x.norm(dim=-1),
    lambda x: x.norm(1, 0),
    lambda x: x.norm(3),
    lambda x: x.nan_to_num() * x.sign(),
    lambda x: torch.vmap(lambda a: a * a.sum())(x),
    lambda x: x.logcumsumexp(-1),
    lambda x: x.view(-1).as_strided((2, 2), (1, 1)),
    lambda x: x.double().square().to(x.dtype),
    lambda x: torch.log1p(x.square()),
    lambda x: torch.expm1(x),
    lambda x: x.sinh().asinh(),
    lambda x: f.softmin(x, -1),
    lambda x: torch.kron(x, x[:1]),
    lambda x: x.renorm(2, 0, 1.0),
    lambda x: f.celu(x),
    lambda x: f.selu(x),
    lambda x: x.movedim(0, -1).contiguous(),
    lambda x: x.amin(0),
    lambda x: x.aminmax()[0] * x,
    lambda x: x.tan().atan(),
    lambda x: x.sin() * x.cos(),
    lambda x: x * x.detach().mean(),
    lambda x: torch.tensordot(x, x, dims=([0], [0])),
    lambda x: torch.trace(x.T @ x) * x,
    lambda x: f.threshold(x, 0.1, 0.2),
    lambda x: f.hardswish(x),
    lambda x: f.pixel_shuffle(x.reshape(1, 4, 1, -1), 2),
    lambda x: torch.broadcast_to(x.mean(), (2, 3)),
    lambda x: x.new_zeros(2, 3) + x.sum(),
    lambda x: x.flatten()[None],
]

BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    lambda x, y: x / (1 + y.square()),
    lambda x, y: x @ y,
    lambda x, y: x.T @ y,
    lambda x, y: x @ y.T,
    torch.maximum,
    torch.minimum,
    lambda x, y: torch.cat([x, y], -1),
    lambda x, y: torch.cat([x, y]),
    lambda x, y: torch.stack([x, y], 1),
    lambda x, y: x[..., None] * y[:, None],
    lambda x, y: torch.lerp(x, y, 0.3),
    lambda x, y: x.lerp(y, y.sigmoid()),
    torch.atan2,
    torch.hypot,
    lambda x, y: x * y.sigmoid(),
    lambda x, y: x + y.mean(),
    lambda x, y: x * y.sum(),
    lambda x, y: torch.addcmul(x, y, y, value=0.5),
    lambda x, y: torch.einsum("bi,bj->ij", x, y),
    lambda x, y: torch.einsum("bi,bi->b", x, y),
    lambda x, y: torch.outer(x.flatten(), y.flatten()),
    lambda x, y: x.unsqueeze(-1) - y.unsqueeze(0),
    lambda x, y: torch.dot(x.flatten(), y.flatten()),
    lambda x, y: (x.abs() + 0.5) ** y,
    lambda x, y: torch.logaddexp(x, y),
    lambda x, y: x.copysign(y),
    lambda x, y: torch.cross(x[..., :3], y[..., :3], dim=-1),
    torch.fmod,
    lambda x, y: f.cosine_similarity(x, y, dim=-1),
    lambda x, y: torch.baddbmm(x[None], x[None], y[None]),
    lambda x, y: torch.where(y > 0, x, y),
    lambda x, y: torch.addmm(x, y, y.T @ x, alpha=0.5, beta=2.0),
    lambda x, y: torch.matmul(x, y.transpose(-1, -2)),
    lambda x, y: x.view(-1)[:2] * y.view(-1)[0],
    lambda x, y: ((x[:, None] - y[None]).square().sum(-1) + 0.1).sqrt(),
    lambda x, y: f.bilinear(x, y, torch.ones(2, x.shape[-1], y.shape[-1]).to(x)),
]


def _linear(b: Builder, pool: list[Tensor]) -> Step:
    i = b.draw.randrange(len(pool))
    width, kind = b.draw.randint(1, 4), b.draw.randrange(7)
    w = b.matrix(width, pool[i].shape[-1])
    bias = b.parameter(*b.pick((width,), (1,), (), (1, width)))
    return lambda m, p: [
        lambda x: f.linear(x, w(m), getattr(m, bias).reshape(-1).expand(width)),
        lambda x: x @ w(m).T,
        lambda x: (w(m) @ x.transpose(-1, -2)).transpose(-1, -2) + getattr(m, bias),
        lambda x: torch.tanh(x @ w(m).T + getattr(m, bias)),
        lambda x: torch.einsum("...i,oi->...o", x, w(m)) * getattr(m, bias),
        lambda x: w(m) @ x.transpose(-1, -2),
        lambda x: w(m) @ x.reshape(-1)[: w(m).shape[1]],
    ][kind](p[i])


def _scaled(b: Builder, pool: list[Tensor]) -> Step:
    i = b.draw.randrange(len(pool))
    shape, kind = tuple(pool[i].shape), b.draw.randrange(8)
    own = b.pick(shape[-1:], (1,), (), shape, tuple(b.pick(1, s) for s in shape), (2, *shape))
    old = [n for n in b.names if tuple(getattr(b.model, n).shape) == own]
    name = b.draw.choice(old) if old and b.draw.random() < 0.4 else b.parameter(*own)
    return lambda m, p: [
        lambda x, g: x * g,
        lambda x, g: x + g,
        lambda x, g: x * (1 + g.tanh()),
        lambda x, g: f.prelu(x, g.reshape(-1)[:1]),
        lambda x, g: x / (g.exp() + 0.5),
        lambda x, g: g - x * g.square(),
        lambda x, g: torch.where(g > 0, x * g, g),
        lambda x, g: x.sigmoid() ** g.exp(),
    ][kind](p[i], getattr(m, name))


def _norm(b: Builder, pool: list[Tensor]) -> Step:
    i = b.draw.randrange(len(pool))
    width = pool[i].shape[-1]
    w, c = b.parameter(width, gain=2.0), b.parameter(width)
    mean, var = b.buffer(torch.randn(width).double()), b.buffer(torch.rand(width).double() + 0.3)
    kind = b.draw.randrange(7)
    return lambda m, p: [
        lambda x, a, d: layer_norm(x, a, d),
        lambda x, a, d: layer_norm(x, None, None),
        lambda x, a, d: rms_norm(x, a),
        lambda x, a, d: f.batch_norm(x, getattr(m, mean), getattr(m, var), a, d),
        lambda x, a, d: f.batch_norm(x, None, None, a, d, training=True),
        lambda x, a, d: group_norm(x, 1, a, d),
        lambda x, a, d: group_norm(x, width // 2, a, None),
    ][kind](p[i], getattr(m, w), getattr(m, c))  # fmt: skip


def _images(b: Builder, pool: list[Tensor]) -> Step:
    i, kind = b.draw.randrange(len(pool)), b.draw.randrange(8)
    B = b.samples
    w = b.parameter(2, 1, 2, gain=1.2)
    w2 = b.parameter(*b.pick((1, 1, 2, 2), (2, 1, 1, 2)), gain=1.2)
    bias = b.parameter(2)
    stride, padding, dilation = b.pick(1, 1, 2), b.pick(0, 1), b.pick(1, 1, 2)

    def square(x: Tensor) -> Tensor:
        x = x.reshape(B, 1, -1)
        return x[..., : x.shape[-1] // 2 * 2].reshape(B, 1, 2, -1)

    return lambda m, p: [
        lambda x: f.conv1d(x.reshape(B, 1, -1), getattr(m, w), getattr(m, bias), stride, padding, dilation),
        lambda x: f.conv2d(square(x), getattr(m, w2), None, 1, padding),
        lambda x: f.max_pool1d(f.conv1d(x.reshape(B, 1, -1), getattr(m, w), None, 1, 1).tanh(), 2),
        lambda x: f.avg_pool2d(f.conv2d(square(x), getattr(m, w2), padding=1), 2, 1),
        lambda x: f.conv_transpose1d(x.reshape(B, 1, -1), getattr(m, w).transpose(0, 1)[:1], None, stride),
        lambda x: f.conv1d(x.reshape(B, 2, -1), getattr(m, w), getattr(m, bias), groups=2),
        lambda x: f.adaptive_avg_pool1d(x.reshape(B, 1, -1).sin(), 2) * getattr(m, bias)[0],
        lambda x: f.max_pool2d(square(x), 2, 1) * f.interpolate(square(x), scale_factor=1.5)[..., :1, :1],
    ][kind](p[i])


def _attention(b: Builder, pool: list[Tensor]) -> Step:
    i, kind = b.draw.randrange(len(pool)), b.draw.randrange(5)
    width = pool[i].shape[-1]
    q, k, v = (b.matrix(width, width) for _ in range(3))
    mha = b.module(nn.MultiheadAttention(2, b.pick(1, 2), batch_first=True)) if kind == 3 else ""
    encoder = b.module(nn.TransformerEncoderLayer(2, 1, 2, 0.0, batch_first=True)) if kind == 4 else ""

    def plain(m: Program, x: Tensor) -> Tensor:
        scores = (x @ q(m)) @ (x @ k(m)).transpose(-1, -2) / width**0.5
        return scores.softmax(-1) @ (x @ v(m))

    def causal(m: Program, x: Tensor) -> Tensor:
        scores = (x @ q(m)) @ x.transpose(-1, -2)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        return x + scores.softmax(-1) @ x

    return lambda m, p: [
        lambda x: plain(m, x),
        lambda x: causal(m, x),
        lambda x: f.scaled_dot_product_attention(x @ q(m), x @ k(m), x, is_causal=True),
        lambda x: getattr(m, mha)(*[x.reshape(b.samples, -1, 2)] * 3, need_weights=False)[0],
        lambda x: getattr(m, encoder)(x.reshape(b.samples, -1, 2)),
    ][kind](p[i])


def _recurrent(b: Builder, pool: list[Tensor]) -> Step:
    i, kind, times = b.draw.randrange(len(pool)), b.draw.randrange(6), b.draw.randint(2, 3)
    width = pool[i].shape[-1]
    w, u = b.matrix(width, width), b.matrix(width, width)
    cell = (
        b.module({0: nn.GRUCell, 1: nn.RNNCell, 2: nn.LSTMCell, 3: nn.GRU}.get(kind, nn.LSTM)(2, 2)) if kind < 5 else ""
    )

    def cells(m: Program, x: Tensor) -> Tensor:
        rows, h = x.reshape(-1, 2), x.new_zeros(x.numel() // 2, 2)
        state = (h, h)
        for _ in range(times):
            if kind == 2:
                state = getattr(m, cell)(rows, state)
            else:
                state = (getattr(m, cell)(rows, state[0]), h)
        return state[0]

    def own(m: Program, x: Tensor) -> Tensor:
        h = x
        for _ in range(times):
            h = torch.tanh(h @ w(m) + x @ u(m))
        return h

    if kind < 3:
        return lambda m, p: cells(m, p[i])
    if kind < 5:
        return lambda m, p: getattr(m, cell)(p[i].reshape(-1, b.samples, 2))[0][-1]
    return lambda m, p: own(m, p[i])


def _embedding(b: Builder, pool: list[Tensor]) -> Step:
    rows, width, kind = 4, b.draw.randint(1, 3), b.draw.randrange(6)
    old = [n for n in b.names if getattr(b.model, n).dim() == 2 and getattr(b.model, n).shape[0] >= rows]
    name = b.draw.choice(old) if old and b.draw.random() < 0.4 else b.parameter(rows, width)
    return lambda m, p: [
        lambda w: f.embedding(m.tokens, w),
        lambda w: f.embedding(m.tokens, w, padding_idx=1).mean(1),
        lambda w: w[m.tokens[:, 0]],
        lambda w: f.embedding_bag(m.tokens, w, mode="mean"),
        lambda w: f.one_hot(m.tokens, w.shape[0]).to(w) @ w,
        lambda w: f.embedding(m.tokens, w.tanh(), scale_grad_by_freq=False).sum(1),
    ][kind](getattr(m, name))


def _simple(b: Builder, pool: list[Tensor]) -> Step:
    i, j = b.draw.randrange(len(pool)), b.draw.randrange(len(pool))
    kind = b.draw.random()
    if kind < 0.5:
        one = b.draw.choice(UNARY)
        return lambda m, p: one(p[i])
    if kind < 0.8:
        two = b.draw.choice(BINARY)
        return lambda m, p: two(p[i], p[j])
    if kind < 0.9:
        k = b.draw.randrange(11)
        return lambda m, p: _written(p[i], k)
    k = b.draw.randrange(17)
    return lambda m, p: _selected(p[i], p[j], k)


def _derivative(b: Builder, pool: list[Tensor]) -> Step:
    i = b.draw.randrange(len(pool))

    def step(m: Program, p: list[Tensor]) -> Tensor:
        x = p[i] * 1.0 if p[i].requires_grad else p[i].detach().requires_grad_()
        return torch.autograd.grad((x.sin() * x.sum()).sum(), x, create_graph=True)[0]

    return step


def _module(b: Builder, pool: list[Tensor]) -> Step:
    i = b.draw.randrange(len(pool))
    width = pool[i].shape[-1]
    name = b.module(
        b.pick(
            lambda: nn.Linear(width, 2),
            lambda: nn.Sequential(nn.Linear(width, 2), nn.Tanh(), nn.Linear(2, width)),
            lambda: nn.Bilinear(width, width, 2),
            lambda: nn.BatchNorm1d(width).eval(),
            lambda: nn.PReLU(),
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(width, 2)),
            lambda: nn.utils.parametrizations.orthogonal(nn.Linear(width, width)),
        )()
    )
    residual = b.draw.random() < 0.4

    def step(m: Program, p: list[Tensor]) -> Tensor:
        module = getattr(m, name)
        if PLAIN[0] and isinstance(module, nn.Linear) and hasattr(module, "parametrizations"):
            weights = module.parametrizations.weight
            if hasattr(weights, "original1"):  # torch's double backward of the fused one is wrong
                w = weights.original1
                return (p[i] if residual else 0.0) + f.linear(
                    p[i], weights.original0 * w / w.norm(dim=1, keepdim=True), module.bias
                )
        y = module(p[i], p[i].sin()) if isinstance(module, nn.Bilinear) else module(p[i])
        return p[i] + y if residual else y

    return step


FAMILIES = (
    [_linear] * 5
    + [_scaled] * 3
    + [_norm] * 2
    + [_images, _attention, _recurrent, _embedding, _derivative, _module]
    + [_simple] * 9
)


def grow(draw: random.Random, x: Tensor, tokens: Tensor) -> Program:
    """A program of 2 to 12 steps; the last tensors that the loss does not see are dead branches."""
    b = Builder(draw, len(x))
    pool, wanted = [x], draw.randint(2, 12)
    for _ in range(200):
        if len(pool) > wanted:
            break
        before = {**b.model._parameters}, {**b.model._modules}, {**b.model._buffers}, list(b.names)
        recent = pool if draw.random() < 0.5 else pool[-2:]
        try:
            family = draw.choice(FAMILIES)
            step = family(b, recent)
            step = step if recent is pool else _recent(step)
            b.model.tokens = tokens
            y = step(b.model, list(pool))
            size = sum(p.numel() for p in b.model.parameters())
            good = (
                y.numel() <= LARGEST
                and size <= PARAMETERS
                and bool(y.isfinite().all())
                and float(y.detach().abs().max()) < 20
            )
        except Exception:  # what does not fit is not taken
            good = False
        if good:
            b.model.steps.append(step)
            pool.append(y.detach().requires_grad_(y.requires_grad))
        else:
            b.model._parameters, b.model._modules, b.model._buffers, b.names = before
    if draw.random() < 0.2:
        b.parameter(2, 1)  # unused
    outputs = {len(pool) - 1} | {k for k in range(1, len(pool)) if draw.random() < 0.15}
    b.model.outputs = sorted(outputs)
    b.model.nest = draw.choice(["tensor", "tensor", "tensor", "dict", "tuple"])
    return b.model


def _recent(step: Step) -> Step:
    return lambda m, p: step(m, p[-2:])
