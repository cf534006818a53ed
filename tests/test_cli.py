"""The ``bertfast`` command: exit codes, one-line messages, the demo from end to end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import bertfast
from bertfast import environment, errors
from bertfast.cli import main

TINY = ["--minutes", "0.05", "--layers", "1", "--hidden", "64", "--vocab-size", "600"]
TINY += ["--length", "32", "--batch-tokens", "256"]


def command(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-P", "-m", "bertfast", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        **options,
    )


def test_demo_end_to_end(tmp_path) -> None:
    out = tmp_path / "demo"
    run = command("demo", *TINY, "--out", str(out), "--seed", "3", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert json.loads((out / "bertfast-demo.json").read_text()) == report
    for number in range(1, 9):
        assert f"[{number}/8]" in run.stderr
    assert report["text"]["held_out_documents"] >= 2
    history = report["training"]["history"]
    # A slow machine may come to one entry only.
    assert len(history) == 1 or history[-1]["mlm_loss"] < history[0]["mlm_loss"]
    assert 0 <= report["held_out"]["model"]["nsp_accuracy"] <= 1
    assert report["held_out"]["model"]["mlm_predictions"] > 500
    assert report["checkpoint"]["same_outputs"] is True
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"} <= set(
        report["checkpoint"]["files"]
    )
    assert len(report["fill_mask"]) == 5
    assert report["training"]["threads"] >= 1
    assert all(len(blank["guesses"]) == 3 for blank in report["fill_mask"])
    assert report["speed"]["reference"] > 0
    assert report["speed"]["automatic"] > 0
    assert set(report["backends"]) >= {"attention", "gelu", "layernorm"}
    # The checkpoint is an ordinary directory of weights.
    bertfast.BertForMaskedLM.from_pretrained(out)

    # Its own directory may be used again; text files work; people get text on stdout.
    text = tmp_path / "text.txt"
    sentence = "The {} of number {} is here and it is not the same as the other one.\n"
    text.write_text(
        "\n".join(
            "".join(sentence.format(word, i) for i in range(12))
            for word in ("cat", "dog", "house", "tree", "river", "city")
        )
    )
    arguments = [*TINY, "--vocab-size", "200", "--minutes", "0.01", "--out", str(out)]
    run = command("demo", *arguments, "--text", str(text))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"[1/8] Text\n      {text}\n      6 documents, 72 sentences")
    assert "Done in" in run.stdout


def test_help_and_version(capsys) -> None:
    for arguments in (["--help"], ["demo", "--help"], ["env", "--help"]):
        assert main(arguments) == 0
        assert "usage: bertfast" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bertfast {bertfast.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from bertfast.cli import main; main(['demo', '--help'])\n"
        "assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules), 'heavy import'"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["demo", "--unknown"],
        ["demo", "--minutes", "0"],
        ["demo", "--minutes", "nan"],
        ["demo", "--minutes", "soon"],
        ["demo", "--hidden", "100"],
        ["demo", "--layers", "0"],
        ["demo", "--lr", "-1"],
        ["demo", "--seed", "-1"],
        ["demo", "--seed", "1.5"],
        ["demo", "--length", "8"],
        ["demo", "--text"],
    ],
)
def test_bad_arguments_are_one_line_and_code_2(arguments, capsys) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bertfast")
    assert captured.err.count("\n") == 1


def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    binary, short, foreign = tmp_path / "binary", tmp_path / "short.txt", tmp_path / "foreign"
    binary.write_bytes(b"\xff\xfe\x00")
    short.write_text("One document only. It has no blank line.")
    foreign.mkdir()
    (foreign / "precious.txt").write_text("mine")
    expected = {
        ("--text", "missing.txt"): "missing.txt: No such file or directory",
        ("--text", str(binary)): f"{binary}: expected UTF-8 text, got byte 0xff at offset 0",
        ("--text", str(short)): "documents: expected at least 4",
        ("--text", str(tmp_path)): f"{tmp_path}: Is a directory",
        ("--out", str(foreign)): "out: expected a new or empty directory or one of an earlier demo",
        ("--out", str(short)): "out: expected a directory, got the file",
        ("--vocab-size", "10"): "vocab_size: expected at least",
    }
    for arguments, message in expected.items():
        assert main(["demo", *arguments]) == 2, arguments
        captured = capsys.readouterr()
        last = captured.err.rstrip("\n").rsplit("\n", 1)[-1]
        assert last.startswith(f"bertfast demo: {message}")
        assert captured.err.count("\n") == 1
    assert [path.name for path in foreign.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        (errors.KernelError("bertfast._cpu.gelu ran out of memory:\n rows=3"),
         "bertfast._cpu.gelu ran out of memory: rows=3"),
        (errors.BackendError("gelu: no"), "gelu: no"),
        (errors.CheckpointError("a:\n b"), "a: b"),
        (errors.InputError(2, "empty"), "input 2: empty"),
        # As oneDNN refuses a dtype, and torch an operation.
        (RuntimeError("bf16 path needs the cpu support avx512bw\nframe #0: ..."),
         "bf16 path needs the cpu support avx512bw"),
        (NotImplementedError("mm is not implemented for Half"), "mm is not implemented for Half"),
        (RuntimeError(), "RuntimeError"),
        (MemoryError(), "out of memory"),
        (ImportError("BERTFAST_CPU_ISA: expected one of"), "BERTFAST_CPU_ISA: expected one of"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
    ],
)  # fmt: skip
def test_any_known_failure_is_one_line_and_code_2(failure, shown, capsys, monkeypatch) -> None:
    def fail():
        raise failure

    monkeypatch.setattr(environment, "collect", fail)
    assert main(["env"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"bertfast env: {shown}\n")


def test_a_mistake_of_our_own_keeps_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr(environment, "collect", lambda: {}["missing"])
    with pytest.raises(KeyError):
        main(["env"])


def test_an_instruction_set_that_is_not_there_is_one_line() -> None:
    run = subprocess.run(
        [sys.executable, "-P", "-m", "bertfast", "embed", "--model", ".", "text"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "BERTFAST_CPU_ISA": "none"},
    )
    assert run.returncode == 2
    assert run.stderr.startswith("bertfast embed: BERTFAST_CPU_ISA: expected one of baseline")
    assert run.stderr.count("\n") == 1


def test_env(capsys) -> None:
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"]
    assert main(["env"]) == 0
    assert "torch" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_ctrl_c_is_130_without_a_traceback(tmp_path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "bertfast", "demo", "--out", str(tmp_path / "demo")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background job, as which the tests may run, has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[4/8]"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert error.endswith("interrupted\n")
    # What is left belongs to the demo, so that it can be run again.
    from bertfast.demo import prepare_directory

    prepare_directory(tmp_path / "demo")


def test_a_reader_that_leaves_is_no_error() -> None:
    run = subprocess.run(
        f"{sys.executable} -P -m bertfast env | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stderr == ""
