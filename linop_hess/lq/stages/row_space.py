"""The controls of a stage, split into those its output sees and those it does not.

With G = R Qᵀ, Q of r orthonormal columns, write x = Q s + x⊥. Where A = 0 the recursion sees the hidden controls x⊥ through B alone, so
x⊥ = (g⊥ − (I − QQᵀ) B δ)/ε is eliminated exactly and only s, of dimension r ≤ min(n_out, p), remains. Eliminating all of x with the
pivot A + εI instead would lose three digits for every decade of ε.

What that leaves in the cost-to-go is −NᵀN/ε, N a factor of Bᵀ(I − QQᵀ)B. With N = Σ_i u_i σ_i w_iᵀ, the orthonormal hidden directions
(I − QQᵀ)B w_i/σ_i are those the state acts on, by σ_i w_i; where σ_i²/ε is too large they are delayed like any pivot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from linop_hess.lq.accuracy import RANK
from linop_hess.lq.stacked import Stacked


class Controlled(Protocol):
    """What a row space asks of its stages; see `lq.stages.base.Stage`."""

    @property
    def p(self) -> int: ...
    @property
    def n_in(self) -> int: ...
    @property
    def n_out(self) -> int: ...
    @property
    def nonzero(self) -> frozenset[str]: ...
    def G(self, x: Tensor) -> Tensor: ...
    def Gt(self, y: Tensor) -> Tensor: ...
    def dense_G(self) -> Tensor: ...
    def dense_A(self) -> Tensor: ...
    def dense_B(self) -> Tensor: ...


@dataclass(frozen=True)
class Joint:
    """Covariance of what is left of a segment: its visible controls s, the state δ before it, and delayed hidden directions c.

    These are blocks of (H + εI)⁻¹, seen from there. With U the directions of c,
    x = Q s + U c + (I − QQᵀ − UUᵀ)(ξ/√ε − B δ/ε), ξ being white.
    """

    left: Tensor  # X and Y of shape (k, r): that of s is XᵀY
    right: Tensor
    sd: Tensor  # of s and (δ, c), (r, n_in + j)
    dd: Tensor  # of (δ, c), (n_in + j, n_in + j); n_in may be 0, where no state comes before
    directions: Tensor | None = None  # U, (p, j), orthonormal, orthogonal to Q; None: j = 0

    @property
    def ss(self) -> Tensor:
        """The block of s, (r, r)."""
        return self.left.mT @ self.right

    @property
    def state_size(self) -> int:
        """Size of δ."""
        return self.dd.shape[0] - (0 if self.directions is None else self.directions.shape[1])


@dataclass(frozen=True)
class RowSpace(Stacked, ABC):
    """x = Q s + x⊥ for a stack of K stages, with G = R Qᵀ.

    Parameters
    ----------
    curved_by : Tensor or None, shape (K, p)
        The diagonal of A where that is one: zero but on controls each of which is a column of Q, so that none is hidden. None: A = 0, or
        a kind of row space knows it.
    """

    curved_by: Tensor | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def r(self) -> int:
        """Dimension of s."""

    @property
    @abstractmethod
    def hidden(self) -> int:
        """Dimension of x⊥: p − r."""

    @property
    @abstractmethod
    def coupled(self) -> bool:
        """Whether the state may act on the hidden controls: B ≠ 0 there."""

    @abstractmethod
    def Q(self, s: Tensor) -> Tensor:
        """Q s: (K, r, k) to (K, p, k)."""

    @abstractmethod
    def Qt(self, x: Tensor) -> Tensor:
        """Qᵀ x: (K, p, k) to (K, r, k)."""

    @abstractmethod
    def R(self, s: Tensor) -> Tensor:
        """R s: (K, r, k) to (K, n_out, k)."""

    @abstractmethod
    def Rt(self, y: Tensor) -> Tensor:
        """Rᵀ y: (K, n_out, k) to (K, r, k)."""

    def QtAQ(self) -> Tensor:
        """QᵀAQ, shape (K, r, r); zero but where A acts on visible controls alone."""
        if self.curved_by is not None:
            return torch.diag_embed(self.Qt(self.curved_by[..., None])[..., 0])
        return torch.zeros(self.count, self.r, self.r, dtype=self.dtype, device=self.device)

    @abstractmethod
    def QtB(self) -> Tensor:
        """QᵀB, shape (K, r, n_in)."""

    @abstractmethod
    def hidden_coupling(self) -> Tensor:
        """N of shape (K, m, n_in) with NᵀN = Bᵀ(I − QQᵀ)B, no larger than it must be; m = 0 where the state does not act on x⊥.

        It comes from an orthogonal factorization, not from the Gram matrix, whose small eigenvalues have lost half the digits.
        """

    @abstractmethod
    def hidden_directions(self, W: Tensor) -> Tensor:
        """(I − QQᵀ) B W: (K, n_in, j) to (K, p, j), orthogonal to Q to rounding in each column.

        For W the right singular vectors w_i/σ_i of N the columns are orthonormal, to about eps·‖N‖/σ_i, and BᵀU has the columns σ_i w_i.
        """

    def hidden_gram(self) -> Tensor:
        """NᵀN = Bᵀ(I − QQᵀ)B, shape (K, n_in, n_in)."""
        N = self.hidden_coupling()
        return N.mT @ N

    def project_out(self, x: Tensor) -> Tensor:
        """(I − QQᵀ) x: (K, p, k) to (K, p, k)."""
        return x - self.Q(self.Qt(x)) if self.hidden else torch.zeros_like(x)

    def project_out_twice(self, x: Tensor) -> Tensor:
        """Project out, exactly even where little of x is left and the rounding of the first pass is not small in terms of that."""
        return self.project_out(self.project_out(x))

    def gram(self, Y: Tensor, samples: int) -> Tensor:
        """YᵀGGᵀY of one stage, (M, M), the columns of Y (n_out, q) standing for `samples` times as many, M = samples · q.

        Row (b, j) of M is column j of Y with all but the rows of sample b zero.
        """
        seen = self.Rt(spread(Y, samples)[None])[0]
        return seen.mT @ seen

    def form_diagonal(self, stage: Controlled, Y: Tensor, samples: int, A: Tensor) -> Tensor:
        """Diagonal of GᵀYAYᵀG of one stage, (p,), with Y as in `gram`."""
        X = stage.Gt(spread(Y, samples)[None])[0]
        return ((X @ A) * X).sum(1)

    def covariance(self, stage: Controlled, joint: Joint, damping: float) -> Tensor:
        """Covariance (p, p) of x of one stage from that of (s, δ, c); see `Joint`."""
        map_, together = self._from(stage, joint, damping)
        out = map_ @ together @ map_.mT
        if self.hidden:
            out += self.project_out(torch.eye(stage.p, dtype=out.dtype, device=out.device)[None])[0] / damping
            if joint.directions is not None:
                out -= joint.directions @ joint.directions.mT / damping
        return out

    def covariance_diagonal(self, stage: Controlled, joint: Joint, damping: float) -> Tensor:
        """Diagonal of `covariance`, (p,); no p × p block is formed."""
        map_, together = self._from(stage, joint, damping)
        out = ((map_ @ together) * map_).sum(1)
        if self.hidden:
            seen = map_[:, : self.r].square().sum(1)
            if joint.directions is not None:
                seen = seen + joint.directions.square().sum(1)
            out += (1.0 - seen) / damping
        return out

    def _from(self, stage: Controlled, joint: Joint, damping: float) -> tuple[Tensor, Tensor]:
        """[Q, −(I − QQᵀ − UUᵀ)B/ε, U] of one stage and the covariance of (s, δ, c), δ left out where it does not act on x⊥."""
        # The state acts on x⊥ by all of (I − QQᵀ)B, but directions of c are unknowns of their own, so theirs is projected out.
        U, n = joint.directions, joint.state_size
        parts = [self.Q(torch.eye(self.r, dtype=joint.sd.dtype, device=joint.sd.device)[None])[0]]
        sd, dd = joint.sd[:, n:], joint.dd[n:, n:]
        if n and self.coupled:
            acts = self.project_out(stage.dense_B())[0]
            if U is not None:
                acts = acts - U @ (U.mT @ acts)
            parts.append(acts / -damping)
            sd, dd = joint.sd, joint.dd
        if U is not None:
            parts.append(U)
        together = torch.cat([torch.cat([joint.ss, sd], 1), torch.cat([sd.mT, dd], 1)])
        return torch.cat(parts, 1), together


def spread(Y: Tensor, samples: int) -> Tensor:
    """Columns (n, q) standing for those of each sample, as (n, samples · q): column (b, j) is column j in the rows of sample b."""
    out = Y.new_zeros(samples, Y.shape[0] // samples, samples, Y.shape[1])
    out.diagonal(dim1=0, dim2=2).copy_(Y.reshape(samples, -1, Y.shape[1]).permute(1, 2, 0))
    return out.view(Y.shape[0], samples * Y.shape[1])


@dataclass(frozen=True)
class IdentityRowSpace(RowSpace):
    """All controls are visible: s = x, Q = I, R = G. For stages with A ≠ 0, or with no more controls than outputs.

    Parameters
    ----------
    stage : Stage
        The stages themselves; nothing is computed.
    """

    stage: Controlled

    @property
    def r(self) -> int:
        return self.stage.p

    @property
    def hidden(self) -> int:
        return 0

    @property
    def coupled(self) -> bool:
        return False

    def Q(self, s: Tensor) -> Tensor:
        return s

    def Qt(self, x: Tensor) -> Tensor:
        return x

    def R(self, s: Tensor) -> Tensor:
        return self.stage.G(s)

    def Rt(self, y: Tensor) -> Tensor:
        return self.stage.Gt(y)

    def QtAQ(self) -> Tensor:
        return self.stage.dense_A()

    def QtB(self) -> Tensor:
        return self.stage.dense_B()

    def hidden_coupling(self) -> Tensor:
        return torch.zeros(self.count, 0, self.stage.n_in, dtype=self.dtype, device=self.device)

    def hidden_directions(self, W: Tensor) -> Tensor:
        return W.new_zeros(self.count, self.r, W.shape[-1])

    def covariance_diagonal(self, stage: Controlled, joint: Joint, damping: float) -> Tensor:
        return (joint.left * joint.right).sum(0)


@dataclass(frozen=True)
class DenseRowSpace(RowSpace):
    """Q and R as arrays, for stages with A = 0.

    Parameters
    ----------
    basis : Tensor, shape (K, p, r)
        Q.
    image : Tensor, shape (K, n_out, r)
        R.
    B : Tensor, shape (K, p, n_in)
    curved : bool
        Whether B may differ from zero.
    """

    basis: Tensor
    image: Tensor
    B: Tensor
    curved: bool

    @property
    def r(self) -> int:
        return self.basis.shape[2]

    @property
    def hidden(self) -> int:
        return self.basis.shape[1] - self.basis.shape[2]

    @property
    def coupled(self) -> bool:
        return self.curved and self.hidden > 0

    def Q(self, s: Tensor) -> Tensor:
        return self.basis @ s

    def Qt(self, x: Tensor) -> Tensor:
        return self.basis.mT @ x

    def R(self, s: Tensor) -> Tensor:
        return self.image @ s

    def Rt(self, y: Tensor) -> Tensor:
        return self.image.mT @ y

    def QtB(self) -> Tensor:
        return self.basis.mT @ self.B

    def hidden_coupling(self) -> Tensor:
        if not self.coupled:
            return self.B[:, :0]
        if self.hidden < self.B.shape[2]:
            return orthogonal_complement(self.basis).mT @ self.B
        return torch.linalg.qr(self.project_out(self.B), mode="r").R

    def hidden_gram(self) -> Tensor:
        hidden = self.project_out(self.B)
        return hidden.mT @ hidden

    def hidden_directions(self, W: Tensor) -> Tensor:
        return self.project_out_twice(self.B @ W)


def generic_row_space(stage: Controlled) -> RowSpace:
    """Row space by a thin SVD of the dense G where that pays: A = 0 and more controls than outputs."""
    if stage.p <= stage.n_out or "A" in stage.nonzero:
        return IdentityRowSpace(stage)
    G = stage.dense_G()
    basis = row_basis(G)
    return DenseRowSpace(basis, G @ basis, stage.dense_B(), "B" in stage.nonzero)


def showing_row_space(stage: Controlled, curved_by: Tensor) -> RowSpace:
    """Row space by thin SVD for A = diag(curved_by), (K, p): controls where that is not zero are columns of Q, beside those of the rest."""
    G = stage.dense_G()
    shown = (curved_by != 0.0).any(0)
    K, p = curved_by.shape
    columns = torch.eye(p, dtype=G.dtype, device=G.device)[:, shown].expand(K, p, -1)
    if stage.n_out:
        columns = torch.cat([columns, row_basis(torch.where(shown, 0.0, G))], 2)
    return DenseRowSpace(columns, G @ columns, stage.dense_B(), "B" in stage.nonzero, curved_by=curved_by)


def row_basis(rows: Tensor) -> Tensor:
    """Orthonormal basis of the row spaces of (K, b, c), as (K, c, rank), the rank being the largest of the K, at least 1.

    Rows are brought to one size first, so that small ones lie in it to as many digits as large ones.
    """
    size = rows.norm(dim=2, keepdim=True)
    unit = torch.exp2(torch.where(size > 0.0, size, 1.0).log2().round())
    _, sigma, Vt = torch.linalg.svd(rows / unit, full_matrices=False)
    cutoff = sigma[:, :1] * (RANK * max(rows.shape[1:]) * torch.finfo(rows.dtype).eps)
    rank = max(1, int((sigma > cutoff).sum(1).max()))
    return Vt[:, :rank].mT.contiguous()


def rows_split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Q_w of shape (K, c, rank) and ρ of shape (K, b, rank) with Z̃ = ρ Q_wᵀ, for the rows Z̃ of shape (K, b, c)."""
    b, c = rows.shape[1:]
    if b >= c:
        return torch.eye(c, dtype=rows.dtype, device=rows.device).expand(rows.shape[0], c, c), rows
    if b > 1:
        basis = row_basis(rows)
        return basis, rows @ basis
    # One row is its own basis; of a row of zeros any unit vector is.
    norm = rows.norm(dim=2, keepdim=True)
    first = torch.eye(1, c, dtype=rows.dtype, device=rows.device)
    return torch.where(norm > 0.0, rows / torch.where(norm > 0.0, norm, 1.0), first).mT, norm


def orthogonal_complement(basis: Tensor) -> Tensor:
    """Orthonormal basis of what is orthogonal to the columns of (K, c, r), themselves orthonormal: (K, c, c − r)."""
    return torch.linalg.qr(basis, mode="complete").Q[:, :, basis.shape[2] :]
