"""How fast this machine is, measured once a process: what cost models multiply their counts with.

No figure of a machine is written down anywhere in the package: a model counts calls, flops and bytes, kernel by kernel, and this tells
what each of them takes here, at their size, in the precision and with the threads in use.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from scipy.linalg import lapack

# Orders at which kernels are timed; rates in between are interpolated, and beyond taken from the nearest.
_SIZES = {
    "gemm": (8, 32, 96, 288),
    "ldl": (8, 32, 96, 288, 1440),
    "cholesky": (96, 288, 720),
    "substitution": (8, 32, 96, 288),
    "lu": (8, 32, 96, 288),
}
# Half bandwidths, and flops of one timed factorization.
_BANDS = (4, 12, 40, 120, 260)
_BAND_FLOPS = 1e6
# Columns that LAPACK's sytrf works on at once.
_SYTRF_BLOCK = 64
# Arrays of so many bytes are the system's, which hands out their memory anew each time (glibc's largest threshold for that).
NEW_FROM = 33 << 20
# Numbers copied to time the memory.
_COPIED = 1 << 20
# Runs of one timing: these at least, and more, up to so many, where they take less than a millisecond together.
_REPEATS, _MOST, _LEAST = 2, 20, 1e-3
# Seconds that a clock of processor time must tell apart.
_FINE = 1e-6


@dataclass(frozen=True)
class Machine:
    """Seconds of what linear algebra is made of, on this machine.

    Attributes
    ----------
    call : float
        Of one small call of torch from Python.
    byte : float
        Of one byte read and written.
    new_byte : float
        Of one byte of memory that the system has to hand out, on top: of large arrays, which are given back at once.
    rates : dict of str to (sizes, seconds per flop)
        Of each kernel: "gemm", "ldl" (Bunch-Kaufman, n³/3 flops), "cholesky" (the same), "substitution" (triangular, n³), "lu" (2/3 n³),
        "band" (LU of half bandwidth n, 4 n² a row).
    """

    call: float
    byte: float
    new_byte: float
    rates: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]

    def seconds(self, kernel: str, flops: float, size: float) -> float:
        """Time of some flops of a kernel whose matrices are about `size` wide."""
        sizes, per_flop = self.rates[kernel]
        return flops * math.exp(float(np.interp(math.log(max(size, 1.0)), np.log(sizes), np.log(per_flop))))


def machine(dtype: torch.dtype) -> Machine:
    """The machine in a precision, with the threads that torch uses now; measured at the first call, in a few tenths of a second."""
    return _measured(dtype, torch.get_num_threads())


@cache
def _measured(dtype: torch.dtype, threads: int) -> Machine:
    with torch.no_grad(), torch.inference_mode(False):
        small = torch.ones(4, 4, dtype=dtype, device="cpu")
        call = _seconds(lambda: [torch.addmm(small, small, small) for _ in range(50)]) / 50
        long = torch.ones(_COPIED, dtype=dtype, device="cpu")
        to = long.clone()  # in memory that exists: what the system takes to hand out pages is not what is asked
        copied = [_seconds(lambda: to.copy_(long))]
        rates: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}
        for kernel, flops in _FLOPS.items():
            times = [_seconds(_run(kernel, n, dtype)) / flops(n) for n in _SIZES[kernel]]
            rates[kernel] = tuple(map(float, _SIZES[kernel])), tuple(times)
            copied.append(_seconds(lambda: to.copy_(long)))  # others use the memory for a while, and then do not
        rates["band"] = _bands(dtype)
    return Machine(call, min(copied) / (2 * _COPIED * dtype.itemsize), _new_byte(), rates)


@cache
def _new_byte() -> float:
    """Seconds of one byte of new memory, beyond what writing it takes."""
    old = torch.empty(NEW_FROM, dtype=torch.uint8, device="cpu")
    new = _seconds(lambda: torch.empty(NEW_FROM, dtype=torch.uint8, device="cpu").fill_(0))
    return max(0.0, new - _seconds(lambda: old.fill_(0))) / NEW_FROM


_FLOPS: dict[str, Callable[[float], float]] = {
    "gemm": lambda n: 2.0 * n**3,
    "ldl": lambda n: n**3 / 3.0,
    "cholesky": lambda n: n**3 / 3.0,
    "substitution": lambda n: 1.0 * n**3,
    "lu": lambda n: 2.0 / 3.0 * n**3,
}


def _run(kernel: str, n: int, dtype: torch.dtype) -> Callable[[], object]:
    """What to time of a kernel at order n."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    S = (A + A.mT) / math.sqrt(n)
    S.diagonal().add_(1.0)
    if kernel == "gemm":
        return lambda: A @ S
    if kernel == "ldl":
        sytrf = lapack.dsytrf if dtype == torch.float64 else lapack.ssytrf
        return lambda: sytrf(S.numpy().T, lower=1, lwork=_SYTRF_BLOCK * n)
    if kernel == "cholesky":
        S.diagonal().add_(3.0)  # definite: eigenvalues of the rest are within ±2√2
        potrf = lapack.dpotrf if dtype == torch.float64 else lapack.spotrf
        return lambda: potrf(S.numpy().T, lower=1)
    if kernel == "substitution":
        return lambda: torch.linalg.solve_triangular(S, A, upper=False, unitriangular=True)
    return lambda: torch.linalg.lu_factor_ex(S)


def _bands(dtype: torch.dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rate of LAPACK's band LU by half bandwidth."""
    numpy_dtype = np.float64 if dtype == torch.float64 else np.float32
    gbtrf = lapack.dgbtrf if dtype == torch.float64 else lapack.sgbtrf
    times = []
    for kl in _BANDS:
        rows = max(3 * kl, round(_BAND_FLOPS / (4 * kl**2)))
        band = np.zeros((3 * kl + 1, rows), dtype=numpy_dtype, order="F")
        band[kl:] = np.random.default_rng(0).standard_normal((2 * kl + 1, rows))
        times.append(_seconds(partial(gbtrf, band, kl, kl)) / (4.0 * rows * kl**2))
    return tuple(map(float, _BANDS)), tuple(times)


def _seconds(run: Callable[[], object]) -> float:
    """Least time of a few runs, the first of which warms up.

    What other processes take is no property of the machine. A long run is never spared them on a machine that others use, so that the
    processor time counts where it is less than the time that passes, which with several threads it is not.
    """
    times: list[float] = []
    fine = time.get_clock_info("process_time").resolution <= _FINE
    while len(times) < _REPEATS or (sum(times) < _LEAST and len(times) < _MOST):
        of_processor, start = time.process_time(), time.perf_counter()
        run()
        passed = time.perf_counter() - start
        times.append(min(passed, time.process_time() - of_processor) if fine else passed)
    return max(min(times), 1e-9)
