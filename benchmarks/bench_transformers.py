"""``accelerate()`` on the training step of transformers' own BERT-base, ``BertForPreTraining``:
forward with both losses, and backward; no optimizer. Dropout 0.1, 15 % of the tokens labelled, at
full length and on mixed lengths, which can be unpadded.

``bertfast`` is ``accelerate(model)``, ``no_logits`` is that with ``output_logits=False``, and
``attention`` is ``attn_implementation="bertfast"`` alone. The models hold the same weights; before
anything is timed, their losses without dropout are compared."""

import copy
from functools import partial

import pytest
import torch

from .bench_training import labelled_batch
from .conftest import mixed_lengths
from .kernels import DTYPES
from .turns import Calls

transformers = pytest.importorskip("transformers")

BATCHES = {"8x128": [128] * 8, "8 of mean 70, longest 128": mixed_lengths(8, 70, 128)}
IMPLEMENTATIONS = ("bertfast", "transformers", "no_logits", "attention")


def calls_of(name, dtype) -> Calls:
    from bertfast.integrations.transformers import accelerate

    torch.manual_seed(0)
    peer = transformers.BertForPreTraining._from_config(
        transformers.BertConfig(), attn_implementation="sdpa"
    )
    models = {
        "bertfast": accelerate(copy.deepcopy(peer)),
        "transformers": peer,
        "no_logits": accelerate(copy.deepcopy(peer), output_logits=False),
        "attention": copy.deepcopy(peer),
    }
    models["attention"].set_attn_implementation("bertfast")
    batch = labelled_batch(BATCHES[name])

    def loss_of(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return model(**batch).loss

    with torch.no_grad():
        losses = {name: loss_of(model.eval()) for name, model in models.items()}
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for loss in losses.values():
        torch.testing.assert_close(loss, losses["transformers"], rtol=tolerance, atol=0)

    def step(model):
        model.zero_grad(set_to_none=True)
        loss_of(model).backward()

    return {name: partial(step, model.train()) for name, model in models.items()}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_accelerated_step(turns, dtype, name, implementation):
    lengths = BATCHES[name]
    turns.info.update(
        case=name,
        dtype=dtype,
        tokens=sum(lengths),
        padded_tokens=len(lengths) * max(lengths),
    )
    prepare = partial(calls_of, name, dtype)
    turns.time(f"accelerated step {name} {dtype}", implementation, prepare, rounds=(5, 10))
