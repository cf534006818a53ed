"""Tasks with the models and the tokenizers of BERT's relatives: what transformers computes."""

from __future__ import annotations

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from bertfast.convert import ConvertSettings, convert
from bertfast.data import builtin_documents
from bertfast.errors import CheckpointError
from bertfast.tasks import Answer, Classify, Embed, FillMask, Tag

TEXT = "The naïve value   of an expression is computed, (when) it is executed."
PAIR = ("What is computed?", TEXT)
SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
    "max_position_embeddings": 120, "type_vocab_size": 1, "num_labels": 4,
}  # fmt: skip
DISTIL = {
    "dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 40, "max_position_embeddings": 120,
    "num_labels": 4,
}  # fmt: skip
NAMES = ["<s>", "<pad>", "</s>", "<unk>"]


def roberta_tokenizer(sentences):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=NAMES, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def xlm_tokenizer(sentences):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=NAMES, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


@pytest.fixture(scope="module", params=["Roberta", "XLMRoberta", "DistilBert"])
def family(request, tmp_path_factory, tiny_tokenizer):
    """The tokenizer, and a way to make a model of transformers, saved with it."""
    import transformers

    transformers.logging.disable_progress_bar()
    sentences = [s for document in builtin_documents()[:4] for s in document]
    makers = {"Roberta": roberta_tokenizer, "XLMRoberta": xlm_tokenizer}
    make = makers.get(request.param, lambda _: tiny_tokenizer)
    tokenizer = make(sentences)

    def load(head):
        torch.manual_seed(0)
        sizes = DISTIL if request.param == "DistilBert" else SIZES
        kind = getattr(transformers, f"{request.param}Config")
        config = kind(vocab_size=tokenizer.get_vocab_size(), initializer_range=0.3, **sizes)
        if head == "ForQuestionAnswering":
            config.num_labels = 2
        model = getattr(transformers, f"{request.param}{head}")(config).eval()
        folder = tmp_path_factory.mktemp(head)
        model.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        return model, folder

    return request.param, tokenizer, load


def outputs(model, encoding):
    with torch.no_grad():
        return model(torch.tensor([encoding.ids]))


def test_embed(family, tmp_path) -> None:
    _, tokenizer, load = family
    model, folder = load("Model")
    expected = outputs(model, tokenizer.encode(TEXT)).last_hidden_state[0].mean(0)
    torch.testing.assert_close(Embed.from_pretrained(folder)(TEXT), expected, rtol=1e-5, atol=1e-5)
    convert(ConvertSettings(source=str(folder), out=str(tmp_path / "out")))
    converted = Embed.from_pretrained(tmp_path / "out")(TEXT)
    torch.testing.assert_close(converted, expected, rtol=1e-5, atol=1e-5)


def test_classify(family) -> None:
    name, tokenizer, load = family
    model, folder = load("ForSequenceClassification")
    if name == "DistilBert":  # has a ReLU where BERT has tanh
        with pytest.raises(CheckpointError):
            Classify.from_pretrained(folder)
        return
    scores = Classify.from_pretrained(folder).scores([TEXT, PAIR])
    for found, texts in zip(scores, [(TEXT,), PAIR], strict=True):
        expected = outputs(model, tokenizer.encode(*texts)).logits[0].softmax(-1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_tag(family) -> None:
    name, tokenizer, load = family
    model, folder = load("ForTokenClassification")
    encoding = tokenizer.encode(TEXT)
    scores = outputs(model, encoding).logits[0].softmax(-1)
    words = Tag.from_pretrained(folder)(TEXT).words
    assert {"naïve", "expression", "executed." if name == "XLMRoberta" else "executed"} <= {
        word.text for word in words
    }
    tokens = [
        encoding.word_to_tokens(i)[0]
        for i in sorted({i for i in encoding.word_ids if i is not None})
        if TEXT[slice(*encoding.word_to_chars(i))].strip()  # RoBERTa has words of spaces
    ]
    for word, token in zip(words, tokens, strict=True):
        assert word.text == TEXT[word.start : word.end] == word.text.strip() != ""
        assert word.score == pytest.approx(scores[token].max().item(), rel=1e-4)


def test_answer(family) -> None:
    _, tokenizer, load = family
    model, folder = load("ForQuestionAnswering")
    encoding = tokenizer.encode(*PAIR)
    out = outputs(model, encoding)
    places = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
    best = max(
        ((a, b) for a in places for b in places if a <= b),
        key=lambda ab: (out.start_logits[0, ab[0]] + out.end_logits[0, ab[1]]).item(),
    )
    answer = Answer.from_pretrained(folder, max_answer_length=100)(*PAIR).best
    assert answer is not None
    assert answer.text == TEXT[answer.start : answer.end] == answer.text.strip()
    first, last = (encoding.token_to_word(i) for i in best)
    words = [encoding.word_to_chars(word, 1) for word in (first, last)]
    assert TEXT[words[0][0] : words[1][1]].strip() == answer.text


def test_fill_mask(family) -> None:
    name, tokenizer, load = family
    model, folder = load("ForMaskedLM")
    mask = "[MASK]" if name == "DistilBert" else "<mask>"
    text = f"The value of an {mask} is computed."
    encoding = tokenizer.encode(text)
    logits = outputs(model, encoding).logits[0]
    place = encoding.ids.index(tokenizer.token_to_id(mask))
    scores, ids = logits[place].softmax(-1).topk(5)
    fill = FillMask.from_pretrained(folder)
    found = fill(text)
    assert [f.token for f in found] == [tokenizer.id_to_token(i) for i in ids]
    assert [f.score for f in found] == pytest.approx(scores.tolist(), rel=1e-4)
    texts = {candidate.token: candidate.text for candidate in fill(text, len(logits[0]))}
    marks, piece = (("Ġ", "▁"), "s") if mask == "<mask>" else (("i",), "##s")
    words = [word for word in texts if word.startswith(marks) and word[1:].isascii() and word[1:]]
    assert words
    for word in words:
        assert texts[word] == f"The value of an {word.lstrip('Ġ▁')} is computed."
    assert texts[piece] == "The value of ans is computed."
    with pytest.raises(ValueError, match=f"expected at least one {mask}".replace("[", r"\[")):
        fill("none")
