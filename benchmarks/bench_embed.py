"""2,000 sentences of Python's documentation to vectors with all-MiniLM-L6-v2: bertfast against
transformers (padded batches of 32, in the order the sentences come) and sentence-transformers
(which sorts by length). From texts to normalized means, so tokenizing is part of everybody's time.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bertfast.data import builtin_documents
from bertfast.tasks import Embed

from .turns import Calls

transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

COUNT, BATCH = 2000, 32


def sentences():
    return [sentence for document in builtin_documents() for sentence in document][:COUNT]


@torch.inference_mode()
def by_transformers(model, tokenizer, texts):
    vectors = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[start : start + BATCH],
            padding=True, truncation=True, max_length=256, return_tensors="pt",
        )  # fmt: skip
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = model(**batch).last_hidden_state * mask
        vectors.append(F.normalize(hidden.sum(1) / mask.sum(1)))
    return torch.cat(vectors)


def calls_of(folder) -> Calls:
    """The three of them, which give the same vectors to 1e-5."""
    texts = sentences()
    transformers.logging.disable_progress_bar()
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    peer = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    embed = Embed.from_pretrained(folder)
    options = {"batch_size": BATCH, "show_progress_bar": False, "convert_to_tensor": True}
    calls = {
        "bertfast": partial(embed.many, texts),
        "transformers": partial(by_transformers, model, tokenizer, texts),
        "sentence-transformers": partial(peer.encode, texts, **options),
    }
    some = texts[:: COUNT // 100]
    ours = embed.many(some)
    for theirs in (by_transformers(model, tokenizer, some), peer.encode(some, **options)):
        assert (ours - theirs).abs().max() < 1e-5
    return calls


@pytest.mark.parametrize("implementation", ["bertfast", "transformers", "sentence-transformers"])
def bench_embed(turns, minilm, implementation):
    texts = sentences()
    tokenizer = Embed.from_pretrained(minilm).tokenizer
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    batches = [lengths[start : start + BATCH] for start in range(0, COUNT, BATCH)]
    turns.info.update(
        case=f"{COUNT} sentences",
        dtype="float32",
        tokens=sum(lengths),
        padded_tokens=sum(max(batch) * len(batch) for batch in batches),
    )
    turns.time("embed texts float32", implementation, partial(calls_of, minilm), rounds=(3, 7))
