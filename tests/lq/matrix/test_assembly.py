"""The dense Hessian from the stages, against double backward and against blocks written out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import linop_hess as lh
from linop_hess.lq.matrix import assembly_plan
from linop_hess.lq.matrix.assembly import assemble
from linop_hess.lq.matrix.assembly_plan import plan_assembly
from tests.helpers import make_batch, make_mlp, oracle_hessian
from tests.lq.graphs import SAMPLES, residual_of_samples
from tests.lq.methods.conformance import WIRED, setting
from tests.lq.problems import random_blocks

CROSS_ENTROPY = nn.CrossEntropyLoss()
BOUND = {torch.float64: 1e-13, torch.float32: 1e-5}


def agrees(H: Tensor, truth: np.ndarray, way: str = "") -> None:
    """H is exactly symmetric, and equal to a truth that is not negligible."""
    assert torch.equal(H, H.T)
    scale = np.abs(truth).max()
    assert scale > 1e-4
    assert np.abs(H.double().numpy() - truth).max() <= BOUND[H.dtype] * scale, way


def net(seed: int, *layers: nn.Module) -> nn.Sequential:
    """Layers in float64, their parameters normal, and large enough for curvature."""
    model = nn.Sequential(*layers).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = noise / fan**0.5 if parameter.ndim > 1 else 1.0 + 0.3 * noise
    return model


class Gated(nn.Module):
    """A module without known structure, with A, B, C, F and G; acts on samples apart, which nobody knows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.gate = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight * self.gate.exp())


def mixed(z: Tensor, target: Tensor) -> Tensor:
    """A loss in which all samples interact."""
    return CROSS_ENTROPY(z, target) * (1 + z.square().mean())


def tokens(vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (12, 4), generator=torch.Generator().manual_seed(5))


X, Y = make_batch(36, 3, 12)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
    "convolutions": (
        lambda: net(
            1,
            nn.Unflatten(1, (1, 6, 6)),
            nn.Conv2d(1, 3, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(3, 4, 3, stride=2, bias=False),
            nn.Softplus(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        X,
        CROSS_ENTROPY,
    ),
    "every kind": (
        lambda: net(
            2,
            nn.Unflatten(1, (4, 9)),
            nn.Conv1d(4, 3, 3, padding=1),
            nn.GELU(),
            nn.LayerNorm(9),
            nn.Linear(9, 5),
            nn.Tanh(),
            nn.BatchNorm1d(3),
            nn.Flatten(),
            nn.Linear(15, 6),
            nn.Tanh(),
            nn.GroupNorm(2, 6),
            nn.Linear(6, 3),
        ),
        X,
        CROSS_ENTROPY,
    ),
    "wide to convolution": (
        lambda: net(
            3,
            nn.Linear(36, 8),
            nn.Tanh(),
            nn.Unflatten(1, (2, 4)),
            nn.Conv1d(2, 6, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
        X,
        CROSS_ENTROPY,
    ),
    "few positions": (
        lambda: net(
            4,
            nn.Unflatten(1, (12, 3)),
            nn.Conv1d(12, 5, 2),
            nn.Tanh(),
            nn.Conv1d(5, 4, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        X,
        CROSS_ENTROPY,
    ),
    "generic": (lambda: net(5, nn.Linear(36, 9), nn.Tanh(), Gated(9, 4), nn.Linear(4, 3)), X, CROSS_ENTROPY),
    "generic first": (lambda: net(6, Gated(36, 4), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 3)), X, CROSS_ENTROPY),
    "embedding of many": (
        lambda: net(7, nn.Embedding(30, 3), nn.Linear(3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        tokens(30),
        CROSS_ENTROPY,
    ),
    "embedding of few": (
        lambda: net(8, nn.Embedding(3, 3, padding_idx=1), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)),
        tokens(3),
        CROSS_ENTROPY,
    ),
    "samples that interact": (lambda: make_mlp([36, 4, 4, 3]), X, mixed),
    "rows of a sample": (
        lambda: net(
            9,
            nn.Unflatten(1, (6, 6)),
            nn.Linear(6, 4),
            nn.Tanh(),
            nn.Linear(4, 4, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        X,
        CROSS_ENTROPY,
    ),
}


EveryWay = Callable[[], Iterator[str]]


@pytest.fixture
def every_way(monkeypatch: pytest.MonkeyPatch) -> EveryWay:
    """Values or costates or the cheaper of them; all at once, or in so little work space that samples, columns and products are cut."""

    def ways() -> Iterator[str]:
        for least, share in ((assembly_plan._LEAST_WORK_BYTES, assembly_plan._WORK_SHARE), (1 << 11, 1e-6)):
            monkeypatch.setattr(assembly_plan, "_LEAST_WORK_BYTES", least)
            monkeypatch.setattr(assembly_plan, "_WORK_SHARE", share)
            for preference in (1e-9, assembly_plan._PREFERENCE_FOR_VALUES, 1e9):
                with monkeypatch.context() as patch:
                    patch.setattr(assembly_plan, "_PREFERENCE_FOR_VALUES", preference)
                    yield f"{least} bytes, {preference:g}"

    return ways


def assembles(problem: lh.lq.Problem, truth: np.ndarray, every_way: EveryWay) -> None:
    """In every way."""
    for way in every_way():
        agrees(assemble(problem), truth, way)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_stage(name: str, every_way: EveryWay) -> None:
    make, x, loss = MODELS[name]
    model = make()
    assembles(lh.linearize(model, loss, x, Y).problem, oracle_hessian(model, loss, x, Y), every_way)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("widths", "samples"),
    [
        ([3, 4, 4, 4, 3], 1),
        ([3, 4, 4, 4, 3], 20),
        ([6, 3, 5, 5, 2], 40),
        ([5, 3], 30),
        ([4, 7, 3, 7, 3], 9),
        ([4] * 14 + [3], 2),
    ],
)
def test_networks(widths: list[int], samples: int, bias: bool, dtype: torch.dtype, every_way: EveryWay) -> None:
    model, (x, y) = make_mlp(widths, bias=bias, dtype=dtype), make_batch(widths[0], widths[-1], samples, dtype=dtype)
    assembles(lh.linearize(model, CROSS_ENTROPY, x, y).problem, oracle_hessian(model, CROSS_ENTROPY, x, y), every_way)


def test_repeated_samples_count_once_each() -> None:
    model, (x, y) = make_mlp([5, 4, 4, 3]), make_batch(5, 3, 7)
    x, y = x[[0, 0, 0, *range(7)]], y[[0, 0, 0, *range(7)]]
    agrees(assemble(lh.linearize(model, CROSS_ENTROPY, x, y).problem), oracle_hessian(model, CROSS_ENTROPY, x, y))


@pytest.mark.parametrize("chosen", [["0.weight"], ["2.bias"], ["2.weight", "4.bias"], ["0.bias", "4.weight"]])
def test_some_of_the_parameters(chosen: list[str], every_way: EveryWay) -> None:
    model, (x, y) = make_mlp([5, 4, 4, 3]), make_batch(5, 3, 8)
    problem = lh.linearize(model, CROSS_ENTROPY, x, y, params=chosen).problem
    assembles(problem, oracle_hessian(model, CROSS_ENTROPY, x, y, chosen), every_way)


@pytest.mark.parametrize("with_A", ["all", "some", "none"])
@pytest.mark.parametrize(
    ("n", "p"),
    [
        ([2, 3, 4, 2], [3, 2, 4]),
        ([0, 3, 1], [5, 6]),
        ([2, 5, 5, 1], [0, 9, 2]),
        ([2, 0, 3, 2, 4], [3, 0, 9, 1]),
        ([4, 4, 4, 4, 4], [0, 0, 7, 3]),
        ([1] * 9, [3, 1] * 4),
    ],
)
def test_problems_of_blocks(n: list[int], p: list[int], with_A: str, every_way: EveryWay) -> None:
    blocks = random_blocks(n, p, seed=3, with_A=with_A)
    assembles(blocks.problem(), blocks.hessian(), every_way)
    rounded = blocks.rounded(torch.float32)
    assembles(rounded.problem(torch.float32), rounded.hessian(), every_way)


@pytest.mark.parametrize("with_A", ["all", "none"])
def test_controls_of_the_last_stage_only(with_A: str) -> None:
    blocks = random_blocks([3, 3, 2], [0, 4], seed=0, with_A=with_A)
    H = assemble(blocks.problem())
    assert np.abs(H.numpy() - blocks.hessian()).max() <= 1e-13


def test_stages_have_the_curvature_of_their_problem() -> None:
    problem = lh.linearize(make_mlp([5, 4, 3]), CROSS_ENTROPY, *make_batch(5, 3, 8)).problem
    for changed in (problem, problem.gauss_newton()):
        for stage, (b, k) in zip(changed.stages, changed.order.tolist(), strict=True):
            assert stage.nonzero == changed.blocks[b].at(k).nonzero
        truth = changed.hessian_product(torch.eye(changed.size, dtype=changed.dtype)).numpy()
        agrees(assemble(changed), truth)


def test_no_controls() -> None:
    assert assemble(random_blocks([3, 3], [0], seed=0).problem()).shape == (0, 0)


MEASURE = """
import ctypes, sys, torch, linop_hess as lh
from torch import nn
from linop_hess.lq.matrix.assembly import assemble, assembly_cost
from tests.helpers import make_batch, make_mlp
def problem(widths, samples):
    return lh.linearize(make_mlp(widths), nn.CrossEntropyLoss(), *make_batch(widths[0], widths[-1], samples)).problem
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
assemble(problem([9, 9, 3], 9)); torch.randn(500, 500) @ torch.randn(500, 500)
for widths, samples in ([700, 4], 20), ([40, 40, 40], 64), ([16] * 12 + [10], 1000):
    H, P = None, problem(widths, samples)
    cost = assembly_cost(P)[1]
    ctypes.CDLL(None).malloc_trim(0); open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS"); H = assemble(P)
    print((status("VmHWM") - before) / cost, (status("VmHWM") - before) / (8 * P.size**2))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_foretold() -> None:
    # Small arrays from the heap leave holes, which the count cannot see; above this size torch's allocations are mapped and given back.
    command, environment = [sys.executable, "-c", MEASURE], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    of_cost, of_H = np.array([line.split() for line in run.stdout.splitlines()], dtype=float).T
    assert of_cost.size == 3 and of_cost.min() >= 1 / 1.3 and of_cost.max() <= 1.3, of_cost
    assert of_H.max() <= 2.0, of_H


@pytest.mark.parametrize("biases", [(False, True), (True, False)])
@pytest.mark.parametrize(("widths", "samples"), [([4, 3, 3, 2], 21), ([4, 6, 5, 5, 3], 9), ([1, 3, 1, 3], 5)])
def test_neighbours_with_as_many_controls_of_other_forms(widths, samples, biases) -> None:
    """A weight of one input more has as many entries as a weight and a bias."""
    layers: list[nn.Module] = []
    for k, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        torch.manual_seed(k)
        linear = nn.Linear(a, b, bias=biases[k % 2], dtype=torch.float64)
        nn.init.orthogonal_(linear.weight, 1.3)
        layers += [linear, nn.Tanh()]
    model, (x, y) = nn.Sequential(*layers[:-1]), make_batch(widths[0], widths[-1], samples)
    lin, H = (
        lh.linearize(model, nn.functional.cross_entropy, x, y),
        oracle_hessian(model, nn.functional.cross_entropy, x, y),
    )
    assert np.abs(assemble(lin.problem).numpy() - H).max() <= 1e-13 * np.abs(H).max()


@pytest.mark.parametrize("permuted", [True, False])
def test_wired_stages_of_samples(permuted: bool) -> None:
    """Samples stay apart through a residual branch, and the controls of every stage stand anywhere."""
    problem, cost = residual_of_samples(permuted, convex=False)
    assert plan_assembly(problem).samples == SAMPLES
    H = torch.autograd.functional.hessian(cost, torch.zeros(problem.size, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(H)[0]) < -1e-2
    ours, scale = assemble(problem), float(H.abs().max())
    assert float((ours - H).abs().max()) <= 1e-13 * scale
    product = problem.hessian_product(torch.eye(problem.size, dtype=torch.float64))
    assert float((product - H).abs().max()) <= 1e-13 * scale


@pytest.mark.parametrize("shape", [shape for shape in WIRED if shape != "idle alone"])  # of which H = 0
def test_wired_chains(shape: str, every_way: EveryWay) -> None:
    truth = setting(shape)
    assembles(truth.problem, truth.H, every_way)
