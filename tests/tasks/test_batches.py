"""Windows, templates, pairs, and batches of like length whose results keep the inputs' order."""

from __future__ import annotations

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

import bertfast
from bertfast import testing
from bertfast.data import train_vocab
from bertfast.errors import CheckpointError, InputError
from bertfast.model import prepacked
from bertfast.tasks import Answer, Classify, Embed, FillMask, NextSentence, Tag, batches
from bertfast.tasks.batches import Row, Template, TextRows
from bertfast.tasks.task import CHUNK

from .conftest import LENGTH, TEXTS

TASKS = {
    FillMask: "BertForMaskedLM",
    NextSentence: "BertForPreTraining",
    Embed: "BertModel",
    Classify: "BertForSequenceClassification",
    Tag: "BertForTokenClassification",
    Answer: "BertForQuestionAnswering",
}


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_windows_cover_every_token_once_but_for_the_stride(count, room, data) -> None:
    stride = data.draw(st.integers(0, room - 1))
    cuts = batches.windows(count, room, stride)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == count
    assert all(0 < end - start <= room for start, end in cuts) or count == 0
    for (_, end), (start, _) in itertools.pairwise(cuts):
        assert end - start == stride
    # No window holds only what the one before it held.
    assert all(b > a for (_, a), (_, b) in itertools.pairwise(cuts))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(2, 50))
def test_pairs_are_truncated_as_tokenizers_does_it(first, second, room) -> None:
    # tokenizers does not tell how much it would keep, so it is made to.
    tokenizer = train_vocab([["a b"] * 5], 20)
    tokenizer.enable_truncation(room + 3, strategy="longest_first")
    pair = tokenizer.encode(" ".join("a" * first), " ".join("b" * second))
    kept = tuple(pair.sequence_ids.count(i) for i in (0, 1))
    assert batches.truncated((first, second), room) == kept


def test_rows_are_what_the_tokenizer_makes(tiny_tokenizer) -> None:
    template = Template(tiny_tokenizer)
    ids = batches.token_ids(tiny_tokenizer.encode_batch(TEXTS, add_special_tokens=False))
    for a, text in zip(ids, TEXTS, strict=True):
        row, expected = template.row(3, [a]), tiny_tokenizer.encode(text)
        assert row.input_ids.tolist() == expected.ids
        assert row.token_type_ids.tolist() == expected.type_ids
        assert (row.owner, row.first, row.size) == (3, 0, len(a))
        for b, other in zip(ids, TEXTS, strict=True):
            row, expected = template.row(0, [a, b], first=7), tiny_tokenizer.encode(text, other)
            assert row.input_ids.tolist() == expected.ids
            assert row.token_type_ids.tolist() == expected.type_ids
            assert row.input_ids[row.start : row.start + row.size].tolist() == b.tolist()
            assert row.first == 7


def test_a_tokenizer_without_a_template_gives_bare_rows(tiny_tokenizer) -> None:
    bare = train_vocab([["some words here"] * 4], 60)
    plain = Tokenizer.from_str(bare.to_str())
    plain.post_processor = None
    assert Template(bare).single == 2
    assert Template(plain).single == 0
    row = Template(plain).row(0, [np.array([5, 6])])
    assert row.input_ids.tolist() == [5, 6]


@given(st.integers(1, 80), st.integers(1, 20), st.data())
def test_a_token_is_read_where_most_is_around_it(total, room, data) -> None:
    stride = data.draw(st.integers(0, room - 1))
    first = data.draw(st.integers(0, total - 1))
    last = data.draw(st.integers(first, total - 1))
    nothing = np.zeros(0, dtype=np.int64)
    cuts = batches.windows(total, room, stride)
    rows = [Row(nothing, nothing, 0, 1, start, end - start) for start, end in cuts]

    def context(start, end):
        # What is cut off on either side, if anything is.
        sides = [first - start] * (start > 0) + [end - 1 - last] * (end < total)
        return min(sides, default=total)

    contexts = [context(*cut) if cut[0] <= first < cut[1] else None for cut in cuts]
    best = TextRows(rows).best(first, last)
    assert contexts[best] == max(c for c in contexts if c is not None)
    assert TextRows(rows).best(total, total) is None


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_results_do_not_depend_on_batches_and_keep_the_order(task, make_model) -> None:
    folder = make_model(TASKS[task])
    pairs = task in (NextSentence, Answer)
    texts = [text.replace("the", "[MASK]") + (" [MASK]") for text in TEXTS]
    inputs = [(TEXTS[-1 - i], text) for i, text in enumerate(texts)] if pairs else texts
    small = task.from_pretrained(folder, batch_tokens=1)
    large = task.from_pretrained(folder, batch_tokens=10**6)
    one_by_one = [small(*value) if pairs else small(value) for value in inputs]
    if task is FillMask:
        one_by_one = [small.candidates(value) for value in inputs]
    for found in (small.many(inputs), large.many(inputs, progress=True)):
        assert len(found) == len(inputs)
        for a, b in zip(found, one_by_one, strict=True):
            assert_same(a, b)
    assert len(large.many([])) == 0


def assert_same(a, b) -> None:
    """Equal but for rounding."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_more_inputs_than_a_chunk(make_model) -> None:
    task = NextSentence.from_pretrained(make_model("BertForPreTraining"), max_length=6)
    pairs = [("a b", "c"), ("x", "y z"), ("", "")]
    found = task.many(pairs * (CHUNK // 3 + 2))
    assert len(found) == 3 * (CHUNK // 3 + 2)
    assert found[-3:] == pytest.approx(found[:3], rel=1e-4)
    inputs = [*(pairs * (CHUNK // 3 + 2)), ("a", "\ud800")]
    with pytest.raises(InputError, match="second: expected Unicode text") as error:
        task.many(inputs)
    assert error.value.index == len(inputs) - 1


def test_an_input_is_found_in_whichever_chunk(make_model, monkeypatch) -> None:
    monkeypatch.setattr("bertfast.tasks.task.CHUNK", 2)
    fill = FillMask.from_pretrained(make_model("BertForPreTraining"))
    texts = ["a [MASK]"] * 5
    assert len(fill.many(texts)) == 5
    with pytest.raises(InputError, match=r"input 3: text: expected at least one \[MASK\]") as error:
        fill.many([*texts[:3], "none", "a [MASK]"])
    assert error.value.index == 3


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_the_tokenizer_and_the_model_are_left_as_they_were(task, make_model) -> None:
    folder = make_model(TASKS[task])
    model = getattr(bertfast, TASKS[task]).from_pretrained(folder).train()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=LENGTH, direction="left")
    tokenizer.enable_truncation(4)
    settings = (tokenizer.padding, tokenizer.truncation)
    # As many tokens as there are positions, in one row.
    text = "[MASK] " + "x " * 40
    value = [("why", text)] if task in (NextSentence, Answer) else [text]
    expected = task.from_pretrained(folder).many(value)
    assert_same(task(model, tokenizer).many(value), expected)
    assert model.training
    assert (tokenizer.padding, tokenizer.truncation) == settings


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 2}, ValueError, "max_length: expected at least {fewest}, got 2"),
        ({"max_length": LENGTH + 1}, ValueError, f"max_length: expected 1 to {LENGTH}, got 49"),
        ({"max_length": 2.5}, TypeError, "max_length: expected an integer, got float"),
        ({"long": "wrap"}, ValueError, "long: expected one of truncate, window, got 'wrap'"),
        ({"stride": 46}, ValueError, "stride: expected 0 to 45, got 46"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens: expected 1 to"),
    ],
)
def test_refuses_options(task, options, error, message, make_model) -> None:
    # A pair has three special tokens, a text two.
    fewest = 5 if task in (Classify, NextSentence, Answer) else 3
    with pytest.raises(error, match=message.format(fewest=fewest)):
        task.from_pretrained(make_model(TASKS[task]), **options)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_refuses_other_models_and_inputs(task, make_model, tiny_tokenizer) -> None:
    other = "BertForMultipleChoice"
    model = getattr(bertfast, other).from_pretrained(make_model(other))
    with pytest.raises(TypeError, match=f"model: expected a .*, got {other}"):
        task(model, tiny_tokenizer)
    mine = getattr(bertfast, TASKS[task]).from_pretrained(make_model(TASKS[task]))
    with pytest.raises(TypeError, match=r"tokenizer: expected a tokenizers.Tokenizer, got str"):
        task(mine, "tokenizer.json")
    larger = Tokenizer.from_str(tiny_tokenizer.to_str())
    larger.add_tokens(["another"])
    with pytest.raises(ValueError, match=r"tokenizer: expected at most the model's \d+ tokens"):
        task(mine, larger)
    with pytest.raises(ValueError, match="tokenizer: expected the special tokens"):
        task(mine, Tokenizer(WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")))
    ready = task(mine, tiny_tokenizer)
    with pytest.raises(TypeError, match="inputs: expected a sequence, got str"):
        ready.many("text")
    with pytest.raises(TypeError, match=r"expected a .*string.*, got int \(input 1\)"):
        ready.many([("a", "b") if task in (NextSentence, Answer) else "a", 3])
    value = ("a", "\ud800") if task in (NextSentence, Answer) else "\ud800"
    with pytest.raises(ValueError, match="expected Unicode text, got a lone surrogate at 0"):
        ready.many([value])


@pytest.mark.parametrize("task", [t for t in TASKS if t is not Embed], ids=lambda t: t.__name__)
@pytest.mark.parametrize("stored", ["BertModel", "BertForMultipleChoice"])
def test_a_checkpoint_without_the_head_is_refused(task, stored, make_model) -> None:
    """A head that is drawn anew would predict noise."""
    folder = make_model(stored)
    with pytest.raises(CheckpointError) as error:
        task.from_pretrained(folder)
    assert re.match(
        re.escape(str(folder)) + r".*(got none for|does not fit BertFor\w+ with|got BertFor\w+)",
        str(error.value),
    )


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_the_tokenizers_limit_holds(task, make_model, tmp_path) -> None:
    folder = shutil.copytree(make_model(TASKS[task]), tmp_path / "model")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for limit, length in ((11, 11), (int(1e30), LENGTH), (LENGTH + 1, LENGTH)):
        file.write_text(json.dumps({**settings, "model_max_length": limit}))
        assert task.from_pretrained(folder).max_length == length
        assert task.from_pretrained(folder, max_length=None).max_length == length
    assert task.from_pretrained(folder, max_length=20).max_length == 20
    file.write_text(json.dumps({**settings, "truncation_side": "left"}))
    with pytest.raises(CheckpointError, match="truncation_side: expected 'right', got 'left'"):
        task.from_pretrained(folder)


@pytest.mark.parametrize(
    ("task", "stored", "message"),
    [
        (Tag, "BertForSequenceClassification", "kind ForTokenClassification, got BertForSequence"),
        (Classify, "BertForMultipleChoice", "kind ForSequenceClassification, got BertForMultiple"),
        # This one has no pooler.
        (Classify, "BertForTokenClassification", "got none for bert.pooler"),
    ],
)
def test_the_same_names_of_another_head_are_refused(task, stored, message, make_model) -> None:
    with pytest.raises(CheckpointError, match=message):
        task.from_pretrained(make_model(stored, num_labels=1))


@pytest.fixture
def packings(monkeypatch):
    """The weights that were packed, one entry for each time."""
    if not prepacked.is_available(torch.float32):
        pytest.skip("this build of torch, on this CPU, does not pack torch.float32")
    seen, pack = [], prepacked._pack
    monkeypatch.setattr(prepacked, "_pack", lambda weight: seen.append(weight) or pack(weight))
    return seen


def replace_data(weight):
    weight.data = weight.data * 2


def write_in_numpy(weight):
    numbers = weight.detach().numpy()
    numbers *= 2


WRITES = {
    "in place": lambda weight: weight.mul_(2),
    "through data": lambda weight: weight.data.mul_(2),
    "copied to data": lambda weight: weight.data.copy_(2 * weight),
    "another data": replace_data,
    "through numpy": write_in_numpy,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_written_weights_are_seen(write, training, make_model, tiny_tokenizer, packings) -> None:
    """Bit by bit as by a new task, whether or not torch counts the writing as a new version."""
    model = bertfast.BertModel.from_pretrained(make_model("BertModel")).train(training)
    embed = Embed(model, tiny_tokenizer)
    texts = ["Some text of several words."] * 100
    before = embed.many(texts)
    assert len({id(weight) for weight in packings}) == 18  # six in each of three layers
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "attention.output.dense" in name:
                WRITES[write](weight)
    after = embed.many(texts)
    assert not torch.allclose(before, after)
    assert torch.equal(after, Embed(model, tiny_tokenizer).many(texts))
    assert len(packings) == 3 * 18


def test_weights_are_packed_where_it_pays(make_model, packings) -> None:
    """Once in a call, in which enough rows are multiplied by a weight."""
    few = prepacked.WORTH // LENGTH - 1
    for task, stored in TASKS.items():
        ready = task.from_pretrained(make_model(stored), long="truncate")
        value = "[MASK] " + "x " * LENGTH
        value = (value, value) if task in (NextSentence, Answer) else value
        ready.many([value] * few)
        assert packings == []
        ready.many([value] * (few + 2))
        assert len({id(weight) for weight in packings}) == len(packings) >= 18
        packings.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same_products(make_model, monkeypatch, dtype) -> None:
    if not prepacked.is_available(dtype):
        pytest.skip(f"this build of torch, on this CPU, does not pack {dtype}")
    monkeypatch.setattr(prepacked, "WORTH", 1)
    model = bertfast.BertModel.from_pretrained(make_model("BertModel"), dtype=dtype)
    ids = torch.randint(0, 100, (3, 17))
    mode = prepacked.PrepackedLinear()
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        with mode:
            packed = model(ids).last_hidden_state
        exact = model.double()(ids).last_hidden_state
    model.to(dtype)
    # Six products in each of three layers, and the pooler's.
    assert sum(seen.packed is not None for seen in mode._seen.values()) == 19
    testing.assert_no_worse(packed, exact, plain, kind="model", name="prepacked")
    # Where gradients are wanted it keeps out of the way.
    with mode:
        model(ids).last_hidden_state.sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad is not None


def test_what_cannot_be_packed_is_multiplied_as_it_is(make_model, monkeypatch) -> None:
    """No task fails for what oneDNN does not take, on this machine or at all."""
    refused = RuntimeError("bf16 path needs the cpu support avx512bw")
    monkeypatch.setattr(prepacked, "WORTH", 1)

    def refuse(weight):
        raise refused

    folder = make_model("BertModel")
    monkeypatch.setattr(prepacked, "_pack", refuse)
    monkeypatch.setattr(prepacked, "is_available", prepacked.is_available.__wrapped__)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        vectors = Embed.from_pretrained(folder, dtype=dtype).many(["Some text.", "Another."])
        assert vectors.isfinite().all()


def test_onednn_switched_off_is_not_used(make_model, packings, monkeypatch) -> None:
    monkeypatch.setattr(prepacked, "WORTH", 1)
    embed = Embed.from_pretrained(make_model("BertModel"))
    embed("Some text.")
    assert packings
    packings.clear()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    embed("Some text.")
    assert packings == []


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_refused(task, value, make_model) -> None:
    ready = task.from_pretrained(make_model(TASKS[task]))
    with torch.no_grad():
        for name, parameter in ready.model.named_parameters():
            # The heads' last biases, or the encoder's.
            if parameter.dim() == 1 and ("LayerNorm" not in name or task is Embed):
                parameter.fill_(value)
    inputs = [("why", "a [MASK]") if task in (NextSentence, Answer) else "a [MASK]"]
    with pytest.raises(ValueError, match="model: expected finite outputs, got NaN or infinity"):
        ready.many(inputs)
    assert len(ready.many([])) == 0
