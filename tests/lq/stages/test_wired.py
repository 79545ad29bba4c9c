"""Stages of several kinds, wired: the truth is P + W F S and so on, with matrices of zeros and ones written out."""

import functools

import numpy as np
import pytest
import torch

from linop_hess.lq.stages.affine import AffineStage
from linop_hess.lq.stages.diagonal import DiagonalStage
from linop_hess.lq.stages.wired import WiredStage
from linop_hess.lq.wiring import Wiring
from tests.lq.stages import (
    test_affine,
    test_convolution,
    test_dense,
    test_diagonal,
    test_embedding,
    test_injection,
    test_objective,
    test_scale_shift,
)
from tests.lq.stages.conformance import Blocks, Case, StageConformance, draw


def matrices(wiring):
    """S of what is read, P of what is kept, W of what is put."""
    S = torch.zeros(wiring.read.numel(), wiring.n_in, dtype=torch.float64)
    P = torch.zeros(wiring.n_out, wiring.n_in, dtype=torch.float64)
    W = torch.zeros(wiring.n_out, wiring.outputs, dtype=torch.float64)
    for row, entry in enumerate(wiring.read.tolist()):
        if entry >= 0:
            S[row, entry] = 1.0
    P[wiring.keep_to, wiring.keep_from] = 1.0
    W[wiring.put_to, wiring.put_from] = 1.0
    return S, P, W


def wired(case, make):
    """A stage and its blocks with a wiring, `make` of its sizes."""
    inner, own = case.stage, case.blocks
    wiring = make(inner.n_in, inner.n_out)
    S, P, W = matrices(wiring)
    blocks = Blocks(P + W @ own.F @ S, W @ own.G, own.A, own.B @ S, S.T @ own.C @ S)
    return Case(WiredStage(inner, wiring), blocks)


def whole(i, o):
    """As if it were not wired."""
    return Wiring.of(i, o, o, read=range(i), keep=([], []), put=(range(o), range(o)))


def beside(i, o):
    """All is kept, and the output stands behind it: a residual branch."""
    return Wiring.of(i, i + o, o, read=range(i), keep=(range(i), range(i)), put=(range(o), range(i, i + o)))


def between(i, o):
    """Reads from the middle; what is before is kept behind the output."""
    read = range(3, 3 + i)
    return Wiring.of(i + 5, o + 4, o, read=read, keep=([0, 1, 2, i + 4], range(o, o + 4)), put=(range(o), range(o)))


def scattered(i, o):
    """Entries in any order, some twice or constant, some outputs dropped, some of what is read kept."""
    rng = np.random.default_rng(i + 10 * o)
    n = max(1, i)
    read = rng.integers(-1, n, i)
    keep = rng.permutation(n)[: (n + 1) // 2]
    put = rng.permutation(o)[: max(1, 2 * o // 3)]
    places = rng.permutation(keep.size + put.size)
    return Wiring.of(n, places.size, o, read=read, keep=(keep, places[: keep.size]), put=(put, places[keep.size :]))


def repeated(i, o):
    """One entry is all that is read, by every input; runs are many."""
    return Wiring.of(2, o + 1, o, read=[1] * i, keep=([0], [o]), put=(range(o), range(o)[::-1]))


def constant(i, o):
    """The first half of what is read is constant, and nothing is kept."""
    read = [-1] * (i // 2) + list(range(i - i // 2))
    return Wiring.of(max(1, i - i // 2), o, o, read=read, keep=([], []), put=(range(o), range(o)))


def by_samples(m):
    """Every one of m samples keeps its first entry, then puts its output, then keeps its second entry."""

    def make(i, o):
        a, b = i // m, o // m
        before, after = a + 2, b + 2
        read = [s * before + 1 + j for s in range(m) for j in range(a)]
        keep_from = [s * before + j for s in range(m) for j in (0, a + 1)]
        keep_to = [s * after + j for s in range(m) for j in (0, b + 1)]
        put_to = [s * after + 1 + j for s in range(m) for j in range(b)]
        return Wiring.of(m * before, m * after, o, read=read, keep=(keep_from, keep_to), put=(range(o), put_to))

    return make


def objective_of(m):
    """An objective of m samples, of each of which it reads what stands behind an entry that it does not."""

    def make(i, o):
        a = i // m
        read = [s * (a + 1) + 1 + j for s in range(m) for j in range(a)]
        return Wiring.of(m * (a + 1), 1, 1, read=read, keep=([], []), put=([0], [0]))

    return make


INNER = {
    "affine": functools.partial(test_affine.case, rows=3, inputs=5, outputs=2),
    "affine, one row": functools.partial(test_affine.case, rows=1, inputs=4, outputs=3),
    "affine, stack": functools.partial(test_affine.case, K=3, rows=2, inputs=4),
    "dense": test_dense.case,
    "dense, hidden": functools.partial(test_dense.case, p=9, curved="BC"),
    "dense, samples": functools.partial(test_dense.case, m=3),
    "diagonal": functools.partial(test_diagonal.case, K=2, n=6),
    "scale and shift": test_scale_shift.case,
    "embedding": test_embedding.case,
    "convolution": next(iter(test_convolution.TestConvolution.cases.values())),
    "injection": functools.partial(test_injection.injected, K=2, size=4),
    "idle": functools.partial(test_injection.idle, K=2, size=4),
}
WIRINGS = {"whole": whole, "beside": beside, "between": between, "repeated": repeated, "constant": constant}


class TestWired(StageConformance):
    cases = {
        f"{name}, {which}": functools.partial(lambda make, wiring: wired(make(), wiring), make, wiring)
        # Each kind in two wirings, each wiring with four or five kinds: what a wiring does, it does to products of any kind.
        for i, (name, make) in enumerate(INNER.items())
        for j, (which, wiring) in enumerate(WIRINGS.items())
        if (i + j) % len(WIRINGS) in (0, 2)
    } | {
        name: functools.partial(lambda make, wiring: wired(make(), wiring), make, wiring)
        for name, make, wiring in (
            ("affine, samples", INNER["affine"], by_samples(3)),
            ("affine stack, samples", INNER["affine, stack"], by_samples(2)),
            ("dense, of samples", INNER["dense, samples"], by_samples(3)),
            ("diagonal, samples", INNER["diagonal"], by_samples(3)),
            ("scale and shift, samples", INNER["scale and shift"], by_samples(2)),
            ("injection, samples", INNER["injection"], by_samples(2)),
            ("idle, samples", INNER["idle"], by_samples(4)),
            ("objective", functools.partial(test_objective.case, m=4, i=2), objective_of(4)),
            ("objective, scattered", functools.partial(test_objective.case, i=6), scattered),
            ("diagonal, scattered", INNER["diagonal"], scattered),
            ("dense, scattered", functools.partial(test_dense.case, o=5, p=3), scattered),
            ("scale and shift, scattered", INNER["scale and shift"], scattered),
            ("affine bias, scattered", functools.partial(test_affine.case, rows=3, weight=False), scattered),
            ("twice", lambda: wired(wired(test_dense.case(), beside), scattered), beside),
        )
    }


def test_dropped_outputs_leave_more_in_the_row_space_than_is_seen():
    """Only the first of two outputs a row lives on: R has rows of zeros, and x = Q s + x⊥ still."""
    case = wired(INNER["affine"](), lambda i, o: Wiring.of(i, 1, o, read=range(i), keep=([], []), put=([3], [0])))
    stage, space = case.stage, case.stage.row_space()
    assert space.r > stage.n_out
    assert torch.allclose(space.R(space.Qt(stage.eye(stage.p))), case.blocks.G, rtol=0, atol=1e-13)
    Q = space.Q(stage.eye(space.r))
    assert torch.allclose(space.QtB(), Q.mT @ case.blocks.B, rtol=0, atol=1e-13)


@pytest.mark.parametrize("make", [*WIRINGS.values(), scattered], ids=[*WIRINGS, "scattered"])
def test_adjoint_is_that_of_the_outputs_that_live_on(make):
    z, beta = (draw(torch.Generator().manual_seed(1), 2, 6) for _ in range(2))
    inner = DiagonalStage(z.cos(), second=-z.sin())
    stage = WiredStage(inner, make(6, 6))
    _, _, W = matrices(stage.wiring)
    beta = draw(torch.Generator().manual_seed(2), 2, stage.n_out)
    assert torch.equal(stage.local_adjoint(beta), beta @ W)
    assert torch.equal(stage.with_adjoint(beta).inner.c, inner.with_adjoint(beta @ W).c)
    assert stage.with_inner(inner.with_adjoint(beta @ W)).nonzero == {"C"}
    assert stage.gauss_newton().nonzero == frozenset()


@pytest.mark.parametrize("name", INNER)
def test_no_product_is_in_the_memory_of_its_argument(name):
    """Callers add to what they get; of what passes through, too."""
    for make in (*WIRINGS.values(), scattered):
        stage = wired(INNER[name](), make).stage
        for product, size in (
            (stage.F, stage.n_in),
            (stage.Ft, stage.n_out),
            (stage.G, stage.p),
            (stage.Gt, stage.n_out),
        ):
            given = torch.ones(stage.count, size, 2, dtype=torch.float64)
            product(given).fill_(float("nan"))
            assert not bool(given.isnan().any())


def test_samples_are_those_that_both_keep_apart():
    affine, dense = INNER["affine"], INNER["dense, samples"]
    assert wired(affine(), by_samples(3)).stage.samples == 3
    assert wired(affine(), beside).stage.samples == 1
    assert wired(affine(), whole).stage.samples == 3
    assert wired(dense(), by_samples(3)).stage.samples == 3
    assert wired(INNER["diagonal"](), by_samples(3)).stage.samples == 3
    assert wired(INNER["diagonal"](), whole).stage.samples == 6
    assert wired(INNER["idle"](), by_samples(4)).stage.samples == 8  # every entry passes by itself
    assert wired(test_objective.case(m=4, i=2), objective_of(4)).stage.samples == 4


def test_pairs_of_whole_stages_only():
    """Rows of samples tell G of the whole state after, and B of the whole state before."""
    stage = test_affine.case(rows=3, inputs=5, outputs=2).stage
    assert WiredStage(stage, whole(15, 6)).sample_rows(3) is not None
    assert WiredStage(stage, by_samples(3)(15, 6)).sample_rows(3) is None
    read_apart = Wiring.of(
        18, 6, 6, read=[s * 6 + j for s in range(3) for j in range(5)], keep=([], []), put=(range(6),) * 2
    )
    assert WiredStage(stage, read_apart).sample_rows(3) is None
    assert WiredStage(stage.gauss_newton(), read_apart).sample_rows(3) is not None


def test_sizes_must_agree():
    stage = AffineStage(torch.ones(1, 2, 3), torch.ones(1, 1, 3), None, True, True)
    with pytest.raises(ValueError, match=r"expected a wiring of \(inputs, outputs\) \(3, 2\)"):
        WiredStage(stage, whole(2, 2))
