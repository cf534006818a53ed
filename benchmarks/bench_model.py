"""A whole BERT-base, random weights, inference: bertfast against transformers (sdpa).

Both hold the same weights and are given the same padded batch; bertfast drops the padding. The
outputs are compared before anything is timed.
"""

import pytest
import torch

import bertfast
from bertfast import testing

from .conftest import mixed_lengths

transformers = pytest.importorskip("transformers")

# Sequences' lengths, padded to the longest.
BATCHES = {
    "1x128": [128],
    "8x128": [128] * 8,
    "32 of mean 34, longest 128": mixed_lengths(32, 34, 128),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    peer = transformers.BertModel._from_config(
        transformers.BertConfig(), attn_implementation="sdpa"
    ).eval()
    folder = tmp_path_factory.mktemp("bert-base")
    peer.save_pretrained(folder)
    return {"bertfast": bertfast.BertModel.from_pretrained(folder), "transformers": peer}


def padded_batch(lengths):
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(1000, 30000, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def check(models, batch, autocast):
    """No speed without the same outputs: the gate of a whole model on the attended tokens, of the
    batch's longest and shortest sequence (all of them in float64 would take minutes)."""
    lengths = batch["attention_mask"].sum(1)
    some = torch.stack([lengths.argmax(), lengths.argmin()])
    batch = {name: tensor[some] for name, tensor in batch.items()}
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours = models["bertfast"](**batch).last_hidden_state[mask]
            theirs = models["transformers"](**batch).last_hidden_state[mask]
        exact = models["transformers"].double()(**batch).last_hidden_state[mask]
        models["transformers"].float()
    baseline = theirs.to(ours.dtype)
    testing.assert_no_worse(ours, exact, baseline, kind="model", name="bert-base")


@pytest.mark.parametrize("implementation", ["bertfast", "transformers"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_inference(benchmark, models, dtype, name, implementation):
    batch = padded_batch(BATCHES[name])
    autocast = dtype == "bfloat16"
    if implementation == "bertfast":
        check(models, batch, autocast)
    model = models[implementation]
    benchmark.group = f"inference {name} {dtype}"
    benchmark.extra_info.update(
        implementation=implementation,
        case=name,
        dtype=dtype,
        tokens=sum(BATCHES[name]),
        padded_tokens=len(BATCHES[name]) * max(BATCHES[name]),
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        benchmark.pedantic(model, kwargs=batch, rounds=5, warmup_rounds=1)
