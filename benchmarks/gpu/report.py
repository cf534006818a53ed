"""The JSON and the Markdown of what was seen on a GPU. A red gate hides its backend's times."""

import copy
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bertfast.backends import ON_GPU, TABLE

Results = dict[str, dict[str, Any]]


def verdicts(results: Results, expected: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """``{(word, backend): what is red or did not run}`` of the gates and checks.

    Args:
        expected: the keys of all units there are.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for key in {**dict.fromkeys(expected), **results}:
        part, *rest = key.split("/")
        if part in ("gates", "checks"):
            word, backend, name = rest
            red = found.setdefault((word, backend), [])
            if key not in results:
                red.append(f"{part} {name} did not run")
            elif not results[key].get("green") and "left_out" not in results[key]:
                red.append(f"{part} {name}")
    return found


def publish(data: dict[str, Any], expected: Iterable[str]) -> dict[str, Any]:
    """What may be shown: times only of backends with all of their gates and checks green."""
    shown = copy.deepcopy(data)
    seen = verdicts(data["results"], expected)
    shown["verdicts"] = {"/".join(key): red for key, red in seen.items()}
    for key, result in shown["results"].items():
        part, word, *_ = [*key.split("/"), ""]
        if part != "bench":
            continue
        for table in ("seconds", "host_us", "working_bytes"):
            for name in list(result.get(table, {})):
                backend = name.split()[0]
                red = seen.get((word, backend), ["its gates did not run"])
                if backend in ON_GPU and red:
                    del result[table][name]
                    result.setdefault("hidden", {})[backend] = ", ".join(red)
    return shown


def winners(shown: dict[str, Any]) -> dict[str, dict[str, str]]:
    """``{op: {length: backend}}``: the fastest of each op that several GPU backends have, over all
    that was timed at a length. One that is red, or was not timed everywhere, does not win.

    Args:
        shown: :func:`publish`'s answer.
    """
    timed: dict[tuple[str, int], list[dict[str, float]]] = {}
    for key, result in shown["results"].items():
        if "length" in result:
            own = {b: s for b, s in result.get("seconds", {}).items() if b in ON_GPU}
            timed.setdefault((key.split("/")[1], result["length"]), []).append(own)
    found: dict[str, dict[str, str]] = {}
    for (word, length), rows in timed.items():
        everywhere = [b for b in TABLE[word] if b in ON_GPU and all(b in row for row in rows)]
        if len(set(TABLE[word]) & set(ON_GPU)) > 1 and everywhere:
            found.setdefault(word, {})[str(length)] = min(
                everywhere,
                key=lambda b: statistics.geometric_mean(row[b] / min(row.values()) for row in rows),
            )
    return found


def keep_winners(file: Path, architecture: str, shown: dict[str, Any]) -> None:
    """Into the table that :mod:`bertfast.backends` chooses by, beside those of other GPUs and of
    ops that were not timed."""
    table = json.loads(file.read_text())
    timed = {key.split("/")[1] for key, result in shown["results"].items() if "length" in result}
    kept = {w: found for w, found in table.get(architecture, {}).items() if w not in timed}
    table[architecture] = {**kept, **winners(shown)}
    file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def ceiling(results: Results, kind: str) -> float | None:
    """Bytes/s of a copy, or FLOP/s of a product, as measured in the same run."""
    made = results.get("bench/ceilings", {})
    if "seconds" not in made:
        return None
    return (
        made["bytes"] / made["seconds"]["copy"]
        if kind == "bytes"
        else made["flops"] / made["seconds"]["gemm"]
    )


def _table(header: list[str], lines: list[list[str]]) -> str:
    marks = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, marks, *lines])


def _bench_line(key: str, result: dict[str, Any], results: Results) -> list[list[str]]:
    word, name = key.split("/")[1:]
    seconds: dict[str, float] = result.get("seconds", {})
    lines = []
    for backend in ON_GPU:
        hidden = {**result.get("hidden", {}), **result.get("red", {})}
        if backend in hidden:
            lines.append([word, name, backend, f"hidden: {hidden[backend]}", *[""] * 6])
        elif backend in seconds:
            own = seconds[backend]
            (kind, amount), *_ = result["work"].items()
            reached = amount / own
            unit = f"{reached / 1e12:.2f} {'TB/s' if kind == 'bytes' else 'TFLOP/s'}"
            share = _share(result["work"], own, results)
            wanted, missed = _targets(result, backend, share)
            lines.append(
                [
                    word,
                    name,
                    backend,
                    f"{own * 1e6:.1f} µs",
                    unit,
                    "" if share is None else f"{share:.0%}",
                    ", ".join(wanted),
                    "" if not wanted else f"**no**: {', '.join(missed)}" if missed else "yes",
                    ", ".join(
                        f"{peer} {theirs / own:.2f}×"
                        for peer, theirs in seconds.items()
                        if peer not in ON_GPU
                    ),
                    ", ".join(
                        f"{peer} {taken / 1e6:.0f}"
                        for peer, taken in result.get("working_bytes", {}).items()
                    ),
                ]
            )
    return lines


def _share(work: dict[str, int], own: float, results: Results) -> float | None:
    """How long the device needs at least for the work, of how long it took."""
    tops = {kind: ceiling(results, kind) for kind in work}
    least = [work[kind] / top for kind, top in tops.items() if top]
    return max(least) / own if least else None


def _targets(
    result: dict[str, Any], backend: str, share: float | None
) -> tuple[list[str], list[str]]:
    """What was to be reached, and what was not. A peer that did not run is no target, but said."""
    seconds, wanted, missed = result["seconds"], [], []
    target = result["target"].get(backend)
    if target is not None:
        wanted.append(f"{target:.0%}")
        if share is None or share < target:
            missed.append("the ceiling is not known" if share is None else f"{share:.0%}")
    for peer, multiple in result["ahead"].get(backend, {}).items():
        if peer in seconds:
            wanted.append(f"{peer} {multiple:g}×")
            got = seconds[peer] / seconds[backend]
            if got < multiple:
                missed.append(f"{peer} {got:.2f}×")
        else:
            wanted.append(f"{peer} {multiple:g}× (did not run)")
    taken = result.get("working_bytes", {})
    for peer, most in result["memory"].items():
        if peer in taken:
            wanted.append(f"{most:.0%} of the memory of {peer}")
            got = taken[backend] / max(taken[peer], 1)
            if got > most:
                missed.append(f"{got:.0%} of the memory of {peer}")
    return wanted, missed


def markdown(data: dict[str, Any]) -> str:
    """The report for people, of :func:`publish`'s answer."""
    about, results = data["about"], data["results"]
    if about["dry"]:
        head = (
            "A dry run: the CPU, kernels interpreted, small inputs. It proves the command and says "
            "nothing about any GPU; nothing was timed."
        )
    else:
        head = (
            f"One {about['gpu']} ({about['multiprocessors']} multiprocessors, "
            f"{about['memory_gib']} GiB), driver {about['driver']}, torch {about['torch']}, "
            f"Triton {about['triton']}, CUDA {about['cuda']}."
        )
    parts = ["# What was seen on a GPU" if not about["dry"] else "# Dry run", head]
    lines = []
    for name, red in data["verdicts"].items():
        word, backend = name.split("/")
        mine = {k: v for k, v in results.items() if k.split("/")[1:3] == [word, backend]}
        gates = [v for k, v in mine.items() if k.startswith("gates/")]
        worst = max((v.get("worst") or 0.0 for v in gates), default=0.0)
        left = [f"{k.split('/')[3]} ({v['left_out']})" for k, v in mine.items() if "left_out" in v]
        lines.append(
            [
                word,
                backend,
                ", ".join(k.split("/")[3] for k in mine if k.startswith("gates/")),
                str(sum(v.get("comparisons", 0) for v in gates)),
                f"{worst:.2f}",
                "green" if not red else f"**red**: {', '.join(red)}",
                ", ".join(left),
            ]
        )
    header = ["op", "backend", "gates in", "comparisons", "worst", "gates and checks", "left out"]
    parts += ["## Gates and checks", _table(header, lines)]
    if about["absent"]:
        parts.append("Did not run here: " + "; ".join(about["absent"]) + ".")
    if not about["dry"]:
        copy_rate, gemm_rate = (ceiling(results, kind) for kind in ("bytes", "flops"))
        if copy_rate and gemm_rate:
            parts.append(
                f"Ceilings in the same run: copy {copy_rate / 1e12:.2f} TB/s (read and written), "
                f"product of 8192×8192×8192 in bfloat16 {gemm_rate / 1e12:.0f} TFLOP/s."
            )
        timed = [
            line
            for key, result in results.items()
            if key.startswith("bench/") and "work" in result
            for line in _bench_line(key, result, results)
        ]
        header = ["op", "what", "backend", "time", "rate", "of the ceiling", "target", "met"]
        header += ["peers take", "working memory, MB"]
        about_targets = (
            "The ceiling is the copy's or the product's rate above, or the lower of what both "
            "allow. A target is a share of it, or how many times as long a peer is to take."
        )
        parts += ["## Times", about_targets, _table(header, timed)]
        best = [
            [word, length, backend]
            for word, lengths in winners(data).items()
            for length, backend in lengths.items()
        ]
        if best:
            parts += ["## The faster one", _table(["op", "length", "backend"], best)]
        hosts = [
            [key.split("/")[1], name, f"{us:.1f} µs"]
            for key, result in results.items()
            for name, us in result.get("host_us", {}).items()
        ]
        parts += ["## Host time of a call", _table(["op", "call", "time"], hosts)]
    return "\n\n".join(parts) + "\n"


def failures(results: Results) -> list[str]:
    return [
        f"{key}: {result.get('error') or result.get('failures') or result.get('red') or 'red'}"
        for key, result in results.items()
        if not result.get("green") and "left_out" not in result
    ]
