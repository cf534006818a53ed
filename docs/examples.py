"""The small models that the pages of this folder predict with: ``python docs/examples.py FOLDER``.

Each is trained in a few seconds on sentences made of a few words, which it then knows by heart:
enough to see what a command prints, and too little for anything else. Yours go in their place.
"""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import bertfast
from bertfast.data import save_tokenizer, train_vocab
from bertfast.training.optim import adamw

CAPITALS = {
    "Paris": "France", "London": "England", "Rome": "Italy", "Madrid": "Spain", "Vienna": "Austria",
    "Athens": "Greece", "Lisbon": "Portugal", "Oslo": "Norway",
}  # fmt: skip
FIRST = ["Ada", "Alan", "Grace", "Marie", "Emmy", "Carl"]
LAST = ["Lovelace", "Turing", "Hopper", "Curie", "Noether", "Gauss"]
GOOD = ["fine", "wonderful", "clever", "moving", "funny"]
BAD = ["dull", "clumsy", "boring", "noisy", "endless"]
THINGS = ["film", "book", "play", "story"]
MONTHS = ["May", "June", "July", "August"]

Example = tuple[str, str | None, Any]  # a text, perhaps a second one, and what is to be learned
Draw = Callable[[random.Random], Example]


def person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def pair(rng: random.Random) -> Example:
    """A word is hidden, and the second sentence is about the same or about something else."""
    city = rng.choice(list(CAPITALS))
    sentences = [f"{city} is the capital of {CAPITALS[city]}.", review(rng)[0]]
    seconds = [f"Many people live in {city}.", f"Nobody who saw the {rng.choice(THINGS)} slept."]
    topic, other = int(rng.random() < 0.25), rng.randrange(2)
    words = sentences[topic].split()
    places = [i for i, word in enumerate(words) if word.strip(".,!")]
    hidden = rng.choice([places[0], places[-1], rng.choice(places)])
    word = words[hidden].strip(".,!")
    words[hidden] = words[hidden].replace(word, "[MASK]")
    return " ".join(words), seconds[other], (word, int(topic != other))


def review(rng: random.Random) -> Example:
    good = rng.random() < 0.5
    words = rng.sample(GOOD if good else BAD, 2)
    thing = rng.choice(THINGS)
    text = rng.choice(["A {} and {} {}.", "The {2} was {0} and {1}.", "What a {} , {} {}!"])
    return text.format(*words, thing), None, int(good)


def life(rng: random.Random) -> Example:
    """A sentence and which of its characters are what."""
    who, where, when = person(rng), rng.choice(list(CAPITALS)), f"in {rng.choice(MONTHS)}"
    text = rng.choice(
        [f"{who} lived in {where}.", f"{who} went to {where} {when}.", f"In {where} {who} worked."]
    )
    return text, None, [(who, "PER"), (where, "LOC")]


def question(rng: random.Random) -> Example:
    """A question about such a sentence among others, or about none."""
    who, where, when = person(rng), rng.choice(list(CAPITALS)), rng.choice(MONTHS)
    facts = {"Who came": who, "Where was it": where, "When was it": when}
    asked = rng.choice(list(facts))
    told = [f"{who} came", f"to {where}", f"in {when}"]
    if rng.random() < 0.25:
        told.pop(list(facts).index(asked))
        facts[asked] = ""
    context = f"The {rng.choice(THINGS)} was {rng.choice(GOOD)}. " + " ".join(told) + "."
    return f"{asked}?", context, facts[asked]


def words_of_everything() -> Iterator[str]:
    rng = random.Random(0)
    for draw in (pair, review, life, question):
        for _ in range(300):
            text, second, _ = draw(rng)
            yield f"{text} {second or ''}".replace("[MASK]", rng.choice(list(CAPITALS.values())))


def main(folder: Path) -> None:
    """Write ``pretrained``, ``reviews``, ``names`` and ``questions`` into ``folder``."""
    tokenizer = train_vocab([list(words_of_everything())], 400)

    def labels(encodings: list[Any], examples: list[Example], name: str) -> dict[str, Any]:
        """What the model of this name is trained on, padded to the longest text."""
        if name == "pretrained":
            words = torch.full((len(examples), len(encodings[0].ids)), -100)
            for row, (encoding, (_, _, (word, _))) in enumerate(
                zip(encodings, examples, strict=True)
            ):
                mask = encoding.ids.index(tokenizer.token_to_id("[MASK]"))
                # A word of several pieces is learned by its first.
                words[row, mask] = tokenizer.encode(word, add_special_tokens=False).ids[0]
            follows = torch.tensor([target[1] for _, _, target in examples])
            return {"labels": words, "next_sentence_label": follows}
        if name == "reviews":
            return {"labels": torch.tensor([target for _, _, target in examples])}
        if name == "names":
            tags = torch.full((len(examples), len(encodings[0].ids)), -100)
            for row, (encoding, (text, _, spans)) in enumerate(
                zip(encodings, examples, strict=True)
            ):
                for i, (start, end) in enumerate(encoding.offsets):
                    if end > start:
                        tags[row, i] = tag_of(text, start, spans)
            return {"labels": tags}
        ends = []
        for encoding, (_, context, answer) in zip(encodings, examples, strict=True):
            first = (context or "").find(answer) if answer else -1
            places = [0, 0]  # [CLS], for no answer
            if first >= 0:
                places = [encoding.char_to_token(first, 1),
                          encoding.char_to_token(first + len(answer) - 1, 1)]  # fmt: skip
            ends.append(places)
        start, end = torch.tensor(ends).unbind(1)
        return {"start_positions": start, "end_positions": end}

    def train(name: str, kind: Any, draw: Draw, steps: int, **config: Any) -> None:
        torch.manual_seed(0)
        rng = random.Random(1)
        model = kind(
            bertfast.BertConfig(
                vocab_size=tokenizer.get_vocab_size(),
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=128,
                max_position_embeddings=64,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=0.05,
                **config,
            )
        ).train()
        optimizer = adamw(model, lr=2e-3)
        tokenizer.enable_padding()
        for step in range(steps):
            examples = [draw(rng) for _ in range(32)]
            encodings = tokenizer.encode_batch(
                [text if second is None else (text, second) for text, second, _ in examples]
            )
            batch = {
                "input_ids": torch.tensor([e.ids for e in encodings]),
                "attention_mask": torch.tensor([e.attention_mask for e in encodings]),
                "token_type_ids": torch.tensor([e.type_ids for e in encodings]),
            }
            loss = model(**batch, **labels(encodings, examples, name)).loss
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
            optimizer.step()
        tokenizer.no_padding()
        model.save_pretrained(folder / name)
        save_tokenizer(tokenizer, folder / name, max_length=64)
        print(f"{folder / name}: {kind.__name__}")

    train("pretrained", bertfast.BertForPreTraining, pair, 450)
    names = {0: "negative", 1: "positive"}
    train("reviews", bertfast.BertForSequenceClassification, review, 60, id2label=names)
    names = dict(enumerate(TAGS))
    train("names", bertfast.BertForTokenClassification, life, 100, id2label=names)
    train("questions", bertfast.BertForQuestionAnswering, question, 200)


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def tag_of(text: str, start: int, spans: list[tuple[str, str]]) -> int:
    for span, kind in spans:
        first = text.index(span)
        if first <= start < first + len(span):
            inside = " " in text[first : start + 1]
            return TAGS.index(f"{'I' if inside else 'B'}-{kind}")
    return 0


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples"))
