"""docs/checkpoints.md: its commands print what it says they do, its code runs."""

import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bertfast.cli import main
from bertfast.model.families import FAMILIES, UNLIKE

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
NAMES = {"roberta": "RoBERTa", "xlm-roberta": "XLM-R", "distilbert": "DistilBERT"}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    return tmp_path


def _without_sizes(text: str) -> str:
    """Another release of a library may write a byte more; config.json is written by nobody else."""
    return re.sub(r"(?<!  config\.json): [\d,]+ bytes$", ": N bytes", text, flags=re.MULTILINE)


def test_the_commands(directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    blocks = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    commands = re.findall(r"^\$ bertfast (.+)\n((?:(?!\$ ).*\n)*)", "".join(blocks), re.MULTILINE)
    assert len(commands) == 4
    for command, expected in commands:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            code = main(shlex.split(command))
        printed = capsys.readouterr()
        assert _without_sizes(printed.out + printed.err) == _without_sizes(expected), command
        assert code == (2 if expected.startswith("bertfast convert: ") else 0)
    assert sorted(p.name for p in directory.iterdir()) == ["tests", "tiny-bert"]


def test_the_code(directory):
    ((code, expected),) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code], cwd=directory, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout == expected, done.stderr


def test_it_names_what_loads_and_what_does_not():
    for name in FAMILIES:
        assert NAMES.get(name, name.upper()) in PAGE
    for name in ("albert", "deberta", "mpnet", "modernbert"):
        assert name in UNLIKE
        assert name in PAGE.lower()
