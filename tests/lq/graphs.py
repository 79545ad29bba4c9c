"""Random chains of live sets: nodes that read some of what is live, and what they are as plain blocks, written out with NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from linop_hess import lq
from linop_hess.lq.stages import (
    AffineStage,
    DenseStage,
    DiagonalStage,
    IdleStage,
    InjectionStage,
    ObjectiveStage,
    Stage,
    WiredStage,
    Wiring,
)
from tests.lq.problems import Blocks


@dataclass(frozen=True)
class Node:
    """One stage: its inner blocks, and which entries it reads, keeps and puts."""

    kind: str
    blocks: dict[str, np.ndarray]
    n_in: int
    n_out: int
    read: tuple[int, ...]
    keep: tuple[tuple[int, ...], tuple[int, ...]]
    put: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def key(self) -> tuple:
        """What the stages of one stack have in common."""
        shapes = tuple(b.shape for b in self.blocks.values())
        return self.kind, shapes, self.n_in, self.n_out, self.read, self.keep, self.put

    def stages(self, nodes: Sequence[Node], dtype: torch.dtype) -> Stage:
        """A stack of nodes that are alike."""
        a, b, c, f, g = (
            torch.from_numpy(np.stack([node.blocks[name] for node in nodes])).to(dtype) for name in "ABCFG"
        )
        inner: Stage
        if self.kind == "injection":
            inner = InjectionStage.of(g.shape[2], len(nodes), dtype=dtype)
        elif self.kind == "idle":
            inner = IdleStage.of(g.shape[2], len(nodes), dtype=dtype)
        elif self.kind == "objective":
            inner = ObjectiveStage(f[:, 0], c[:, None])
        else:
            given = (block if bool(block.any()) else None for block in (a, b, c))
            inner = DenseStage.plain(f, g, *given)
        wiring = Wiring.of(self.n_in, self.n_out, f.shape[1], read=self.read, keep=self.keep, put=self.put)
        return WiredStage(inner, wiring)


@dataclass
class Graph:
    """Live tensors by name and size, in the order of the state; `input` never moves."""

    seed: int
    live: dict[str, int]
    gain: float = 1.0
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def entries(self, name: str) -> list[int]:
        names = list(self.live)
        start = sum(self.live[other] for other in names[: names.index(name)])
        return list(range(start, start + self.live[name]))

    def add(self, kind, out, reads=(), size=0, p=0, dies=(), drops=0, blocks=None):
        """A node that leaves `out`; a read of None is a constant; the first `drops` outputs are dropped."""
        read = tuple(e for name in reads for e in ([-1] if name is None else self.entries(name)))
        n_in, i = sum(self.live.values()), len(read)
        keep_from = tuple(e for name in self.live if name not in dies for e in self.entries(name))
        n_out = len(keep_from) + size - drops
        # Outputs stand first in every second node, and backwards.
        front = len(self.nodes) % 2 == 0 and kind == "dense"
        put_to = tuple(range(size - drops))[::-1] if front else tuple(range(len(keep_from), n_out))
        keep_to = tuple(range(size - drops, n_out)) if front else tuple(range(len(keep_from)))
        kept = {name: n for name, n in self.live.items() if name not in dies}
        own = {} if out is None else {out: size - drops}
        given = blocks or self.blocks(kind, i, size, p)
        self.nodes.append(
            Node(kind, given, n_in, n_out, read, (keep_from, keep_to), (tuple(range(drops, size)), put_to))
        )
        self.live = own | kept if front else kept | own
        return self

    def blocks(self, kind: str, i: int, o: int, p: int) -> dict[str, np.ndarray]:
        rng = self.rng

        def symmetric(n):
            half = rng.standard_normal((n, n))
            return (half + half.T) / 2

        zero = {
            "A": np.zeros((p, p)),
            "B": np.zeros((p, i)),
            "C": np.zeros((i, i)),
            "F": np.zeros((o, i)),
            "G": np.zeros((o, p)),
        }
        if kind == "injection":
            return zero | {"G": np.eye(p)}
        if kind == "idle":
            return zero
        f = self.gain * rng.standard_normal((o, i)) / np.sqrt(max(i, 1))
        if kind == "objective":
            return zero | {"F": f, "C": symmetric(i)}
        a = symmetric(p) if len(self.nodes) % 3 == 0 else zero["A"]
        return {
            "A": a,
            "B": rng.standard_normal((p, i)),
            "C": self.gain * symmetric(i),
            "F": f,
            "G": rng.standard_normal((o, p)),
        }

    def sum(self, out: str, left: str, right: str) -> Graph:
        """`out` = left + right, which both die."""
        n = self.live[left]
        blocks = self.blocks("idle", 2 * n, n, 0) | {"F": np.hstack([np.eye(n), np.eye(n)])}
        return self.add("sum", out, [left, right], n, dies=[left, right], blocks=blocks)


@dataclass(frozen=True)
class Chain:
    """The nodes of a graph and a place for each control, None where they lie in order."""

    nodes: Sequence[Node]
    places: np.ndarray | None

    def rounded(self, dtype: torch.dtype) -> Chain:
        """Return the chain with numbers that a dtype holds."""
        nodes = [
            Node(
                **{
                    **vars(node),
                    "blocks": {k: torch.tensor(b, dtype=dtype).double().numpy() for k, b in node.blocks.items()},
                }
            )
            for node in self.nodes
        ]
        return Chain(nodes, self.places)

    def problem(self, dtype: torch.dtype = torch.float64) -> lq.Problem:
        """Nodes that are alike in one stack."""
        stacks: dict[tuple, list[Node]] = {}
        order = []
        for node in self.nodes:
            members = stacks.setdefault(node.key, [])
            order.append((list(stacks).index(node.key), len(members)))
            members.append(node)
        blocks = [members[0].stages(members, dtype) for members in stacks.values()]
        return lq.Problem(blocks, np.array(order), places=self.places)

    def hessian(self) -> np.ndarray:
        """H in the order of flat vectors."""
        parts = {name: [] for name in "ABCFG"}
        for node in self.nodes:
            a, b, c, f, g = (node.blocks[name] for name in "ABCFG")
            S, P, W = (
                np.zeros((len(node.read), node.n_in)),
                np.zeros((node.n_out, node.n_in)),
                np.zeros((node.n_out, len(f))),
            )
            for row, entry in enumerate(node.read):
                if entry >= 0:
                    S[row, entry] = 1.0
            P[list(node.keep[1]), list(node.keep[0])] = 1.0
            W[list(node.put[1]), list(node.put[0])] = 1.0
            for name, block in zip("ABCFG", (a, b @ S, S.T @ c @ S, P + W @ f @ S, W @ g), strict=True):
                parts[name].append(block)
        H = Blocks(**parts).hessian()
        if self.places is None:
            return H
        flat = np.empty_like(H)
        flat[np.ix_(self.places, self.places)] = H
        return flat


def residual(width: int = 4, blocks: int = 3, p: int = 6, seed: int = 1) -> Graph:
    """h ← h + f(h), the same wirings again and again."""
    graph = Graph(seed, {"input": 3}, gain=0.3).add("dense", "h", ["input"], width, p, dies=["input"])
    for _ in range(blocks):
        graph.add("dense", "f", ["h"], width, p).sum("h", "h", "f")
    return graph


def shared(width: int = 3, size: int = 5, seed: int = 2) -> Graph:
    """A parameter w injected after other controls, read twice beside h, once with a constant; then it dies."""
    graph = Graph(seed, {"input": 2}).add("dense", "h", ["input"], width, 4, dies=["input"])
    graph.add("injection", "w", size=size, p=size)
    graph.add("dense", "h2", ["h", "w", None], width, 2, dies=["h"], drops=1)
    graph.add("dense", "y", ["h2", "h2", "w"], width, 0, dies=["h2"])
    graph.add("dense", "z", ["y", "w"], width, 3, dies=["w"])
    return graph.add("objective", "cost", ["z", "y"], 1, dies=["z", "y"])


def idle(where: Sequence[int], seed: int = 3) -> Graph:
    """Controls that nothing sees before the nodes `where` of three, or after the last."""
    graph = Graph(seed, {"h0": 3})
    for l in range(4):
        if l in where:
            graph.add("idle", None, p=2 + l)
        if l < 3:
            graph.add("dense", f"h{l + 1}", [f"h{l}"], 3, 2 * (l + 1), dies=[f"h{l}"])
    return graph


def idle_alone(seed: int = 4) -> Graph:
    """No other controls: H = 0."""
    graph = Graph(seed, {"h": 3}).add("dense", "y", ["h"], 2, 0, dies=["h"])
    return graph.add("idle", None, p=4).add("objective", "cost", ["y"], 1, dies=["y"])


def unused_beside_shared(seed: int = 5) -> Graph:
    """Two parameters injected one after the other, of which the second is never read and dropped at once; and an idle one."""
    graph = Graph(seed, {}).add("injection", "w", size=3, p=3).add("injection", "v", size=2, p=2)
    graph.add("dense", "h", ["w"], 4, 5, dies=["v"]).add("idle", None, p=3)
    return graph.add("dense", "y", ["h", "w"], 2, 4, dies=["h", "w"])


def chain(make: Callable[[], Graph], *, permuted: bool = False) -> Chain:
    nodes = make().nodes
    size = sum(node.blocks["G"].shape[1] for node in nodes)
    return Chain(nodes, np.random.default_rng(size).permutation(size) if permuted else None)


GRAPHS: dict[str, Callable[[], Chain]] = {
    "residual": lambda: chain(residual),
    "residual, places": lambda: chain(residual, permuted=True),
    "residual, wide, places": lambda: chain(lambda: residual(60, 2, 70), permuted=True),
    "shared": lambda: chain(shared),
    "shared, places": lambda: chain(shared, permuted=True),
    "shared, wide": lambda: chain(lambda: shared(40, 50)),
    "idle first": lambda: chain(lambda: idle([0])),
    "idle between": lambda: chain(lambda: idle([1, 2])),
    "idle last": lambda: chain(lambda: idle([3])),
    "idle everywhere, places": lambda: chain(lambda: idle([0, 1, 3]), permuted=True),
    "idle alone": lambda: chain(idle_alone),
    "unused beside shared": lambda: chain(unused_beside_shared, permuted=True),
}


SAMPLES, WIDTH = 3, 4


def residual_of_samples(
    permuted: bool = True, convex: bool = True
) -> tuple[lq.Problem, Callable[[torch.Tensor], torch.Tensor]]:
    """h = W₁z, y = h + W₂ tanh(h) of every sample, a cost of y, and an idle parameter: stages that keep samples apart.

    Returns the problem and the cost as a function of the flat vector of W₁, b₁, W₂, b₂ and the idle parameter.
    """
    m, n, i = SAMPLES, WIDTH, 5
    generator = torch.Generator().manual_seed(11)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    Z, W1, b1, W2, b2 = draw(m, i), draw(n, i), draw(n), 1.5 * draw(n, n), draw(n)
    sizes = [n * i, n, n * n, n, 2]
    N = sum(sizes)
    places = np.random.default_rng(1).permutation(N) if permuted else np.arange(N)

    def cost(flat):
        w1, c1, w2, c2, _ = flat[places].split(sizes)
        h = Z @ w1.view(n, i).T + c1
        y = h + h.tanh() @ w2.view(n, n).T + c2
        return torch.logsumexp(y, 1).sum() - (0.0 if convex else 2.0) * y.sin().prod(1).sum()

    h = Z @ W1.T + b1
    g = h.tanh()
    y = (h + g @ W2.T + b2).requires_grad_()
    value = torch.logsumexp(y, 1).sum() - (0.0 if convex else 2.0) * y.sin().prod(1).sum()
    (slope,) = torch.autograd.grad(value, y)
    own = torch.stack(
        [
            torch.autograd.functional.hessian(
                lambda v: torch.logsumexp(v, 0) - (0.0 if convex else 2.0) * v.sin().prod(), row
            )
            for row in y.detach()
        ]
    )
    each = np.arange(n)

    def rows(width, start):
        """Of every sample n entries from `start` on, in states of that width a sample."""
        return (np.arange(m)[:, None] * width + start + each).ravel()

    whole = np.arange(m * n)
    beside = Wiring.of(m * n, 2 * m * n, m * n, read=whole, keep=(whole, rows(2 * n, 0)), put=(whole, rows(2 * n, n)))
    second = Wiring.of(
        2 * m * n,
        2 * m * n,
        m * n,
        read=rows(2 * n, n),
        keep=(rows(2 * n, 0), rows(2 * n, 0)),
        put=(whole, rows(2 * n, n)),
    )
    nothing = Wiring.of(m * n, m * n, 0, read=[], keep=(whole, whole), put=([], []))
    both = torch.cat([torch.eye(n), torch.eye(n)], 1).double()
    stages = [
        AffineStage(W1[None], Z[None], None, True, True),
        WiredStage(DiagonalStage((1 - g**2).reshape(1, -1), second=(-2 * g * (1 - g**2)).reshape(1, -1)), beside),
        WiredStage(AffineStage(W2[None], g[None], None, True, True), second),
        DenseStage(both[None, None], samples=m),
        WiredStage(IdleStage.of(2), nothing),
        ObjectiveStage(slope.reshape(1, -1), own[None]),
    ]
    beta, curved = torch.ones(1, 1, dtype=torch.float64), []
    for stage in reversed(stages):
        curved.append(stage.with_adjoint(beta))
        beta = stage.Ft(beta[..., None])[..., 0]
    problem = lq.Problem.stacked(curved[::-1], places=places)
    at = torch.empty(N, dtype=torch.float64)
    at[torch.from_numpy(places)] = torch.cat([W1.ravel(), b1, W2.ravel(), b2, torch.zeros(2, dtype=torch.float64)])
    return problem, lambda flat: cost(at + flat)
