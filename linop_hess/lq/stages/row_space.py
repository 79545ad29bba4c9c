"""The controls of a stage, split into those its output sees and those it does not.

With G = R Qᵀ, Q of r orthonormal columns, write x = Q s + x⊥. Where A = 0 the recursion sees x⊥ through B alone, so
x⊥ = (g⊥ − (I − QQᵀ) B δ)/ε is eliminated exactly and only s, of dimension r ≤ min(n_out, p), remains. Eliminating all of x
with the pivot A + εI instead would lose three digits for every decade of ε.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.stages.base import Stacked, Stages


@dataclass(frozen=True)
class Joint:
    """Covariance of the visible controls s of a segment and the state δ before it: blocks of (H + εI)⁻¹, seen from there."""

    left: Tensor  # X and Y of shape (k, r): that of s is XᵀY
    right: Tensor
    sd: Tensor  # (r, n_in)
    dd: Tensor  # (n_in, n_in)

    @property
    def ss(self) -> Tensor:
        """The block of s, (r, r)."""
        return self.left.mT @ self.right


@dataclass(frozen=True)
class RangeSplit(Stacked, ABC):
    """x = Q s + x⊥ for a stack of K stages, with G = R Qᵀ."""

    @property
    @abstractmethod
    def r(self) -> int:
        """Dimension of s."""

    @property
    @abstractmethod
    def complement(self) -> int:
        """Dimension of x⊥: p − r."""

    @property
    def coupled(self) -> bool:
        """Whether the state may act on x⊥."""
        return self.complement > 0

    def extended(self, stages: Stages) -> RangeSplit:
        """Return a split of the same stages whose x⊥ the state does not act on: what B sees of it belongs to s as well."""
        return self

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

    @abstractmethod
    def A_range(self) -> Tensor | None:
        """QᵀAQ, shape (K, r, r), or None where A = 0."""

    @abstractmethod
    def B_range(self) -> Tensor | None:
        """QᵀB, shape (K, r, n_in), or None where B = 0."""

    @abstractmethod
    def B_complement_gram(self) -> Tensor | None:
        """Bᵀ(I − QQᵀ)B, shape (K, n_in, n_in), or None where it is zero."""

    def gram(self, Y: Tensor, samples: int) -> Tensor:
        """YᵀGGᵀY of one stage, (M, M), the columns of Y (n_out, q) standing for `samples` times as many, M = samples · q.

        Row (b, j) of M is column j of Y with all but the rows of sample b zero.
        """
        seen = self.Rt(spread(Y, samples)[None])[0]
        return seen.mT @ seen

    def form_diagonal(self, stage: Stages, Y: Tensor, samples: int, A: Tensor) -> Tensor:
        """Diagonal of GᵀYAYᵀG of one stage, (p,), with Y as in `gram`."""
        X = stage.Gt(spread(Y, samples)[None])[0]
        return ((X @ A) * X).sum(1)

    def project_out(self, x: Tensor) -> Tensor:
        """(I − QQᵀ) x: (K, p, k) to (K, p, k)."""
        return x - self.Q(self.Qt(x))

    def covariance(self, stage: Stages, joint: Joint, damping: float) -> Tensor:
        """Covariance (p, p) of x = Q s + x⊥, x⊥ = ξ⊥/√ε − (I − QQᵀ)Bδ/ε, of one stage from that of (s, δ)."""
        map_, together = self._from(stage, joint, damping)
        out = map_ @ together @ map_.mT
        if self.complement:
            out += self.project_out(torch.eye(stage.p, dtype=out.dtype, device=out.device)[None])[0] / damping
        return out

    def covariance_diagonal(self, stage: Stages, joint: Joint, damping: float) -> Tensor:
        """Diagonal of `covariance`, (p,); no p × p block is formed."""
        map_, together = self._from(stage, joint, damping)
        out = ((map_ @ together) * map_).sum(1)
        if self.complement:
            out += (1.0 - map_[:, : self.r].square().sum(1)) / damping
        return out

    def _from(self, stage: Stages, joint: Joint, damping: float) -> tuple[Tensor, Tensor]:
        """[Q, −(I − QQᵀ)B/ε] of one stage and the covariance of (s, δ)."""
        map_ = self.Q(torch.eye(self.r, dtype=joint.sd.dtype, device=joint.sd.device)[None])[0]
        coupled = stage.dense_B() if joint.dd.numel() and self.complement and self.coupled else None
        if coupled is None:
            return map_, joint.ss
        map_ = torch.cat([map_, self.project_out(coupled)[0] / -damping], 1)
        return map_, torch.cat([torch.cat([joint.ss, joint.sd], 1), torch.cat([joint.sd.mT, joint.dd], 1)])


def spread(Y: Tensor, samples: int) -> Tensor:
    """Columns (n, q) standing for those of each sample, as (n, samples · q): column (b, j) is column j in the rows of sample b."""
    out = Y.new_zeros(samples, Y.shape[0] // samples, samples, Y.shape[1])
    out.diagonal(dim1=0, dim2=2).copy_(Y.reshape(samples, -1, Y.shape[1]).permute(1, 2, 0))
    return out.view(Y.shape[0], samples * Y.shape[1])


@dataclass(frozen=True)
class IdentitySplit(RangeSplit):
    """No split: s = x, Q = I, R = G. For stages with A ≠ 0, or with no more controls than outputs."""

    stages: Stages

    @property
    def r(self) -> int:
        return self.stages.p

    @property
    def complement(self) -> int:
        return 0

    def Q(self, s: Tensor) -> Tensor:
        return s

    def Qt(self, x: Tensor) -> Tensor:
        return x

    def R(self, s: Tensor) -> Tensor:
        return self.stages.G(s)

    def Rt(self, y: Tensor) -> Tensor:
        return self.stages.Gt(y)

    def A_range(self) -> Tensor | None:
        return self.stages.dense_A()

    def B_range(self) -> Tensor | None:
        return self.stages.dense_B()

    def B_complement_gram(self) -> Tensor | None:
        return None

    def project_out(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def covariance_diagonal(self, stage: Stages, joint: Joint, damping: float) -> Tensor:
        return (joint.left * joint.right).sum(0)


@dataclass(frozen=True)
class DenseSplit(RangeSplit):
    """Q and R as arrays, from a thin singular value decomposition of G."""

    basis: Tensor  # (K, p, r)
    image: Tensor  # (K, n_out, r)
    coupling: Tensor | None  # B, (K, p, n_in)

    @property
    def r(self) -> int:
        return self.basis.shape[2]

    @property
    def complement(self) -> int:
        return self.basis.shape[1] - self.basis.shape[2]

    def Q(self, s: Tensor) -> Tensor:
        return self.basis @ s

    def Qt(self, x: Tensor) -> Tensor:
        return self.basis.mT @ x

    @property
    def coupled(self) -> bool:
        return self.coupling is not None and self.complement > 0

    def extended(self, stages: Stages) -> RangeSplit:
        if not self.coupled or self.coupling is None:
            return self
        whole, _ = torch.linalg.qr(torch.cat([self.basis, self.project_out(self.coupling)], 2))
        basis = torch.cat([self.basis, whole[:, :, self.r :]], 2)
        blank = self.image.new_zeros(*self.image.shape[:2], basis.shape[2] - self.r)
        return FullSplit(basis, torch.cat([self.image, blank], 2), self.coupling)

    def R(self, s: Tensor) -> Tensor:
        return self.image @ s

    def Rt(self, y: Tensor) -> Tensor:
        return self.image.mT @ y

    def A_range(self) -> Tensor | None:
        return None

    def B_range(self) -> Tensor | None:
        return None if self.coupling is None else self.basis.mT @ self.coupling

    def B_complement_gram(self) -> Tensor | None:
        if self.coupling is None:
            return None
        rest = self.project_out(self.coupling)
        return rest.mT @ rest


@dataclass(frozen=True)
class FullSplit(DenseSplit):
    """A dense split that has the range of B in Q as well."""

    @property
    def coupled(self) -> bool:
        return False

    def B_complement_gram(self) -> Tensor | None:
        return None


def dense_range_split(stages: Stages) -> RangeSplit:
    """Split by a thin SVD of the dense G where that pays: A = 0 and more controls than outputs."""
    if stages.p <= stages.n_out or stages.dense_A() is not None:
        return IdentitySplit(stages)
    G = stages.dense_G()
    basis = row_space(G)
    return DenseSplit(basis, G @ basis, stages.dense_B())


def row_space(rows: Tensor) -> Tensor:
    """Orthonormal basis of the row spaces of (K, b, c), as (K, c, rank), the rank being the largest of the K.

    Rows are brought to one size first, so that small ones lie in it to as many digits as large ones.
    """
    size = rows.norm(dim=2, keepdim=True)
    unit = torch.exp2(torch.where(size > 0.0, size, 1.0).log2().round())
    _, sigma, Vt = torch.linalg.svd(rows / unit, full_matrices=False)
    cutoff = sigma[:, :1] * (max(rows.shape[1:]) * torch.finfo(rows.dtype).eps)
    rank = max(1, int((sigma > cutoff).sum(1).max()))
    return Vt[:, :rank].mT.contiguous()
