"""One pre-training step of BERT-base (forward, backward; no optimizer), 8 sequences of mean length
70 padded to 128, 15 % of the tokens labelled: bertfast against transformers (sdpa), dropout 0.1,
and torch.compile of transformers."""

import copy
from functools import partial

import pytest
import torch

import bertfast

from .bench_model import padded_batch
from .conftest import mixed_lengths
from .kernels import DTYPES
from .turns import Calls

transformers = pytest.importorskip("transformers")

LENGTHS = mixed_lengths(8, 70, 128)


def labelled_batch(lengths):
    batch = padded_batch(lengths)
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(batch["input_ids"].shape, generator=generator) < 0.15
    labelled = chosen & batch["attention_mask"].bool()
    batch["labels"] = batch["input_ids"].masked_fill(~labelled, -100)
    batch["next_sentence_label"] = torch.arange(len(lengths)) % 2
    return batch


def calls_of(folder, dtype) -> Calls:
    """A step of each implementation, which give the same loss where no dropout differs."""
    torch.manual_seed(0)
    peer = transformers.BertForPreTraining._from_config(
        transformers.BertConfig(), attn_implementation="sdpa"
    )
    peer.save_pretrained(folder)
    models = {
        "bertfast": bertfast.BertForPreTraining.from_pretrained(folder),
        "transformers": peer,
        "compile": copy.deepcopy(peer),
    }
    batch = labelled_batch(LENGTHS)
    with torch.no_grad():
        losses = [models[name].eval()(**batch).loss for name in ("bertfast", "transformers")]
    torch.testing.assert_close(*losses)
    models["compile"].compile(dynamic=False)

    def step(model):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()

    return {name: partial(step, model.train()) for name, model in models.items()}


@pytest.mark.parametrize("implementation", ["bertfast", "transformers", "compile"])
@pytest.mark.parametrize("dtype", DTYPES)
def bench_step(turns, tmp_path, dtype, implementation):
    turns.info.update(
        case="8 of mean 70, longest 128",
        dtype=dtype,
        tokens=sum(LENGTHS),
        padded_tokens=len(LENGTHS) * max(LENGTHS),
    )
    prepare = partial(calls_of, tmp_path, dtype)
    turns.time(f"training step {dtype}", implementation, prepare, rounds=(5, 10))
