"""The settings beside a vocabulary: ids are those of transformers, or the setting is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from bertfast.data import load_tokenizer, save_tokenizer, train_vocab
from bertfast.data.tokenizer_config import is_lowercase, read_tokenizer_config
from bertfast.errors import CheckpointError

# Accents of one and of two code points, Turkish letters, Greek's two sigmas, ideographs, kana,
# white space and controls that are cleaned away, letters outside of the first plane.
TEXTS = [
    "Schön, NAÏVE Cafe\u0301 İstanbul ΣΊΣΥΦΟΣ ẞtraße",
    "日本語 カタカナ 漢字kanji 한국어 𝔊othic 🙂",
    "tab\tnew\nline zero\u200bwidth \u00a0 nul\x00 \ufffd end",
    "a FooBar foobar FOOBAR <x><X> x [MASK] [mask]the[MASK] , [SEP] fox-trot",
    "",
]


@pytest.fixture(scope="module")
def vocab():
    words = re.sub(r"\[\w+\]|[Ff]oo[Bb]ar|FOOBAR", "f##o bar F##B O##A R", " ".join(TEXTS))
    lowered = [words, words.lower(), words.lower().replace("\u0301", ""), "schon naive istanbul"]
    return train_vocab([lowered * 2], 400, lowercase=False)


@pytest.fixture
def write(vocab, tmp_path):
    """A directory with ``vocab.txt`` or ``tokenizer.json`` and settings."""

    def make(files, kept="vocab.txt", **model) -> Path:
        save_tokenizer(vocab, tmp_path)
        for name in {"vocab.txt", "tokenizer.json"} - {kept} | {"tokenizer_config.json"}:
            (tmp_path / name).unlink()
        for name, content in {"config.json": {"model_type": "bert", **model}, **files}.items():
            (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    return make


def token(content, **flags):
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, **usual, "special": True, **flags}


def settings(**values):
    return {"tokenizer_config.json": values}


def check(directory) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = load_tokenizer(directory)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
        pair = ours.encode(text, "the fox")
        expected = theirs(text, "the fox")
        assert pair.ids == expected["input_ids"]
        assert pair.type_ids == expected.get("token_type_ids", [0] * len(pair.ids))
    assert ours.get_vocab() == theirs.get_vocab()
    flags, expected = (
        {id: repr(token) for id, token in tokenizer.get_added_tokens_decoder().items()}
        for tokenizer in (ours, theirs.backend_tokenizer)
    )
    assert flags == expected


@pytest.mark.parametrize("kept", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"strip_accents": True},
        {"strip_accents": False},
        {"strip_accents": None, "tokenize_chinese_chars": False},
        {"tokenizer_class": "ElectraTokenizerFast", "tokenize_chinese_chars": False},
        {"tokenizer_class": "DistilBertTokenizer", "never_split": None, "do_basic_tokenize": True},
        {"tokenizer_class": "BertTokenizerFast", "model_input_names": ["input_ids"]},
    ],
)
def test_words_are_cut_as_transformers_cuts_them(values, lower, kept, write) -> None:
    values = {"do_lower_case": lower, **values}
    directory = write(settings(**values), kept)
    check(directory)
    assert is_lowercase(load_tokenizer(directory)) == lower


def test_a_class_that_takes_tokenizer_json_as_it_is(write) -> None:
    # Of the types of a pair, transformers 4 and 5 think differently for this class unless told.
    names = ["input_ids", "token_type_ids", "attention_mask"]
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names}
    directory = write(settings(do_lower_case=True, **values), "tokenizer.json")
    check(directory)
    assert not is_lowercase(load_tokenizer(directory))


def test_strip_accents_of_the_report(tmp_path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "schon", "schön"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = tmp_path / "tokenizer_config.json"
    for settings, word in (
        ({"do_lower_case": True, "strip_accents": False}, "schön"),
        ({"do_lower_case": True}, "schon"),
        ({"do_lower_case": True, "strip_accents": True}, "schon"),
    ):
        config.write_text(json.dumps(settings))
        assert load_tokenizer(tmp_path).encode("Schön").tokens[1:-1] == [word]


def added(vocab) -> list[dict]:
    n = vocab.get_vocab_size()
    plain = {"special": False, "normalized": True}
    return [
        {"added_tokens.json": {"FooBar": n, "<x>": n + 1}},
        {"added_tokens.json": {"<x>": n + 1, "FooBar": n},
         "special_tokens_map.json": {"additional_special_tokens": ["<x>"]}},
        {"added_tokens.json": {"FooBar": n},
         **settings(additional_special_tokens=["FooBar", "<x>"])},
        {"special_tokens_map.json": {"mask_token": token("[MASK]", lstrip=True),
                                     "cls_token": "[CLS]"}},
        {"special_tokens_map.json": {"bos_token": "<x>", "eos_token": None}},
        settings(added_tokens_decoder={str(n): token("FooBar", **plain)}),
        settings(added_tokens_decoder={str(n): token("FooBar", normalized=True)}),
        settings(added_tokens_decoder={str(n): token("foo", single_word=True, **plain)}),
        settings(added_tokens_decoder={str(n): token("<x>", rstrip=True, **plain)},
                 do_lower_case=True),
        settings(added_tokens_decoder={str(n): token("<x>", **plain)}, bos_token="<x>"),
        # Where there is this key, the older files do not count.
        settings(added_tokens_decoder={"4": token("[MASK]", lstrip=True, rstrip=True)})
        | {"added_tokens.json": {"<x>": n},
           "special_tokens_map.json": {"mask_token": "[MASK]"}},
        settings(extra_special_tokens={"image_token": "<x>"}, foo_token="FooBar"),
        settings(extra_special_tokens=["<x>"], additional_special_tokens=["FooBar"]),
    ]  # fmt: skip


@pytest.mark.parametrize("kept", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("case", range(13))
def test_added_tokens_are_those_of_transformers(case, kept, vocab, write) -> None:
    files = added(vocab)[case]
    files["tokenizer_config.json"] = {
        "do_lower_case": False,
        **files.get("tokenizer_config.json", {}),
    }
    directory = write(files, kept)
    check(directory)
    if kept == "vocab.txt":
        # What is written of it is the same tokenizer, to both.
        expected = [load_tokenizer(directory).encode(text).ids for text in TEXTS]
        save_tokenizer(load_tokenizer(directory), directory / "new")
        for name in ("tokenizer.json", "vocab.txt"):
            assert [load_tokenizer(directory / "new").encode(t).ids for t in TEXTS] == expected
            (directory / "new" / "config.json").write_text('{"model_type": "bert"}')
            check(directory / "new")
            (directory / "new" / name).unlink()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "expected BertTokenizer, got 'BertJapanese"),
        ({"tokenizer_class": "CharTokenizer"}, "tokenizer_class: .* got 'CharTokenizer'"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "got 'PreTrainedTokenizerFast'"),
        ({"word_tokenizer_type": "mecab"}, "word_tokenizer_type: expected 'basic', got 'mecab'"),
        ({"subword_tokenizer_type": "character"}, "expected 'wordpiece', got 'character'"),
        ({"never_split": ["FooBar"]}, r"never_split: .* special tokens only, got \['FooBar'\]"),
        ({"do_basic_tokenize": False}, "do_basic_tokenize: expected true, got False"),
        ({"truncation_side": "left"}, "truncation_side: expected 'right', got 'left'"),
        ({"split_special_tokens": True}, "split_special_tokens: expected False, got True"),
        ({"auto_map": {"AutoTokenizer": ["a.B", None]}}, "auto_map: expected no tokenizer of its"),
        ({"strip_accents": "yes"}, "strip_accents: expected true or false, got 'yes'"),
        ({"cls_token": "<s>"}, r"cls_token: expected '\[CLS\]', .* got '<s>'"),
        ({"model_max_length": 0}, "model_max_length: expected a number of tokens, got 0"),
        ({"model_max_length": "512"}, "model_max_length: expected a number .* got '512'"),
        ({"model_max_length": 12.5}, "model_max_length: expected a number .* got 12.5"),
        ({"do_reverse": True}, "do_reverse: expected no such setting, .* got True"),
        ({"added_tokens_decoder": {"9999": {"content": "q"}}}, "'q' to have the id .* got 9999"),
        ({"added_tokens_decoder": {"4": "[MASK]"}}, "added_tokens_decoder: expected tokens by"),
        ({"mask_token": {"content": "[MASK]", "shift": 1}}, "mask_token: expected a token, or an"),
        ({"mask_token": 4}, "mask_token: expected a token, got 4"),
        ({"extra_special_tokens": [3]}, "extra_special_tokens: expected a token, .* got 3"),
    ],
)
def test_what_is_neither_obeyed_nor_without_effect_is_refused(values, message, write) -> None:
    directory = write(settings(do_lower_case=False, **values))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(directory)
    assert str(directory) in str(caught.value)


def test_the_older_files_are_refused_by_name(write) -> None:
    directory = write({"special_tokens_map.json": {"shift": 1}})
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json: shift: expected no such"):
        load_tokenizer(directory)
    directory = write({"special_tokens_map.json": {}, "added_tokens.json": {"q": "1"}})
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: q: expected an id, got '1'"):
        load_tokenizer(directory)


def test_the_class_of_the_models_config(write) -> None:
    directory = write({}, tokenizer_class="BertJapaneseTokenizer")
    message = r"/config\.json: tokenizer_class: .* got 'BertJapaneseTokenizer'"
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(directory)
    directory = write(settings(tokenizer_class="BertJapaneseTokenizer"), "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"got 'BertJapaneseTokenizer', which cuts texts in"):
        load_tokenizer(directory)


def test_settings_that_change_nothing(write) -> None:
    values = {
        "name_or_path": "x", "special_tokens_map_file": None, "tokenizer_file": "x", "max_len": 9,
        "backend": "tokenizers", "is_local": True, "chat_template": "x", "padding_side": "left",
        "clean_up_tokenization_spaces": True, "max_length": 128, "stride": 0, "use_fast": True,
        "truncation_strategy": "longest_first", "unheard_of": None, "extra_special_tokens": {},
        "processor_class": "X", "never_split": ["[CLS]"], "pad_to_multiple_of": 8,
        "auto_map": {}, "local_files_only": False, "pad_token_type_id": 0, "num_labels": 2,
        "torch_dtype": "float32", "id2label": {"0": "a"}, "cls_token_id": 2, "use_cache": True,
        "attn_implementation": "eager", "subfolder": "x", "from_pt": True, "_name_or_path": "x",
    }  # fmt: skip
    directory = write(settings(do_lower_case=False, **values))
    check(directory)
    assert read_tokenizer_config(directory).max_length == 9


@pytest.mark.parametrize(
    ("value", "limit"),
    [(32, 32), (512.0, 512), (1e30, 10**30), (int(1e30), int(1e30)), (None, None)],
)
def test_model_max_length(value, limit, write) -> None:
    found = read_tokenizer_config(write(settings(model_max_length=value))).max_length
    assert found == limit or (limit == 10**30 and found == int(1e30))


def test_other_normalizers_are_not_contradicted(write) -> None:
    directory = write(
        settings(do_lower_case=True, tokenizer_class="BertTokenizer"), "tokenizer.json"
    )
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.save(str(directory / "tokenizer.json"))
    assert is_lowercase(load_tokenizer(directory))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(directory / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"do_lower_case: expected False, as in tok"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_lower_case": False}, "do_lower_case: expected True, .* got False"),
        ({"do_lower_case": True, "strip_accents": False}, "strip_accents: expected True, .* False"),
        ({"tokenize_chinese_chars": True}, "tokenize_chinese_chars: expected False, .* got True"),
        ({"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": False}, None),
    ],
)
@pytest.mark.parametrize("kind", [{}, {"tokenizer_class": "BertTokenizer"}])
def test_normalizers_in_a_row_are_obeyed_or_refused(kind, values, message, write) -> None:
    directory = write(settings(**kind, **values), "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    parts = [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    tokenizer.normalizer = normalizers.Sequence(parts)
    tokenizer.save(str(directory / "tokenizer.json"))
    if message is None:
        assert "schon" in load_tokenizer(directory).normalizer.normalize_str("Schön")
        return
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(directory)


@pytest.mark.parametrize("kind", ["TokenizersBackend", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("names", [None, ["input_ids", "token_type_ids"]])
def test_types_of_a_tokenizer_without_a_class_of_its_own(kind, names, write) -> None:
    from transformers import AutoTokenizer

    named = {} if names is None else {"model_input_names": names}
    # transformers 5 has no types by default where the class is not BERT's.
    directory = write(settings(tokenizer_class=kind, unk_token="[UNK]", **named), "tokenizer.json")
    expected = AutoTokenizer.from_pretrained(directory)("a", "the fox")
    pair = load_tokenizer(directory).encode("a", "the fox")
    assert pair.ids == expected["input_ids"]
    assert pair.type_ids == expected.get("token_type_ids", [0] * len(pair.ids))
    assert any(pair.type_ids) == (names is not None)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("MPNetTokenizer", r"start with '\[CLS\]', .* got 'MPNetTokenizer', whose .* '<s>'"),
        ("RobertaTokenizerFast", "tokenizer.json's WordPiece, got 'RobertaTokenizer', .* for BPE"),
        ("XLMRobertaTokenizer", "WordPiece, got 'XLMRobertaTokenizer', which is for Unigram"),
    ],
)
def test_a_class_of_another_tokenizer_is_refused(kind, message, write) -> None:
    with pytest.raises(CheckpointError, match=f"tokenizer_class: expected .*{message}"):
        load_tokenizer(write(settings(tokenizer_class=kind), "tokenizer.json"))


def test_berts_class_over_another_model_is_refused(write) -> None:
    directory = write(settings(tokenizer_class="BertTokenizer"), "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.model = models.Unigram([(word, -1.0) for word in tokenizer.get_vocab()], 0, False)
    tokenizer.save(str(directory / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="Unigram, got 'BertTokenizer', which is for WordP"):
        load_tokenizer(directory)


def test_pairs_without_types_keep_the_tokens_between_the_texts(tmp_path) -> None:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(words[:5])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )  # fmt: skip
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "MPNetTokenizer"}')
    pair = load_tokenizer(tmp_path).encode("a", "a")
    assert pair.ids == [0, 5, 2, 2, 5, 2]
    assert not any(pair.type_ids)


def test_truncation_at_the_other_end_is_refused(write) -> None:
    directory = write({}, "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(20, direction="left")
    tokenizer.save(str(directory / "tokenizer.json"))
    with pytest.raises(ValueError, match="truncation: expected the direction Right, got 'left'"):
        load_tokenizer(directory)


def test_robertas_space_before_the_first_word(tmp_path) -> None:
    from transformers import AutoTokenizer, RobertaTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "Ġf", "Ġfo"]
    vocab = {word: id for id, word in enumerate(words)}
    merges = [("Ġ", "f"), ("Ġf", "o")]
    for stored in (False, True):
        RobertaTokenizer(vocab=vocab, merges=merges, add_prefix_space=stored).save_pretrained(
            tmp_path
        )
        (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
        file = tmp_path / "tokenizer_config.json"
        for wanted in (False, True):
            content = json.loads(file.read_text())
            file.write_text(json.dumps({**content, "add_prefix_space": wanted}))
            theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
            for text in ("fo fo<mask> x", "  fo", ""):
                assert ours.encode(text).ids == theirs(text)["input_ids"]
            assert ("Ġfo" in ours.encode("fo").tokens) == wanted


def test_a_space_that_sentencepiece_puts_is_not_contradicted(write) -> None:
    directory = write(settings(add_prefix_space=False, do_lower_case=False), "tokenizer.json")
    load_tokenizer(directory)  # BERT's puts none
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.save(str(directory / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="add_prefix_space: expected True, as in tokenizer"):
        load_tokenizer(directory)
