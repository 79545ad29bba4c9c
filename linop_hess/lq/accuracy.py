"""Every tolerance of the package's linear algebra, named once, with the number that it protects.

Sizes are relative to ‖H‖ or max(‖H‖, |ε|) where nothing else is said.
"""

from __future__ import annotations

import numpy as np
import torch

# --- Solves ------------------------------------------------------------------------------------------------------------------

# Backward error that a solve must reach, by dtype: a few roundings of a sum over N terms.
BACKWARD_ERROR = {torch.float64: 1e-14, torch.float32: 1e-6}

# ‖H + εI‖‖x‖/‖g‖ is a lower bound of the condition number; above this, H + εI as a matrix is singular to double precision, and a
# solution is believed only where the blocks it is made of determine it, ...
SINGULAR_CONDITION = 0.25 / np.finfo(np.float64).eps
# ... which they do where rounding in them moves it by so much at most. Chains whose states grow have 1e-13, singular ones 1e-1 and more.
DETERMINED = 1e-6
# A solution that rounding in the blocks moves by this much or more is none, which is looked at from this condition on: rounding may make
# an eigenvalue of zero look as large as that.
UNDETERMINED = 0.1
NEARLY_SINGULAR = 1e-2 * SINGULAR_CONDITION
# Factors of the matrix itself see nothing of the blocks: their solutions are looked at from this condition on.
DENSE_CONDITION = 1e-4 * SINGULAR_CONDITION

# A step of refinement that does not halve the backward error is the last one: rounding has been reached.
STALLED = 0.5

# ‖H + εI‖ for a backward error, from below, is taken as found when two steps of power iteration have added no more than this each: an
# eigenvalue that is found too late makes backward errors look larger than they are.
NORM_SETTLED = 0.01

# Factors in single precision are tried for a float64 problem where |ε| is at least this part of ‖H‖: eigenvalues of H that are zero are
# rounding of size 1e-7‖H‖ in them, which GMRES cannot tell from ε below that.
SINGLE_DAMPING = 1e-6
# ‖H‖ within these bounds leaves entries of H, and their products, in the range of float32.
SINGLE_NORMS = (1e-12, 1e12)
# One GMRES with such factors ends where the residual is down to this part; its restart gains as much again.
REFINED_BY = 1e-7

# --- Blocks and ranks ------------------------------------------------------------------------------------------------------------

# Largest gap |A − Aᵀ| of a block that is given as symmetric, in terms of its largest entry: float32 input symmetrized by hand has 1e-7.
SYMMETRIC = 1e-5

# Singular values count towards a rank from this many times max(rows, columns)·eps of the largest on, LAPACK's bound on their errors.
RANK = 1.0

# Eigenvalues of a curvature computed in lower precision are rounding up to this many times size·eps of the largest; kept, they would make
# a semidefinite objective indefinite in float64.
ROUNDED = 1.0

# A linearization agrees with double backward where they differ, in each parameter, by at most so many times what an ulp in the parameters
# and an ulp of the whole product explain. Networks of 18 kinds came to 1.5 at most in both dtypes, a coupling of 4e-5 that was dropped in
# float32 to 119.
VERIFIED = 16.0

# Where they do not, so many runs with all intermediate results moved by an ulp, too, tell what rounding explains.
ROUNDINGS = 3

# Where differences of gradients are compared with, by so much relatively a backward pass may miss the derivative of its operation: some
# of torch's have constants in float32 whatever they compute in (hardsigmoid's 1/6 is off by 3e-8), and so no symmetric Hessian.
BACKWARD_CONSTANTS = 2.0**-24

# Where all cancels (softmax with equal adjoints) an operation's first derivatives are rounding, and so is the asymmetry of its second
# ones: up to this many eps of what is summed, the adjoints, it is no sign that autograd's derivatives are wrong.
CANCELLED = 100.0

# A dense Hessian is compared with a product on a random unit vector: it is right where they differ by so many eps of its norm.
ASSEMBLED = 1e4

# Rows of a Jacobian, added up with random weights, are the gradient of the same sum up to so much of the sum of their absolute values:
# sums in another order, through some layers.
ROWS_ADD_UP = {torch.float64: 1e-12, torch.float32: 1e-5}

# A loss computed twice at the same parameters by the same kernels differs by no more, relatively: on a graphics card some add up in an
# order that is not told, in float32 too.
LOSS_REPEATS = 1e-5

# Residuals of eigenpairs that a Lanczos run contributes; what is beyond is left to the next run.
LANCZOS_SHARP = 1e-9

# A loss is taken as convex in the outputs where its negative curvatures are at most so much of the largest: those of cross entropy cancel
# to p − p², and are rounding in these terms where all probabilities are near 0 and 1.
CONCAVE = 1e-3

# Controls reach the states after them, so that these stand for them in a band, where the matrix between has a condition number of this at
# most: the square of it is lost, and found again by refinement.
REACHED = 1e4

# --- Which pivots a solve may divide by ----------------------------------------------------------------------------------------

# Every stage has pivots of size ε (controls that its output hardly sees), so a pivot is small only where it is far below |ε|, and far
# below the largest of its stage too. Below SUSPECT·|ε| eigenvectors are taken, and those below DELAY·|ε| are delayed.
PIVOT_DELAY = 0.1
PIVOT_SUSPECT = 0.01
PIVOT_SMALL = 1e-4

# --- Sketches ----------------------------------------------------------------------------------------------------------------

# Eigenvalues of YᵀKY from this share of the largest on are kept: below, they are rounding in products of that precision.
SKETCH_KEPT = {torch.float64: 1e-13, torch.float32: 1e-6}
# Norm that is left of a block of vectors, orthogonalized against others, in terms of what it was: less is rounding, and no direction.
SKETCH_SPANNED = {torch.float64: 1e-12, torch.float32: 1e-5}

# A solve by iterating looks at the solution again when the residual has fallen by this, since what is reached by recurrence drifts.
RESTARTED = 1e-6

# --- What inertia, determinants and entries may lose -----------------------------------------------------------------------------

# What the division by a small pivot may add to the cost-to-go: rounding in it then moves eigenvalues by about 1e-13.
GROWTH = 300.0

# The same for the most careful diagonal of the inverse.
GROWTH_LITTLE = 0.1

# The same for the positive definite operator, with the largest multiplier of a pivot: what is larger makes that operator large, and
# MINRES loses digits with it.
GROWTH_MODERATE = 10.0
MULTIPLIER = 2.0

# The same for chunks that are eliminated side by side, where no pivot can be delayed: eigenvalues move by 1e-12.
GROWTH_PARALLEL = 5e3

# What the elimination of hidden controls, or of those that reach states, may add before a band LU is asked for a determinant: eigenvalues
# move by 1e-12.
GROWTH_DETERMINANT = 1e4

# Largest entry of the constraints, in which 1 is their unit, with which the pivots of a band LU are worth a determinant. Where a state
# hardly moves what comes after it (a norm of equal entries) units reach 1e17, solves stay right and determinants were 4 % off.
SPREAD_DETERMINANT = 1e8

# Below this |ε| rounding makes the signs of pivots uncertain that are ε by themselves.
SMALLEST_DAMPING = 1e-12

# Rounding in H may move an eigenvalue by this; the sign of one that is smaller is not told.
ROUNDED_EIGENVALUE = 1e-14

# A pivot below this counts as zero.
ZERO_PIVOT = 1e-15

# Below this the sign of a pivot may be rounding: it is delayed until no stage is left.
UNSURE_PIVOT = 1e-11

# Factors are believed where rounding in them moves eigenvalues by this at most.
CERTAIN = 1e-12

# A shift that is an eigenvalue to rounding is moved by this.
NUDGE = 1e-7

# Pivots are right although ‖H + εI‖ exceeds them by more than 1/eps where random errors in the blocks of this share of their size ...
BLOCKS_MOVED = 1e-9
# ... move each of them by no more than this share, a seventh of its digits being left so; pivots that are rounding move by 1e7, ...
PIVOTS_MOVED = 0.1
# ... and the logarithms of determinants by two eliminations differ by no more than this times √N.
DETERMINANTS_DIFFER = 1e-6
# A condition from which on this is looked at.
DETERMINED_CONDITION = 1e-3 * SINGULAR_CONDITION

# --- Entries of the inverse, compared with certified solves ------------------------------------------------------------------------

# Beyond so many times 1 + κ (κ estimated from below) entries are computed in a more careful way, ...
ENTRIES_ROUNDING = 1e-14
# ... beyond so many a RuntimeWarning tells, ...
ENTRIES_TOLD = 1e-12
# ... and beyond this part of the largest entry it is an error.
ENTRIES_WRONG = 1e-5

# The certified solves that entries are compared with need not be better than this where there are many parameters.
ENTRIES_SOLVED = 1e-12

# Curvature added to the end of what is eliminated from the first stage on, in terms of the largest entry of the cost-to-go after it: the
# first of them with which ρΣ stays below the limit. 1 % leaves the covariance its digits.
ADDED_CURVATURE = (1e-2, -1e-2, 3e-3, -3e-2)
ADDED_LIMIT = 100.0

# --- Steps in a trust region ----------------------------------------------------------------------------------------------------

# A condition of a certificate holds where it is broken by so much at most, relatively: solves within 1e-12‖H‖ of a singular matrix.
CONDITION_HOLDS = 1e-10
# Newton's method on the secular equation ends where the length is right to this; ...
SECULAR_LENGTH = 1e-12
# ... a step with an eigenvector added is taken where its backward error is at most this, with λ within about 1e-12‖H‖ of the edge.
HARD_CASE = 4e-12
# A step whose length is right to this is tried with an eigenvector, too: near a singular matrix Newton's method gets no closer.
SECULAR_NEAR = 1e-6
# A bracket narrower than this many times ‖H‖ + λ cannot be told apart further.
NARROW_BRACKET = 4e-16


def default_tolerance(dtype: torch.dtype) -> float:
    """Backward error a solve must reach: 1e-14 in float64, 1e-6 in float32."""
    return BACKWARD_ERROR[dtype]
