"""Fill in the blanks: what a masked language model expects at [MASK]."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from bertfast.data.vocab import special_ids
from bertfast.model.heads import BertForMaskedLM, BertForPreTraining

MASK = "[MASK]"


class Filled(NamedTuple):
    """A candidate for one [MASK]: the token, its probability in [0, 1], and the text with the token
    in place."""

    token: str
    score: float
    text: str


class FillMask:
    """``FillMask(model, tokenizer)("Paris is the [MASK] of France.")``.

    ``model``: a ``BertForMaskedLM`` or ``BertForPreTraining``; it is called in eval mode, without
    gradients, and left in the mode it was in. ``tokenizer``: a ``tokenizers.Tokenizer`` with BERT's
    special tokens (see ``load_tokenizer``); padding that it adds is left out.

    Raises TypeError for another model, ValueError for a tokenizer without BERT's special tokens.
    """

    def __init__(self, model: BertForMaskedLM | BertForPreTraining, tokenizer: Tokenizer) -> None:
        # Inside torch.compile's wrapper is the model itself.
        if not isinstance(getattr(model, "_orig_mod", model), BertForMaskedLM | BertForPreTraining):
            raise TypeError(
                "model: expected a BertForMaskedLM or BertForPreTraining, "
                f"got {type(model).__name__}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.mask_id = special_ids(tokenizer)[MASK]

    def __call__(self, text: str, top_k: int = 5) -> list[Filled] | list[list[Filled]]:
        """The ``top_k`` most probable tokens for the [MASK] in ``text``, best first.

        With several masks: one such list per mask, in their order, as ``candidates`` gives them.
        Raises as ``candidates`` does.
        """
        lists = self.candidates(text, top_k)
        return lists[0] if len(lists) == 1 else lists

    def candidates(self, text: str, top_k: int = 5) -> list[list[Filled]]:
        """For each [MASK] in ``text``, the ``top_k`` most probable tokens, best first.

        The text of a candidate fills its own mask only. A piece of a word ("##ing") is attached
        to the word before it.

        Raises TypeError for anything but a string, or a ``top_k`` that is no integer; ValueError
        for a text without [MASK], one longer than the model's positions, or a ``top_k`` outside
        1..vocabulary.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a string, got {type(text).__name__}")
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k: expected an integer, got {type(top_k).__name__}")
        encoding = self.tokenizer.encode(text)
        # Padding that the tokenizer adds is cut off and not only masked: on the left it would
        # shift the positions.
        kept = [i for i, attended in enumerate(encoding.attention_mask) if attended]
        ids = [encoding.ids[i] for i in kept]
        type_ids = [encoding.type_ids[i] for i in kept]
        places = [i for i, id in enumerate(ids) if id == self.mask_id]
        if not places:
            raise ValueError(f"text: expected at least one {MASK}, got {text[:80]!r}")
        config: Any = self.model.config
        if len(ids) > config.max_position_embeddings:
            raise ValueError(
                f"text: expected at most {config.max_position_embeddings} tokens, got {len(ids)}"
            )
        if not 1 <= top_k <= config.vocab_size:
            raise ValueError(
                f"top_k: expected 1 to {config.vocab_size} (the vocabulary), got {top_k}"
            )
        probabilities = self._logits(ids, type_ids)[places].float().softmax(-1)
        filled = []
        for place, row in zip(places, probabilities, strict=True):
            scores, best = row.topk(top_k)
            tokens = [self.tokenizer.id_to_token(id) or "" for id in best.tolist()]
            start, end = encoding.offsets[kept[place]]
            filled.append(
                [
                    Filled(token, score, _put(text, start, end, token))
                    for token, score in zip(tokens, scores.tolist(), strict=True)
                ]
            )
        return filled

    @torch.no_grad()
    def _logits(self, ids: list[int], type_ids: list[int]) -> torch.Tensor:
        device = next(self.model.parameters()).device
        training = self.model.training
        self.model.eval()
        try:
            out = self.model(
                input_ids=torch.tensor([ids], device=device),
                token_type_ids=torch.tensor([type_ids], device=device),
            )
        finally:
            self.model.train(training)
        logits = out.prediction_logits if hasattr(out, "prediction_logits") else out.logits
        return logits[0]


def _put(text: str, start: int, end: int, token: str) -> str:
    before, after = text[:start], text[end:]
    if token.startswith("##"):
        return before.rstrip() + token[2:] + after
    return before + token + after
