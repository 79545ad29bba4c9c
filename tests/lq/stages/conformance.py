"""One suite for all kinds of stage, against dense blocks by reverse mode of the map a stage was linearized from.

A kind's tests inherit `StageConformance` and name `cases`, functions that return a `Case`; each runs in float32 and float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from linop_hess.lq.stages import Joint, RowSpace, Stage
from tests.helpers import CountedCalls

DTYPES = (torch.float32, torch.float64)
DAMPINGS = (0.3, -2.0)


@dataclass(frozen=True)
class Blocks:
    """Dense blocks of K stages in float64: F (K, n_out, n_in), G (K, n_out, p), A, B (K, p, n_in), C."""

    F: Tensor
    G: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


@dataclass(frozen=True)
class Case:
    """Stages in float64, of numbers that float32 holds, and their blocks."""

    stage: Stage
    blocks: Blocks


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers that float32 holds, in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).float().double()


def symmetric(generator: torch.Generator, *shape: int) -> Tensor:
    half = draw(generator, *shape)
    return half + half.mT


def differentiated(
    maps: Sequence[Callable[[Tensor, Tensor], Tensor]],
    energies: Sequence[Callable[[Tensor, Tensor], Tensor]],
    x: Tensor,
    z: Tensor,
) -> Blocks:
    """Jacobians of y = map(x, z) and Hessians of energy(x, z) for each stage, at x of shape (K, p) and z of shape (K, n_in)."""
    p = x.shape[1]
    slopes, curvatures = [], []
    together = torch.cat([x, z], 1)
    if not together.shape[1]:
        n_out = maps[0](x[0], z[0]).numel()
        return Blocks(*(x.new_zeros(len(x), *shape) for shape in ((n_out, 0), (n_out, 0), (0, 0), (0, 0), (0, 0))))
    for map_, energy, u in zip(maps, energies, together, strict=True):
        slopes.append(jacobian(lambda v, m=map_: m(v[:p], v[p:]), u))
        curvatures.append(hessian(lambda v, e=energy: e(v[:p], v[p:]), u))
    J, H = torch.stack(slopes), torch.stack(curvatures)
    return Blocks(J[:, :, p:], J[:, :, :p], H[:, :p, :p], H[:, :p, p:], H[:, p:, p:])


def with_adjoint(maps: Sequence[Callable[[Tensor, Tensor], Tensor]], x: Tensor, z: Tensor, beta: Tensor) -> Blocks:
    """As `differentiated`, the energy being that of adjoints β of shape (K, n_out)."""
    energies = [lambda a, b, m=map_, w=w: w @ m(a, b) for map_, w in zip(maps, beta, strict=True)]
    return differentiated(maps, energies, x, z)


def close(ours: Tensor, truth: Tensor, dtype: torch.dtype, scale: float | None = None) -> None:
    """Assert that an array of a dtype is a truth in float64 to rounding."""
    assert ours.shape == truth.shape and ours.dtype == dtype
    if truth.numel():
        scale = max(scale or 0.0, float(truth.abs().max()))
        gap = float((ours.double() - truth).abs().max())
        assert gap <= 300 * torch.finfo(dtype).eps * scale, f"{gap:.1e} of {scale:.1e}"


class StageConformance:
    """Inherit, and set `cases`: a name to a function that makes a Case."""

    cases: dict[str, Callable[[], Case]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", _made(type(self)), ids=list(self.cases))
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", DTYPES, ids=str)

    @pytest.mark.parametrize("k", [1, 3])
    def test_products(self, case: Case, dtype: torch.dtype, k: int):
        stage, blocks = case.stage.to(dtype), case.blocks
        generator = torch.Generator().manual_seed(k)
        K, n_out, n_in = blocks.F.shape
        d, y, x = (draw(generator, K, n, k) for n in (n_in, n_out, blocks.G.shape[2]))
        assert (stage.count, stage.n_in, stage.n_out, stage.p) == (K, n_in, n_out, x.shape[1])
        for product, matrix, v in (
            (stage.F, blocks.F, d),
            (stage.Ft, blocks.F.mT, y),
            (stage.G, blocks.G, x),
            (stage.Gt, blocks.G.mT, y),
            (stage.A, blocks.A, x),
            (stage.B, blocks.B, d),
            (stage.Bt, blocks.B.mT, x),
            (stage.C, blocks.C, d),
        ):
            close(product(v.to(dtype)), matrix @ v, dtype, _size(matrix) * _size(v))

    def test_calls_are_about_as_many_as_are_told(self, case: Case):
        stage, like = case.stage.at(0), torch.zeros(1, dtype=torch.float64)
        d, y, x = (like.new_ones(1, n, 1) for n in (stage.n_in, stage.n_out, stage.p))
        products = {"F": [(stage.F, d), (stage.Ft, y)]}
        products |= {"G": [(stage.G, x), (stage.Gt, y)]} if stage.p else {}
        products |= {"B": [(stage.B, d), (stage.Bt, x)]} if "B" in stage.nonzero else {}
        products |= {name: [(getattr(stage, name), v)] for name, v in (("A", x), ("C", d)) if name in stage.nonzero}
        for name, both in products.items():
            for product, v in both:
                product(v)  # wirings are looked at once
            with CountedCalls() as found:
                for product, v in both:
                    product(v)
            assert found.count <= 2 * stage.calls(name) * len(both) + 4, (name, found.count, stage.calls(name))
            assert stage.calls(name) * len(both) <= 2 * found.count + 4, (name, found.count, stage.calls(name))

    def test_dense_blocks(self, case: Case, dtype: torch.dtype):
        stage = case.stage.to(dtype)
        for name in "FGABC":
            close(getattr(stage, f"dense_{name}")(), getattr(case.blocks, name), dtype)

    def test_nonzero_is_true_and_gauss_newton_has_no_curvature(self, case: Case):
        for name in "ABC":
            block = getattr(case.blocks, name)
            assert name in case.stage.nonzero or not bool(block.any())
        flat = case.stage.gauss_newton()
        kept = case.stage.nonzero if flat is case.stage else frozenset()
        assert flat.nonzero == kept and torch.equal(flat.dense_F(), case.stage.dense_F())
        for name in frozenset("ABC") - kept:
            assert not bool(getattr(flat, f"dense_{name}")().any())

    def test_samples_are_apart(self, case: Case):
        stage, blocks = case.stage, case.blocks
        for samples in _divisors(stage):
            assert stage.n_in % samples == 0
            _assert_block_diagonal(blocks.C, samples)
            if stage.n_out % samples == 0:
                _assert_block_diagonal(blocks.F, samples)
            i = stage.n_in // samples
            parts = blocks.C.view(stage.count, samples, i, samples, i).diagonal(dim1=1, dim2=3).movedim(-1, 1)
            close(stage.C_of_samples(samples), parts, torch.float64)

    def test_parts_of_the_state(self, case: Case, dtype: torch.dtype):
        stage, blocks = case.stage.to(dtype), case.blocks
        for samples, start, stop in _parts(stage):
            part = stage.of_samples(start, stop, samples)
            ins = slice(start * (stage.n_in // samples), stop * (stage.n_in // samples))
            # An objective, the one kind whose output is not cut, adds parts up.
            each = stage.n_out // samples
            outs = slice(start * each, stop * each) if stage.n_out % samples == 0 else slice(None)
            assert (part.count, part.p, part.n_in) == (stage.count, stage.p, ins.stop - ins.start)
            assert part.samples % (stop - start) == 0 and part.nonzero <= stage.nonzero - {"A"}
            close(part.dense_F(), blocks.F[:, outs, ins], dtype)
            close(part.dense_G(), blocks.G[:, outs], dtype)
            close(part.dense_B(), blocks.B[:, :, ins], dtype)
            close(part.dense_C(), blocks.C[:, ins, ins], dtype)

    def test_rows_of_samples(self, case: Case, dtype: torch.dtype):
        stage, blocks = case.stage.to(dtype).at(0), case.blocks
        for samples in _divisors(stage):
            rows = stage.sample_rows(samples)
            if rows is None:
                continue
            o, i = stage.n_out // samples, stage.n_in // samples
            assert rows.Z.shape[0] == samples and o * rows.Z.shape[1] == stage.p
            for b, (row, G) in enumerate(zip(rows.Z, blocks.G[0].split(o), strict=True)):
                weight, bias = row[: row.numel() - rows.bias], row[row.numel() - rows.bias :]
                own = torch.eye(o, dtype=dtype)
                close(torch.cat([torch.kron(own, weight[None]), torch.kron(own, bias[None])], 1), G, dtype)
                B = torch.zeros(stage.p, i, dtype=dtype)
                if rows.beta is not None:
                    B[: o * i] = torch.kron(rows.beta[b, :, None], torch.eye(i, dtype=dtype))
                close(B, blocks.B[0, :, b * i : (b + 1) * i], dtype)

    def test_columns_and_parts_of_G(self, case: Case, dtype: torch.dtype):
        stage, G = case.stage.to(dtype).at(0), case.blocks.G[:1]
        cuts = sorted({0, stage.p // 3, stage.p // 2, stage.p - 1, stage.p} & set(range(stage.p + 1)))
        for start, stop in ((a, b) for a in cuts for b in cuts if a <= b):
            close(stage.G_columns(start, stop), G[:, :, start:stop], dtype)
        for samples in (m for m in _divisors(stage) if stage.n_out % m == 0):
            y = draw(torch.Generator().manual_seed(8), samples, stage.n_out // samples, 2)
            parts = G.view(samples, -1, stage.p) if G.numel() else G.new_zeros(*y.shape[:2], stage.p)
            close(stage.Gt_each(y.to(dtype), samples), parts.mT @ y, dtype, _size(G) * _size(y))

    def test_entries_are_at_least_what_is_not_zero(self, case: Case):
        for name in "FGBC":
            assert case.stage.entries(name) >= int(getattr(case.blocks, name)[0].count_nonzero())

    def test_pull_back(self, case: Case, dtype: torch.dtype):
        blocks, stage = case.blocks, case.stage.to(dtype).at(0)
        V = symmetric(torch.Generator().manual_seed(3), stage.n_out, stage.n_out)
        F, given = blocks.F[0], V.to(dtype)
        ours = stage.pull_back(given)
        close(ours, F.T @ V @ F + blocks.C[0], dtype, F.shape[0] * _size(F) ** 2 * _size(V))
        ours.fill_(float("nan"))
        assert torch.equal(given, V.to(dtype))
        assert stage.first_not_finite() is None

    def test_add_curvature(self, case: Case, dtype: torch.dtype):
        stage, blocks = case.stage.to(dtype), case.blocks
        generator = torch.Generator().manual_seed(2)
        W, T = draw(generator, stage.count, stage.n_in, 3), symmetric(generator, stage.count, 3, 3)
        ours = T.to(dtype, copy=True)
        stage.add_curvature(ours, W.to(dtype))
        close(ours, T + W.mT @ blocks.C @ W, dtype, _size(T) + _size(W) ** 2 * _size(blocks.C))

    def test_pull_back_over_is_the_same(self, case: Case, dtype: torch.dtype):
        stage = case.stage.to(dtype).at(0)
        V = symmetric(torch.Generator().manual_seed(3), stage.n_out, stage.n_out).to(dtype)
        for given in (V, V.clone().mT):  # by rows, and by columns
            expected = stage.pull_back(given)
            assert torch.equal(stage.pull_back_over(given), expected)
        over, back = (
            next(kind for kind in type(stage).__mro__ if name in vars(kind)) for name in ("pull_back_over", "pull_back")
        )
        assert over is Stage or issubclass(over, back)  # one that takes V back its own way has no other's way in place
        assert stage.first_not_finite() is None

    def test_stack_is_sliced_and_cast(self, case: Case, dtype: torch.dtype):
        stage, space = case.stage.to(dtype), case.stage.to(dtype).row_space()
        assert stage.dtype == dtype and space.dtype == dtype and stage.nbytes > 0 and stage.device.type == "cpu"
        assert stage.first_not_finite() is None and space.count == stage.count
        last = stage.count - 1
        for picked, part in ((stage.at(last), space.at(last)), (stage.take(torch.tensor([last]).numpy()), None)):
            assert picked.count == 1
            close(picked.dense_G(), case.blocks.G[last:], dtype)
            close(picked.dense_B(), case.blocks.B[last:], dtype)
            if part is not None:
                image = part.R(part.Qt(picked.eye(picked.p)))
                close(image, case.blocks.G[last:], dtype)

    def test_row_space(self, case: Case, dtype: torch.dtype):
        stage, blocks = case.stage.to(dtype), case.blocks
        space = stage.row_space()
        Q = self.basis(stage, space)
        K, p, r = Q.shape
        assert (r, p) == (space.r, space.r + space.hidden) and p == stage.p
        close(Q.mT @ Q, torch.eye(r, dtype=torch.float64).expand(K, r, r), torch.float64, _rounding(dtype))
        # G = R Qᵀ through each of the four products.
        close(space.R(space.Qt(stage.eye(p))), blocks.G, dtype)
        close(space.R(stage.eye(r)), blocks.G @ Q, dtype, _size(blocks.G))
        close(space.Qt(stage.eye(p)), Q.mT, dtype)
        close(space.Rt(stage.eye(stage.n_out)), (blocks.G @ Q).mT, dtype, _size(blocks.G))
        close(space.QtAQ(), Q.mT @ blocks.A @ Q, dtype, _size(blocks.A))
        close(space.QtB(), Q.mT @ blocks.B, dtype, p * _size(blocks.B))
        close(space.project_out(stage.eye(p)), torch.eye(p, dtype=torch.float64) - Q @ Q.mT, dtype, 1.0)
        if space.hidden:
            # A, if any, acts on visible controls alone, and is all that adds to what the output sees.
            assert r <= stage.n_out + int(blocks.A.any(0).any(0).sum())
            close((blocks.A @ Q) @ Q.mT, blocks.A, torch.float64, _size(blocks.A) * _rounding(dtype))

    def test_hidden_coupling(self, case: Case, dtype: torch.dtype):
        stage, blocks = case.stage.to(dtype), case.blocks
        space = stage.row_space()
        Q = self.basis(stage, space)
        hidden = blocks.B - Q @ (Q.mT @ blocks.B)
        gram, scale = hidden.mT @ hidden, stage.p * _size(blocks.B) ** 2
        N = space.hidden_coupling()
        assert N.shape[1] <= space.hidden and N.shape[::2] == (stage.count, stage.n_in)
        close(N.double().mT @ N.double(), gram, torch.float64, scale * _rounding(dtype))
        close(space.hidden_gram(), gram, dtype, scale)
        if not space.coupled:
            assert N.shape[1] == 0 and _size(gram) <= 300 * torch.finfo(dtype).eps ** 2 * scale
        W = draw(torch.Generator().manual_seed(4), stage.count, stage.n_in, 2)
        close(space.hidden_directions(W.to(dtype)), hidden @ W, dtype, stage.n_in * _size(blocks.B) * _size(W))

    def test_hidden_directions(self, case: Case, dtype: torch.dtype):
        stage = case.stage.to(dtype)
        space = stage.row_space()
        for k in range(stage.count):
            U, sigma, W = self.directions(space.at(k))
            if not sigma.numel():
                continue
            j, loss = sigma.numel(), float(sigma[0] / sigma[-1])
            close(U.mT @ U, torch.eye(j, dtype=dtype).double(), dtype, loss)
            close(space.at(k).Qt(U[None])[0], torch.zeros(space.r, j, dtype=torch.float64), dtype, 1.0)
            acts = stage.at(k).Bt(U[None])[0]
            close(acts, (W * sigma).double(), dtype, loss * _size(case.blocks.B) * stage.p**0.5)

    # Every two of damping, state and delay meet.
    @pytest.mark.parametrize(
        ("damping", "before", "delayed"),
        [
            (DAMPINGS[0], True, True),
            (DAMPINGS[0], False, False),
            (DAMPINGS[1], True, False),
            (DAMPINGS[1], False, True),
        ],
        ids=["with state, delayed", "first, eliminated", "with state, eliminated", "first, delayed"],
    )
    def test_covariance(self, case: Case, dtype: torch.dtype, damping: float, before: bool, delayed: bool):
        stage, blocks = case.stage.to(dtype).at(0), case.blocks
        space = stage.row_space()
        U = self.directions(space)[0][:, :2] if delayed else None
        n, j = (stage.n_in if before else 0), 0 if U is None else U.shape[1]
        joint, together = _joint(space.r, n, j, U, dtype)

        # x = Q s + U c + Π(ξ/√ε − Bδ/ε), Π = I − QQᵀ − UUᵀ, written out.
        Q = self.basis(stage, space)[0]
        known = Q if U is None else torch.cat([Q, U.double()], 1)
        rest = torch.eye(stage.p, dtype=torch.float64) - known @ torch.linalg.pinv(known)
        map_ = torch.cat([Q, -rest @ blocks.B[0][:, :n] / damping, known[:, Q.shape[1] :]], 1)
        truth = map_ @ together @ map_.T + rest / damping
        scale = float((map_.abs() @ together.abs() @ map_.abs().T).max()) if truth.numel() else 0.0
        close(space.covariance(stage, joint, damping), truth, dtype, scale)
        close(space.covariance_diagonal(stage, joint, damping), truth.diagonal(), dtype, scale)

    def test_function_space_products(self, case: Case, dtype: torch.dtype):
        stage, G = case.stage.to(dtype).at(0), case.blocks.G[0]
        space = stage.row_space()
        generator = torch.Generator().manual_seed(6)
        for samples in {m for m in (1, max(1, stage.samples)) if stage.n_out % m == 0}:
            Y, A = draw(generator, stage.n_out, 2), symmetric(generator, 2 * samples, 2 * samples)
            rows = Y.view(samples, -1, 2)
            wide = torch.block_diag(*rows)
            seen = G.T @ wide
            scale = max(1, stage.p) * _size(seen) ** 2
            close(space.gram(Y.to(dtype), samples), seen.T @ seen, dtype, scale)
            ours = space.form_diagonal(stage, Y.to(dtype), samples, A.to(dtype))
            close(ours, (seen @ A @ seen.T).diagonal(), dtype, scale * _size(A) * 2 * samples)

    @staticmethod
    def basis(stage: Stage, space: RowSpace) -> Tensor:
        """Q in float64."""
        return space.Q(stage.eye(space.r)).double()

    @staticmethod
    def directions(space: RowSpace) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden directions U (p, j) of one stage, their couplings σ and the states w (n_in, j), but for those that are rounding."""
        N = space.hidden_coupling()[0]
        _, sigma, Wt = torch.linalg.svd(N, full_matrices=False)
        keep = sigma > 1e-3 * sigma.max() if sigma.numel() else sigma > 0
        W, sigma = Wt[keep].mT, sigma[keep]
        return space.hidden_directions((W / sigma)[None])[0], sigma, W


@cache
def _made(kind: type[StageConformance]) -> list[Case]:
    """A kind's cases, made once for all its tests."""
    return [make() for make in kind.cases.values()]


def _divisors(stage: Stage) -> list[int]:
    return [m for m in range(1, stage.samples + 1) if stage.samples % m == 0]


def _parts(stage: Stage) -> list[tuple[int, int, int]]:
    """(samples, start, stop): every way to cut the state, and of each the whole, the first and the last two parts."""
    return [
        (samples, start, stop)
        for samples in _divisors(stage)
        for start, stop in sorted({(0, samples), (0, 1), (max(0, samples - 2), samples)})
    ]


def _size(matrix: Tensor) -> float:
    return float(matrix.abs().max()) if matrix.numel() else 0.0


def _rounding(dtype: torch.dtype) -> float:
    """One rounding of a dtype in terms of float64's."""
    return torch.finfo(dtype).eps / torch.finfo(torch.float64).eps


def _assert_block_diagonal(block: Tensor, samples: int) -> None:
    K, rows, columns = block.shape
    cut = block.view(K, samples, rows // samples, samples, columns // samples).clone()
    cut.diagonal(dim1=1, dim2=3).zero_()
    assert not bool(cut.any())


def _joint(r: int, n: int, j: int, U: Tensor | None, dtype: torch.dtype) -> tuple[Joint, Tensor]:
    """Return a covariance of (s, δ, c), and the same in float64 in the order of [Q, B, U]."""
    size = r + n + j
    half = draw(torch.Generator().manual_seed(5), size + 2, size)
    together = half.T @ half
    sd, dd = together[:r, r:], together[r:, r:]
    turn = torch.linalg.qr(draw(torch.Generator().manual_seed(7), size + 2, size + 2)).Q
    left = (turn @ half)[:, :r].to(dtype)
    return Joint(left, left, sd.to(dtype), dd.to(dtype), U), together
