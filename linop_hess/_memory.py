"""How much memory there is, asked before it is taken."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

# Arrays from this size on come from NumPy, whose memory is in huge pages: new memory of torch's, in small ones, takes four times as long.
_HUGE = 4 << 20


def available_bytes() -> int:
    """Bytes this process can still have without swapping: what the machine has left, and its container's limit."""
    return min(_machine(), _container())


def _machine() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 1 << 62


def _container() -> int:
    """Room below the limit of the control group (version 2) that this process runs in."""
    folder, limit = _limited_group()
    if folder is None:
        return 1 << 62
    try:
        used = int((folder / "memory.current").read_text())
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        reclaimable = next((int(value) for key, value in lines if key == "inactive_file"), 0)
    except (OSError, ValueError):
        return 1 << 62
    return max(limit - used + reclaimable, 0)


@cache
def _limited_group() -> tuple[Path | None, int]:
    """The control group's folder and its limit in bytes; None where there is no limit."""
    try:
        own = next(line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::")
        folder = Path("/sys/fs/cgroup") / own.lstrip("/")
        folder = folder if (folder / "memory.max").exists() else Path("/sys/fs/cgroup")
        return folder, int((folder / "memory.max").read_text())  # "max" is no number: no limit
    except (OSError, ValueError, StopIteration):
        return None, 0


def available_on(device: torch.device) -> int:
    """Bytes that tensors on a device can still take: `available_bytes`, or what a graphics card has left."""
    if device.type != "cuda":
        return available_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Return memory that is not written yet, of the dtype and on the device of a tensor."""
    if is_huge(shape, like):
        return torch.from_numpy(np.empty(tuple(shape), _numpy_dtype(like)))
    return like.new_empty(tuple(shape))


def zeros(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Return zeros of the dtype and on the device of a tensor."""
    if is_huge(shape, like):
        return torch.from_numpy(np.zeros(tuple(shape), _numpy_dtype(like)))
    return like.new_zeros(tuple(shape))


def is_huge(shape: Sequence[int], like: torch.Tensor) -> bool:
    """Tell whether new memory like a tensor's is better NumPy's."""
    return like.device.type == "cpu" and math.prod(shape) * like.element_size() >= _HUGE


def _numpy_dtype(like: torch.Tensor) -> np.dtype:
    return np.dtype(str(like.dtype).removeprefix("torch."))


def format_bytes(count: float) -> str:
    """Return a number of bytes in words, as ``"512 B"`` or ``"3.42 MiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


# So little is there wherever anything runs; to ask how much takes the time of dozens of calls of torch.
_LITTLE = 1 << 14


def require_on(device: torch.device, nbytes: float, what: str) -> None:
    """Raise unless tensors on a device can take `nbytes` more, where that is more than a little.

    Parameters
    ----------
    device : torch.device
    nbytes : float
        The estimate.
    what : str
        What needs it, for the message.

    Raises
    ------
    MemoryError
        With the estimate and what is available; nothing has been allocated.
    """
    if nbytes > _LITTLE:
        require(nbytes, what, available_on(device))


def require(nbytes: float, what: str, available: int | None = None) -> None:
    """Raise unless `nbytes` more can be allocated.

    Parameters
    ----------
    nbytes : float
        The estimate.
    what : str
        What needs it, for the message.
    available : int, optional
        What there is, if that is known already.

    Raises
    ------
    MemoryError
        With the estimate and what is available; nothing has been allocated.
    """
    if available is None:
        available = available_bytes()
    if nbytes > available:
        raise MemoryError(
            f"{what} needs about {format_bytes(nbytes)}, but only {format_bytes(available)} is available: "
            "choose another method, or a smaller batch or model"
        )
