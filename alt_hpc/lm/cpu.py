"""What makes models faster on CPUs; loading calls it, and nobody else knows."""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep the large blocks that torch frees.

    glibc gives them back to the system at once, and each operation's result then faults its
    pages in anew (see tests/benchmarks/results.md). Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
