"""How much memory a call takes at its peak, measured in a process of its own.

``measure`` starts the process; there, the system's high-water mark of resident memory is reset
before the call and read after it. Only Linux has such a mark: elsewhere, nothing is measured. The
allocator is left as it is by default (the timings tell it to keep freed memory).
"""

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def _resident(mark: str) -> int:
    (kilobytes,) = re.findall(rf"{mark}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def peak_growth(call: Callable[[], Any]) -> tuple[int, Any] | None:
    """By how many bytes the process grew at most during the call, and what it returned; None where
    the system does not say."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)  # else the call would find memory that is free, but still resident
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except OSError:
        return None
    returned = call()
    return _resident("VmHWM") - before, returned


def _bytes_of(returned: Any) -> int:
    tensors: Iterable[Any] = returned if isinstance(returned, tuple) else (returned,)
    return sum(tensor.nbytes for tensor in tensors)


def measure(
    module: str, implementation: str, direction: str, dtype: str, **parameters: Any
) -> dict[str, int]:
    """The peak of one call of ``module.subject(**parameters)``, beyond its inputs.

    A smaller call comes first, of what ``module.SMALL`` replaces in the parameters: what libraries
    set up once and keep is not the call's.

    Returns:
        ``peak_bytes`` and, as a part of it, ``returned_bytes``: the outputs or the gradients, which
        no implementation can do without. Nothing where the system does not say.
    """
    request = json.dumps([module, implementation, direction, dtype, parameters])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    # The very bertfast that is imported here.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-P", __file__, request],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure_here(
    module: str, implementation: str, direction: str, dtype: str, parameters: dict[str, Any]
) -> dict[str, int]:
    # Last on the path, so that the folder's bertfast does not stand in for an installed one.
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    benchmark = importlib.import_module(f"benchmarks.{module}")
    small = {name: benchmark.SMALL.get(name, value) for name, value in parameters.items()}
    benchmark.subject(**small).call(implementation, direction, dtype)()
    found = peak_growth(benchmark.subject(**parameters).call(implementation, direction, dtype))
    if found is None:
        return {}
    peak, returned = found
    return {"peak_bytes": peak, "returned_bytes": _bytes_of(returned)}


if __name__ == "__main__":
    print(json.dumps(_measure_here(*json.loads(sys.argv[1]))))
