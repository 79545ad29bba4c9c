"""Eigenvalues of a chain's Hessian, near any shift and as an exact histogram, their numbers verified by inertia."""

from linop_hess.spectrum.density import Density, density
from linop_hess.spectrum.eigenpairs import eigsh
from linop_hess.spectrum.pairs import Eigenpairs

__all__ = ["Density", "Eigenpairs", "density", "eigsh"]
