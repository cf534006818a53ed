"""Finds the fastest tiles of the Triton kernels on this machine's GPU.

    python -P benchmarks/tune.py [WORD...]        print what was found
    python -P benchmarks/tune.py --write          put it into bertfast/kernels/triton/tuned.json

Every candidate goes through its gate at the size that is timed before it is timed. Users never wait
for this: the table comes with the package, and a GPU that is not in it gets the default.
"""

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

# Words whose kernels multiply on the tensor cores.
PRODUCTS = ("attention", "cross_entropy")
ROOT = Path(__file__).resolve().parents[1]
TABLE_FILE = ROOT / "bertfast" / "kernels" / "triton" / "tuned.json"


def candidates(kernel: str, width: int) -> Iterator[dict[str, int]]:
    """Tiles worth a try: of products, up to 128 rows, and loads up to four steps ahead; else 4 to
    64 elements to a thread, at most 16384 in all."""
    if kernel.startswith(PRODUCTS):
        # One program has all queries of a head, and no other number of rows will do.
        whole = {"attention_heads": (128,), "attention_short_heads": (64,)}
        for rows in whole.get(kernel, (16, 32, 64, 128)):
            for warps in (4, 8):
                for stages in (1, 2, 3, 4):
                    yield {"rows": rows, "warps": warps, "stages": stages}
        return
    loops = "backward" in kernel
    for rows in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16):
            if not (rows * width <= 16384 and 4 <= rows * width // (32 * warps) <= 64):
                continue
            if not loops:
                yield {"rows": rows, "warps": warps}
                continue
            for per_processor in (2, 4, 8):
                if per_processor * warps <= 48:
                    for stages in (1, 2):
                        yield {
                            "rows": rows,
                            "warps": warps,
                            "per_processor": per_processor,
                            "stages": stages,
                        }


def tune(
    word: str,
    entry: Any,
    kernel: str,
    table: dict[str, Any],
    done: set[tuple[str, str]],
    *,
    device: str,
    measure: Callable[[Callable[[], Any]], float],
) -> None:
    """Put a kernel's fastest tile for one benchmark into ``table``, which the launchers read.

    Args:
        done: tiles that need no more tuning; this one is added.
        measure: gives a call's seconds.
    """
    from benchmarks.gpu.checks import is_sticky
    from benchmarks.kernels import precision
    from bertfast import testing
    from bertfast.kernels import triton

    module = importlib.import_module(f"bertfast.kernels.triton.{word}")
    case, (dtype, _) = entry.subject.case, precision(entry.dtype)
    columns = case.inputs(dtype)[case.grads[0]].shape[-1]
    choose = functools.partial(module.tile_of, kernel)
    where = torch.device(device)
    default = choose(columns, where)
    tiles = table.setdefault(triton.architecture(where), {}).setdefault(kernel, {})
    key, before = str(default.columns), tiles_of(default)
    if (kernel, key) in done:
        return
    done.add((kernel, key))
    found: list[tuple[float, dict[str, int]]] = []
    for tile in [before, *candidates(kernel, default.columns)]:
        tiles[key] = tile
        try:
            testing.run_gate(case, dtype, "triton", device=device)
        except Exception as error:
            if is_sticky(error):
                raise
            print(f"  {tile}: {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}")
            continue
        seconds = measure(entry.subject.call("triton", entry.direction, entry.dtype, device))
        found.append((seconds, tile))
        print(f"  {tile}: {seconds * 1e6:.1f} µs", flush=True)
    testing._expected.cache_clear()
    # Timed in one precision, with dropout, at one size: the winner must be right in all others.
    alike = [
        other
        for other in testing.CASES[word]
        if choose(other.inputs(dtype)[other.grads[0]].shape[-1], where).columns == default.columns
    ]
    for seconds, tile in sorted(found, key=lambda pair: pair[0]):
        tiles[key] = tile
        try:
            for precision_name in testing.precisions_of(word, "triton"):
                testing.run_gates(word, "triton", precision_name, cases=alike)
        except Exception as error:
            if is_sticky(error):
                raise
            print(f"  {tile}: {str(error).partition(chr(10))[0][:80]}")
            continue
        print(f"{kernel} {key}: {tile}, {seconds * 1e6:.1f} µs; the default was {before}")
        return
    del tiles[key]
    print(f"{kernel} {key}: no tile passes its gates")


def tiles_of(tile: Any) -> dict[str, int]:
    """A tile as the table writes it."""
    return {name: value for name, value in asdict(tile).items() if name != "columns"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    # Last, so that this folder's bertfast does not stand in for an installed one.
    sys.path.append(str(ROOT))
    from benchmarks.gpu.place import Place, benchmark_of
    from benchmarks.gpu.timing import in_turns

    def measure(call: Callable[[], Any]) -> float:
        return in_turns({"this": call}, rounds=15)["this"]

    place = Place(dry=False)
    place.refuse_if_impossible()
    from bertfast.kernels import triton

    # The launchers' own copy, with what this tree has, which may not be what is installed.
    table, done = triton._tuned(), set[tuple[str, str]]()
    table.clear()
    table.update(json.loads(TABLE_FILE.read_text()))
    for word in arguments.words or place.words():
        for entry in benchmark_of(word).on_gpu(dry=False):
            for kernel in entry.tiles if "triton" in place.backends(word) else ():
                print(f"{word} {entry.name} {kernel}")
                tune(word, entry, kernel, table, done, device="cuda:0", measure=measure)
    text = json.dumps(table, indent=1, sort_keys=True) + "\n"
    if arguments.write:
        TABLE_FILE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
