"""The pages in docs/ say what is so: their commands run, and print what stands there."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bertfast.cli import _build_parser, main

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["fill-mask", "next-sentence", "embed", "classify", "tag", "answer"]
# The models are trained anew on each machine, whose rounding is its own. What a page shows must be
# of the kind that they were trained on: of anything else they may think anything, which another
# seed or another CPU turns round.
TOLERANCE = 0.05
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the pages' models, and commands that are this Python's."""
    folder = tmp_path_factory.mktemp("docs")
    for name, call in (("bertfast", "-P -m bertfast"), ("python", "-P")):
        script = folder / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        script.chmod(0o755)
    spec = importlib.util.spec_from_file_location("examples", DOCS / "examples.py")
    examples = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(examples)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    examples.main(folder / "examples")
    torch.set_num_threads(threads)
    return folder


def run(command, folder) -> str:
    """What a terminal shows. Importing torch takes seconds, so what needs no shell stays here."""
    if command.startswith("bertfast ") and not re.search(r"[|<>$]", command):
        shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(shown),
            contextlib.redirect_stderr(shown),
        ):
            main(shlex.split(command)[1:])
        return shown.buffer.getvalue().decode()
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.stdout


def assert_shows(got: str, expected: str) -> None:
    """The same but for the numbers' last digits; of what scores next to nothing, only as many."""

    def weighty(text):
        scored = [(line, re.match(r"\s*(0\.0[0-4]\d*)\b", line)) for line in text.splitlines()]
        return [line for line, small in scored if small is None]

    assert len(got.splitlines()) == len(expected.splitlines()), got
    got, expected = "\n".join(weighty(got)), "\n".join(weighty(expected))
    assert NUMBER.sub("#", got) == NUMBER.sub("#", expected)
    for a, b in zip(NUMBER.findall(got), NUMBER.findall(expected), strict=True):
        assert float(a) == pytest.approx(float(b), abs=TOLERANCE), got


@pytest.mark.parametrize("page", PAGES)
def test_commands(page, workplace) -> None:
    text = (DOCS / f"{page}.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        steps = re.split(r"^\$ ", block, flags=re.MULTILINE)
        assert steps[0] == ""
        for step in steps[1:]:
            command, _, expected = step.partition("\n")
            assert_shows(run(command, workplace), expected)


@pytest.mark.parametrize("page", PAGES)
def test_python(page, workplace, monkeypatch) -> None:
    if page == "embed" and not (workplace / "minilm").exists():
        test_commands(page, workplace)
    monkeypatch.chdir(workplace)
    text = (DOCS / f"{page}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```python") == 1
    for code, expected in blocks:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile(code, f"{page}.md", "exec"), {})
        assert_shows(shown.getvalue(), expected)


def test_every_option_of_a_page_is_the_verbs() -> None:
    verbs = _build_parser()._subparsers._group_actions[0].choices
    for page in PAGES:
        options = set(re.findall(r"`(--[a-z-]+)", (DOCS / f"{page}.md").read_text()))
        assert options <= set(verbs[page]._option_string_actions), page
    shared = re.findall(r"`(--[a-z-]+)", (DOCS / "README.md").read_text())
    assert set(shared) <= set(verbs["tag"]._option_string_actions)


def test_the_calls_that_one_migrates_to_exist() -> None:
    text = (DOCS / "migrating.md").read_text()
    calls = re.findall(r"`((?:bertfast|tasks|data|training)(?:\.\w+)+)", text)
    assert len(set(calls)) > 15
    for call in set(calls) - {"bertfast.tasks", "bertfast.data", "bertfast.training"}:
        top, *names = call.split(".")
        found = importlib.import_module("bertfast" if top == "bertfast" else f"bertfast.{top}")
        for i, name in enumerate(names):
            if not hasattr(found, name):
                found = importlib.import_module(f"{found.__name__}.{'.'.join(names[: i + 1])}")
            else:
                found = getattr(found, name)
        assert callable(found), call
    commands = re.findall(r"\[`([\w-]+)[^`]*`\]\(([\w-]+)\.md\)", text)
    assert sorted({page for _, page in commands}) == sorted(PAGES)
    assert all(verb == page for verb, page in commands)


@pytest.mark.parametrize("page", ["README", "migrating", *PAGES])
def test_links(page) -> None:
    for path in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", (DOCS / f"{page}.md").read_text()):
        assert (DOCS / path).exists(), path
