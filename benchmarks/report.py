"""Turns the JSON of ``pytest benchmarks/ --benchmark-json=FILE`` into the README's tables.

    python benchmarks/report.py FILE                     print the tables
    python benchmarks/report.py FILE --slim OUT          write FILE without its single timings
    python benchmarks/report.py FILE --readme README.md  put the tables between the README's markers

Every time is the median of its rounds. ``tests/test_readme.py`` holds the README to the committed
JSON.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

Row = dict[str, Any]


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def slim(data: dict[str, Any]) -> dict[str, Any]:
    """Without the single timings, and without what is about the checkout and not the machine."""
    for entry in data["benchmarks"]:
        entry["stats"].pop("data", None)
    data.pop("commit_info", None)
    return data


def rows_of(data: dict[str, Any]) -> list[Row]:
    """One flat row per benchmark: what it was and its median in seconds."""
    return [
        {**entry["extra_info"], "group": entry["group"], "seconds": entry["stats"]["median"]}
        for entry in data["benchmarks"]
    ]


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    header = list(header)
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, marks, *map(list, lines)])


def by_group(rows: list[Row], prefix: str) -> dict[str, dict[str, Row]]:
    """``{group: {implementation: row}}`` of the groups that start with ``prefix``."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["group"].startswith(prefix):
            groups.setdefault(row["group"], {})[row["implementation"]] = row
    return groups


def copy_bandwidth(rows: list[Row], megabytes: int) -> float:
    size = 2 * megabytes * 1024 * 1024
    (row,) = (r for r in rows if r["group"] == "copy" and r["bytes"] == size)
    return row["bytes"] / row["seconds"]


def times(ours: Row, theirs: Row | None) -> str:
    return "" if theirs is None else f"{theirs['seconds'] / ours['seconds']:.1f}×"


def kernel_table(rows: list[Row]) -> str:
    ceiling = copy_bandwidth(rows, 256)
    lines = []
    for word in ("gelu", "layernorm"):
        for group in by_group(rows, f"{word} ").values():
            if "bertfast" not in group:
                continue
            ours = group["bertfast"]
            bandwidth = ours["bytes"] / ours["seconds"]
            shape = "×".join(map(str, ours["shape"]))
            lines.append(
                [
                    f"{word} ({ours['case']}) {ours['direction']} {shape} {ours['dtype']}",
                    f"{ours['seconds'] * 1e6:.0f} µs",
                    times(ours, group.get("eager")),
                    times(ours, group.get("compile")),
                    f"{bandwidth / 1e9:.1f}",
                    f"{bandwidth / ceiling:.0%}",
                ]
            )
    return table(
        ["kernel", "bertfast", "vs eager", "vs torch.compile", "GB/s", "of copy bandwidth"], lines
    )


def overhead_table(rows: list[Row]) -> str:
    lines = []
    for word in ("gelu", "layernorm"):
        calls = by_group(rows, f"{word} overhead")[f"{word} overhead"]
        lines.append([word, *(f"{calls[name]['seconds'] * 1e6:.1f} µs" for name in CALLS)])
    return table(["a call on 8 numbers", *CALLS.values()], lines)


CALLS = {
    "launcher": "launcher",
    "inference": "op, no grad",
    "grad": "op, grad mode",
    "eager_grad": "eager torch, grad mode",
}


def model_table(rows: list[Row], prefix: str) -> str:
    lines = []
    for group in by_group(rows, prefix).values():
        ours, theirs = group["bertfast"], group["transformers"]
        lines.append(
            [
                f"{ours['case']}, {ours['dtype']}",
                f"{ours['tokens']} of {ours['padded_tokens']}",
                f"{ours['seconds'] * 1e3:.0f} ms",
                f"{theirs['seconds'] * 1e3:.0f} ms",
                times(ours, theirs),
            ]
        )
    return table(["batch", "tokens of padded", "bertfast", "transformers (sdpa)", "faster"], lines)


def report(data: dict[str, Any], source: str) -> str:
    """The Markdown between the README's markers."""
    rows = rows_of(data)
    about = data["machine_info"]["bertfast"]
    gemm = {r["group"] + str(i): r for i, r in enumerate(r for r in rows if r["group"] == "gemm")}
    rates = [f"{row['flops'] / row['seconds'] / 1e9:.0f}" for row in gemm.values()]
    return "\n\n".join(
        [
            f"Measured on {about['torch']['threads']} cores of an {about['cpu']['model']}, "
            f"torch {about['versions']['torch']}, kernels `{about['kernels']['isa']}`; "
            f"medians, from [`{source}`]({source}). There `copy_` moves "
            f"{copy_bandwidth(rows, 256) / 1e9:.0f} GB/s between buffers of 256 MB, "
            f"{copy_bandwidth(rows, 12) / 1e9:.0f} GB/s at 12 MB and "
            f"{copy_bandwidth(rows, 3) / 1e9:.0f} GB/s at 3 MB, which stay in the cache; "
            f"`F.linear` runs at {' (float32) and '.join(rates)} (bfloat16) GFLOP/s. "
            "For all implementations alike, glibc is told to keep freed memory "
            "([allocator.py](bertfast/allocator.py); in a process of your own set "
            "`MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=33554432`): without it page "
            "faults can cost more than the kernels do.",
            "**BERT-base inference**, the same weights and the same padded batch",
            model_table(rows, "inference"),
            "**BERT-base pre-training step**, forward and backward, dropout 0.1",
            model_table(rows, "training step"),
            "**Kernels**, bias + GELU and residual + dropout + LayerNorm",
            kernel_table(rows),
            overhead_table(rows),
        ]
    )


def insert(readme: str, text: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README: expected the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("json", type=Path)
    parser.add_argument("--slim", type=Path, help="write the JSON without its single timings")
    parser.add_argument("--readme", type=Path, help="put the tables into this file")
    arguments = parser.parse_args()
    data = load(arguments.json)
    if arguments.slim:
        arguments.slim.write_text(json.dumps(slim(data), indent=1, sort_keys=True) + "\n")
    text = report(data, arguments.json.as_posix())
    if arguments.readme:
        arguments.readme.write_text(insert(arguments.readme.read_text(), text))
    elif not arguments.slim:
        print(text)


if __name__ == "__main__":
    main()
