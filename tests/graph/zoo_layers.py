"""Modules of the zoo (`tests/graph/zoo.py`) that use every parameter once or nearly so: residual networks, gates, attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as f

# Residual networks, dense connections, gates.


class PreNorm(nn.Module):
    """x + W₂ tanh(W₁ norm(x)), the branch beginning with a norm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class PostNorm(nn.Module):
    """norm(x + tanh(Wx))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.linear(x)))


class TwoLayer(nn.Module):
    """x + W₂ tanh(W₁ x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Highway(nn.Module):
    """g tanh(Wx) + (1 − g) x with a learned gate g."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, torch.tanh(self.value(x)), torch.sigmoid(self.gate(x)))


class BasicBlock(nn.Module):
    """Two convolutions with norms around a skip, projected where the sizes differ."""

    def __init__(self, n_in: int, n_out: int, stride: int, norm: Callable[[int], nn.Module], act: Callable) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm1 = norm(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = norm(n_out)
        self.act = act
        self.short = (
            nn.Identity()
            if (n_in, stride) == (n_out, 1)
            else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), norm(n_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(y + self.short(x))


class ResNet(nn.Module):
    """A residual convolutional network with global average pooling."""

    def __init__(self, norm: Callable[[int], nn.Module], act: Callable = f.softplus) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, 2, 1)
        self.blocks = nn.Sequential(BasicBlock(2, 2, 1, norm, act), BasicBlock(2, 4, 2, norm, act))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(f.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class DenseNet(nn.Module):
    """Every layer reads all that was made before it."""

    def __init__(self, width: int = 3, growth: int = 2, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width + growth * i, growth) for i in range(depth)])
        self.head = nn.Linear(width + growth * depth, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, torch.tanh(layer(x))], 1)
        return self.head(x)


class UNet(nn.Module):
    """Down and up again, with a long skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 2, 3, padding=1)
        self.down = nn.Conv1d(2, 3, 3, stride=2, padding=1)
        self.middle = nn.Conv1d(3, 3, 3, padding=1)
        self.up = nn.ConvTranspose1d(3, 2, 2, stride=2)
        self.last = nn.Conv1d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.first(x))
        y = torch.tanh(self.middle(torch.tanh(self.down(skip))))
        return self.last(torch.cat([torch.tanh(self.up(y)), skip], 1))


class SqueezeExcitation(nn.Module):
    """Channels scaled by a gate that saw the whole image."""

    def __init__(self, channels: int = 4, squeezed: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, channels, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)
        self.head = nn.Linear(channels * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = f.silu(self.conv(x))
        gate = torch.sigmoid(self.excite(f.relu(self.squeeze(y.mean((2, 3))))))
        return self.head((y * gate[:, :, None, None]).flatten(1))


class Mixer(nn.Module):
    """Tokens mixed by einsum, a gated unit, a learned scale of the branch."""

    def __init__(self, width: int = 4, tokens: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(tokens, tokens))
        self.gated = nn.Linear(width, 2 * width)
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.gated(torch.einsum("btd,ts->bsd", x, self.tokens)).chunk(2, -1)
        return self.head((x + self.scale * (f.silu(gate) * value)).mean(1))


class SwiGLU(nn.Module):
    """RMS norm before a gated feed-forward layer, around a skip."""

    def __init__(self, width: int = 4, hidden: int = 5) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(width))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.norm
        return x + self.down(f.silu(self.gate(y)) * self.up(y))


class SoftExperts(nn.Module):
    """A mixture of experts, every expert evaluated by one einsum."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(3, experts)
        self.weight, self.bias = nn.Parameter(torch.zeros(experts, 4, 3)), nn.Parameter(torch.zeros(experts, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.tanh(torch.einsum("eoi,bi->beo", self.weight, x) + self.bias)
        return self.head((self.router(x).softmax(1)[:, :, None] * outputs).sum(1))


class HyperNetwork(nn.Module):
    """A network whose output is the weight of another, one for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 12))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        weight = self.make(context).view(-1, 4, 3)
        return self.head(torch.sin(torch.bmm(weight, x[:, :, None]).squeeze(2)))


# Attention.


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer as it is, between two linear layers."""

    def __init__(self, encoder: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.embed, self.encoder, self.head = nn.Linear(3, width), encoder, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Attention(nn.Module):
    """nn.MultiheadAttention as it is; the loss sees the attention weights as well."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x, need_weights=True)
        return self.head(y[:, 0]), weights


class CausalAttention(nn.Module):
    """One projection for queries, keys and values; scaled_dot_product_attention."""

    def __init__(self, width: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, 3), heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (u.view(b, t, self.heads, -1).transpose(1, 2) for u in self.qkv(x).chunk(3, -1))
        y = f.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d)).mean(1)


class Perceiver(nn.Module):
    """Cross-attention of learned queries, the same for all samples, to the tokens of a sample."""

    def __init__(self, queries: int = 2, width: int = 3) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(queries, width))
        self.key, self.value = nn.Linear(4, width, bias=False), nn.Linear(4, width)
        self.head = nn.Linear(queries * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.queries @ self.key(x).mT / math.sqrt(self.queries.shape[1])
        return self.head((scores.softmax(-1) @ self.value(x)).flatten(1))


class LearnedQueries(nn.Module):
    """The same by nn.MultiheadAttention, whose projection of the queries reads no state."""

    def __init__(self, queries: int = 2, width: int = 4) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(queries, width))
        self.embed = nn.Linear(4, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(queries * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        out, _ = self.attention(self.queries.expand(len(x), -1, -1), tokens, tokens)
        return self.head(out.flatten(1))


class Decoder(nn.Module):
    """nn.TransformerDecoderLayer as it is: two inputs, one of which is only read by cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.memory = nn.Linear(3, 2), nn.Linear(2, 2)
        self.layer = nn.TransformerDecoderLayer(2, 1, 3, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        t = x.shape[1]
        later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        return self.head(self.layer(self.embed(x), torch.tanh(self.memory(context)), tgt_mask=later)[:, -1])


class GPTBlock(nn.Module):
    """Causal attention with a mask in a buffer, and a feed-forward layer, both pre-norm."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, width + 2), nn.Linear(width + 2, width)
        self.register_buffer("mask", torch.tril(torch.ones(context, context)))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (u.view(b, t, self.heads, -1).transpose(1, 2) for u in self.qkv(self.norm1(x)).split(d, 2))
        scores = q @ k.mT / math.sqrt(k.shape[-1])
        scores = scores.masked_fill(self.mask[:t, :t] == 0, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(b, t, d))
        return x + self.down(f.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """A language model whose embedding and output share one weight."""

    def __init__(self, vocabulary: int = 5, width: int = 4, context: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.block, self.norm = GPTBlock(width, context, 2), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.block(self.tokens(tokens) + self.positions(places))))
