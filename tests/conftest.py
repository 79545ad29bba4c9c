import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for LAPACK, which reads it when NumPy is imported; torch: below

import pytest
import torch

# The repository root, so that `tests.helpers` is found however pytest is started.
sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.register_assert_rewrite("tests.operators.conformance", "tests.lq.stages.conformance")

# The tests' matrices are tiny: on a busy machine threads that wait for each other cost ten times the work.
torch.set_num_threads(1)
