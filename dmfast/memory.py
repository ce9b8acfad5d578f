# SPDX-License-Identifier: MIT
"""Keeping freed memory in the process.

Under glibc's defaults a large tensor is mapped when it is made and unmapped when it is freed, so
every iteration asks the kernel for the same gigabytes again, zeroed page by page. On a CPU that
takes a third to a half of the time of a condensing or training step made of torch's own layers.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3), from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4

_kept = False


def keep_freed_pages() -> bool:
    """Makes glibc's allocator keep what is freed, for the whole process and until it ends.

    The process grows to its peak and stays there; freed blocks that small live ones separate are
    not joined, so the peak can lie above that of the defaults.

    Returns:
        Whether the allocator took the settings; False, with nothing changed, where the C library
        is not glibc.
    """
    try:
        libc = ctypes.CDLL(None)
        _ = libc.gnu_get_libc_version  # a mallopt elsewhere need not mean the same
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    mallopt.restype = ctypes.c_int
    # The value is an int that glibc turns into a size_t: -1 is the largest size, "never". Older
    # versions refuse a threshold over 32 MiB; there, no mapping at all says the same.
    unmapped = mallopt(_M_MMAP_THRESHOLD, -1) or mallopt(_M_MMAP_MAX, 0)
    global _kept
    _kept = bool(unmapped and mallopt(_M_TRIM_THRESHOLD, -1))
    return _kept


def freed_pages_kept() -> bool:
    """Whether :func:`keep_freed_pages` has been called in this process, and did so."""
    return _kept
