"""All there is to do, in units that are small enough to be done one by one and kept.

A new op or backend is in here by its word in ``bertfast.backends.TABLE``, its cases in
``bertfast.testing`` and its ``on_gpu`` and ``large`` in ``bench_<word>.py``.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bertfast import testing

from ..kernels import Subject
from . import checks, timing
from .place import Place, benchmark_of

Result = dict[str, Any]
PARTS = ("gates", "checks", "bench")


@dataclass(frozen=True)
class Unit:
    """Something to run whose result is worth keeping.

    Attributes:
        part: one of :data:`PARTS`.
        word, backend: whose; "" for what is about the machine.
        name: which of the part's.
        run: does it. A dict with ``green``, or with ``left_out`` and the reason.
    """

    part: str
    word: str
    backend: str
    name: str
    run: Callable[[], Result]

    @property
    def key(self) -> str:
        return "/".join(filter(None, (self.part, self.word, self.backend, self.name)))


def all_units(place: Place, words: Iterable[str]) -> list[Unit]:
    units = []
    for word in words:
        for backend in place.backends(word):
            for precision in testing.precisions_of(word, backend):
                if place.supports(word, backend, precision):
                    units.append(_gate(place, word, backend, precision))
            for name, check in checks.CHECKS.items():
                units.append(_check(place, word, backend, name, check))
    units.append(Unit("bench", "", "", "ceilings", lambda: timing.ceilings(place)))
    for word in words:
        entries = benchmark_of(word).on_gpu(place.dry)
        units += [_bench(place, word, entry) for entry in entries]
        small = benchmark_of(word).on_gpu(True)[0].subject
        units.append(Unit("bench", word, "", "overhead", _overhead(place, word, small)))
    # The shortest way to a first answer: gates before checks before times.
    return sorted(units, key=lambda unit: PARTS.index(unit.part))


def some_cases(place: Place, word: str, backend: str) -> list[testing.Case]:
    """Every case; of a dry run, a few of them."""
    cases = testing.cases_of(word, backend)
    if place.dry:
        return cases[:: len(cases) // 4]
    return [*cases, *([testing.MANY_TILES[word]] if word in testing.MANY_TILES else [])]


def _gate(place: Place, word: str, backend: str, precision: str) -> Unit:
    def run() -> Result:
        before = len(testing.gate_records)
        start = time.perf_counter()
        failures = []
        for case in some_cases(place, word, backend):
            try:
                testing.run_gates(word, backend, precision, cases=[case])
            except Exception as error:
                if checks.is_sticky(error):
                    raise
                failures.append(f"{case}: {type(error).__name__}: {error}"[:300])
        records = testing.gate_records[before:]
        worst = max(records, key=lambda record: record.ratio, default=None)
        return {
            "green": bool(records) and not failures,
            "comparisons": len(records),
            "worst": None if worst is None else round(worst.ratio, 3),
            "worst_at": None if worst is None else worst.name,
            "failures": failures,
            "seconds": round(time.perf_counter() - start, 1),
        }

    return Unit("gates", word, backend, precision, run)


def _check(place: Place, word: str, backend: str, name: str, check: Any) -> Unit:
    return Unit("checks", word, backend, name, lambda: check(place, word, backend))


def _bench(place: Place, word: str, entry: timing.OnGpu) -> Unit:
    return Unit("bench", word, "", entry.name, lambda: timing.bench(place, word, entry))


def _overhead(place: Place, word: str, small: Subject) -> Callable[[], Result]:
    return lambda: timing.overhead(place, word, small)
