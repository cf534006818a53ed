"""Real short trainings with transformers' ``Trainer`` and with the accelerate library."""

from __future__ import annotations

import copy

import pytest
import torch

from bertfast.data import builtin_documents, train_vocab
from bertfast.integrations.transformers import accelerate, restore

from .conftest import CONFIGS, DROPOUTS, FAMILIES

transformers = pytest.importorskip("transformers")
accelerate_library = pytest.importorskip("accelerate")

STEPS = 32


@pytest.fixture(autouse=True)
def one_device_and_no_memory_of_it():
    """The library keeps its settings for the whole process, and refuses others."""
    reset = accelerate_library.state.AcceleratorState._reset_state
    reset(True)
    yield
    reset(True)


@pytest.fixture(scope="module")
def text():
    """Lines of real text as features of different lengths, and their tokenizer."""
    documents = builtin_documents()[:6]
    lines = [line for document in documents for line in document if len(line) > 20][:96]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train_vocab(documents, 300),
        pad_token="[PAD]", mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]",
    )  # fmt: skip
    features = [tokenizer(line, truncation=True, max_length=24) for line in lines]
    assert len({len(feature["input_ids"]) for feature in features}) > 3
    return features, tokenizer


def untrained(family, tokenizer, dropout=0.0):
    torch.manual_seed(1)
    sizes = {**CONFIGS[family], "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    config = getattr(transformers, f"{family}Config")(**{**sizes, "initializer_range": 0.05})
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    config.pad_token_id = tokenizer.pad_token_id
    return getattr(transformers, f"{family}ForMaskedLM")(config)


def train(model, text, folder, **options):
    """Losses of every step, and the trainer."""
    features, tokenizer = text
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **options,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=features,
        eval_dataset=features[:16],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, seed=4),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_follows_that_of_transformers(family, text, tmp_path):
    """Step by step, without dropout; and the loss falls."""
    model = untrained(family, text[1])
    expected, _ = train(copy.deepcopy(model), text, tmp_path)
    losses, trainer = train(accelerate(model), text, tmp_path)
    assert len(losses) == len(expected) == STEPS
    assert losses != expected  # other kernels round otherwise
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-3, atol=0)
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert trainer.evaluate()["eval_loss"] < losses[0]


def test_a_training_with_dropout_repeats(text, tmp_path):
    """Bit by bit, also with gradient checkpointing; and what it saves is what it has."""
    model = accelerate(untrained("Bert", text[1], dropout=0.1), output_logits=False)
    copies = [copy.deepcopy(model) for _ in range(2)]
    losses, trainer = train(copies[0], text, tmp_path)
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    again, _ = train(copies[1], text, tmp_path, gradient_checkpointing=True)
    assert again == losses
    weights = {name: p.clone() for name, p in copies[0].named_parameters()}
    assert all(torch.equal(p, weights[name]) for name, p in copies[1].named_parameters())
    trainer.save_model(tmp_path / "saved")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_under_the_accelerate_library(precision, text):
    features, tokenizer = text
    model = accelerate(untrained("Bert", tokenizer, dropout=0.1))
    accelerator = accelerate_library.Accelerator(cpu=True, mixed_precision=precision)
    loader = torch.utils.data.DataLoader(
        features,
        batch_size=8,
        collate_fn=transformers.DataCollatorForLanguageModeling(tokenizer, seed=4),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    torch.manual_seed(2)
    losses = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(prepared):
                out = prepared(**batch)
                assert out.loss.dtype == out.logits.dtype == torch.float32
                accelerator.backward(out.loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(out.loss.item())
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    if precision == "bf16":
        with pytest.raises(ValueError, match="its forward or class was wrapped after accelerate"):
            restore(prepared)
    prepared.eval()
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert plain is model
    with torch.no_grad():
        kernels = plain(**batch).logits
    restore(plain)
    assert type(plain) is transformers.BertForMaskedLM
    with torch.no_grad():
        assert not torch.equal(plain(**batch).logits, kernels)


def test_a_trainer_finds_the_columns_that_a_model_takes(text, tmp_path):
    """``Trainer`` drops what ``forward`` does not name."""
    model = accelerate(untrained("DistilBert", text[1]))
    _, trainer = train(model, text, tmp_path)
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "labels"} <= set(trainer._signature_columns)
    assert "token_type_ids" not in trainer._signature_columns
