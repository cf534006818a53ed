"""Keeps each unit's result once it is there, so that a run may end anywhere and go on later."""

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def fingerprint(about: dict[str, Any]) -> str:
    """Of the sources and the machine: results of others are not mixed with these. The table of
    winners is made of the results, so it is no source."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for folder in ("bertfast", "csrc", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".cu", ".cuh", ".h", ".cpp") and (
                "results" not in path.parts
                and path.name not in ("_build_info.json", "winners.json")
            ):
                digest.update(path.relative_to(ROOT).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """The results so far, in one JSON file."""

    def __init__(self, path: Path, about: dict[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.data: dict[str, Any] = {"fingerprint": fingerprint(about), "about": about}
        self.results: dict[str, dict[str, Any]] = {}
        if fresh:
            path.unlink(missing_ok=True)
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept.get("fingerprint") == self.data["fingerprint"]:
                self.results = kept["results"]

    def put(self, key: str, result: dict[str, Any]) -> None:
        self.results[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({**self.data, "results": self.results}, indent=1) + "\n")
        part.replace(self.path)
