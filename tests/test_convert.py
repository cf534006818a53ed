"""``bertfast convert``: what it writes, what it chooses, what it refuses, and that nothing is half
written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bertfast
from bertfast import convert as module
from bertfast.cli import HEADS, main
from bertfast.convert import CLASSES, ConvertSettings, choose_head, convert
from bertfast.data import load_tokenizer, save_tokenizer, train_vocab
from bertfast.data.tokenizer_config import read_tokenizer_config
from bertfast.errors import CheckpointError

FILES = Path(__file__).parent / "model" / "tensorflow"
CONFIG = {
    "vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 10,
}  # fmt: skip


def run(source, out, **options):
    return convert(ConvertSettings(str(source), str(out), **options))


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def same(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize(
    ("name", "cls", "left_out"),
    [
        ("pretraining", "BertForPreTraining", ["93 of the optimizer's variables"]),
        ("sharded/bert_model.ckpt", "BertForPreTraining", []),
        ("classifier", "BertForSequenceClassification", ["1 of the optimizer's variables"]),
        ("squad", "BertForQuestionAnswering", ["bert.pooler"]),
    ],
)
def test_tensorflow_checkpoints(name, cls, left_out, tmp_path):
    report = run(FILES / name, tmp_path / "out")
    assert (report["class"], report["left_out"], report["warnings"]) == (cls, left_out, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = getattr(bertfast, cls).from_pretrained(tmp_path / "out")
    same(model, getattr(bertfast, cls).from_pretrained(FILES / name))
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["hidden_act"] == model.config.hidden_act == "gelu_new"
    assert report["dtype"] == str(model.dtype).removeprefix("torch.")
    there = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    assert report["files"] == there
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_transformers_reads_what_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    run(FILES / "pretraining", tmp_path / "out")
    ours = bertfast.BertForPreTraining.from_pretrained(tmp_path / "out")
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("The quick fox", "runs.", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[2, 5, 12, 7, 3, 9, 17, 3]]
    with torch.no_grad():
        got, expected = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(got.prediction_logits, expected.prediction_logits)
    torch.testing.assert_close(got.seq_relationship_logits, expected.seq_relationship_logits)


def test_options(tmp_path):
    report = run(
        FILES / "pretraining", tmp_path / "out", head="masked-lm", dtype=torch.bfloat16,
        hidden_act="gelu", max_positions=4, lowercase=False,
    )  # fmt: skip
    assert report["left_out"][:2] == ["bert.pooler", "cls.seq_relationship"]
    assert report["tokenizer"] == {"tokens": 24, "lowercase": False}
    model = bertfast.BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert (model.config.hidden_act, model.config.max_position_embeddings) == ("gelu", 4)
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (tokenizer["model_max_length"], tokenizer["do_lower_case"]) == (4, False)
    assert load_tokenizer(tmp_path / "out").encode("The the").tokens[1:3] == ["[UNK]", "the"]


def test_a_head_that_is_not_there_is_announced(tmp_path):
    report = run(FILES / "squad", tmp_path / "out", head="sequence-classification")
    (warning,) = report["warnings"]
    assert "has no classifier, which BertForSequenceClassification draws anew" in warning
    encoder = run(FILES / "squad", tmp_path / "encoder", head="encoder")
    assert (encoder["class"], encoder["left_out"]) == ("BertModel", ["qa_outputs"])


@pytest.mark.parametrize(
    ("architectures", "parts", "head"),
    [
        (None, ["bert.pooler.", "cls.predictions.", "cls.seq_relationship."], "pretraining"),
        (None, ["cls.predictions."], "masked-lm"),
        (None, ["bert.pooler.", "cls.seq_relationship."], "next-sentence"),
        (None, ["bert.pooler.", "classifier."], "sequence-classification"),
        (None, ["classifier."], "token-classification"),
        (None, ["qa_outputs."], "question-answering"),
        (None, ["bert.pooler."], "encoder"),
        (None, [], "encoder"),
        (["BertForMultipleChoice"], ["bert.pooler.", "classifier."], "multiple-choice"),
        (["BertForTokenClassification"], ["bert.pooler.", "classifier."], "token-classification"),
        (["RobertaForSequenceClassification"], ["classifier."], "sequence-classification"),
        (["BertForMaskedLM"], ["cls.predictions.", "cls.seq_relationship."], "masked-lm"),
        (["ElectraForPreTraining"], [], "encoder"),
        (["BertForQuestionAnswering"], ["cls.predictions."], "masked-lm"),
        (["BertModel"], ["bert.pooler."], "encoder"),
        ("BertForMaskedLM", ["bert.pooler."], "encoder"),
        ([3, None, "(", "BertForMaskedLM"], ["cls.predictions."], "masked-lm"),
    ],
)
def test_the_head_is_chosen(architectures, parts, head):
    config = bertfast.BertConfig(extra={"architectures": architectures})
    assert choose_head(config, {f"{part}weight" for part in parts}) == head


def test_the_command_line_knows_the_heads():
    assert set(HEADS) == {"auto", *CLASSES}


@pytest.fixture
def saved(tmp_path):
    """A directory of bertfast's own, with a tokenizer and what sentence-transformers puts there."""
    directory = tmp_path / "saved"
    bertfast.BertModel(bertfast.BertConfig(**CONFIG)).save_pretrained(directory)
    tokenizer = train_vocab([["the quick brown fox jumps over the lazy dog"]], 60, min_frequency=1)
    save_tokenizer(tokenizer, directory, max_length=512)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text("{}")
    (directory / "modules.json").write_text("[]")
    (directory / "README.md").write_text("not copied")
    return directory


def test_a_hugging_face_directory_keeps_its_tokenizer(saved, tmp_path):
    before = (saved / "tokenizer.json").read_text()
    report = run(saved, tmp_path / "out", dtype=torch.float16)
    assert set(report["files"]) == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
        "modules.json", "1_Pooling/config.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "tokenizer.json").read_text() == before
    # The position table has ten rows, so no text may have more tokens.
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 10
    assert bertfast.BertModel.from_pretrained(tmp_path / "out").dtype == torch.float16


def test_relatives_become_bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(**CONFIG, type_vocab_size=1)
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    report = run(tmp_path / "roberta", tmp_path / "out")
    assert (report["class"], report["max_position_embeddings"]) == ("BertForMaskedLM", 8)
    assert report["tokenizer"] is None
    same(bertfast.BertForMaskedLM.from_pretrained(tmp_path / "out"),
         bertfast.BertForMaskedLM.from_pretrained(tmp_path / "roberta"))  # fmt: skip


def test_the_encoder_of_a_relative_s_classifier(tmp_path):
    """Its dense layer is no pooler of the encoder's."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(**CONFIG, type_vocab_size=1)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    assert run(tmp_path / "roberta", tmp_path / "out")["class"] == "BertForSequenceClassification"
    report = run(tmp_path / "roberta", tmp_path / "encoder", head="encoder")
    assert report["warnings"] == []
    model = bertfast.BertModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
    same(model, bertfast.BertModel.from_pretrained(tmp_path / "roberta", add_pooling_layer=False))


def content(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_it_does_not_overwrite(saved, tmp_path):
    source = FILES / "sharded"
    before = content(saved)
    with pytest.raises(ValueError, match=r"^out: expected a new or empty directory, .*--force re"):
        run(source, saved)
    assert content(saved) == before
    assert run(source, saved, force=True)["files"].keys() == {"config.json", "model.safetensors"}
    assert {p.name for p in saved.iterdir()} == {"config.json", "model.safetensors"}
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty")
    run(source, tmp_path / "new" / "sub")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "new", "saved"]


def test_what_is_no_place_to_write_to(saved, tmp_path, monkeypatch):
    home, file = tmp_path / "home", tmp_path / "file"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    file.write_text("mine")
    (tmp_path / "link").symlink_to(saved)
    for out, message in (
        (home, "expected a directory with a checkpoint to replace, got"),
        (file, "which is a file"),
        (tmp_path / "link", "which is a file"),
        (saved, "expected another directory than the source's"),
        (tmp_path, "expected another directory than the source's"),
        (".", "expected the name of a new directory, got"),
    ):
        with pytest.raises(ValueError, match=f"^out: .*{message}"):
            run(saved, out, force=True)
    assert (home / "letter.txt").read_text() == "dear"
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    "where", ["save_tokenizer", "sync", "_replace", "replace", "second replace"]
)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(where, error, saved, tmp_path, monkeypatch):
    before, calls = content(saved), []
    replace = os.replace

    def fail(*arguments, **options):
        raise error

    def fail_later(source, target):
        if Path(target) == saved:
            calls.append(target)
            if len(calls) == 1:
                raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        if where == "second replace":
            patch.setattr(module.os, "replace", fail_later)
        else:
            patch.setattr(module.os if where == "replace" else module, where, fail)
        with pytest.raises((OSError, KeyboardInterrupt)):
            run(FILES / "pretraining", saved, force=True)
    assert content(saved) == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_damaged_checkpoints_leave_nothing(tmp_path, capsys):
    source = Path(shutil.copytree(FILES / "pretraining", tmp_path / "source"))
    data = source / "bert_model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-8] + bytes(8))  # global_step is not read
    run(source, tmp_path / "fine")
    data.write_bytes(bytes(len(data.read_bytes())))
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bertfast convert: {data}: expected bert/embeddings/word_embeddings")
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fine", "source"]


def test_tokenizers_that_do_not_fit(saved, tmp_path):
    source = Path(shutil.copytree(FILES / "pretraining", tmp_path / "source"))
    vocab = source / "vocab.txt"
    text = vocab.read_text()
    vocab.write_text(text + "more\n")
    with pytest.raises(
        CheckpointError, match=r"expected a vocabulary of at most 24 tokens, .* got 25"
    ):
        run(source, tmp_path / "out")
    vocab.write_text(text.replace("[MASK]", "[GAP]"))
    with pytest.raises(ValueError, match=r"vocab\.txt: tokenizer: expected the special tokens"):
        run(source, tmp_path / "out")
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizers file, got"):
        run(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flag_does_not_contradict_the_tokenizer(saved, tmp_path):
    message = (
        r"^--cased/--uncased: expected --uncased or neither, as .*/tokenizer\.json lower-cases"
    )
    with pytest.raises(ValueError, match=message + ", got --cased$"):
        run(saved, tmp_path / "out", lowercase=False)
    run(saved, tmp_path / "out", lowercase=True)


def test_what_cannot_be_read_or_written_goes_by_the_name_it_was_given(saved, tmp_path, capsys):
    out = tmp_path / ("long" * 63)  # what is written beside it has a longer name
    assert main(["convert", str(saved), str(out)]) == 2
    assert (
        capsys.readouterr().err == f"bertfast convert: {out}: {os.strerror(errno.ENAMETOOLONG)}\n"
    )
    config = saved / "tokenizer_config.json"
    config.write_text("{")
    assert main(["convert", str(saved), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"bertfast convert: {config}: expected JSON, got 1 ")
    config.unlink()
    config.symlink_to("nowhere")  # left out, as what is no file
    run(saved, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "saved"]


def test_a_copy_that_fails_names_the_place(saved, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run(saved, tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out")


def test_the_command(tmp_path, capsys):
    out = str(tmp_path / "out")
    arguments = ["convert", str(FILES / "squad"), out, "--head", "masked-lm", "--dtype", "float32"]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert "bertfast convert: warning: " in captured.err
    assert json.loads(captured.out)["dtype"] == "float32"
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("bertfast convert: out: expected a new or empty dir")
    assert main([*arguments, "--force"]) == 0
    assert f"-> {out}: BertForMaskedLM" in capsys.readouterr().out
    cased = [
        "convert",
        str(FILES / "pretraining"),
        out,
        "--force",
        "--cased",
        "--max-positions",
        "3",
    ]
    assert main([*cased, "--hidden-act", "gelu"]) == 0
    printed = capsys.readouterr().out
    assert "tokenizer: 24 tokens, keeps case" in printed
    assert "float32, gelu, 3 positions" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/place", "out"], "path: expected a directory, the prefix of a TensorFlow check"),
        ([str(FILES / "other" / "resnet.ckpt"), "out"], "expected the variables of Google's BERT"),
        ([str(FILES / "sharded"), "out", "--max-positions", "99"], "max_position_embeddings of at"),
        ([str(FILES / "sharded"), "out", "--head", "poet"], "argument --head: invalid choice"),
        ([str(FILES / "sharded"), "out", "--dtype", "int8"], "argument --dtype: invalid choice"),
        ([str(FILES / "sharded"), "out", "--cased", "--uncased"], "not allowed with argument"),
        ([str(FILES / "sharded")], "the following arguments are required: OUT"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tensors_beyond_the_model_are_left_out_by_pattern(tmp_path, capsys):
    source = tmp_path / "source"
    torch.manual_seed(0)
    model = bertfast.BertForPreTraining(bertfast.BertConfig(**CONFIG))
    model.save_pretrained(source)
    file = source / "model.safetensors"
    more = {"cls.species.weight": torch.ones(2, 8), "bert.embeddings.chains": torch.arange(3)}
    save_file({**load_file(file), **more}, file)
    with pytest.raises(CheckpointError, match=r"convert --ignore, leaves out what a pattern mat"):
        run(source, tmp_path / "out")
    arguments = ["convert", str(source), str(tmp_path / "out"), "--ignore", "cls.species.*"]
    assert main([*arguments, "--ignore", "*chains"]) == 0
    assert "  ignored: bert.embeddings.chains, cls.species.weight\n" in capsys.readouterr().out
    same(bertfast.BertForPreTraining.from_pretrained(tmp_path / "out"), model)
    # A head that is left out is not the one that is chosen.
    report = run(source, tmp_path / "words", ignore=(*more, "cls.seq_relationship.*"))
    assert report["class"] == "BertForMaskedLM"
    assert report["ignored"] == sorted([*more, "cls.seq_relationship.bias",
                                        "cls.seq_relationship.weight"])  # fmt: skip
    for pattern in ("cls.nothing.*", "cls.predictions.*"):
        assert main([*arguments, "--force", "--ignore", "*chains", "--ignore", pattern]) == (
            2 if "nothing" in pattern else 0
        )
    assert "got 'cls.nothing.*', which none of its" in capsys.readouterr().err


def converted(saved, tmp_path, files, kept="vocab.txt"):
    """What is written of a directory with ``vocab.txt`` and these settings, and its source."""
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if name != kept:
            (saved / name).unlink()
    for name, values in files.items():
        (saved / name).write_text(json.dumps(values))
    return run(saved, tmp_path / "out"), tmp_path / "out"


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "tokenize_chinese_chars": False},
    ],
)
def test_settings_of_a_vocab_txt_are_written_down(settings, saved, tmp_path):
    _, out = converted(saved, tmp_path, {"tokenizer_config.json": settings})
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert settings.items() <= written.items()
    text = "Thé quick 日 fox"
    expected = load_tokenizer(saved).encode(text).tokens
    for name in ("tokenizer.json", "vocab.txt"):
        assert load_tokenizer(out).encode(text).tokens == expected
        (out / name).unlink()


def test_added_tokens_of_a_vocab_txt_are_written_down(saved, tmp_path):
    words = (saved / "vocab.txt").read_text().splitlines()[:-1]
    (saved / "vocab.txt").write_text("\n".join(words))
    tokens = len(words)
    files = {
        "tokenizer_config.json": {"do_lower_case": True, "mask_token": "[MASK]"},
        "special_tokens_map.json": {"mask_token": {"content": "[MASK]", "lstrip": True}},
        "added_tokens.json": {"FooBar": tokens},
    }
    report, out = converted(saved, tmp_path, files)
    assert report["tokenizer"]["tokens"] == tokens + 1
    assert {*files} <= {*report["files"]}
    expected = load_tokenizer(saved).encode("the [MASK]FooBar").ids
    assert tokens in expected
    for name in ("special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.txt"):
        assert load_tokenizer(out).encode("the [MASK]FooBar").ids == expected
        (out / name).unlink()


@pytest.mark.parametrize(("limit", "written"), [(8, 8), (512, 10), (1e30, 10), (None, 10)])
@pytest.mark.parametrize("kept", ["vocab.txt", "tokenizer.json"])
def test_a_tokenizers_limit_is_kept(limit, written, kept, saved, tmp_path):
    files = {"tokenizer_config.json": {"do_lower_case": True, "model_max_length": limit}}
    _, out = converted(saved, tmp_path, files, kept)
    found = json.loads((out / "tokenizer_config.json").read_text())["model_max_length"]
    assert found == written


@pytest.mark.parametrize(("limit", "written"), [(8, 8), (512, 10)])
@pytest.mark.parametrize("kept", ["vocab.txt", "tokenizer.json"])
def test_a_limit_by_its_older_name_is_kept(limit, written, kept, saved, tmp_path):
    files = {"tokenizer_config.json": {"do_lower_case": True, "max_len": limit}}
    _, out = converted(saved, tmp_path, files, kept)
    assert read_tokenizer_config(out).max_length == written


def test_a_tokenizer_without_settings_gets_the_models_limit(saved, tmp_path):
    _, out = converted(saved, tmp_path, {}, "tokenizer.json")
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"model_max_length": 10}


def test_the_report_is_of_the_tokenizer_with_its_settings(saved, tmp_path):
    (saved / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert run(saved, tmp_path / "out")["tokenizer"]["lowercase"] is False
    with pytest.raises(ValueError, match=r"--cased/--uncased: expected --cased or neither"):
        run(saved, tmp_path / "other", lowercase=True)


@pytest.mark.parametrize("kept", ["vocab.txt", "tokenizer.json"])
def test_a_tokenizer_of_another_kind_is_not_converted(kept, saved, tmp_path):
    files = {"tokenizer_config.json": {"tokenizer_class": "BertJapaneseTokenizer"}}
    with pytest.raises(CheckpointError, match=r"tokenizer_class: expected .* got 'BertJapaneseTok"):
        converted(saved, tmp_path, files, kept)
    assert not (tmp_path / "out").exists()


def test_weights_of_modules_come_along(saved, tmp_path):
    for folder, name in (("2_Dense", "model.safetensors"), ("10_LayerNorm", "pytorch_model.bin")):
        (saved / folder).mkdir()
        (saved / folder / "config.json").write_text("{}")
        (saved / folder / name).write_bytes(b"weights")
    files = run(saved, tmp_path / "out")["files"]
    assert {"2_Dense/model.safetensors", "10_LayerNorm/pytorch_model.bin"} <= files.keys()
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes() == b"weights"
