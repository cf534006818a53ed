"""Turns the JSON of ``pytest benchmarks/ --benchmark-json=FILE`` into the README's tables.

    python benchmarks/report.py FILE                     print the tables
    python benchmarks/report.py FILE --slim OUT          write FILE without its single timings
    python benchmarks/report.py FILE --readme README.md  put the tables between the README's markers

Every time is the median of its rounds. ``tests/test_readme.py`` holds the README to the committed
JSON.
"""

import argparse
import json
import re
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


def product_rate(rows: list[Row], dtype: str) -> float:
    """FLOP/s of ``F.linear``; products of a mixed precision run in the activations' dtype."""
    dtype = dtype.partition("-")[0]
    (row,) = (r for r in rows if r["group"] == "gemm" and r["dtype"] == dtype)
    return row["flops"] / row["seconds"]


def working_memory(row: Row) -> int | None:
    """Peak memory beyond the inputs and what is returned; None where it was not measured."""
    if "peak_bytes" not in row:
        return None
    return max(row["peak_bytes"] - row["returned_bytes"], 0)


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def milliseconds(row: Row | None) -> str:
    return "" if row is None else f"{row['seconds'] * 1e3:.0f} ms"


def times(ours: Row, theirs: Row | None) -> str:
    return "" if theirs is None else f"{theirs['seconds'] / ours['seconds']:.1f}×"


def ratio(ours: Row, theirs: Row) -> float:
    return float(ours["seconds"] / theirs["seconds"])


def rate(row: Row, rows: list[Row]) -> list[str]:
    """GFLOP/s or GB/s, and the share of what this machine reaches."""
    if "flops" in row:
        reached, ceiling = row["flops"] / row["seconds"], product_rate(rows, row["dtype"])
        return [f"{reached / 1e9:.0f} GFLOP/s", f"{reached / ceiling:.0%} of linear"]
    reached, ceiling = row["bytes"] / row["seconds"], copy_bandwidth(rows, 256)
    return [f"{reached / 1e9:.1f} GB/s", f"{reached / ceiling:.0%} of copy"]


def memory(ours: Row, theirs: Row) -> str:
    sizes = [working_memory(row) for row in (ours, theirs)]
    if None in sizes:
        return ""
    return " / ".join(f"{size / 1e6:.3g}" for size in sizes if size is not None) + " MB"


# The kernels' rows in the README, in this order; the JSON has them all.
SHOWN = [
    r"cross_entropy forward\+backward .*",
    r"embedding .* p0\.1 .*",
    r"layernorm .* 1024x768 p0\.1 .*",
    r"gelu .* 1024x3072 none .*",
    r"dropout .*",
]


def kernel_table(rows: list[Row]) -> str:
    lines = []
    for pattern in SHOWN:
        for name, group in by_group(rows, "").items():
            if not re.fullmatch(pattern, name):
                continue
            ours, eager = group["bertfast"], group["eager"]
            lines.append(
                [
                    name,
                    duration(ours["seconds"]),
                    times(ours, eager),
                    times(ours, group["compile"]),
                    *rate(ours, rows),
                    memory(ours, eager),
                ]
            )
    header = ["kernel", "bertfast", "vs eager", "vs torch.compile", "rate", "of the ceiling"]
    return table([*header, "working memory, and eager's"], lines)


def attention_table(rows: list[Row]) -> str:
    """Forward and backward together, and in one column how forward compares alone."""
    lines = []
    forward = by_group(rows, "attention forward ")
    for name, group in by_group(rows, "attention forward+backward ").items():
        ours, sdpa = group["bertfast"], group["sdpa"]
        alone = forward[name.replace("forward+backward", "forward")]
        lines.append(
            [
                f"{ours['case']} {ours['dtype']}",
                duration(ours["seconds"]),
                times(ours, sdpa),
                times(ours, group["eager"]),
                times(ours, group["compile"]),
                *rate(ours, rows),
                memory(ours, sdpa),
                times(alone["bertfast"], alone["sdpa"]),
            ]
        )
    header = ["attention", "bertfast", "vs SDPA", "vs eager", "vs torch.compile", "rate"]
    rest = ["of the ceiling", "working memory, and SDPA's", "forward alone vs SDPA"]
    return table([*header, *rest], lines)


CALLS = {
    "launcher": "launcher",
    "inference": "op, no grad",
    "grad": "op, grad mode",
    "eager_grad": "eager torch, grad mode",
}


def overhead_table(rows: list[Row]) -> str:
    lines = []
    for word in ("gelu", "layernorm"):
        calls = by_group(rows, f"{word} overhead")[f"{word} overhead"]
        lines.append([word, *(f"{calls[name]['seconds'] * 1e6:.1f} µs" for name in CALLS)])
    return table(["a call on 8 numbers", *CALLS.values()], lines)


def model_table(rows: list[Row], prefix: str, peers: dict[str, str]) -> str:
    """``peers``: implementation and what its column is called."""
    lines = []
    for group in by_group(rows, prefix).values():
        ours = group["bertfast"]
        line = [f"{ours['case']}, {ours['dtype']}", milliseconds(ours)]
        if "tokens" in ours:
            line[0] += f" ({ours['tokens']} of {ours['padded_tokens']} tokens)"
        for peer in peers:
            line += [milliseconds(group.get(peer)), times(ours, group.get(peer))]
        lines.append(line)
    columns = [column for title in peers.values() for column in (title, "faster")]
    return table(["batch", "bertfast", *columns], lines)


TRANSFORMERS = {"transformers": "transformers (sdpa)"}


def embed_section(rows: list[Row]) -> list[str]:
    """Texts to vectors, where it was measured."""
    if not by_group(rows, "embed texts"):
        return []
    peers = {
        "transformers": "transformers, batches of 32 as they come",
        "sentence-transformers": "sentence-transformers, sorted by length",
    }
    title = "**Texts to vectors**, all-MiniLM-L6-v2, tokenizing included"
    return [title, model_table(rows, "embed texts", peers)]


def accelerated_section(rows: list[Row]) -> list[str]:
    """Transformers' own models on bertfast's kernels; nothing where they were not measured."""
    lines = []
    for group in by_group(rows, "accelerated step ").values():
        ours, theirs = group["bertfast"], group["transformers"]
        line = [f"{ours['case']}, {ours['dtype']}", milliseconds(theirs)]
        for implementation in ("attention", "bertfast", "no_logits"):
            row = group.get(implementation)
            line += ["", ""] if row is None else [milliseconds(row), times(row, theirs)]
        lines.append(line)
    if not lines:
        return []
    ways = ('attn_implementation="bertfast"', "accelerate()", "accelerate(output_logits=False)")
    columns = [column for way in ways for column in (f"`{way}`", "faster")]
    return [
        "**transformers' `BertForPreTraining`, its own BERT-base training step**, forward and "
        "backward, dropout 0.1 ([docs/transformers.md](docs/transformers.md))",
        table(["batch", "transformers (sdpa)", *columns], lines),
    ]


def startup_section(rows: list[Row]) -> list[str]:
    """Whole processes from start to end, where they were measured."""
    lines = [
        [ours["case"], *map(milliseconds, (ours, theirs)), f"{ratio(ours, theirs):.2f}"]
        for ours, theirs in (
            (group["bertfast"], group["torch"]) for group in by_group(rows, "start-up ").values()
        )
    ]
    if not lines:
        return []
    title = "**Start-up**, whole processes: a model class, and all-MiniLM-L6-v2 on one text"
    return [title, table(["process", "bertfast", "torch alone", "of it"], lines)]


def report(data: dict[str, Any], source: str) -> str:
    """The Markdown between the README's markers."""
    rows = rows_of(data)
    about = data["machine_info"]["bertfast"]
    copies = {size: f"{copy_bandwidth(rows, size) / 1e9:.0f} GB/s" for size in (256, 12, 3)}
    products = {name: f"{product_rate(rows, name) / 1e9:.0f}" for name in ("float32", "bfloat16")}
    return "\n\n".join(
        [
            f"Measured on {about['torch']['threads']} cores of an {about['cpu']['model']}, "
            f"torch {about['versions']['torch']}, kernels `{about['kernels']['isa']}`; medians, "
            f"from [`{source}`]({source}), which has all of them; the tables show a choice. The "
            "implementations of a row took turns. The ceilings: "
            f"`copy_` moves {copies[256]} between buffers of 256 MB (and {copies[12]} at 12 MB, "
            f"{copies[3]} at 3 MB, which stay in the cache); `F.linear` runs at "
            f"{products['float32']} (float32) and {products['bfloat16']} (bfloat16) GFLOP/s. "
            "For all implementations alike, glibc is told to keep freed memory "
            "([allocator.py](bertfast/allocator.py); in a process of your own set "
            "`MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=33554432`): without it page "
            "faults can cost more than the kernels do.",
            "**BERT-base inference**, the same weights and the same padded batch",
            model_table(rows, "inference", TRANSFORMERS),
            *embed_section(rows),
            *startup_section(rows),
            "**Outside the matrix products**, where kernels can help: the same forward without the "
            "time inside `F.linear`'s products",
            model_table(rows, "outside gemm", TRANSFORMERS),
            "**BERT-base pre-training step**, forward and backward, dropout 0.1",
            model_table(
                rows, "training step", {**TRANSFORMERS, "compile": "torch.compile of that"}
            ),
            *accelerated_section(rows),
            "**Attention**, forward and backward, 12 heads of 64, dropout p; SDPA and eager get "
            "padded batches. Working memory is the peak beyond inputs and results",
            attention_table(rows),
            "**Other kernels**: decoder + loss on the 15 % labelled tokens (eager: on all, as "
            "transformers does), embedding + LayerNorm + dropout, residual + dropout + LayerNorm, "
            "bias + GELU, dropout",
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
    if arguments.readme:
        text = report(data, arguments.json.as_posix())
        arguments.readme.write_text(insert(arguments.readme.read_text(), text))
    elif not arguments.slim:
        print(report(data, arguments.json.as_posix()))


if __name__ == "__main__":
    main()
