"""Keeping freed memory in the process, on Linux with glibc.

By default glibc gives large blocks back to the system as soon as they are freed, and the next
activation of the same size is made of fresh pages again, each of which costs a page fault. On
tensors of a few megabytes that can take ten times as long as the kernel that fills them
(benchmarks/NOTES.md has the figures). It holds for any CPU code, torch's own included.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# glibc refuses more for the second; larger blocks are mapped anew every time.
_LARGEST_THRESHOLD = 32 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory instead of giving it back, for the rest of the process.

    The ``bertfast`` command and the benchmarks do this; importing the package does not, because a
    library has no business with its host's allocator. The environment variables
    ``MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=33554432`` do the same from outside.

    Returns:
        Whether it was done; False where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = mallopt(_M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))
    return bool(kept and mallopt(_M_MMAP_THRESHOLD, ctypes.c_int(_LARGEST_THRESHOLD)))
