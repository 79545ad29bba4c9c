"""Compositions with SciPy's operators of array namespaces, which SciPy has from 1.18 on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from scipy.sparse.linalg import aslinearoperator

from linop_hess.operators import Operator
from tests.operators.test_operator import matrix

NAMESPACES = tuple(int(part) for part in scipy.__version__.split(".")[:2]) >= (1, 18)
needs_namespaces = pytest.mark.skipif(not NAMESPACES, reason=f"SciPy {scipy.__version__} has no array namespaces")


@pytest.mark.skipif(NAMESPACES, reason="SciPy has namespaces")
def test_earlier_scipys_have_no_namespaces():
    with pytest.raises(NotImplementedError, match=r"SciPy 1\.18"):
        matrix(3, 4).to_xp(torch)


def test_other_namespaces_are_refused():
    for xp in (os, torch.nn.functional, None):
        with pytest.raises(TypeError, match="NumPy or torch"):
            matrix(3, 4).to_xp(xp)


def test_operators_of_numpy_stay_scipys():
    A = matrix(3, 4)
    assert not isinstance(A + aslinearoperator(np.ones((3, 4))), Operator)
    product = A.rdot(aslinearoperator(np.ones((2, 3)))) @ np.ones(4)
    np.testing.assert_allclose(product, np.full(2, float(A.matrix.sum())), rtol=1e-14)


@needs_namespaces
def test_a_switch_that_is_off_is_told():
    if os.environ.get("SCIPY_ARRAY_API", "0") in ("", "0"):
        with pytest.raises(RuntimeError, match="SCIPY_ARRAY_API=1"):
            matrix(3, 4).to_xp(torch)


@needs_namespaces
def test_with_scipys_switch():
    """SCIPY_ARRAY_API is read when SciPy is imported, hence the process of its own."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    files = [str(here / "namespaces.py"), str(here / "test_operator.py")]
    environment = dict(os.environ, SCIPY_ARRAY_API="1")
    done = subprocess.run([*command, *files], env=environment, cwd=here.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
