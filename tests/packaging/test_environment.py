"""``bertfast env``'s facts on machines that are not in order."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bertfast import environment

from .conftest import run


def test_facts_are_plain_json_and_render() -> None:
    information = environment.collect()
    assert json.loads(json.dumps(information)) == information
    text = environment.render(information)
    assert information["versions"]["torch"] in text
    assert information["cpu"]["model"] in text
    for row in information["ops"]:
        assert row["op"] in text


def test_it_answers_when_torch_is_broken(tmp_path: Path) -> None:
    """A torch that raises at import, as one with a missing shared library does."""
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open')\n")
    done = run(
        sys.executable,
        "-c",
        "import json, sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from bertfast import environment as e\n"
        "information = e.collect()\n"
        "print(e.render(information))\n"
        "print(json.dumps(information))",
        cwd=tmp_path,
    )
    *text, last = done.stdout.splitlines()
    information = json.loads(last)
    for part in ("torch", "ops", "gpus"):
        assert "libtorch_cpu.so" in information[part]["error"]
    assert information["built"]["cpu"]["built"] is True
    assert any("libtorch_cpu.so" in line for line in text)


def test_bertfast_variables_are_shown(monkeypatch) -> None:
    monkeypatch.setenv("BERTFAST_CHECK", "1")
    assert environment.collect()["environment"]["BERTFAST_CHECK"] == "1"


def test_a_part_that_fails_says_why_and_the_rest_stands() -> None:
    information = environment.collect()
    for part in ("system", "cpu", "torch", "kernels", "built", "gpus", "ops"):
        broken = {**information, part: {"error": f"RuntimeError: no {part} today"}}
        assert f"no {part} today" in environment.render(broken)


def test_a_failed_build_shows_the_compilers_words() -> None:
    information = environment.collect()
    information["built"] = {
        "cpu": {"built": False, "reason": "the compiler failed", "output": ["x.cpp:1: error: no"]}
    }
    text = environment.render(information)
    assert "not built: the compiler failed" in text
    assert "x.cpp:1: error: no" in text
