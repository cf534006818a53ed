"""The ``bertfast`` command: one verb per job.

Exit codes: 0 done; 2 the arguments or the input cannot be used, or not on this machine (one line on
stderr says why); 130 interrupted with Ctrl-C. Heavy imports wait until a verb runs, so that
``--help`` is quick.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from bertfast import __version__
from bertfast.cli import predict
from bertfast.cli.arguments import integer, number
from bertfast.cli.imports import load_torch

# What says of itself what is wrong: our own errors, Python's on files, memory and packages, and
# torch's, which are RuntimeErrors, on what this CPU, this GPU or this build of it cannot do.
FAILURES = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError, ImportError)
# bertfast.convert knows their classes.
HEADS = (
    "auto", "encoder", "pretraining", "masked-lm", "next-sentence", "sequence-classification",
    "token-classification", "question-answering", "multiple-choice",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: ``sys.argv[1:]``); returns the exit code."""
    parser = _build_parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as done:  # --help, --version and errors end argparse this way
        return int(done.code or 0)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) is gone; without this, Python complains while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FAILURES as error:
        print(f"bertfast {arguments.verb}: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory"
    text = str(error).strip()
    if type(error).__module__ != "bertfast.errors" and isinstance(error, RuntimeError):
        # What torch adds below its first line are lists of backends and stacks of its own.
        text = text.partition("\n")[0]
    return " ".join(text.split()) or type(error).__name__


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bertfast", description="BERT whose hot paths are hand-written kernels.")
    parser.add_argument("--version", action="version", version=f"bertfast {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    _add_demo(verbs)
    predict.add_verbs(verbs)
    _add_convert(verbs)
    _add_env(verbs)
    return parser


def _add_demo(verbs: Any) -> None:
    demo = verbs.add_parser(
        "demo",
        help="text to a trained BERT in a few minutes",
        description="Train a vocabulary and a small BERT on real text, measure it on held-out "
        "text, save it, reload it, fill blanks with it, and time it. Without --text it reads "
        "Python's own language reference.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        default=[],
        help="UTF-8 text files; blank lines separate documents, which hold one sentence a line or "
        "running text",
    )
    demo.add_argument("--minutes", type=number(0, 24 * 60), default=2.5, help="minutes of training")
    demo.add_argument("--out", metavar="DIR", default="bertfast-demo", help="where to save")
    demo.add_argument(
        "--vocab-size", type=integer(1, 10**6), default=2048, help="word pieces at most"
    )
    demo.add_argument("--layers", type=integer(1, 48), default=2, help="encoder layers")
    demo.add_argument(
        "--hidden", type=integer(64, 4096, 64), default=128, help="hidden size, 64 per head"
    )
    demo.add_argument(
        "--length", type=integer(16, 512), default=64, help="longest sequence in tokens"
    )
    demo.add_argument(
        "--batch-tokens", type=integer(16, 10**6), default=1024, help="tokens per step at most"
    )
    demo.add_argument("--lr", type=number(0, 1), default=2e-3, help="highest learning rate")
    demo.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, help="of everything random")
    demo.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    demo.set_defaults(run=_demo)


def _add_convert(verbs: Any) -> None:
    convert = verbs.add_parser(
        "convert",
        help="a TensorFlow, Hugging Face or hub checkpoint to a directory of bertfast's",
        description="Read Google's TensorFlow checkpoints, Hugging Face directories and models of "
        "the hub (BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA) and write a Hugging Face directory: "
        "config.json, model.safetensors and the tokenizer. TensorFlow is not needed.",
    )
    convert.add_argument(
        "source",
        metavar="SOURCE",
        help="a directory, a TensorFlow checkpoint's prefix (.../bert_model.ckpt), or a hub id",
    )
    convert.add_argument("out", metavar="OUT", help="the directory to write, all of it or nothing")
    convert.add_argument(
        "--head",
        choices=HEADS,
        default="auto",
        metavar="HEAD",
        help=f"what to keep: one of {', '.join(HEADS[1:])}; auto (the default) is what the config "
        "names or else the weights have",
    )
    convert.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights; as they are stored by default",
    )
    case = convert.add_mutually_exclusive_group()
    case.add_argument(
        "--cased",
        action="store_false",
        dest="lowercase",
        default=None,
        help="vocab.txt is of text in its own case; by default its words show it",
    )
    case.add_argument(
        "--uncased",
        action="store_true",
        dest="lowercase",
        default=None,
        help="vocab.txt is of lower-cased text",
    )
    convert.add_argument(
        "--hidden-act",
        choices=("gelu", "gelu_new", "relu"),
        help="in place of the config's: gelu is erf's, gelu_new tanh's approximation, which "
        '"gelu" in Google\'s bert_config.json means',
    )
    convert.add_argument(
        "--max-positions",
        type=integer(1, 10**6),
        metavar="N",
        help="keep the first N positions only",
    )
    convert.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out stored tensors with such names, as cls.species.*; may be given again",
    )
    convert.add_argument("--revision", help="branch, tag or commit on the hub")
    convert.add_argument("--force", action="store_true", help="replace a checkpoint in OUT")
    convert.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    convert.set_defaults(run=_convert)


def _add_env(verbs: Any) -> None:
    env = verbs.add_parser(
        "env",
        help="this machine, what was built for it, what runs on what",
        description="Show versions, CPU and GPU features, which kernels were built (or why not), "
        "and which implementation each op runs on.",
    )
    env.add_argument("--json", action="store_true", help="print it as JSON")
    env.set_defaults(run=_env)


def _demo(arguments: argparse.Namespace) -> None:
    load_torch()
    from bertfast.allocator import keep_freed_memory
    from bertfast.demo import DemoSettings, run

    keep_freed_memory()
    settings = DemoSettings(
        text=tuple(arguments.text),
        minutes=arguments.minutes,
        out=arguments.out,
        vocab_size=arguments.vocab_size,
        layers=arguments.layers,
        hidden=arguments.hidden,
        length=arguments.length,
        batch_tokens=arguments.batch_tokens,
        lr=arguments.lr,
        seed=arguments.seed,
    )
    run(settings, as_json=arguments.json)


def _convert(arguments: argparse.Namespace) -> None:
    load_torch()
    import torch

    from bertfast.convert import ConvertSettings, convert, render

    settings = ConvertSettings(
        source=arguments.source,
        out=arguments.out,
        head=arguments.head,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        lowercase=arguments.lowercase,
        hidden_act=arguments.hidden_act,
        max_positions=arguments.max_positions,
        revision=arguments.revision,
        ignore=tuple(arguments.ignore),
        force=arguments.force,
    )
    report = convert(settings)
    for warning in report["warnings"]:
        print(f"bertfast convert: warning: {warning}", file=sys.stderr)
    print(json.dumps(report, indent=2) if arguments.json else render(report))


def _env(arguments: argparse.Namespace) -> None:
    from bertfast import environment

    info = environment.collect()
    print(json.dumps(info, indent=2) if arguments.json else environment.render(info))
