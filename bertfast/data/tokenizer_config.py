"""What the files beside a vocabulary say of its tokenizer: ``tokenizer_config.json``, and the older
``special_tokens_map.json`` and ``added_tokens.json``. They are understood as transformers does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from bertfast.errors import CheckpointError
from bertfast.settings import Settings

FILE = "tokenizer_config.json"

# By these names transformers makes the same tokenizer: BERT's.
BERT_CLASSES = frozenset(
    {
        "BertTokenizer", "ConvBertTokenizer", "DPRContextEncoderTokenizer",
        "DPRQuestionEncoderTokenizer", "DPRReaderTokenizer", "DistilBertTokenizer",
        "ElectraTokenizer", "LayoutLMTokenizer", "LxmertTokenizer", "MobileBertTokenizer",
        "RealmTokenizer", "RetriBertTokenizer", "SqueezeBertTokenizer",
    }
)  # fmt: skip
# These are programs in Python, and do not read tokenizer.json even if it is there.
PYTHON_CLASSES = frozenset(
    {
        "BartphoTokenizer", "BertJapaneseTokenizer", "BertweetTokenizer", "BioGptTokenizer",
        "ByT5Tokenizer", "CanineTokenizer", "CpmTokenizer", "EsmTokenizer", "FlaubertTokenizer",
        "PhobertTokenizer", "ProphetNetTokenizer", "RoCBertTokenizer", "TapasTokenizer",
        "XLMTokenizer",
    }
)  # fmt: skip
# Of these transformers makes a tokenizer of one kind with a first token of its own, whatever
# tokenizer.json has: another one's ids would be other words.
MODELS = {
    **dict.fromkeys(BERT_CLASSES, "WordPiece"),
    **dict.fromkeys(("FunnelTokenizer", "MPNetTokenizer"), "WordPiece"),
    **dict.fromkeys(("LongformerTokenizer", "RobertaTokenizer"), "BPE"),
    **dict.fromkeys(("AlbertTokenizer", "CamembertTokenizer", "XLMRobertaTokenizer"), "Unigram"),
}
STARTS = {
    **dict.fromkeys(BERT_CLASSES, "[CLS]"),
    "FunnelTokenizer": "<cls>",
    **dict.fromkeys(("LongformerTokenizer", "MPNetTokenizer", "RobertaTokenizer"), "<s>"),
    **dict.fromkeys(("CamembertTokenizer", "XLMRobertaTokenizer"), "<s>"),
}
# transformers gives the inputs of these no types, where model_input_names does not ask for them.
# PreTrainedTokenizerFast had types in its version 4, and has none in 5.
UNTYPED = frozenset(
    {
        "DistilBertTokenizer", "FunnelTokenizer", "MPNetTokenizer", "PreTrainedTokenizer",
        "TokenizersBackend",
    }
)  # fmt: skip
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
FLAGS = {"lstrip", "rstrip", "normalized", "single_word", "special"}
# Where the tokenizer came from, how texts are padded (rows here are not), decoding, chats,
# warnings, and offsets, which the tasks trim themselves. A key that nobody knows is refused: it may
# be of a tokenizer that cuts texts by it.
HARMLESS = frozenset(
    {
        "_commit_hash", "_from_auto", "backend", "cache_dir", "chat_template",
        "chat_control_tokens", "clean_up_tokenization_spaces",
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
        "deprecation_warnings", "device", "device_map", "errors", "files_loaded", "force_download",
        "from_slow", "full_tokenizer_file", "is_local", "lang", "legacy", "local_files_only",
        "max_length", "merges_file", "model_type", "name_or_path", "pad_to_multiple_of",
        "pad_token_id", "pad_token_type_id", "padding", "padding_side", "processor_class",
        "response_schema", "response_template", "return_attention_mask", "return_tensors",
        "revision", "sp_model_kwargs", "special_tokens_map_file", "stride", "tokenizer_file",
        "tokenizer_version", "transformers_version", "trim_offsets", "truncation",
        "truncation_strategy", "trust_remote_code", "use_auth_token",
        "use_default_system_prompt", "use_fast", "verbose", "vocab_file", "vocab_size",
    }
    # AutoTokenizer.from_pretrained keeps whatever else it is given, which is for the model.
    | {
        "_name_or_path", "_fast_init", "architectures", "attn_implementation", "auto_class",
        "bad_words_ids", "classifier_dropout", "dtype", "finetuning_task", "from_flax", "from_pt",
        "from_tf", "gradient_checkpointing", "id2label", "ignore_mismatched_sizes", "label2id",
        "language", "load_in_4bit", "load_in_8bit", "low_cpu_mem_usage", "max_memory",
        "max_seq_length", "mirror", "num_labels", "offload_folder", "offload_state_dict",
        "output_attentions", "output_hidden_states", "output_loading_info", "problem_type",
        "proxies", "quantization_config", "resume_download", "return_dict", "return_unused_kwargs",
        "state_dict", "subfolder", "task", "tie_word_embeddings", "token", "tokenizer_type",
        "torch_dtype", "torchscript", "tp_plan", "use_cache", "use_safetensors", "variant",
        "weights_only",
    }
    # transformers looks ids up by their tokens.
    | {f"{role}_token_id" for role in ROLES}
)  # fmt: skip


@dataclass
class TokenizerConfig:
    """What the files say.

    serialized: whether there is ``tokenizer.json``, whose tokens have their flags already; those of
    ``vocab.txt`` are the settings' to say. kind: the class, without the "Fast" that it may end
    with. normalizer: those of BertNormalizer's arguments that they give. max_length: tokens of an
    input at most, if they limit it. token_types: whether the second text of a pair has another type
    than the first. declared: tokens with an id, in the order of their ids; ``final`` if their flags
    are those to take, even against ``tokenizer.json``'s. named: by role. extra: tokens without an
    id or role.
    """

    file: Path
    serialized: bool
    kind: str | None = None
    normalizer: dict[str, bool | None] = field(default_factory=dict)
    max_length: int | None = None
    token_types: bool = True
    add_prefix_space: bool | None = None
    declared: dict[int, AddedToken] = field(default_factory=dict)
    final: bool = False
    named: dict[str, AddedToken] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """Read what is there of the three files.

    Raises CheckpointError for what is damaged, and for a setting that is neither obeyed nor without
    effect.
    """
    serialized = (directory / "tokenizer.json").is_file()
    settings = Settings.read(directory / FILE)
    found = TokenizerConfig(settings.file, serialized, _kind(directory, settings, serialized))
    for key, argument in (
        ("do_lower_case", "lowercase"),
        ("strip_accents", "strip_accents"),
        ("tokenize_chinese_chars", "handle_chinese_chars"),
    ):
        # Of the three, only strip_accents means something by null: what do_lower_case says.
        if key in settings:
            value = settings.flag(key)
            if value is not None or key == "strip_accents":
                found.normalizer[argument] = value
    found.max_length = _length(settings)
    found.token_types = _has_token_types(settings, found.kind)
    found.add_prefix_space = settings.flag("add_prefix_space")
    _refuse_other_ways(settings, serialized)
    _read_tokens(directory, settings, found)
    settings.finish(HARMLESS)
    return found


def _kind(directory: Path, settings: Settings, serialized: bool) -> str | None:
    name = settings.text("tokenizer_class")
    file, key = settings.file, "tokenizer_class"
    if name is None:
        other = Settings.read(directory / "config.json")
        name, file = other.text(key), other.file
    if name is None:
        return None
    kind = name.removesuffix("Fast")
    if kind in PYTHON_CLASSES or not (serialized or kind in BERT_CLASSES):
        expected = "one that tokenizer.json is for" if serialized else "BertTokenizer"
        raise CheckpointError(
            f"{file}: {key}: expected {expected}, got {name!r}, which cuts texts in another way"
        )
    return kind


def _length(settings: Settings) -> int | None:
    lengths = []
    for key in ("model_max_length", "max_len"):
        value = settings.take(key, (int, float), "a number of tokens")
        if value is None or value == math.inf:
            continue
        if value < 1 or value != int(value):
            raise settings.error(key, value, "a number of tokens")
        lengths.append(int(value))
    return lengths[0] if lengths else None


def _has_token_types(settings: Settings, kind: str | None) -> bool:
    names = settings.take("model_input_names", list, "a list of names")
    settings.only("return_token_type_ids", True)
    return kind not in UNTYPED if names is None else "token_type_ids" in names


def _refuse_other_ways(settings: Settings, serialized: bool) -> None:
    """Settings that cut texts in another way than this package can."""
    settings.only("truncation_side", "right")
    settings.only("split_special_tokens", False)
    settings.only("add_special_tokens", True)
    settings.only("clean_text", True)
    settings.only("wordpieces_prefix", "##")
    settings.only("init_inputs", [])
    settings.only("fast_tokenizer_files", [], ["tokenizer.json"])
    classes = settings.take("auto_map", (dict, list), "an object")
    classes = classes.get("AutoTokenizer") if isinstance(classes, dict) else classes
    if classes:
        raise settings.error("auto_map", classes, "no tokenizer of its own, whose code is not run")
    special = {f"[{role.upper()}]" for role in ROLES}
    never = settings.take("never_split", list, "a list of tokens")
    basic = settings.flag("do_basic_tokenize")
    if not serialized:
        # tokenizer.json has settled these; only the slow tokenizers of vocab.txt asked for them.
        if never and not special.issuperset(never):
            raise settings.error("never_split", never, "special tokens only")
        if basic is False:
            raise settings.error("do_basic_tokenize", basic, "true")
        settings.only("add_bos_token", False)
        settings.only("add_eos_token", False)
    else:
        settings.flag("add_bos_token")
        settings.flag("add_eos_token")
    settings.only("do_word_tokenize", True)
    settings.only("do_subword_tokenize", True)
    settings.only("word_tokenizer_type", "basic")
    settings.only("subword_tokenizer_type", "wordpiece")


def _read_tokens(directory: Path, settings: Settings, found: TokenizerConfig) -> None:
    """As transformers does: older names count where there are no newer ones, and the two older
    files where there is no ``added_tokens_decoder``."""
    found.final = "added_tokens_decoder" in settings
    entries = settings.take("added_tokens_decoder", dict, "tokens by their ids") or {}
    for id, value in entries.items():
        if not str(id).isdecimal() or not isinstance(value, dict):
            raise settings.error("added_tokens_decoder", {id: value}, "tokens by their ids")
        found.declared[int(id)] = _token(settings, "added_tokens_decoder", value)
    named = _named(settings)
    tokens, older_tokens = (_extra(settings, key, named) for key in EXTRA)
    tokens = tokens or older_tokens
    if not found.final:
        older = Settings.read(directory / "special_tokens_map.json")
        named |= _named(older)
        more, older_tokens = (_extra(older, key, named) for key in EXTRA)
        older.finish()
        contents = {token.content for token in tokens}
        tokens += [token for token in more if token.content not in contents]
        special = {token.content for token in tokens}
        special |= {named[role].content for role in ROLES if role in named}
        tokens = tokens or older_tokens
        ids = Settings.read(directory / "added_tokens.json")
        for content, _ in ids.items():
            id = ids.take(content, int, "an id")
            if id is not None:
                plain = content not in special
                found.declared[id] = AddedToken(content, normalized=plain, special=not plain)
    flags = {token.content: token for token in found.declared.values()}
    found.named = {role: flags.get(token.content, token) for role, token in named.items()}
    for token in found.named.values():
        token.special = True
    found.declared = dict(sorted(found.declared.items()))
    found.extra = tokens


def _named(settings: Settings) -> dict[str, AddedToken]:
    """Tokens by their role: of the seven that transformers knows, in its order, and those that a
    model has by itself, as ``image_token``."""
    keys = [f"{role}_token" for role in ROLES]
    keys += [
        key
        for key, value in settings.items()
        if key.endswith("_token") and key not in (*keys, "use_auth_token")
        and isinstance(value, (str, dict))
    ]  # fmt: skip
    values = {key: settings.take(key, (str, dict), "a token") for key in keys}
    more = settings.take("model_specific_special_tokens", dict, "tokens by their names")
    values |= more or {}
    return {
        key.removesuffix("_token"): _token(settings, key, value)
        for key, value in values.items()
        if value is not None
    }


def _extra(settings: Settings, key: str, named: dict[str, AddedToken]) -> list[AddedToken]:
    """Tokens without a role. Where they have names, they go to ``named``."""
    values = settings.take(key, (list, dict), "a list of tokens") or []
    if isinstance(values, dict):
        named |= {name: _token(settings, key, value) for name, value in values.items()}
        return []
    return [_token(settings, key, value) for value in values]


def _token(settings: Settings, key: str, value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    expected = "a token, or an object with its content and flags"
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise settings.error(key, value, expected)
    flags = {name: flag for name, flag in value.items() if name not in ("content", "__type", "id")}
    if not set(flags) <= FLAGS or not all(isinstance(flag, bool) for flag in flags.values()):
        raise settings.error(key, value, expected)
    # The files that leave "special" out are of special tokens only.
    return AddedToken(value["content"], **{"special": True, **flags})


def apply(config: TokenizerConfig, tokenizer: Tokenizer, specials: Sequence[str]) -> None:
    """Make a tokenizer do what its files say: normalizer, added tokens, types of a pair.

    ``specials`` are the tokens it has for padding, unknown words, start, end and mask, in this
    order, or none.

    Raises CheckpointError where the files contradict each other and transformers, too, would have
    to guess.
    """
    _match_class(config, tokenizer, specials)
    _normalize(config, tokenizer)
    _add_prefix_space(config, tokenizer)
    for role, content in zip(("pad", "unk", "cls", "sep", "mask"), specials, strict=False):
        token = config.named.get(role)
        if token is not None and token.content != content:
            raise CheckpointError(
                f"{config.file}: {role}_token: expected {content!r}, as in the vocabulary, "
                f"got {token.content!r}"
            )
    _add_tokens(config, tokenizer)
    if not config.token_types and specials:
        pair = tokenizer.encode(specials[-1], specials[-1])
        if any(pair.type_ids):
            ids = [(token, tokenizer.token_to_id(token)) for token in specials[2:4]]
            texts = iter(("$A", "$B:0"))
            # RoBERTa has two tokens between the texts, BERT one.
            parts = [next(texts) if t == specials[-1] else f"{t}:0" for t in pair.tokens]
            start, end = specials[2:4]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{start} $A {end}", pair=" ".join(parts), special_tokens=ids
            )


def _match_class(config: TokenizerConfig, tokenizer: Tokenizer, specials: Sequence[str]) -> None:
    """Refuse a class that makes another tokenizer than the one that is there."""
    kind = config.kind
    if kind is None:
        return
    got = type(tokenizer.model).__name__
    if MODELS.get(kind, got) != got:
        raise CheckpointError(
            f"{config.file}: tokenizer_class: expected one for tokenizer.json's {got}, got "
            f"{kind!r}, which is for {MODELS[kind]}"
        )
    # Where the start is named, that is what counts.
    start = None if "cls" in config.named else STARTS.get(kind)
    if specials and start not in (None, specials[2]):
        raise CheckpointError(
            f"{config.file}: tokenizer_class: expected one whose texts start with {specials[2]!r}, "
            f"as in the vocabulary, got {kind!r}, whose texts start with {start!r}"
        )


def _normalize(config: TokenizerConfig, tokenizer: Tokenizer) -> None:
    # Other classes take tokenizer.json as it is.
    if config.kind not in (None, *BERT_CLASSES):
        return
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        for name, value in config.normalizer.items():
            if getattr(normalizer, name) != value:
                setattr(normalizer, name, value)
                tokenizer.normalizer = normalizer
        return
    # transformers would put BertNormalizer in its place. Where both do the same, nothing is lost.
    if type(tokenizer.model) is not models.WordPiece:
        return
    lowers = _normalized(tokenizer, "A") == "a"
    wanted = dict(config.normalizer)
    lowercase = wanted.get("lowercase")
    if wanted.get("strip_accents", False) is None:
        wanted["strip_accents"] = lowers if lowercase is None else lowercase
    for key, argument, does in (
        ("do_lower_case", "lowercase", lowers),
        ("strip_accents", "strip_accents", _normalized(tokenizer, "\u00e9") == "e"),
        ("tokenize_chinese_chars", "handle_chinese_chars", _splits(tokenizer, "\u4e2d\u56fd")),
    ):
        value = wanted.get(argument)
        if value is not None and value != does:
            raise _contradiction(config, key, does, value)


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    found: str = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return found


def _splits(tokenizer: Tokenizer, text: str) -> bool:
    text, splitter = _normalized(tokenizer, text), tokenizer.pre_tokenizer
    return len(splitter.pre_tokenize_str(text) if splitter else text.split()) > 1


def _add_prefix_space(config: TokenizerConfig, tokenizer: Tokenizer) -> None:
    splitter, wanted = tokenizer.pre_tokenizer, config.add_prefix_space
    if wanted is None or splitter is None:
        return
    state = json.loads(splitter.__getstate__())
    for part in state.get("pretokenizers", [state]):
        adds = part.get("add_prefix_space", wanted)
        if part.get("type") == "Metaspace":
            adds = part.get("prepend_scheme", "always") != "never"
        if adds == wanted:
            continue
        if not isinstance(splitter, pre_tokenizers.ByteLevel):
            raise _contradiction(config, "add_prefix_space", adds, wanted)
        splitter.add_prefix_space = wanted
        tokenizer.pre_tokenizer = splitter


def _contradiction(config: TokenizerConfig, key: str, expected: bool, got: bool) -> CheckpointError:
    return CheckpointError(
        f"{config.file}: {key}: expected {expected}, as in tokenizer.json, got {got}"
    )


def _add_tokens(config: TokenizerConfig, tokenizer: Tokenizer) -> None:
    there = {}
    if config.serialized:
        there = {t.content: repr(t) for t in tokenizer.get_added_tokens_decoder().values()}
    known = set(there)
    new = []
    for token in config.declared.values():
        if token.content not in known or (config.final and there[token.content] != repr(token)):
            new.append(token)
        known.add(token.content)
    for token in (*config.named.values(), *config.extra):
        if token.content not in known:
            new.append(token)
            known.add(token.content)
    if new:
        tokenizer.add_tokens(new)
    for id, token in config.declared.items():
        if tokenizer.token_to_id(token.content) != id:
            raise CheckpointError(
                f"{config.file.parent}: expected the added token {token.content!r} to have the id "
                f"{tokenizer.token_to_id(token.content)}, which the vocabulary leaves to it, "
                f"got {id}"
            )


def is_lowercase(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer lower-cases text."""
    if tokenizer.normalizer is None:
        return False
    parts = json.loads(tokenizer.normalizer.__getstate__())
    return any(
        part.get("type") == "Lowercase" or part.get("lowercase") is True
        for part in parts.get("normalizers", [parts])
    )


def lowercase_first(tokenizer: Tokenizer) -> None:
    """Lower-case texts before the tokenizer's own normalizer, as sentence-transformers does."""
    parts = [normalizers.Lowercase()]
    if tokenizer.normalizer is not None:
        parts.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(parts)
