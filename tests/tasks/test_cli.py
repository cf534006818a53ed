"""The verbs that predict: what the functions give, as text and JSON; bad input; whole files."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

from bertfast.cli import main
from bertfast.cli.predict import _json_line
from bertfast.tasks import Answer, Classify, Embed, FillMask, NextSentence, Tag

VERBS = {
    "fill-mask": "BertForPreTraining",
    "next-sentence": "BertForPreTraining",
    "embed": "BertModel",
    "classify": "BertForSequenceClassification",
    "tag": "BertForTokenClassification",
    "answer": "BertForQuestionAnswering",
}
PAIRED = {"next-sentence": ("first", "second"), "answer": ("question", "context")}
TEXTS = ["Names [MASK] to objects.", "[MASK] is an\u2028expression"]
OTHERS = ["It is executed.", "The value is computed."]


def fields_of(verb):
    return PAIRED.get(verb, ("text",))


def inputs_of(verb):
    return list(zip(OTHERS, TEXTS, strict=True)) if verb in PAIRED else [(x,) for x in TEXTS]


def objects_of(verb):
    return [dict(zip(fields_of(verb), texts, strict=True)) for texts in inputs_of(verb)]


@pytest.fixture
def model(make_model):
    return lambda verb: str(make_model(VERBS[verb]))


def lines(capsys):
    captured = capsys.readouterr()
    assert captured.err == ""
    return [json.loads(line) for line in captured.out.removesuffix("\n").split("\n")]


def expected_of(verb, folder):
    inputs = inputs_of(verb)
    if verb == "fill-mask":
        found = FillMask.from_pretrained(folder).many(TEXTS)
        return [{"masks": [[f._asdict() for f in mask] for mask in masks]} for masks in found]
    if verb == "next-sentence":
        return [{"probability": p} for p in NextSentence.from_pretrained(folder).many(inputs)]
    if verb == "embed":
        return [{"embedding": v.tolist()} for v in Embed.from_pretrained(folder).many(TEXTS)]
    if verb == "classify":
        found = Classify.from_pretrained(folder).many(TEXTS)
        return [{"labels": [label._asdict() for label in labels]} for labels in found]
    if verb == "tag":
        return [
            {"words": [w._asdict() for w in t.words], "spans": [s._asdict() for s in t.spans]}
            for t in Tag.from_pretrained(folder).many(TEXTS)
        ]
    found = Answer.from_pretrained(folder).many(inputs)
    return [
        {
            "answer": a.best._asdict(),
            "candidates": [c._asdict() for c in a.candidates],
            "no_answer": a.no_answer,
            "null_difference": a.null_difference,
        }
        for a in found
    ]


def close(a, b):
    """Equal but for the last digits of numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-5, abs=1e-7) if isinstance(a, float) else a == b


@pytest.mark.parametrize("verb", VERBS)
def test_json_is_what_the_functions_give(verb, model, capsys, tmp_path) -> None:
    folder = model(verb)
    expected = [
        {**values, **result}
        for values, result in zip(objects_of(verb), expected_of(verb, folder), strict=True)
    ]
    arguments = [verb, "--model", folder, "--json"]
    flat = [text for texts in inputs_of(verb) for text in texts]
    assert main([*arguments, *flat]) == 0
    assert close(lines(capsys), expected)

    # The same from a file of lines, and from JSON Lines, whose other fields are kept.
    text = tmp_path / "input.txt"
    text.write_bytes(b"\xef\xbb\xbf" + "\r\n".join("\t".join(x) for x in inputs_of(verb)).encode())
    assert main([*arguments, "--input", str(text)]) == 0
    assert close(lines(capsys), expected)
    objects = tmp_path / "input.jsonl"
    values = [{"id": i, **x} for i, x in enumerate(objects_of(verb))]
    objects.write_text("\n\n".join(map(json.dumps, values)) + "\n")
    output = tmp_path / "output.jsonl"
    assert main([verb, "--model", folder, "--input", str(objects), "--output", str(output)]) == 0
    assert capsys.readouterr() == ("", "")
    found = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert close(found, [{"id": i, **x} for i, x in enumerate(expected)])
    assert sorted(os.listdir(tmp_path)) == ["input.jsonl", "input.txt", "output.jsonl"]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "embed"])
def test_text_for_people(verb, model, capsys) -> None:
    flat = [text for texts in inputs_of(verb) for text in texts]
    assert main([verb, "--model", model(verb), *flat]) == 0
    out = capsys.readouterr().out.rstrip("\n").split("\n")
    heads = [line for line in out if not line.startswith("  ")]
    assert heads == [" | ".join(" ".join(t.split()) for t in texts) for texts in inputs_of(verb)]
    results = [line.split() for line in out if line.startswith("  ")]
    assert len(results) >= 2
    assert all(0 <= float(words[0]) <= 1 for words in results)
    if verb == "fill-mask":
        assert main([verb, "--model", model(verb), "[MASK] [MASK]", "--top-k", "1"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert [out[0], out[1], out[3]] == ["[MASK] [MASK]", "  [MASK] 1", "  [MASK] 2"]
        assert len(out) == 5


def test_options_reach_the_task(model, capsys, tmp_path) -> None:
    folder = model("embed")
    array = tmp_path / "vectors.npy"
    options = ["--pooling", "max", "--layer", "0", "--layer", "-1", "--normalize", "--dimensions"]
    options += ["7", "--prompt", "Names: ", "--max-length", "9", "--long", "window"]
    options += ["--stride", "2", "--batch-tokens", "5", "--device", "cpu", "--dtype", "float32"]
    text = "the value of an expression is computed when it is executed"
    assert main(["embed", "--model", folder, text, "x", *options, "--output", str(array)]) == 0
    embed = Embed.from_pretrained(
        folder, pooling="max", layers=(0, -1), normalize=True, dimensions=7, prompt="Names: ",
        max_length=9, long="window", stride=2,
    )  # fmt: skip
    found = np.load(array)
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found), embed.many([text, "x"]))
    joined = ["--pooling", "weightedmean", "--pooling", "cls", "--output", str(array)]
    assert main(["embed", "--model", folder, text, *joined]) == 0
    embed = Embed.from_pretrained(folder, pooling=("weightedmean", "cls"))
    torch.testing.assert_close(torch.from_numpy(np.load(array)), embed.many([text]))

    assert main(["classify", "--model", model("classify"), "--pairs", "a", "b", "--json"]) == 0
    paired = lines(capsys)
    expected = Classify.from_pretrained(model("classify"))("a", "b")
    assert [label["score"] for label in paired[0]["labels"]] == pytest.approx(
        [label.score for label in expected]
    )
    options = ["--function", "none", "--top-k", "1", "--json"]
    assert main(["classify", "--model", model("classify"), "a", *options]) == 0
    best = Classify.from_pretrained(model("classify"), function="none")("a", top_k=1)[0]
    assert close(lines(capsys)[0]["labels"], [best._asdict()])

    options = ["--strategy", "max", "--words"]
    assert main(["tag", "--model", model("tag"), "Names refer.", *options]) == 0
    assert len(capsys.readouterr().out.split("\n")) == 5

    options = ["--no-answer", "--null-threshold", "-1000", "--max-answer-length", "1"]
    asked = ["answer", "--model", model("answer"), "what", "Names refer.", *options]
    for count in (1, 2):
        assert main([*asked, "--top-k", str(count)]) == 0
        out = capsys.readouterr().out.splitlines()
        assert len(out) == 1 + count  # the question, no answer, and the other candidates
        assert out[1].endswith("  no answer")
    assert main([*asked, "--json", "--top-k", "9"]) == 0
    (found,) = lines(capsys)
    assert found["answer"] is None
    assert {c["text"] for c in found["candidates"]} == {"Names", "refer", "."}
    # JSON has no infinity.
    assert main(["answer", "--model", model("answer"), "what", "", "--json"]) == 0
    assert lines(capsys)[0]["null_difference"] is None


def test_pairs_in_json_lines(model, capsys, tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"text": "a", "text_pair": "b"}\n{"text": "c", "text_pair": "d"}\n')
    assert main(["classify", "--model", model("classify"), "--input", str(path), "--json"]) == 0
    found = [x["labels"][0]["score"] for x in lines(capsys)]
    expected = Classify.from_pretrained(model("classify")).many([("a", "b"), ("c", "d")], 1)
    assert found == pytest.approx([labels[0].score for labels in expected], rel=1e-5)


def test_standard_input(model) -> None:
    run = subprocess.run(
        [sys.executable, "-P", "-m", "bertfast", "fill-mask", "--model", model("fill-mask"),
         "--json", "--top-k", "1"],
        input=b"the [MASK]\nan [MASK]\n", capture_output=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.stderr == b""
    assert [json.loads(line)["text"] for line in run.stdout.splitlines()] == [
        "the [MASK]",
        "an [MASK]",
    ]


@pytest.mark.parametrize(
    ("verb", "name", "content", "message"),
    [
        ("embed", "a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2: expected JSON, got"),
        ("embed", "a.jsonl", b'{"text": "a"}\n\n[1]\n', "a.jsonl:3: expected a JSON object, got l"),
        ("tag", "a.jsonl", b'{"txt": "a"}', 'a.jsonl:1: expected a string as "text", got none'),
        ("tag", "a.jsonl", b'{"text": 3}', 'a.jsonl:1: expected a string as "text", got int'),
        ("tag", "a.jsonl", b"[" * 100000, "a.jsonl:1: expected JSON, got"),
        ("tag", "a.jsonl", b'{"text": "a"}\n{"text": "a", "n": NaN}', "a.jsonl:2: expected JSON"),
        ("tag", "a.jsonl", b'{"text": "a", "n": -Infinity}', "a.jsonl:1: expected JSON, got"),
        ("embed", "a.jsonl", b'{"text": "a", "n": [1e400]}', "a.jsonl:1: expected JSON, got"),
        ("tag", "a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: expected Unicode text"),
        ("classify", "a.jsonl", b'{"text": "a", "text_pair": 1}', "a.jsonl:1: expected a str"),
        ("answer", "a.jsonl", b'{"question": "a"}', 'a.jsonl:1: expected a string as "context"'),
        ("answer", "a.txt", b"q\tc\nonly\n", "a.txt:2: expected question and context with a tab"),
        ("next-sentence", "a.txt", b"a\tb\tc\n", "a.txt:1: expected first and second with a tab"),
        ("embed", "a.txt", b"good\nb\xffad\n", "a.txt:2: expected UTF-8 text, got byte 0xff at 1"),
        ("embed", "a.txt", b"", "a.txt: expected at least one input, got an empty file"),
        ("embed", "a.jsonl", b"\n \n", "a.jsonl: expected at least one input, got an empty file"),
        ("fill-mask", "a.txt", b"a [MASK]\nnone\n", "a.txt:2: text: expected at least one [MASK]"),
        ("embed", "missing.txt", None, "missing.txt: No such file or directory"),
    ],
)  # fmt: skip
def test_bad_files(verb, name, content, message, model, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "out.jsonl").write_text("old")
    arguments = [verb, "--model", model(verb), "--input", name, "--output", "out.jsonl"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"bertfast {verb}: {message}")
    assert captured.err.count("\n") == 1
    # What was there stays, and nothing else is left.
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert set(os.listdir(tmp_path)) <= {name, "out.jsonl"}


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("fill-mask", ["no mask"], "input 1: text: expected at least one [MASK], got 'no mask'"),
        ("fill-mask", ["[MASK]", "--top-k", "0"], "argument --top-k: expected an integer from 1"),
        ("fill-mask", ["[MASK]", "--top-k", "99999"], "top_k: expected 1 to"),
        (
            "embed",
            ["a", "--pooling", "median"],
            "pooling: expected one of cls, max, mean, mean",
        ),
        ("embed", ["a", "--prompt-name", "q"], "prompt_name: expected none, as there are no prom"),
        ("embed", ["a", "--prompt-name", "q", "--prompt", "b"], "argument --prompt: not allowed"),
        ("embed", ["a", "--layer", "7"], "layers: expected -4 to 3, got 7"),
        ("embed", ["a", "--dimensions", "99"], "dimensions: expected 1 to 24 (numbers of a vect"),
        ("embed", ["a", "--input", "b.txt"], "expected TEXT or --input, got both"),
        ("embed", ["a", "--device", "nowhere"], "device: expected one that is here, got 'nowhere'"),
        ("embed", ["a", "--device", "meta"], "device: expected one that holds weights, got 'meta'"),
        ("embed", ["a", "--output", "no/such/x.npy"], "no/such/x.npy: No such file or directory"),
        ("embed", ["a", "--output", "."], ".: Is a directory"),
        ("answer", ["question"], "expected question and context for each input, got 1 arguments"),
        ("answer", ["q", "c", "--top-k", "50"], "top_k: expected 1 to 20 (n_best), got 50"),
        ("tag", ["a", "--strategy", "last"], "argument --strategy: invalid choice"),
    ],
)
def test_bad_arguments(verb, arguments, message, model, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([verb, "--model", model(verb), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"bertfast {verb}: {message}")
    assert captured.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "embed"])
def test_a_model_without_the_head(verb, model, capsys, recwarn) -> None:
    flat = [text for texts in inputs_of(verb) for text in texts]
    assert main([verb, "--model", model("embed"), *flat]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "expected the weights of a trained BertFor" in captured.err
    assert captured.err.count("\n") == 1
    assert not recwarn.list


def test_a_device_stays_what_it_is(model, tmp_path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        arguments = ["embed", "--model", model("embed"), "a", "--output", str(pipe)]
        assert main(arguments) == 0
        assert os.read(reader, 16).startswith(b'{"text": "a"')
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_other_fields_come_back_as_they_were(model, capsys, tmp_path) -> None:
    values = {"text": "a", "\ud83d": "\ude00 \u2028 é", "big": 10**30, "float": 1e300}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(values)}\n")
    arguments = ["classify", "--model", model("classify"), "--input", str(tmp_path / "a.jsonl")]
    assert main([*arguments, "--output", str(tmp_path / "b.jsonl")]) == 0
    (line,) = (tmp_path / "b.jsonl").read_bytes().decode("utf-8").splitlines()
    found = json.loads(line)
    assert found.pop("labels")
    assert found == values


def test_what_is_no_number_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        _json_line({"score": float("nan")})


def test_an_output_keeps_its_link_and_mode(model, tmp_path) -> None:
    target, link = tmp_path / "files" / "private.npy", tmp_path / "link.npy"
    target.parent.mkdir()
    link.symlink_to(target)
    arguments = ["embed", "--model", model("embed"), "a", "--output", str(link)]
    assert main(arguments) == 0  # a link to nothing yet
    target.write_bytes(b"old")
    target.chmod(0o600)
    assert main(arguments) == 0
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert np.load(target).shape == (1, 24)
    assert os.listdir(tmp_path / "files") == ["private.npy"]


@pytest.mark.parametrize(
    ("texts", "stream", "message"),
    [
        (["a"], "stdout", "stdout: expected it open, or --output FILE"),
        (["--input", "-"], "stdin", "stdin: expected it open, or --input FILE"),
        ([], "stdin", "expected TEXT, --input FILE or text on stdin"),
    ],
)
def test_closed_streams(texts, stream, message, model, capsys, monkeypatch) -> None:
    """What Python makes of ``>&-`` and ``<&-``."""
    monkeypatch.setattr(sys, stream, None)
    assert main(["classify", "--model", model("classify"), *texts]) == 2
    assert capsys.readouterr().err == f"bertfast classify: {message}\n"


def test_help_is_quick_and_complete(capsys) -> None:
    code = (
        "import sys; from bertfast.cli import main\n"
        f"for verb in {list(VERBS)}: assert main([verb, '--help']) == 0\n"
        "assert not {'torch', 'numpy', 'tokenizers', 'tqdm'} & set(sys.modules), 'heavy import'"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for option in ("--model", "--input", "--output", "--json", "--batch-tokens", "--device"):
        assert run.stdout.count(f"\n  {option}") == len(VERBS)
