"""Fill in the blanks: what a masked language model expects at [MASK]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Encoding

from bertfast.data.vocab import ROBERTA_TOKENS
from bertfast.errors import InputError
from bertfast.model.heads import BertForMaskedLM, BertForPreTraining
from bertfast.tasks.batches import Row, TextRows, finite, token_ids, trimmed
from bertfast.tasks.task import Done, Task, check_count

# Each candidate of each mask has the whole text, which for many masks in a long text would take all
# memory.
CHARACTERS = 2**26
WORD_STARTS = ("\u0120", "\u2581")


class Filled(NamedTuple):
    """A candidate for one [MASK]: the token as it is in the vocabulary, its probability in [0, 1],
    and the text with the token in place."""

    token: str
    score: float
    text: str


class FillMask(Task[str, list[list[Filled]]]):
    """``FillMask(model, tokenizer)("Paris is the [MASK] of France.")``.

    ``model``: a ``BertForMaskedLM`` or ``BertForPreTraining``; the head runs at the masks only.
    What is said of [MASK] holds for ``<mask>`` where the tokenizer is RoBERTa's.
    Other arguments as in :class:`~bertfast.tasks.task.Task`. A text longer than the model reads is
    cut to windows, and each [MASK] is filled where it sees most of the text around it; with
    ``long="truncate"`` masks behind the cut are an error.
    """

    pairs = False
    models = (BertForMaskedLM, BertForPreTraining)
    default_long = "window"
    with_offsets = True

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
        for a text without [MASK], a text whose candidates' texts would be more than 2**26
        characters together, or a ``top_k`` outside 1..vocabulary.
        """
        return self._one(text, top_k=self._checked_top_k(top_k))

    def many(
        self, texts: Sequence[str], top_k: int = 5, *, progress: bool = False
    ) -> list[list[list[Filled]]]:
        """:meth:`candidates` of each text, in their order.

        Raises as ``candidates`` does, with :class:`~bertfast.errors.InputError`, a ValueError, for
        a text.
        """
        return self._many(texts, progress, top_k=self._checked_top_k(top_k))

    def _checked_top_k(self, top_k: int) -> int:
        return check_count("top_k", top_k, self._module.config.vocab_size, "the vocabulary")

    def _results(
        self, texts: Sequence[str], done: Done, /, **options: Any
    ) -> list[list[list[Filled]]]:
        encodings = self._encode(texts)
        ids = token_ids(encodings)
        places = [(text == self.mask_id).nonzero()[0].tolist() for text in ids]
        rows_of: list[list[Row]] = [[] for _ in texts]
        for row in self._rows(ids):
            rows_of[row.owner].append(row)
        # Rows without a mask to fill are not computed.
        rows: list[Row] = []
        filled_by: list[list[int]] = []
        for owner, masks in enumerate(places):
            if not masks:
                shown = texts[owner][:80]
                raise InputError(owner, f"text: expected at least one {self.mask}, got {shown!r}")
            if len(masks) * options["top_k"] * len(texts[owner]) > CHARACTERS:
                raise InputError(
                    owner,
                    f"text: expected candidates of at most {CHARACTERS} characters together, got "
                    f"{len(masks)} masks * {options['top_k']} (top_k) * {len(texts[owner])}",
                )
            for row, share in _share(self.mask, masks, rows_of[owner]):
                rows.append(row)
                filled_by.append(share)

        def read(inputs: dict[str, Any], batch: Sequence[int]) -> list[Any]:
            counts = [len(filled_by[i]) for i in batch]
            wanted = [
                start + rows[i].start + mask - rows[i].first
                for i, start in zip(batch, inputs["cu_seqlens"].tolist(), strict=False)
                for mask in filled_by[i]
            ]
            scores, best = self._best(inputs, wanted, options["top_k"])
            return list(zip(scores.split(counts), best.split(counts), strict=True))

        found = self._run(rows, read, done)
        # Of each text, the probabilities and ids at its masks.
        filled: list[dict[int, tuple[list[float], list[int]]]] = [{} for _ in texts]
        for row, masks, (scores, best) in zip(rows, filled_by, found, strict=True):
            for mask, *pair in zip(masks, scores.tolist(), best.tolist(), strict=True):
                filled[row.owner][mask] = (pair[0], pair[1])
        return [
            list(self._filled(text, encoding, masks, at_masks))
            for text, encoding, masks, at_masks in zip(
                texts, encodings, places, filled, strict=True
            )
        ]

    def _best(
        self, inputs: dict[str, Any], places: list[int], top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The probabilities and ids of the best tokens at packed ``places``, ``(masks, top_k)``."""
        hidden = self._module.bert(**inputs, return_dict=True).last_hidden_state
        hidden = hidden[torch.tensor(places, dtype=torch.int64, device=hidden.device)]
        logits = self._module.cls.predictions(hidden)
        scores, best = logits.float().softmax(-1).topk(top_k)
        return finite(scores.cpu()), best.cpu()

    def _filled(
        self,
        text: str,
        encoding: Encoding,
        masks: Sequence[int],
        found: dict[int, tuple[list[float], list[int]]],
    ) -> Iterator[list[Filled]]:
        offsets = encoding.offsets
        for mask in masks:
            start, end = trimmed(text, *offsets[mask])
            scores, ids = found[mask]
            tokens = [self.tokenizer.id_to_token(id) or "" for id in ids]
            yield [
                Filled(token, score, _put(text, start, end, self._piece(id, token)))
                for id, token, score in zip(ids, tokens, scores, strict=True)
            ]

    def _piece(self, id: int, token: str) -> str:
        """What a token writes, in the way of WordPiece: "##" before a piece of a word."""
        if self.mask == "[MASK]" or token in ROBERTA_TOKENS:
            return token
        written: str = self.tokenizer.decode([id]).lstrip(" ")
        # The tokenizers of RoBERTa and XLM-R mark what begins a word.
        return written if token.startswith(WORD_STARTS) else f"##{written}"


def _share(
    mask_token: str, masks: Sequence[int], rows: Sequence[Row]
) -> Iterator[tuple[Row, list[int]]]:
    """Of a text's rows those that fill masks, and which: each row those that it sees most around.

    Raises InputError for a mask that no row holds.
    """
    shares: list[list[int]] = [[] for _ in rows]
    text_rows = TextRows(rows)
    for mask in masks:
        best = text_rows.best(mask, mask)
        if best is None:
            raise InputError(
                rows[0].owner,
                f"text: expected every {mask_token} among the first {rows[0].size} tokens, "
                f"got one at {mask} (--long window, long='window', reads on)",
            )
        shares[best].append(mask)
    return ((row, share) for row, share in zip(rows, shares, strict=True) if share)


def _put(text: str, start: int, end: int, token: str) -> str:
    before, after = text[:start], text[end:]
    if token.startswith("##"):
        return before.rstrip() + token[2:] + after
    return before + token + after
