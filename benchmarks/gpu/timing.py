"""Times on a GPU: CUDA events, a cold L2 cache, implementations in turns.

The host is kept ahead of the device: each call is queued behind a wait, so that its launches are
not what is timed. How long they take the host is timed apart (:func:`overhead`).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bertfast.backends import ON_GPU, kernel

from ..kernels import Subject
from .place import Place

Result = dict[str, Any]
_CYCLES_PER_SECOND = 2e9  # of a wait, at the most
_FLUSHED = 1 << 28  # bytes, several times any L2 cache


@dataclass(frozen=True)
class OnGpu:
    """One thing to time on a GPU.

    Attributes:
        subject, direction, dtype: as on the CPU; ``"training forward"`` keeps what backward needs.
        work: ``bytes`` that must at least be read and written, ``flops``, or both.
        length: by which a winner is chosen, as :func:`bertfast.backends.choose` takes it.
        target: the share of the measured ceiling that each of our backends is to reach: of the
            lower one, where there is work of both kinds.
        ahead: by our backend, how many times as long each of these peers is to take.
        memory: the share of each of these peers' working memory that ours may take.
        tiles: the names of the tiles ``benchmarks/tune.py`` may choose for it.
    """

    subject: Subject
    direction: str
    dtype: str
    work: dict[str, int]
    length: int
    target: dict[str, float] = field(default_factory=dict)
    tiles: tuple[str, ...] = ()
    peers: tuple[str, ...] = ("eager", "compile")
    ahead: dict[str, dict[str, float]] = field(
        default_factory=lambda: {backend: {"compile": 1.0} for backend in ON_GPU}
    )
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.direction} {self.subject.case.name} {self.dtype}"


def in_turns(
    calls: dict[str, Callable[[], Any]], rounds: int = 30, warmup: int = 3
) -> dict[str, float]:
    """The median seconds of each call on the device."""
    # Read, not written, between calls: written lines would be carried out during the next call.
    cold = torch.empty(_FLUSHED // 4, dtype=torch.float32, device="cuda").zero_()
    cycles = {}
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        # Twice what the host takes to launch it, or a millisecond.
        seconds = max(2 * (time.perf_counter() - start), 1e-3)
        cycles[name] = int(seconds * _CYCLES_PER_SECOND)
        torch.cuda.synchronize()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles[name])
            cold.sum()
            start.record()
            call()
            stop.record()
            events[name].append((start, stop))
        torch.cuda.synchronize()
    return {
        name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3
        for name, pairs in events.items()
    }


def working_bytes(call: Callable[[], Any]) -> int:
    """The most memory a call takes at a time beyond what is there before and what it returns."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = call()
    returned = sum(x.nbytes for x in (made if isinstance(made, tuple) else (made,)))
    return torch.cuda.max_memory_allocated() - before - returned


def bench(place: Place, word: str, entry: OnGpu) -> Result:
    """Our backends and the peers in turns, those whose gate is green at this very size."""
    subject, dtype = entry.subject, entry.dtype
    gates = {}
    for backend in place.backends(word):
        if not place.supports(word, backend, dtype):
            continue
        try:
            subject.run_gate(dtype, backend, place.device)
            gates[backend] = ""
        except AssertionError as error:
            gates[backend] = str(error).partition("\n")[0] or "too large an error"
    green = [backend for backend, failure in gates.items() if not failure]
    calls = {name: subject.call(name, entry.direction, dtype, place.device) for name in green}
    failed = {}
    for name in entry.peers:
        # A peer that does not run here is no fault of ours.
        try:
            call = subject.call(name, entry.direction, dtype, place.device)
            call()
            calls[name] = call
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    result: Result = {
        "green": bool(green) and len(green) == len(gates),
        "red": {backend: failure for backend, failure in gates.items() if failure},
        "peers_that_failed": failed,
        "dtype": dtype,
        "direction": entry.direction,
        "case": subject.case.name,
        "work": entry.work,
        "length": entry.length,
        "target": entry.target,
        "ahead": entry.ahead,
        "memory": entry.memory,
    }
    try:
        if place.dry:
            for call in calls.values():
                call()
        else:
            result["seconds"] = in_turns(calls)
            result["working_bytes"] = {name: working_bytes(call) for name, call in calls.items()}
    finally:
        torch.compiler.reset()
    return result


def ceilings(place: Place) -> Result:
    """What copying and a large product reach on this device, in this process."""
    size, n = (1 << 16, 64) if place.dry else (1 << 29, 8192)
    source = torch.randn(size, dtype=torch.bfloat16, device=place.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=place.device) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}
    result: Result = {"green": True, "bytes": 2 * source.nbytes, "flops": 2 * n**3}
    if place.dry:
        for call in calls.values():
            call()
    else:
        result["seconds"] = in_turns(calls)
    return result


def overhead(place: Place, word: str, subject: Subject) -> Result:
    """Host microseconds of a call with little to compute: of the launcher alone, of the op with and
    without gradients, and of what a user would write in eager torch."""
    ours = {name: place.precision(word, name) for name in place.backends(word)}
    host = {}
    for name, dtype in ours.items():
        call = subject.call(name, "forward", dtype, place.device)
        host[f"{name} launcher"] = _host_time(launcher(word, name, call), place)
    for mode, direction in (("inference", "forward"), ("grad", "training forward")):
        for name, dtype in {**ours, "eager": next(iter(ours.values()))}.items():
            call = subject.call(name, direction, dtype, place.device)
            host[f"{name} {mode}"] = _host_time(call, place)
    return {"green": True} if place.dry else {"green": True, "host_us": host}


def launcher(word: str, backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """What ``call`` hands to the backend's forward, as a call of its own."""
    module = kernel(word, backend)
    forward, handed = module.forward, []

    def keep(*arguments: Any) -> Any:
        handed.append(arguments)
        return forward(*arguments)

    module.forward = keep
    try:
        call()
    finally:
        module.forward = forward
    return lambda: forward(*handed[0])


def _host_time(call: Callable[[], Any], place: Place) -> float:
    rounds, each = (1, 1) if place.dry else (20, 50)
    call()
    times = []
    for _ in range(rounds):
        if not place.dry:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(each):
            call()
        times.append((time.perf_counter() - start) / each)
    return round(statistics.median(times) * 1e6, 2)
