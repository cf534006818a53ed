"""The JSON and the Markdown of what was seen on a GPU. A red gate hides its backend's times."""

import copy
from collections.abc import Iterable
from typing import Any

from bertfast.backends import ON_GPU

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
        for table in ("seconds", "host_us"):
            for name in list(result.get(table, {})):
                backend = name.split()[0]
                red = seen.get((word, backend), ["its gates did not run"])
                if backend in ON_GPU and red:
                    del result[table][name]
                    result.setdefault("hidden", {})[backend] = ", ".join(red)
    return shown


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
            lines.append([word, name, backend, f"hidden: {hidden[backend]}", *[""] * 5])
        elif backend in seconds:
            own = seconds[backend]
            (kind, amount), *_ = result["work"].items()
            top = ceiling(results, kind)
            reached = amount / own
            unit = f"{reached / 1e12:.2f} {'TB/s' if kind == 'bytes' else 'TFLOP/s'}"
            share = reached / top if top else None
            target = result["target"]
            first = own <= seconds.get("compile", own)
            lines.append(
                [
                    word,
                    name,
                    backend,
                    f"{own * 1e6:.1f} µs",
                    unit,
                    "" if share is None else f"{share:.0%}",
                    "" if target is None else f"{target:.0%}",
                    "" if target is None or share is None else _met(share >= target and first),
                    ", ".join(
                        f"{peer} {theirs / own:.2f}×"
                        for peer, theirs in seconds.items()
                        if peer not in ON_GPU
                    ),
                ]
            )
    return lines


def _met(yes: bool) -> str:
    return "yes" if yes else "**no**"


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
        header.append("peers take")
        about_targets = "A target is met where its share is reached and torch.compile is no faster."
        parts += ["## Times", about_targets, _table(header, timed)]
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
