"""The training gate: the kernels lead a run no further from float64 than eager torch does in the
same dtype."""

import pytest
import torch

import bertfast
from bertfast import testing

STEPS = 32


def losses(model, batches, backend):
    """The masked-LM losses of a run of plain SGD, every step with its own dropout seed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    seen = []
    with bertfast.backend(backend):
        for step, batch in enumerate(batches):
            loss = model(**batch, seed=step).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
    return torch.stack(seen)


# Backend, dtype, hidden size, layers, heads, sequences and their longest: where Triton's kernels
# are interpreted, a step of the larger model takes seconds.
RUNS = [
    (None, torch.float32, 48, 2, 4, 6, 40),
    ("triton", torch.float32, 16, 1, 2, 2, 12),
    ("cuda,cpu", torch.bfloat16, 48, 2, 2, 4, 40),
    ("cuda,reference", torch.float16, 32, 1, 4, 3, 20),
]


@pytest.mark.parametrize(
    ("backend", "dtype", "hidden", "layers", "heads", "sequences", "longest"), RUNS
)
def test_kernels_train_as_the_reference_does(
    backend, dtype, hidden, layers, heads, sequences, longest
):
    config = bertfast.BertConfig(
        vocab_size=120,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=longest,
    )
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(STEPS // 8):
        lengths = torch.randint(1, longest, (sequences,), generator=generator).tolist()
        ids = torch.randint(5, 120, (sum(lengths),), generator=generator)
        labelled = torch.rand(len(ids), generator=generator) < 0.3
        batches.append(
            {
                "input_ids": ids.masked_fill(labelled, 4),
                "labels": ids.masked_fill(~labelled, -100),
                "cu_seqlens": testing.cu_seqlens_of(lengths),
                "max_seqlen": max(lengths),
            }
        )

    # Each is seen eight times, so that there is something to learn.
    batches *= 8

    def run(dtype, backend):
        torch.manual_seed(0)
        return losses(bertfast.BertForMaskedLM(config).to(dtype), batches, backend)

    exact = run(torch.float64, "reference")
    plain = run(dtype, "reference")
    kernels = run(dtype, backend)
    assert exact[-8:].mean() < exact[:8].mean()
    for step in range(STEPS):
        # Up to this step, so that a late one does not lend an early one its error.
        so_far = slice(0, step + 1)
        name = f"training.losses-{backend}-step{step}"
        testing.assert_no_worse(
            kernels[so_far], exact[so_far], plain[so_far], kind="model", name=name
        )
    assert not torch.equal(kernels, plain), "the run on the kernels did not run on them"


def test_the_gate_sees_another_mask():
    """A single step with another seed is further off than rounding ever is."""
    torch.manual_seed(0)
    config = bertfast.BertConfig(
        vocab_size=120,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
    )
    model = bertfast.BertForMaskedLM(config).train()
    batch = {"input_ids": torch.arange(5, 45).reshape(2, 20), "labels": torch.ones(2, 20).long()}
    one, other = (model(**batch, seed=seed).loss.detach() for seed in (0, 1))
    exact = model.double()(**batch, seed=0).loss.detach()
    with pytest.raises(AssertionError, match="of the allowed"):
        testing.assert_no_worse(other, exact, one, kind="model", name="training.mask")
