"""``bertfast demo``: from raw text to a BERT that fills blanks, in a few minutes on a CPU."""

import copy
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

import bertfast
from bertfast.data import (
    Example,
    MaskVocabulary,
    PretrainingData,
    builtin_documents,
    encode_documents,
    group,
    load_tokenizer,
    pack,
    read_documents,
    save_tokenizer,
    split_documents,
    train_vocab,
)
from bertfast.tasks import FillMask
from bertfast.training import (
    TrainingConfig,
    adamw,
    evaluate,
    pretrain,
    training_step,
    trivial_baselines,
)

REPORT = "bertfast-demo.json"
STAGES = 8


@dataclass(frozen=True)
class DemoSettings:
    """What to run. The defaults are chosen so that two CPU cores learn something in 2.5 minutes.

    text: UTF-8 files (see ``read_documents``); none takes Python's own language reference.
    minutes: of training. out: directory for checkpoint, vocabulary and report.
    vocab_size: word pieces at most. layers, hidden: of the model, with one attention head per 64
    columns. length: longest sequence in tokens. batch_tokens: tokens per step, at most.
    lr: highest learning rate. seed: of everything random.
    """

    text: tuple[str, ...] = ()
    minutes: float = 2.5
    out: str = "bertfast-demo"
    vocab_size: int = 2048
    layers: int = 2
    hidden: int = 128
    length: int = 64
    batch_tokens: int = 1024
    lr: float = 2e-3
    seed: int = 0


def prepare_directory(out: str | os.PathLike[str]) -> Path:
    """Create ``out``, or take it over when it is empty or holds an earlier demo.

    Raises ValueError for a directory with anything else in it, or a file of that name.
    """
    directory = Path(out)
    if directory.exists():
        if not directory.is_dir():
            raise ValueError(f"out: expected a directory, got the file {directory}")
        if any(directory.iterdir()) and not (directory / REPORT).is_file():
            raise ValueError(
                f"out: expected a new or empty directory or one of an earlier demo, "
                f"got {directory} with other files in it"
            )
    directory.mkdir(parents=True, exist_ok=True)
    # Says whose directory this is even if the run is interrupted.
    (directory / REPORT).write_text("{}\n", encoding="utf-8")
    return directory


def new_model(settings: DemoSettings, vocab_size: int) -> bertfast.BertForPreTraining:
    """The model to train, its weights drawn from ``settings.seed``.

    An ordinary BERT but for three choices that make a few minutes count: weights are drawn wider
    than BERT's 0.02, which suits a hidden size of 768; there is no dropout, because so short a run
    does not overfit; and the position table, which is learned as ever, starts as the sinusoids of
    Vaswani et al. (2017), from which a model finds a token's neighbours sooner.
    """
    torch.manual_seed(settings.seed)
    model = bertfast.BertForPreTraining(
        bertfast.BertConfig(
            vocab_size=vocab_size,
            hidden_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.hidden // 64,
            intermediate_size=4 * settings.hidden,
            max_position_embeddings=settings.length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.05,
        )
    )
    half = settings.hidden // 2
    angles = torch.arange(settings.length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    with torch.no_grad():  # scaled so that its entries are as large as the other tables'
        weight = model.bert.embeddings.position_embeddings.weight
        weight.copy_(0.05 * math.sqrt(2) * table)
    return model


def fastest_threads(model: torch.nn.Module, batch: dict[str, Any]) -> int:
    """The number of CPU threads, of 1, 2, 4, … and what torch would take, on which a training step
    is fastest now. A model this small gains little from threads, and on cores that others use too
    it loses much. Works on a copy of the model; torch's setting is left as it was."""
    most = torch.get_num_threads()
    step = _step_timer(model, batch)
    seconds = {}
    try:
        for threads in sorted({most, *(2**i for i in range(most.bit_length()))}):
            torch.set_num_threads(threads)
            step()
            seconds[threads] = min(step() for _ in range(5))
    finally:
        torch.set_num_threads(most)
    return min(seconds, key=seconds.__getitem__)


def run(settings: DemoSettings, *, as_json: bool = False) -> dict[str, Any]:
    """Run the demo; returns its report, which is also written to ``out/bertfast-demo.json``.

    The stages are printed as they go, to stdout, or to stderr when ``as_json`` (then the report
    is printed to stdout at the end). Raises ValueError or OSError for settings or files that
    cannot be used.
    """
    threads_before = torch.get_num_threads()
    try:
        return _run(settings, as_json, threads_before)
    finally:
        torch.set_num_threads(threads_before)


def _run(settings: DemoSettings, as_json: bool, threads_before: int) -> dict[str, Any]:
    began = time.perf_counter()
    stage = _Stage(sys.stderr if as_json else sys.stdout)
    documents = read_documents(settings.text) if settings.text else builtin_documents()
    training_text, held_out_text = split_documents(documents, held_out=0.1, seed=settings.seed)
    directory = prepare_directory(settings.out)
    report: dict[str, Any] = {"version": bertfast.__version__, "settings": asdict(settings)}

    stage("Text")
    report["text"] = {
        "source": list(settings.text) or "pydoc_data.topics",
        "documents": len(documents),
        "sentences": sum(len(document) for document in documents),
        "characters": sum(len(sentence) for document in documents for sentence in document),
        "held_out_documents": len(held_out_text),
    }
    source = ", ".join(settings.text) or "Python's language reference (pydoc_data.topics)"
    stage.say(source)
    stage.say(
        "{documents:,} documents, {sentences:,} sentences, {characters:,} characters; "
        "{held_out_documents} documents held out".format(**report["text"])
    )

    stage("Vocabulary")
    tokenizer = train_vocab(training_text, settings.vocab_size)
    training = encode_documents(training_text, tokenizer)
    held_out = encode_documents(held_out_text, tokenizer)
    vocab = MaskVocabulary.from_tokenizer(tokenizer)
    report["vocabulary"] = {
        "word_pieces": tokenizer.get_vocab_size(),
        "training_tokens": _count(training),
        "held_out_tokens": _count(held_out),
    }
    stage.say(
        "{word_pieces:,} word pieces; {training_tokens:,} tokens to train on, "
        "{held_out_tokens:,} held out".format(**report["vocabulary"])
    )

    stage("Sentence pairs")
    data = PretrainingData(training, vocab, max_length=settings.length, seed=settings.seed)
    examples = PretrainingData(held_out, vocab, max_length=settings.length, seed=settings.seed)
    questions = [example for epoch in range(3) for example in examples.epoch(epoch)]
    first = data.epoch(0)
    report["pairs"] = {
        "per_epoch": len(first),
        "mean_length": _mean_length(first),
        "held_out": len(questions),
    }
    stage.say(
        f"{len(first):,} pairs an epoch, {_mean_length(first):.0f} tokens on average, at most "
        f"{settings.length}; drawn and masked anew every epoch"
    )
    stage.say(f"for example: {_show(first[0], tokenizer)}")

    stage("Pre-training")
    model = new_model(settings, tokenizer.get_vocab_size())
    parameters = sum(p.numel() for p in model.parameters())
    stage.say(
        f"BERT with {settings.layers} layers, hidden size {settings.hidden}, "
        f"{parameters / 1e6:.2f} M parameters"
    )
    batch = pack(next(iter(group(first, tokens=settings.batch_tokens))))
    threads = fastest_threads(model, batch)
    torch.set_num_threads(threads)
    stage.say(
        f"{settings.minutes:g} minutes on {threads} CPU thread{'s' if threads > 1 else ''} "
        f"(the fastest of 1 to {threads_before})"
    )
    config = TrainingConfig(
        minutes=settings.minutes,
        batch_tokens=settings.batch_tokens,
        lr=settings.lr,
        seed=settings.seed,
        log_every=25,
    )
    history = pretrain(model, data, config)
    start, end = history[0], history[-1]
    report["training"] = {
        "parameters": parameters,
        "threads": threads,
        "steps": end["step"],
        "epochs": end["epoch"],
        "tokens": end["tokens"],
        "seconds": end["seconds"],
        "tokens_per_second": end["tokens"] / end["seconds"],
        "history": history,
    }
    stage.say(
        "{steps:,} steps, {epochs} epochs, {tokens:,} tokens, "
        "{tokens_per_second:,.0f} tokens/s".format(**report["training"])
    )
    stage.say(
        f"loss: masked tokens {start['mlm_loss']:.2f} → {end['mlm_loss']:.2f}, "
        f"next sentence {start['nsp_loss']:.2f} → {end['nsp_loss']:.2f}"
    )

    stage("Held-out accuracy")
    scores = evaluate(model, questions)
    trivial = trivial_baselines(training, questions)
    frequent = tokenizer.id_to_token(int(trivial["mlm_token"]))
    report["held_out"] = {"model": scores, "trivial": trivial, "trivial_token": frequent}
    stage.say(
        f"masked tokens  {scores['mlm_accuracy']:6.1%} of {scores['mlm_predictions']:,}"
        f"   (always {frequent!r}: {trivial['mlm_accuracy']:.1%})"
    )
    stage.say(
        f"next sentence  {scores['nsp_accuracy']:6.1%} of {scores['sequences']:,}"
        f"   (always the same answer: {trivial['nsp_accuracy']:.1%})"
    )

    stage("Checkpoint")
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory, max_length=settings.length)
    reloaded = bertfast.BertForPreTraining.from_pretrained(directory)
    report["checkpoint"] = {
        "directory": str(directory),
        "files": sorted(path.name for path in directory.iterdir()),
        "same_outputs": _same_outputs(model, reloaded, questions),
    }
    if not report["checkpoint"]["same_outputs"]:
        raise RuntimeError(f"{directory}: the reloaded model gives other outputs than the saved")
    stage.say(f"saved to {directory}: {', '.join(report['checkpoint']['files'])}")
    stage.say("reloaded: outputs are bitwise the same")

    stage("Fill in the blank (sentences of the held-out documents)")
    report["fill_mask"] = []
    fill = FillMask(reloaded, load_tokenizer(directory))
    for text, answer in _blanks(held_out_text, training, tokenizer, settings):
        guesses = [(guess.token, round(guess.score, 4)) for guess in fill.candidates(text, 3)[0]]
        report["fill_mask"].append({"text": text, "answer": answer, "guesses": guesses})
        mark = "✓" if guesses[0][0] == answer else " "
        listed = " · ".join(f"{token} {score:.0%}" for token, score in guesses)
        stage.say(text)
        stage.say(f"  {mark} {listed}   (was: {answer})")

    stage("The same training step on the reference and on the kernels")
    report["speed"] = _compare_speed(model, batch)
    report["backends"] = {row.op: row.backend for row in bertfast.explain(device="cpu")}
    for name in ("reference", "automatic"):
        milliseconds = 1e3 * report["speed"][name]
        tokens = batch["input_ids"].numel() / report["speed"][name]
        stage.say(f"{name:9}  {milliseconds:7.1f} ms a step  {tokens:9,.0f} tokens/s")
    kernels = [op for op, backend in report["backends"].items() if backend != "reference"]
    stage.say(
        f"{report['speed']['ratio']:.2f} times as fast with kernels for {', '.join(kernels)}"
        if kernels
        else "no native kernel was built here; bertfast env says why"
    )

    report["seconds"] = time.perf_counter() - began
    text = json.dumps(report, indent=2) + "\n"
    (directory / REPORT).write_text(text, encoding="utf-8")
    stage.end(f"Done in {report['seconds'] / 60:.1f} minutes; report in {directory / REPORT}")
    if as_json:
        print(text, end="")
    return report


class _Stage:
    """Numbered headings and indented lines."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.number = 0

    def __call__(self, title: str) -> None:
        self.number += 1
        blank = "\n" if self.number > 1 else ""
        print(f"{blank}[{self.number}/{STAGES}] {title}", file=self.stream, flush=True)

    def say(self, line: str) -> None:
        print(f"      {line}", file=self.stream, flush=True)

    def end(self, line: str) -> None:
        print(f"\n{line}", file=self.stream, flush=True)


def _count(documents: Sequence[Sequence[np.ndarray]]) -> int:
    return sum(len(sentence) for document in documents for sentence in document)


def _mean_length(examples: Sequence[Example]) -> float:
    return float(np.mean([len(example.input_ids) for example in examples]))


def _show(example: Example, tokenizer: Tokenizer) -> str:
    words = tokenizer.decode(example.input_ids.tolist(), skip_special_tokens=False)
    label = "random" if example.next_sentence_label else "next"
    return f"{words[:150]}… → {label}"


def _same_outputs(
    model: torch.nn.Module, reloaded: torch.nn.Module, examples: Sequence[Example]
) -> bool:
    batch = pack(examples[:8])
    del batch["labels"], batch["next_sentence_label"]
    was_training = model.training
    model.eval()
    reloaded.eval()
    with torch.no_grad():
        a, b = (m(**batch, return_dict=True) for m in (model, reloaded))
    model.train(was_training)
    return torch.equal(a.prediction_logits, b.prediction_logits) and torch.equal(
        a.seq_relationship_logits, b.seq_relationship_logits
    )


def _blanks(
    documents: Sequence[list[str]],
    training: Sequence[Sequence[np.ndarray]],
    tokenizer: Tokenizer,
    settings: DemoSettings,
    number: int = 5,
) -> list[tuple[str, str]]:
    """Up to ``number`` sentences of 8 to 20 words, drawn by the seed, each with one word replaced
    by [MASK], and that word: one of at least three letters that is a single token and frequent in
    the training text (30 times or more), so that the model has a chance to know it."""
    rng = np.random.default_rng([settings.seed, 2])
    counts = np.bincount(np.concatenate([ids for document in training for ids in document]))
    frequent = {str(tokenizer.id_to_token(int(id))) for id in np.flatnonzero(counts >= 30)}
    sentences = [sentence for document in documents for sentence in document]
    blanks: list[tuple[str, str]] = []
    for index in rng.permutation(len(sentences)):
        words = sentences[index].split()
        known = [
            i
            for i, word in enumerate(words)
            if len(word) >= 3 and word.isalpha() and word.lower() in frequent
        ]
        if not 8 <= len(words) <= 20 or not known:
            continue
        place = int(rng.choice(known))
        text = " ".join([*words[:place], "[MASK]", *words[place + 1 :]])
        if len(tokenizer.encode(text).ids) <= settings.length:
            blanks.append((text, words[place].lower()))
        if len(blanks) == number:
            break
    return blanks


def _step_timer(model: torch.nn.Module, batch: dict[str, Any]) -> Callable[[], float]:
    """A function that takes a training step on a copy of ``model`` and returns its seconds."""
    model = copy.deepcopy(model).train()
    optimizer = adamw(model)

    def step() -> float:
        start = time.perf_counter()
        training_step(model, optimizer, batch)
        return time.perf_counter() - start

    return step


def _compare_speed(
    model: torch.nn.Module, batch: dict[str, Any], rounds: int = 9
) -> dict[str, float]:
    """Seconds of one training step, median of interleaved rounds, on the reference and as chosen
    automatically, and their ratio. Works on a copy of the model."""
    step = _step_timer(model, batch)

    def on_reference() -> float:
        with bertfast.backend("reference"):
            return step()

    ways: dict[str, Callable[[], float]] = {"reference": on_reference, "automatic": step}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            seconds = way()
            if i:  # the first round warms up
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": medians["reference"] / medians["automatic"]}
