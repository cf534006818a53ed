"""Forked processes: torch and the kernels work in the child as they do in the parent.

OpenMP's threads do not follow through a fork. GNU's OpenMP, which torch uses on Linux, does not
notice: once it has started its threads, which loading a model is enough for, the child waits for
them for ever at its first operation on more than one thread. So they are ended before a fork, and
parent and child both start their own when they need them. Other OpenMP runtimes notice by
themselves. A process that does not fork, or forks only to execute another program (``subprocess``
without ``preexec_fn``), never comes here.
"""

import os
import sys

_GNU = "libgomp"
# What omp.h calls omp_pause_soft: the threads end, the settings stay.
_SOFT = 1
# Whether there were threads that could not be ended before the last fork.
_left = False


def _runtimes() -> set[str]:
    """The files of GNU's OpenMP in this process; packages besides torch may bring their own."""
    try:
        with open("/proc/self/maps", errors="surrogateescape") as maps:
            files = {line.split(maxsplit=5)[-1].rstrip("\n") for line in maps if _GNU in line}
    except OSError:  # not Linux, where OpenMP is another
        return set()
    return {file for file in files if os.path.basename(file).startswith(_GNU)}


def _end_threads() -> None:
    """End the OpenMP threads of this Python thread, which is the one that the child will have."""
    global _left
    _left = False
    for file in _runtimes():
        import ctypes

        try:
            runtime = ctypes.CDLL(file, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            refused = runtime.omp_pause_resource_all(_SOFT)
        except (OSError, AttributeError):  # older than OpenMP 5, or its file was replaced
            refused = True
        _left = _left or bool(refused)


def _in_child() -> None:
    """One thread needs none of those that were left."""
    if _left and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_threads, after_in_child=_in_child)
