"""Kinds of stage of a linear-quadratic problem, a kind a file: its products and its row space."""

from linop_hess.lq.stacked import Stacked
from linop_hess.lq.stages.affine import AffineStage
from linop_hess.lq.stages.base import SampleRows, Stage, common_samples
from linop_hess.lq.stages.convolution import Arrangement, ConvolutionStage
from linop_hess.lq.stages.dense import DenseStage
from linop_hess.lq.stages.diagonal import DiagonalStage
from linop_hess.lq.stages.embedding import EmbeddingStage
from linop_hess.lq.stages.injection import IdleStage, InitialStage, InjectionStage
from linop_hess.lq.stages.objective import ObjectiveStage
from linop_hess.lq.stages.penalized import CurvedStage, ScaledStage, scaled
from linop_hess.lq.stages.row_space import DenseRowSpace, IdentityRowSpace, Joint, RowSpace
from linop_hess.lq.stages.scale_shift import Features, ScaleShiftStage
from linop_hess.lq.stages.wired import WiredRowSpace, WiredStage
from linop_hess.lq.wiring import Wiring

__all__ = [
    "AffineStage",
    "Arrangement",
    "ConvolutionStage",
    "CurvedStage",
    "DenseRowSpace",
    "DenseStage",
    "DiagonalStage",
    "EmbeddingStage",
    "Features",
    "IdentityRowSpace",
    "IdleStage",
    "InitialStage",
    "InjectionStage",
    "Joint",
    "ObjectiveStage",
    "RowSpace",
    "SampleRows",
    "ScaleShiftStage",
    "ScaledStage",
    "Stacked",
    "Stage",
    "WiredRowSpace",
    "WiredStage",
    "Wiring",
    "common_samples",
    "scaled",
]
