"""bertfast's own models under transformers' ``Trainer``, beside transformers' own."""

from __future__ import annotations

import pytest
import torch

import bertfast

from .test_trainer import (  # noqa: F401
    STEPS,
    one_device_and_no_memory_of_it,
    text,
    train,
    transformers,
    untrained,
)


def twin(model, folder):
    """The same weights as a model of ours."""
    model.save_pretrained(folder)
    return getattr(bertfast, type(model).__name__).from_pretrained(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
    ],
)
def test_a_training_follows_that_of_transformers(options, text, tmp_path):  # noqa: F811
    theirs = untrained("Bert", text[1])
    ours = twin(theirs, tmp_path)
    expected, _ = train(theirs, text, tmp_path, **options)
    losses, trainer = train(ours, text, tmp_path, **options)
    assert len(losses) == STEPS
    rtol = 3e-2 if options.get("bf16") else 2e-3
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=rtol, atol=0)
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert trainer.evaluate()["eval_loss"] < losses[0]
    ours.save_pretrained(tmp_path / "out")
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    weights = dict(ours.named_parameters())
    assert all(p.equal(weights[name]) for name, p in loaded.named_parameters())


def test_accumulated_batches_count_by_their_labels(text, tmp_path):  # noqa: F811
    """Two batches of eight in a step are one of sixteen, whatever number of words each masks."""
    features, tokenizer = text

    def collate(chosen):
        batch = tokenizer.pad({"input_ids": [f["input_ids"] for f in chosen]}, return_tensors="pt")
        labels = batch["input_ids"].clone()
        rows = torch.tensor([int(f["input_ids"][1]) % 7 for f in chosen])
        labels[torch.arange(labels.shape[1]) % 7 < rows.unsqueeze(1)] = -100
        batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    results = []
    for rows, steps in ((8, 2), (16, 1)):
        model = twin(untrained("Bert", tokenizer), tmp_path)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps, learning_rate=0.1, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True, seed=3, optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=features, data_collator=collate
        )
        trainer.train()
        results.append(dict(model.named_parameters()))
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_predictions(name, text, tmp_path):  # noqa: F811
    features, tokenizer = text
    config = bertfast.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    model = getattr(bertfast, name)(config)
    token = "Token" in name
    rows = [{**f, "labels": [1] * len(f["input_ids"]) if token else 1} for f in features[:16]]
    collator = (
        transformers.DataCollatorForTokenClassification
        if token
        else transformers.DataCollatorWithPadding
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, save_steps=2, learning_rate=1e-2,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator(tokenizer),
        compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == 1).mean())},
    )  # fmt: skip
    trainer.train()
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape[0] == 16
    assert predicted.predictions.shape[-1] == 3
    assert 0 < predicted.metrics["test_right"] <= 1
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_columns_that_a_model_takes(text, tmp_path):  # noqa: F811
    _, trainer = train(twin(untrained("Bert", text[1]), tmp_path), text, tmp_path)
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "token_type_ids", "labels"} <= set(
        trainer._signature_columns
    )
