"""One pre-training step of BERT-base (forward, backward; no optimizer), 8 sequences of mean length
70 padded to 128, 15 % of the tokens labelled: bertfast against transformers (sdpa), dropout 0.1."""

import pytest
import torch

import bertfast

from .bench_model import padded_batch
from .conftest import mixed_lengths

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("implementation", ["bertfast", "transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_step(benchmark, tmp_path, dtype, implementation):
    torch.manual_seed(0)
    lengths = mixed_lengths(8, 70, 128)
    model = peer = transformers.BertForPreTraining._from_config(
        transformers.BertConfig(), attn_implementation="sdpa"
    )
    batch = padded_batch(lengths)
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(batch["input_ids"].shape, generator=generator) < 0.15
    labelled = chosen & batch["attention_mask"].bool()
    batch["labels"] = batch["input_ids"].masked_fill(~labelled, -100)
    batch["next_sentence_label"] = torch.arange(8) % 2
    if implementation == "bertfast":
        model.save_pretrained(tmp_path)
        model = bertfast.BertForPreTraining.from_pretrained(tmp_path)
        with torch.no_grad():  # no speed without the same loss, where no dropout differs
            torch.testing.assert_close(model.eval()(**batch).loss, peer.eval()(**batch).loss)
    model.train()

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()

    benchmark.group = f"training step {dtype}"
    benchmark.extra_info.update(
        implementation=implementation,
        case="8 of mean 70, longest 128",
        dtype=dtype,
        tokens=sum(lengths),
        padded_tokens=8 * 128,
    )
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
