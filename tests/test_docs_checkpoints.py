"""docs/checkpoints.md: its commands print what it says they do, its code runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bertfast.model.families import FAMILIES, UNLIKE

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
NAMES = {"roberta": "RoBERTa", "xlm-roberta": "XLM-R", "distilbert": "DistilBERT"}


def _python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    return tmp_path


def _without_sizes(text: str) -> str:
    """Another release of a library may write a byte more."""
    return re.sub(r": [\d,]+ bytes$", ": N bytes", text, flags=re.MULTILINE)


def test_the_commands(directory):
    blocks = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    commands = re.findall(r"^\$ bertfast (.+)\n((?:(?!\$ ).*\n)*)", "".join(blocks), re.MULTILINE)
    assert len(commands) == 4
    for command, expected in commands:
        done = _python("-W", "error", "-m", "bertfast", *shlex.split(command), cwd=directory)
        assert _without_sizes(done.stdout + done.stderr) == _without_sizes(expected), command
        assert done.returncode == (2 if expected.startswith("bertfast convert: ") else 0)
    assert sorted(p.name for p in directory.iterdir()) == ["tests", "tiny-bert"]


def test_the_code(directory):
    ((code, expected),) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    done = _python("-W", "error", "-c", code, cwd=directory)
    assert done.stdout == expected, done.stderr


def test_it_names_what_loads_and_what_does_not():
    for name in FAMILIES:
        assert NAMES.get(name, name.upper()) in PAGE
    for name in ("albert", "deberta", "mpnet", "modernbert"):
        assert name in UNLIKE
        assert name in PAGE.lower()
