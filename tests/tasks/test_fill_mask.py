"""Filling blanks: order, scores, texts, several masks, refusals."""

import pytest
import torch

import bertfast
from bertfast.data import train_vocab
from bertfast.tasks import FillMask

TEXT = [["the cat sat on the mat", "the dog sat on the rug", "catlike doglike"]] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_vocab(TEXT, 80)


@pytest.fixture(scope="module", params=["BertForMaskedLM", "BertForPreTraining"])
def model(request, tokenizer):
    torch.manual_seed(0)
    config = bertfast.BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        initializer_range=0.5,
    )
    return getattr(bertfast, request.param)(config)


def test_one_mask(model, tokenizer) -> None:
    model.train()
    size = tokenizer.get_vocab_size()
    fills = FillMask(model, tokenizer)("The  [MASK] Sat!", top_k=size)
    assert model.training
    assert [fill.score for fill in fills] == sorted((f.score for f in fills), reverse=True)
    assert sum(fill.score for fill in fills) == pytest.approx(1, abs=1e-5)
    assert len({fill.token for fill in fills}) == size
    for token, _score, text in fills:
        if token.startswith("##"):
            assert text == f"The{token[2:]} Sat!"
        else:
            assert text == f"The  {token} Sat!"  # the text around it stays as it was

    encoding = tokenizer.encode("The  [MASK] Sat!")
    model.eval()
    with torch.no_grad():
        out = model(input_ids=torch.tensor([encoding.ids]))
    logits = out["logits" if "logits" in out else "prediction_logits"][0, 2]
    assert fills[0].token == tokenizer.id_to_token(int(logits.argmax()))
    assert fills[0].score == pytest.approx(logits.softmax(-1).max().item(), rel=1e-5)
    three = FillMask(model, tokenizer)("The  [MASK] Sat!", top_k=3)
    assert [fill.token for fill in three] == [fill.token for fill in fills[:3]]
    scores = [fill.score for fill in fills[:3]]
    assert [fill.score for fill in three] == pytest.approx(scores, rel=1e-5)


def test_several_masks(model, tokenizer) -> None:
    first, second = FillMask(model, tokenizer)("[MASK] sat on [MASK]", top_k=2)
    assert len(first) == len(second) == 2
    assert all(fill.text.endswith("sat on [MASK]") for fill in first)
    assert all(fill.text.startswith("[MASK] sat on") for fill in second)


@pytest.mark.parametrize(
    ("text", "top_k", "error", "message"),
    [
        ("no mask", 5, ValueError, r"text: expected at least one \[MASK\], got 'no mask'"),
        ("", 5, ValueError, r"text: expected at least one \[MASK\]"),
        ("[MASK]", 0, ValueError, "top_k: expected 1 to"),
        ("[MASK]", 10**6, ValueError, "top_k: expected 1 to"),
        (["[MASK]"], 5, TypeError, "text: expected a string, got list"),
    ],
)
def test_refuses(model, tokenizer, text, top_k, error, message) -> None:
    with pytest.raises(error, match=message):
        FillMask(model, tokenizer)(text, top_k)


def test_refuses_more_text_than_there_is_memory_for(model, tokenizer) -> None:
    fill = FillMask(model, tokenizer)
    with pytest.raises(ValueError, match=r"at most 67108864 .*2000 masks \* 5 \(top_k\) \* 14000"):
        fill("[MASK] " * 2000)
    assert len(fill("[MASK] " * 200)) == 200


def test_a_long_text_is_read_in_windows(model, tokenizer) -> None:
    """Each mask in the window where it sees most; the text of a candidate is the whole text."""
    words = ["sat"] * 23
    words[0] = words[9] = words[22] = "[MASK]"
    text = " ".join(words)
    fill = FillMask(model, tokenizer, stride=4)  # windows of ten tokens: 0-9, 6-15, 12-21, 18-22
    found = fill.candidates(text, top_k=3)
    alone = [
        fill.candidates(" ".join(words[a:b]), top_k=3)[i]
        for a, b, i in ((0, 10, 0), (6, 16, 0), (18, 23, 0))
    ]
    for here, there in zip(found, alone, strict=True):
        assert [fill.token for fill in here] == [fill.token for fill in there]
        scores = [fill.score for fill in there]
        assert [fill.score for fill in here] == pytest.approx(scores, rel=1e-5)
    assert found[1][0].text.startswith("[MASK] sat")
    assert found[1][0].text.endswith("sat [MASK]")
    short = FillMask(model, tokenizer, long="truncate")
    with pytest.raises(ValueError, match=r"the first 10 tokens, got one at 22 \(--long window, "):
        short(text)
    assert len(short(" ".join(words[:22]), top_k=1)) == 2


def test_scores_are_those_of_transformers(make_model, theirs) -> None:
    folder = make_model("BertForPreTraining")
    texts = ["Names [MASK] to objects.", "[MASK] [MASK] is an [MASK]ion", "the [MASK]"]
    found = FillMask.from_pretrained(folder).many(texts, top_k=7)
    model, tokenizer = theirs(folder, "BertForMaskedLM")
    for text, masks in zip(texts, found, strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded).logits[0]
        places = (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
        assert len(masks) == len(places)
        for mask, place in zip(masks, places, strict=True):
            scores, ids = logits[place].softmax(-1).topk(7)
            assert [fill.token for fill in mask] == tokenizer.convert_ids_to_tokens(ids.tolist())
            assert [fill.score for fill in mask] == pytest.approx(scores.tolist(), rel=1e-4)


@pytest.mark.parametrize("direction", ["left", "right"])
def test_padding_by_the_tokenizer_changes_nothing(model, tokenizer, direction) -> None:
    fill = FillMask(model, tokenizer)
    expected = fill("the [MASK] sat", top_k=3)
    tokenizer.enable_padding(length=12, direction=direction)
    try:
        assert fill("the [MASK] sat", top_k=3) == expected
    finally:
        tokenizer.no_padding()


def test_refuses_other_models_and_counts(model, tokenizer) -> None:
    with pytest.raises(TypeError, match=r"model: expected a BertForMaskedLM or .*, got BertModel"):
        FillMask(model.bert, tokenizer)
    for top_k in (1.5, True, "2"):
        with pytest.raises(TypeError, match="top_k: expected an integer, got"):
            FillMask(model, tokenizer)("[MASK]", top_k)
