"""The verbs that predict: a model, texts, and what it makes of them."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from bertfast.cli.arguments import integer, number
from bertfast.cli.files import JSON_LINES, Fields, Record, read_arguments, read_file, writing
from bertfast.cli.imports import load_torch
from bertfast.errors import InputError

MANY = 10**9
DTYPES = ("float32", "bfloat16", "float16")

# A result as what is added to its input's object, and as lines for people.
AsJson = Callable[[Any], dict[str, Any]]
AsLines = Callable[[Any], Iterable[str]]


def add_verbs(verbs: Any) -> None:
    """Add ``fill-mask``, ``next-sentence``, ``embed``, ``classify``, ``tag`` and ``answer``."""
    _add_fill_mask(verbs)
    _add_next_sentence(verbs)
    _add_embed(verbs)
    _add_classify(verbs)
    _add_tag(verbs)
    _add_answer(verbs)


def _add_fill_mask(verbs: Any) -> None:
    verb = _add(
        verbs,
        "fill-mask",
        "the words that fit in the place of [MASK]",
        "Say which tokens a masked language model expects at each [MASK] of a text.",
        "text with at least one [MASK]",
        _fill_mask,
    )
    _add_top_k(verb, "candidates for each [MASK]", 5)


def _add_next_sentence(verbs: Any) -> None:
    _add(
        verbs,
        "next-sentence",
        "whether one text follows another",
        "Say how probable it is that the second text follows the first.",
        "first and second text, in turns",
        _next_sentence,
    )


def _add_embed(verbs: Any) -> None:
    verb = _add(
        verbs,
        "embed",
        "a vector for each text",
        "Turn texts into vectors: JSON Lines, or with --output FILE.npy a float32 array with one "
        "row for each text. A directory of sentence-transformers says how it wants to be pooled, "
        "normalized and truncated; elsewhere it is the mean, as it is.",
        "text",
        _embed,
    )
    verb.add_argument(
        "--pooling",
        action="append",
        metavar="NAME",
        help="cls, max, mean, mean_sqrt_len_tokens, weightedmean or lasttoken; of several, given "
        "one by one, the vectors are joined",
    )
    verb.add_argument(
        "--layer",
        dest="layers",
        metavar="N",
        action="append",
        type=int,
        help="whose outputs: 0 is the embedding, -1 the last layer (default); of several the mean",
    )
    verb.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="make vectors of length 1",
    )
    verb.add_argument(
        "--dimensions", type=integer(1, MANY), metavar="N", help="keep the first N dimensions"
    )
    prompt = verb.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="put this before every text")
    prompt.add_argument(
        "--prompt-name",
        metavar="NAME",
        help="put that prompt of the directory's before every text: query, document or another",
    )


def _add_classify(verbs: Any) -> None:
    verb = _add(
        verbs,
        "classify",
        "labels for texts, scores for pairs of texts",
        "Label each text, or score each pair of texts, with a sequence classifier.",
        "text; with --pairs, two in turns",
        _classify,
    )
    verb.add_argument(
        "--pairs",
        action="store_true",
        help="an input is two texts; in JSON, the field text_pair says so by itself",
    )
    _add_top_k(verb, "labels for each input (default: all)", None)
    verb.add_argument(
        "--function",
        choices=("softmax", "sigmoid", "none"),
        help="from logits to scores (default: what the model's config.json implies)",
    )


def _add_tag(verbs: Any) -> None:
    verb = _add(
        verbs,
        "tag",
        "labels for words, and the spans they make",
        "Label each word of a text with a token classifier, and join B- and I- labels to spans.",
        "text",
        _tag,
    )
    verb.add_argument(
        "--strategy",
        default="first",
        choices=("first", "mean", "max"),
        help="how a word of several pieces is labelled (default: first)",
    )
    verb.add_argument("--words", action="store_true", help="print every word, not the spans")


def _add_answer(verbs: Any) -> None:
    verb = _add(
        verbs,
        "answer",
        "the part of a text that answers a question",
        "Find the answer to a question in a context.",
        "question and context, in turns",
        _answer,
    )
    _add_top_k(verb, "candidates for each question", 1)
    verb.add_argument(
        "--no-answer",
        action="store_true",
        help="there may be none, for models trained on SQuAD 2",
    )
    verb.add_argument(
        "--null-threshold",
        type=number(-math.inf, 1e9),
        default=0.0,
        metavar="X",
        help="with --no-answer, there is none if its score exceeds the best answer's by more than "
        "this (default: 0)",
    )
    verb.add_argument(
        "--max-answer-length",
        type=integer(1, MANY),
        default=30,
        metavar="N",
        help="tokens of an answer at most (default: 30)",
    )


def _add(
    verbs: Any,
    name: str,
    summary: str,
    description: str,
    texts: str,
    run: Callable[[argparse.Namespace], None],
) -> Any:
    """A verb and the arguments that all of them have."""
    verb = verbs.add_parser(name, help=summary, description=description)
    verb.set_defaults(run=run)
    verb.add_argument("texts", nargs="*", metavar="TEXT", help=texts)
    verb.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="directory with config.json, weights and tokenizer.json or vocab.txt",
    )
    verb.add_argument(
        "--input",
        metavar="FILE",
        help="instead of TEXT: one input a line, two texts with a tab between them; or JSON Lines; "
        "- or nothing at all is stdin",
    )
    verb.add_argument(
        "--format",
        choices=("lines", "jsonl"),
        help="of the input (default: jsonl for files named .jsonl or .ndjson, else lines)",
    )
    verb.add_argument(
        "--output", metavar="FILE", help="where results go, all or nothing (default: stdout)"
    )
    verb.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line: the input's, with the result added (also if FILE is .jsonl)",
    )
    verb.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    verb.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    verb.add_argument(
        "--batch-tokens", type=integer(1, MANY), metavar="N", help="tokens of a batch at most"
    )
    verb.add_argument(
        "--max-length",
        type=integer(1, MANY),
        metavar="N",
        help="tokens that are read at a time (default: what the directory says, or else what the "
        "model can)",
    )
    if name != "next-sentence":
        verb.add_argument(
            "--long",
            choices=("truncate", "window"),
            help="read the beginning of a longer text, or all of it in windows (default: "
            + ("truncate)" if name in ("embed", "classify") else "window)"),
        )
        verb.add_argument(
            "--stride", type=integer(0, MANY), metavar="N", help="tokens that windows share"
        )
    return verb


def _add_top_k(verb: Any, what: str, default: int | None) -> None:
    shown = "" if default is None else f" (default: {default})"
    verb.add_argument(
        "--top-k", type=integer(1, MANY), default=default, metavar="K", help=what + shown
    )


def _fill_mask(arguments: argparse.Namespace) -> None:
    def as_json(masks: Any) -> dict[str, Any]:
        return {"masks": [[fill._asdict() for fill in mask] for mask in masks]}

    def as_lines(masks: Any) -> Iterable[str]:
        for i, mask in enumerate(masks, 1):
            if len(masks) > 1:
                yield f"  [MASK] {i}"
            for fill in mask:
                yield f"  {fill.score:.4f}  {fill.token}"

    task, records = _start(arguments, "FillMask", Fields(("text",)))
    many = partial(task.many, top_k=arguments.top_k)
    _print(arguments, records, many, as_json, as_lines)


def _next_sentence(arguments: argparse.Namespace) -> None:
    task, records = _start(arguments, "NextSentence", Fields(("first", "second")))
    _print(
        arguments,
        records,
        task.many,
        lambda probability: {"probability": probability},
        lambda probability: [f"  {probability:.4f}"],
    )


def _embed(arguments: argparse.Namespace) -> None:
    if arguments.pooling is not None and len(arguments.pooling) == 1:
        arguments.pooling = arguments.pooling[0]
    names = ("pooling", "layers", "normalize", "dimensions", "prompt", "prompt_name")
    task, records = _start(arguments, "Embed", Fields(("text",)), names)
    with writing(arguments.output) as file:
        vectors = _ask(records, task.many).numpy()
        if arguments.output and arguments.output.endswith(".npy"):
            import numpy as np

            np.save(file, vectors)
            return
        for record, vector in zip(records, vectors, strict=True):
            # The shortest decimals that give the float32 back.
            numbers = [float(str(x)) for x in vector]
            file.write(_json_line({**record.values, "embedding": numbers}))


def _classify(arguments: argparse.Namespace) -> None:
    both = ("text", "text_pair")
    fields = Fields(both) if arguments.pairs else Fields(both[:1], both[1:])
    task, records = _start(arguments, "Classify", fields, ("function",))
    _print(
        arguments,
        records,
        partial(task.many, top_k=arguments.top_k),
        lambda labels: {"labels": [label._asdict() for label in labels]},
        lambda labels: [f"  {label.score:.4f}  {label.label}" for label in labels],
    )


def _tag(arguments: argparse.Namespace) -> None:
    def as_json(tagged: Any) -> dict[str, Any]:
        return {name: [x._asdict() for x in getattr(tagged, name)] for name in tagged._fields}

    def as_lines(tagged: Any) -> Iterable[str]:
        for found in tagged.words if arguments.words else tagged.spans:
            text = " ".join(found.text.split())
            yield f"  {found.score:.4f}  {found.label}  {found.start}-{found.end}  {text}"

    task, records = _start(arguments, "Tag", Fields(("text",)), ("strategy",))
    _print(arguments, records, task.many, as_json, as_lines)


def _answer(arguments: argparse.Namespace) -> None:
    def as_json(found: Any) -> dict[str, Any]:
        finite = math.isfinite(found.null_difference)
        return {
            "answer": None if found.best is None else found.best._asdict(),
            "candidates": [candidate._asdict() for candidate in found.candidates],
            "no_answer": found.no_answer,
            "null_difference": found.null_difference if finite else None,
        }

    def as_lines(found: Any) -> Iterable[str]:
        candidates = found.candidates
        if found.best is None:
            yield f"  {found.no_answer:.4f}  no answer"
            candidates = candidates[: arguments.top_k - 1]
        for best in candidates:
            yield f"  {best.score:.4f}  {best.start}-{best.end}  {' '.join(best.text.split())}"

    arguments.may_be_unanswerable = arguments.no_answer
    names = ("may_be_unanswerable", "null_threshold", "max_answer_length")
    task, records = _start(arguments, "Answer", Fields(("question", "context")), names)
    many = partial(task.many, top_k=arguments.top_k)
    _print(arguments, records, many, as_json, as_lines)


def _start(
    arguments: argparse.Namespace, name: str, fields: Fields, options: Sequence[str] = ()
) -> tuple[Any, list[Record]]:
    """The inputs, which are read first, and the task with its model."""
    if arguments.texts and arguments.input is not None:
        raise ValueError("expected TEXT or --input, got both")
    if arguments.texts:
        records = read_arguments(arguments.texts, fields)
    elif arguments.input is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("expected TEXT, --input FILE or text on stdin")
    else:
        records = read_file(arguments.input or "-", fields, arguments.format)

    load_torch()
    import torch

    from bertfast import tasks
    from bertfast.allocator import keep_freed_memory

    keep_freed_memory()
    names = ("batch_tokens", "max_length", "long", "stride", *options)
    values = {name: getattr(arguments, name, None) for name in names}
    task = getattr(tasks, name).from_pretrained(
        arguments.model,
        device=arguments.device,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        **{name: value for name, value in values.items() if value is not None},
    )
    return task, records


def _ask(records: Sequence[Record], many: Callable[..., Any]) -> Any:
    inputs = [record.texts if len(record.texts) > 1 else record.texts[0] for record in records]
    try:
        return many(inputs, progress=True)
    except InputError as error:
        raise ValueError(f"{records[error.index].place}: {error.reason}") from None


def _print(
    arguments: argparse.Namespace,
    records: Sequence[Record],
    many: Callable[..., Any],
    as_json: AsJson,
    as_lines: AsLines,
) -> None:
    file_is_json = str(arguments.output).endswith(JSON_LINES)
    # Opened first, so that nobody waits for results that cannot be kept.
    with writing(arguments.output) as file:
        for record, result in zip(records, _ask(records, many), strict=True):
            if arguments.json or file_is_json:
                file.write(_json_line({**record.values, **as_json(result)}))
                continue
            head = " | ".join(" ".join(text.split()) for text in record.texts)
            file.write("".join(f"{line}\n" for line in (head, *as_lines(result))).encode())


def _json_line(values: dict[str, Any]) -> bytes:
    line = json.dumps(values, ensure_ascii=False, allow_nan=False)
    try:
        return f"{line}\n".encode()
    # Half of a pair, passed through from the input, is JSON only as an escape.
    except UnicodeEncodeError:
        return f"{json.dumps(values, allow_nan=False)}\n".encode()
