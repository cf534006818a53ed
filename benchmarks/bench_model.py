"""A whole BERT-base, random weights, inference: bertfast against transformers (sdpa).

Both hold the same weights and are given the same padded batch; bertfast drops the padding. The
outputs are compared before anything is timed.
"""

from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import bertfast
from bertfast import testing

from .conftest import MIXED, MIXED_LENGTHS
from .kernels import DTYPES
from .turns import Calls, wall_time

transformers = pytest.importorskip("transformers")

# Sequences' lengths, padded to the longest.
BATCHES = {
    "1x128": [128],
    "8x128": [128] * 8,
    MIXED: MIXED_LENGTHS,
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


def calls_of(models, name, dtype) -> Calls:
    """A forward of each model, after the gate. Autocast is entered in every call, so that all pay
    for casting their weights."""
    batch, autocast = padded_batch(BATCHES[name]), dtype == "bfloat16"
    check(models, batch, autocast)

    def call(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(**batch)

    return {name: partial(call, model) for name, model in models.items()}


@pytest.mark.parametrize("implementation", ["bertfast", "transformers"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_inference(turns, models, dtype, name, implementation):
    lengths = BATCHES[name]
    turns.info.update(
        case=name,
        dtype=dtype,
        tokens=sum(lengths),
        padded_tokens=len(lengths) * max(lengths),
    )
    prepare = partial(calls_of, models, name, dtype)
    turns.time(f"inference {name} {dtype}", implementation, prepare, rounds=(5, 20))


# The matrix products of F.linear, with and without bias; packed weights have ops of their own.
PRODUCTS = {"aten::addmm", "aten::mm", "aten::mkldnn_linear", "mkldnn::_linear_pointwise"}


def time_outside_products(call) -> float:
    """Seconds of a call that are not spent in the products' own code.

    Broadcasting a bias before a product and casting weights for it are outside. So are the two
    products of attention, which the implementations fuse with other things.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = wall_time(call)
    inside = sum(
        event.self_cpu_time_total for event in profiler.key_averages() if event.key in PRODUCTS
    )
    assert inside > 0, "no matrix product seen: one of another name?"
    return seconds - inside * 1e-6


@pytest.mark.parametrize("implementation", ["bertfast", "transformers"])
@pytest.mark.parametrize("dtype", DTYPES)
def bench_outside_products(turns, models, dtype, implementation):
    """The share of a forward at full length that kernels can make faster."""
    name = "8x128"
    turns.info.update(case=name, dtype=dtype)
    turns.time(
        f"outside gemm {name} {dtype}",
        implementation,
        partial(calls_of, models, name, dtype),
        rounds=(7, 15),
        measure=time_outside_products,
    )
