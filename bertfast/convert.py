"""Any checkpoint that ``from_pretrained`` reads, to a directory in Hugging Face's layout."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bertfast.data.tokenizer_config import is_lowercase, read_tokenizer_config
from bertfast.data.vocab import load_tokenizer, save_tokenizer
from bertfast.errors import CheckpointError
from bertfast.model import heads
from bertfast.model.base import BertPreTrainedModel
from bertfast.model.bert import BertModel
from bertfast.model.checkpoint import build, checked_dtype, ignored, parts_of, sync, with_bert
from bertfast.model.config import BertConfig, read_json
from bertfast.model.families import CLASSIFIER, POOLER, PREDICTIONS, bert_names, possible_names
from bertfast.model.hub import COMPANIONS
from bertfast.model.sources import CONFIG, Source, directory_of, locate, open_source

# By what --head calls them: the class, and what a checkpoint has that is made for it.
CLASSES: dict[str, tuple[type[BertPreTrainedModel], set[str]]] = {
    "question-answering": (heads.BertForQuestionAnswering, {"qa_outputs."}),
    "sequence-classification": (heads.BertForSequenceClassification, {CLASSIFIER, POOLER}),
    "token-classification": (heads.BertForTokenClassification, {CLASSIFIER}),
    "multiple-choice": (heads.BertForMultipleChoice, {CLASSIFIER, POOLER}),
    "pretraining": (heads.BertForPreTraining, {PREDICTIONS, "cls.seq_relationship."}),
    "masked-lm": (heads.BertForMaskedLM, {PREDICTIONS}),
    "next-sentence": (heads.BertForNextSentencePrediction, {"cls.seq_relationship."}),
    "encoder": (BertModel, set()),
}


@dataclass(frozen=True)
class ConvertSettings:
    """What ``bertfast convert`` takes; see its ``--help``."""

    source: str
    out: str
    head: str = "auto"
    dtype: torch.dtype | None = None
    lowercase: bool | None = None
    hidden_act: str | None = None
    max_positions: int | None = None
    revision: str | None = None
    ignore: tuple[str, ...] = ()
    force: bool = False


def convert(settings: ConvertSettings) -> dict[str, Any]:
    """Write ``settings.out`` anew, all of it or nothing; returns a report of what is there.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or no BERT.
        ValueError: ``out`` is there already, or the tokenizer is damaged or does not fit.
        OSError: ``out`` cannot be written.
    """
    checked_dtype(settings.dtype)
    place = locate(settings.source, settings.revision)
    directory = directory_of(place)
    out = Path(settings.out)
    _check_out(out, directory, settings.force)
    source = open_source(place)
    ignoring = ignored(source, settings.ignore)
    kept = source.tensors.keys() - set(ignoring)
    stored = {with_bert(n) for n in possible_names(source.family, kept)}
    head = choose_head(source.config, stored) if settings.head == "auto" else settings.head
    cls, _ = CLASSES[head]
    options: dict[str, Any] = {}
    if cls is BertModel:
        names = bert_names(source.file, source.family, source.tensors, {POOLER}).values()
        options["add_pooling_layer"] = POOLER in parts_of(with_bert(n) for n in names if n)
    if settings.hidden_act is not None:
        options["hidden_act"] = settings.hidden_act
    if settings.max_positions is not None:
        options["max_position_embeddings"] = settings.max_positions
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build(cls, source, dtype=settings.dtype, options=options, ignore=settings.ignore)

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tokenizer = _put_companions(directory, temporary, model.config, settings.lowercase)
        for file in temporary.rglob("*"):
            sync(file)
        report = {
            "source": str(source.file),
            "out": str(out),
            "class": cls.__name__,
            "head": head,
            "dtype": str(model.dtype).removeprefix("torch."),
            "hidden_act": model.config.hidden_act,
            "max_position_embeddings": model.config.max_position_embeddings,
            "parameters": sum(p.numel() for p in model.parameters()),
            "left_out": _left_out(source, stored, model),
            "ignored": ignoring,
            "tokenizer": tokenizer,
            "warnings": [str(w.message) for w in caught if w.category is UserWarning],
            "files": {
                str(file.relative_to(temporary)): file.stat().st_size
                for file in sorted(temporary.rglob("*"))
                if file.is_file()
            },
        }
        _replace(temporary, out)
    except OSError as error:
        if error.strerror and _is_of(temporary, error):
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def choose_head(config: BertConfig, stored: set[str]) -> str:
    """The head that a checkpoint's config names, if it has it, or else the first of
    :data:`CLASSES` that it has.

    Args:
        config: with ``architectures`` among its extra fields, or without.
        stored: what BERT calls the checkpoint's weights.
    """
    parts = parts_of(stored)
    named = config.extra.get("architectures")
    for name in named if isinstance(named, list) else []:
        for head, (cls, needed) in CLASSES.items():
            # A relative's own pooler may be missing; its classifier has a layer in its place.
            if re.fullmatch(rf"\w+{cls.__name__[4:]}", str(name)) and needed - {POOLER} <= parts:
                return head
    return next(head for head, (_, needed) in CLASSES.items() if needed <= parts)


def render(report: dict[str, Any]) -> str:
    """A report as text."""
    tokenizer = report["tokenizer"]
    lines = [
        f"{report['source']}",
        f"  -> {report['out']}: {report['class']}, {report['parameters']:,} parameters in "
        f"{report['dtype']}, {report['hidden_act']}, {report['max_position_embeddings']} positions",
    ]
    if report["left_out"]:
        lines.append(f"  left out: {', '.join(report['left_out'])}")
    if report["ignored"]:
        lines.append(f"  ignored: {', '.join(report['ignored'])}")
    if tokenizer is None:
        lines.append("  no tokenizer: expected tokenizer.json or vocab.txt in the source")
    else:
        case = {True: "lower-cases text", False: "keeps case", None: "copied as it is"}
        lines.append(f"  tokenizer: {tokenizer['tokens']} tokens, {case[tokenizer['lowercase']]}")
    lines += [f"  {name}: {size:,} bytes" for name, size in report["files"].items()]
    return "\n".join(lines)


def _check_out(out: Path, source: Path, force: bool) -> None:
    if not out.name:
        raise ValueError(f"out: expected the name of a new directory, got {str(out)!r}")
    if not (out.exists() or out.is_symlink()):
        return
    if out.is_symlink() or not out.is_dir():
        raise ValueError(f"out: expected a new directory, got {str(out)!r}, which is a file")
    if not any(out.iterdir()):
        return
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"out: expected another directory than the source's, got {str(out)!r}")
    if not force:
        raise ValueError(
            f"out: expected a new or empty directory, got {str(out)!r} with files in it; "
            "--force replaces it"
        )
    # Not somebody's home by a slip of the hand.
    if not (out / CONFIG).is_file():
        raise ValueError(
            f"out: expected a directory with a checkpoint to replace, got {str(out)!r} without "
            f"{CONFIG}"
        )


def _is_of(temporary: Path, error: OSError) -> bool:
    """Whether an error names ``temporary`` or what is in it, which nobody knows who reads it. Of a
    copy that fails both files are named."""
    named = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
    return any(temporary in (file, *file.parents) for file in named)


def _replace(temporary: Path, out: Path) -> None:
    """Put a complete directory in place of ``out``, which is moved aside first and removed last."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(temporary, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _left_out(source: Source, stored: set[str], model: BertPreTrainedModel) -> list[str]:
    kept = parts_of(with_bert(name) for name, _ in model.named_parameters())
    left = [part.rstrip(".") for part in sorted(parts_of(stored) - kept)]
    return left + ([f"{source.others} of the optimizer's variables"] if source.others else [])


def _put_companions(
    source: Path, out: Path, config: BertConfig, lowercase: bool | None
) -> dict[str, Any] | None:
    """Copy what belongs to the model, and make ``tokenizer.json`` if there is ``vocab.txt`` only.

    Returns what the tokenizer is like, None if there is none.
    """
    for file in sorted({*source.iterdir(), *source.glob("*/*")}):
        name = file.relative_to(source).as_posix()
        if COMPANIONS.fullmatch(name) and file.is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, out / name)
    positions = config.max_position_embeddings
    if (source / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(source, any_tokens=True)
        if lowercase not in (None, is_lowercase(tokenizer)):
            does = "keeps case" if lowercase else "lower-cases"
            expected, got = ("--cased", "--uncased") if lowercase else ("--uncased", "--cased")
            raise ValueError(
                f"--cased/--uncased: expected {expected} or neither, as "
                f"{source / 'tokenizer.json'} {does}, got {got}"
            )
        _limit_length(source, out, positions)
    elif (source / "vocab.txt").is_file():
        tokenizer = load_tokenizer(source, lowercase=lowercase)
        length = read_tokenizer_config(source).max_length
        save_tokenizer(tokenizer, out, max_length=min(length or positions, positions))
    else:
        return None
    tokens = tokenizer.get_vocab_size()
    if tokens > config.vocab_size:
        raise CheckpointError(
            f"{source}: expected a vocabulary of at most {config.vocab_size} tokens, as the model "
            f"has, got {tokens}"
        )
    return {"tokens": tokens, "lowercase": is_lowercase(tokenizer)}


def _limit_length(source: Path, out: Path, positions: int) -> None:
    """No tokenizer should make texts longer than the position table."""
    found = read_tokenizer_config(source).max_length
    if found is not None and found <= positions:
        return
    file = source / "tokenizer_config.json"
    values = read_json(file) if file.is_file() else {}
    # Older files name it so, and it would be read as well.
    values.pop("max_len", None)
    values["model_max_length"] = positions
    text = json.dumps(values, indent=2)
    (out / file.name).write_text(text + "\n", encoding="utf-8")
