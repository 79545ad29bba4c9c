"""How much memory there is, asked before it is taken."""

from __future__ import annotations

import os


def available_bytes() -> int:
    """Bytes this machine can still give, without swapping."""
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


def require(nbytes: float, what: str) -> None:
    """Raise unless `nbytes` more can be allocated.

    Parameters
    ----------
    nbytes : float
        The estimate.
    what : str
        What needs it, for the message.

    Raises
    ------
    MemoryError
        With the estimate and what is available; nothing has been allocated.
    """
    available = available_bytes()
    if nbytes > available:
        raise MemoryError(
            f"{what} needs about {nbytes / 2**30:.3g} GiB, but only {available / 2**30:.3g} GiB is available; "
            "choose another method, or a smaller batch or model"
        )
