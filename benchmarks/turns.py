"""Implementations are timed in turns, A B C A B C, and not one after another.

The machine's speed drifts by a fifth within minutes, and a ratio of two medians must not drift with
it. Turns also leave somebody else's data in the caches, as the rest of a model does.

pytest-benchmark times one callable per test. So the first test of a case times all of the case's
implementations, and each test replays the durations of its own under :func:`clock`, which moves
only when it is told to: statistics and JSON are pytest-benchmark's as ever.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
Calls = dict[str, Call]

_now = 0.0
_latest: dict[str, dict[str, list[float]]] = {}


def clock() -> float:
    return _now


def _advance(seconds: float) -> None:
    global _now
    _now += seconds


def wall_time(call: Call) -> float:
    start = time.perf_counter()
    result = call()
    stop = time.perf_counter()
    del result  # giving its memory back is not the call's time
    return stop - start


def take_turns(
    calls: Calls, seconds: float, rounds: tuple[int, int], measure: Callable[[Call], float]
) -> dict[str, list[float]]:
    """The durations of each call: rounds until ``seconds`` are spent, within the limits. The first
    round is not among them."""
    for call in calls.values():
        call()  # which compiles, and touches all memory
    least, most = rounds
    durations: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > stop:
            break
        for name, call in calls.items():
            durations[name].append(measure(call))
    return durations


class Turns:
    """What a benchmark asks for instead of ``benchmark``."""

    def __init__(self, benchmark: Any, seconds: float) -> None:
        self.benchmark = benchmark
        self.info: dict[str, Any] = benchmark.extra_info
        self.seconds = seconds

    def time(
        self,
        group: str,
        implementation: str,
        prepare: Callable[[], Calls],
        *,
        rounds: tuple[int, int] = (7, 100),
        measure: Callable[[Call], float] = wall_time,
    ) -> None:
        """Record one implementation of a group.

        Args:
            group: names the case; two benchmarks of one group are compared.
            implementation: which of the group's this test stands for.
            prepare: runs the gate and gives a call for every implementation of the group; used
                once per group.
            rounds: the least and the most turns.
            measure: runs a call and returns its seconds.
        """
        if group not in _latest:
            _latest.clear()
            try:
                _latest[group] = take_turns(prepare(), self.seconds, rounds, measure)
            finally:
                torch.compiler.reset()
                gc.collect()
        durations = _latest[group][implementation]
        self.benchmark.group = group
        self.info["implementation"] = implementation
        upcoming = iter(durations)
        self.benchmark.pedantic(lambda: _advance(next(upcoming)), rounds=len(durations))
