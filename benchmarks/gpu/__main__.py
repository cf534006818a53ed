"""Proves and times every GPU kernel: `make gpu`, or `python -P benchmarks/gpu --help`.

Results are kept unit by unit in ``build/gpu.json``; a run that ends early goes on where it was, as
long as neither the sources nor the machine have changed. At the end, or with ``--part report``,
the JSON and the Markdown are written: to ``benchmarks/results/`` for a GPU, to ``build/`` for a dry
run.
"""

import argparse
import faulthandler
import importlib
import importlib.util
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
INCOMPLETE = 75


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--part", choices=["gates", "checks", "bench", "report"])
    parser.add_argument("--words", nargs="*", help="only these ops")
    parser.add_argument("--dry", action="store_true", help="on the CPU, interpreted, small inputs")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no unit after these")
    parser.add_argument("--under-sanitizer", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--emulated", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = arguments_of()
    # Last, so that this folder's bertfast does not stand in for an installed one.
    sys.path.append(str(ROOT))
    failure = emulate_cuda() if arguments.dry or arguments.emulated else None
    checks, place, report, store, units = (
        importlib.import_module(f"benchmarks.gpu.{name}")
        for name in ("checks", "place", "report", "store", "units")
    )
    if arguments.under_sanitizer:
        checks.under_sanitizer(*arguments.under_sanitizer)
        return 0
    if arguments.emulated and failure is not None:
        print(failure)
        return int(checks.NOT_BUILT)
    if arguments.emulated:
        checks.emulated(*arguments.emulated)
        return 0
    start = time.monotonic()
    here = place.Place(arguments.dry, until=start + 60 * (arguments.minutes + 1))
    here.refuse_if_impossible()
    about = here.describe()
    for absent in about["absent"]:
        print(f"NOT HERE {absent}", flush=True)
    name = "gpu-dry" if arguments.dry else "gpu"
    kept = store.Store(ROOT / "build" / f"{name}.json", about, arguments.fresh)
    words = arguments.words or here.words()
    unknown = sorted(set(words) - set(here.words()))
    if unknown:
        raise SystemExit(f"make gpu: no GPU kernel of {', '.join(unknown)}")
    everything = units.all_units(here, here.words())
    todo = [
        unit
        for unit in everything
        if unit.key not in kept.results
        and arguments.part in (None, unit.part)
        and (unit.word in words or not unit.word)
    ]
    # A hang ends the process; the unit it hung in is already kept, as red.
    faulthandler.dump_traceback_later(60 * (arguments.minutes + 1), exit=True)
    for i, unit in enumerate(todo):
        if time.monotonic() - start > 60 * arguments.minutes:
            print(f"{len(todo) - i} units are left: run the same command again", flush=True)
            return INCOMPLETE
        sticky = run(unit, kept, checks)
        if sticky and not arguments.dry:
            # Every later call would fail with it. A new process goes on behind this unit.
            left = arguments.minutes - (time.monotonic() - start) / 60
            command = [a for a in sys.argv[1:] if a != "--fresh"]
            os.execv(
                sys.executable,
                [sys.executable, "-P", str(Path(__file__).parent), *command, f"--minutes={left}"],
            )
    faulthandler.cancel_dump_traceback_later()
    write(report, kept, [unit.key for unit in everything], arguments.dry)
    red = report.failures(kept.results)
    for line in red:
        print(f"RED {line}")
    return 1 if red else 0


def emulate_cuda() -> Exception | None:
    """Before bertfast is imported; why it cannot be built, or None."""
    for name, file in (("csrc_build", "build.py"), ("csrc_build_cuda", "build_cuda.py")):
        spec = importlib.util.spec_from_file_location(name, ROOT / "csrc" / file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    try:
        sys.modules["csrc_build_cuda"].emulate(ROOT)
    except sys.modules["csrc_build"].BuildError as error:
        return error
    return None


def run(unit, kept, checks) -> bool:  # type: ignore[no-untyped-def]
    """Run and keep one unit; whether it left CUDA unusable."""
    print(f"{unit.key} ... ", end="", flush=True)
    before = time.monotonic()
    sticky = False
    kept.put(unit.key, {"green": False, "error": "the process ended during this unit"})
    try:
        with open(os.devnull, "w") as nowhere:
            stdout, sys.stdout = sys.stdout, nowhere
            try:
                result = unit.run()
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()  # what went wrong late went wrong in this unit
            finally:
                sys.stdout = stdout
    except Exception as error:
        sticky = checks.is_sticky(error)
        traceback.print_exc()
        result = {"green": False, "error": f"{type(error).__name__}: {error}"[:500]}
    kept.put(unit.key, result)
    word = "left out" if "left_out" in result else "green" if result["green"] else "RED"
    print(f"{word} ({time.monotonic() - before:.1f} s)", flush=True)
    return sticky


def write(report, kept, expected, dry) -> None:  # type: ignore[no-untyped-def]
    about = kept.data["about"]
    shown = report.publish({**kept.data, "results": kept.results}, expected)
    if dry:
        target = ROOT / "build" / "gpu-dry-report"
    else:
        name = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
        target = ROOT / "benchmarks" / "results" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(shown, indent=1) + "\n")
    target.with_suffix(".md").write_text(report.markdown(shown))
    print(f"written: {target.relative_to(ROOT)}.json and .md", flush=True)
    if not dry:
        file = ROOT / "bertfast" / "kernels" / "winners.json"
        report.keep_winners(file, about["architecture"], shown)
        print(f"written: {file.relative_to(ROOT)}; commit it, and reinstall", flush=True)


if __name__ == "__main__":
    # The folder itself, which python puts first when it runs one, has names of its own.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]
    sys.exit(main())
