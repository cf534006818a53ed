"""What every task shares: a model and a tokenizer that fit, any number of inputs of any length."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from tqdm import tqdm

from bertfast.data.tokenizer_config import lowercase_first, read_tokenizer_config
from bertfast.data.vocab import load_tokenizer, mask_token
from bertfast.errors import CheckpointError, InputError
from bertfast.model.base import BertPreTrainedModel
from bertfast.model.prepacked import PrepackedLinear
from bertfast.model.sources import directory_of, locate
from bertfast.tasks import batches
from bertfast.tasks.batches import Reader, Row, Template
from bertfast.tasks.modes import evaluating

LONG = ("truncate", "window")
# Tokens of a batch: on a CPU its activations should stay in the caches.
BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_ELSEWHERE = 32768
# So many inputs are tokenized, sorted and computed together, which bounds memory.
CHUNK = 8192

Input = TypeVar("Input")
Result = TypeVar("Result")
Self = TypeVar("Self", bound="Task[Any, Any]")
# Told of a number of inputs that are finished.
Done = Callable[[int], object]


class Task(Generic[Input, Result]):
    """Base of the tasks.

    Args:
        model: one of the classes the task names; called in eval mode, without gradients, and each
            of its modules left in the mode it was in. On the CPU a call on many tokens packs a
            copy of the weights, for speed, which lives as long as the call; the weights may be
            written between calls, by whatever means, but not during one.
        tokenizer: a ``tokenizers.Tokenizer`` with BERT's or RoBERTa's special tokens (see
            ``load_tokenizer``). It is copied; truncation and padding that it has set are not used.
        max_length: tokens of a row at most, special tokens included; None is what the model has
            positions for, in ``from_pretrained`` also what the tokenizer's ``model_max_length``
            allows, if that is less.
        long: what becomes of a longer text: ``"truncate"`` reads its beginning, ``"window"`` all
            of it, in overlapping windows.
        stride: tokens that neighbouring windows share; None is a quarter of a row.
        batch_tokens: tokens of a batch at most; None is a number that suits the model's device.

    Raises:
        TypeError: another model.
        ValueError: a tokenizer without such special tokens or with more tokens than the model, or
            an option out of range.
    """

    # What ``model`` may be, and what from_pretrained makes.
    models: ClassVar[tuple[type[BertPreTrainedModel], ...]]
    # Ends of the names in config.json's "architectures" that have this task's head.
    architectures: ClassVar[tuple[str, ...]] = ()
    default_long: ClassVar[str] = "truncate"
    with_offsets: ClassVar[bool] = False
    # Whether an input may be a pair, which takes a longer row.
    pairs: ClassVar[bool] = True

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        long: str | None = None,
        stride: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        # Inside torch.compile's wrapper is the model itself.
        self._module = getattr(model, "_orig_mod", model)
        if not isinstance(self._module, self.models):
            names = " or ".join(kind.__name__ for kind in self.models)
            raise TypeError(f"model: expected a {names}, got {type(model).__name__}")
        if self._module.device.type == "meta":
            raise ValueError("device: expected one that holds weights, got 'meta'")
        self.model = model
        self.tokenizer = _copy(tokenizer)
        self.mask = mask_token(self.tokenizer)
        self.mask_id = self.tokenizer.token_to_id(self.mask)
        config = self._module.config
        self.template = Template(self.tokenizer, config.type_vocab_size)

        if self.tokenizer.get_vocab_size() > config.vocab_size:
            raise ValueError(
                f"tokenizer: expected at most the model's {config.vocab_size} tokens (vocab_size), "
                f"got {self.tokenizer.get_vocab_size()}"
            )
        positions = config.max_position_embeddings
        # The fewest that leave a token for each text.
        fewest = self.template.single + 1
        if self.pairs:
            fewest = max(fewest, self.template.pair + 2)
        self.max_length = _integer("max_length", max_length, positions, 1, positions)
        self.long = self.default_long if long is None else long
        if self.long not in LONG:
            raise ValueError(f"long: expected one of {', '.join(LONG)}, got {long!r}")
        room = self.max_length - self.template.single
        if self.max_length < fewest:
            raise ValueError(f"max_length: expected at least {fewest}, got {self.max_length}")
        self.stride = _integer("stride", stride, room // 4, 0, room - 1)
        tokens = BATCH_TOKENS.get(self._module.device.type, BATCH_TOKENS_ELSEWHERE)
        self.batch_tokens = _integer("batch_tokens", batch_tokens, tokens, 1, 2**31 - 1)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        ignore: Sequence[str] = (),
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """The task with the model and the tokenizer of a directory.

        Args:
            path: what the model's ``from_pretrained`` takes, with ``tokenizer.json`` or
                ``vocab.txt``.
            dtype, device, ignore: of the model, as its ``from_pretrained`` takes them.
            revision, local_files_only, token, cache_dir: of the hub, likewise.
            options: the class's own arguments.

        Raises:
            CheckpointError: files are missing or damaged, or the checkpoint does not have the
                head that the task needs.
            TypeError, ValueError: a bad argument, or no tokenizer.
        """
        place = locate(
            path, revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir
        )
        model = cls._load_model(place, dtype=dtype, device=device, ignore=ignore)
        found = model.config.extra.get("architectures")
        names = [str(name) for name in found] if isinstance(found, list) else []
        heads = [name for name in names if "For" in name]
        # Two heads of different meaning can have weights of the same names.
        if cls.architectures and heads and not any(n.endswith(cls.architectures) for n in heads):
            raise CheckpointError(
                f"{os.fspath(path)}: expected a model of the kind {' or '.join(cls.architectures)},"
                f" got {', '.join(heads)}"
            )
        directory = directory_of(place)
        asked, lowercase = cls._asked_for(directory, options)
        asked["max_length"] = limit(
            directory, model.config.max_position_embeddings, asked.get("max_length")
        )
        options |= {key: value for key, value in asked.items() if options.get(key) is None}
        tokenizer = load_tokenizer(directory)
        if lowercase:
            lowercase_first(tokenizer)
        return cls(model, tokenizer, **options)

    @classmethod
    def _asked_for(cls, directory: Path, given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Arguments that a directory asks for besides those given, and whether it has texts
        lower-cased first."""
        return {}, False

    @classmethod
    def _load_model(cls, path: Any, **options: Any) -> Any:
        return cls.models[0].from_pretrained(path, fresh_heads=False, **options)

    def _many(self, inputs: Sequence[Input], progress: bool, **options: Any) -> list[Result]:
        if isinstance(inputs, str) or not isinstance(inputs, Sequence):
            raise TypeError(f"inputs: expected a sequence, got {type(inputs).__name__}")
        checked = [self._checked(i, value) for i, value in enumerate(inputs)]
        results: list[Result] = []
        hidden = None if progress else True  # None shows it on a terminal only
        with tqdm(total=len(checked), unit="input", delay=1, leave=False, disable=hidden) as bar:
            for start in range(0, len(checked), CHUNK):
                try:
                    chunk = checked[start : start + CHUNK]
                    results += self._results(chunk, bar.update, **options)
                except InputError as error:
                    raise InputError(start + error.index, error.reason) from None
        return results

    def _one(self, value: Input, **options: Any) -> Result:
        try:
            return self._many([value], False, **options)[0]
        except InputError as error:
            raise ValueError(error.reason) from None

    def _checked(self, index: int, value: Any) -> Any:
        """An input, or TypeError or InputError."""
        return check_text(index, "text", value)

    def _results(self, inputs: Sequence[Any], done: Done, /, **options: Any) -> list[Result]:
        """One result for each of a chunk of inputs."""
        raise NotImplementedError

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokens of whole texts, without special tokens; offsets only where the task needs them."""
        tokenizer = self.tokenizer
        encode = tokenizer.encode_batch if self.with_offsets else tokenizer.encode_batch_fast
        encodings: list[Encoding] = encode(list(texts), add_special_tokens=False)
        return encodings

    def _windows(self, count: int, room: int) -> list[tuple[int, int]]:
        """Where texts of ``count`` tokens are cut: as ``long`` says."""
        cuts = batches.windows(count, room, min(self.stride, room - 1))
        return cuts if self.long == "window" else cuts[:1]

    def _rows(self, texts: Sequence[np.ndarray]) -> list[Row]:
        """Rows of texts' token ids, cut as ``long`` says; each is owned by its text's index."""
        room = self.max_length - self.template.single
        return [
            self.template.row(owner, [ids[first:end]], first)
            for owner, ids in enumerate(texts)
            for first, end in self._windows(len(ids), room)
        ]

    def _pair_row(self, owner: int, first: np.ndarray, second: np.ndarray) -> Row:
        """A pair, truncated."""
        room = self.max_length - self.template.pair
        kept = batches.truncated((len(first), len(second)), room)
        return self.template.row(owner, [first[: kept[0]], second[: kept[1]]])

    def _run(self, rows: Sequence[Row], read: Reader, done: Done) -> list[Any]:
        """``read`` on every row; see :func:`bertfast.tasks.batches.run`. ``done`` is told how many
        inputs have had their last row read."""
        left = Counter(row.owner for row in rows)

        def read_and_count(inputs: dict[str, Any], places: Sequence[int]) -> Sequence[Any]:
            values = read(inputs, places)
            owners = [rows[i].owner for i in places]
            left.subtract(owners)
            done(sum(left[owner] == 0 for owner in set(owners)))
            return values

        with self._inference():
            return batches.run(
                rows, read_and_count, tokens=self.batch_tokens, device=self._module.device
            )

    @contextmanager
    def _inference(self) -> Iterator[None]:
        # A compiled graph would have the packed weights baked in.
        packing = PrepackedLinear() if self.model is self._module else nullcontext()
        with evaluating(self._module), torch.no_grad(), packing:
            yield


def limit(directory: Path, positions: int, asked: int | None = None) -> int | None:
    """How many tokens of a text are kept, of those that the model has positions for: as many as
    are asked for, or else as the directory's tokenizer says, if it does."""
    found = read_tokenizer_config(directory).max_length if asked is None else asked
    return None if found is None else min(found, positions)


def check_text(index: int, name: str, value: Any) -> str:
    """``value`` if it is a string that can be encoded, else TypeError or InputError."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__} (input {index})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            index, f"{name}: expected Unicode text, got a lone surrogate at {error.start}"
        ) from None
    return value


def check_pair(index: int, names: tuple[str, str], value: Any) -> tuple[str, str]:
    """``value`` if it is two such strings."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            f"{', '.join(names)}: expected a pair of strings, got {type(value).__name__} "
            f"(input {index})"
        )
    return check_text(index, names[0], value[0]), check_text(index, names[1], value[1])


def check_count(name: str, value: Any, highest: int, what: str) -> int:
    """``value`` if it is an integer from 1 to ``highest``, the number of ``what``."""
    return _between(name, value, 1, highest, f" ({what})")


def _integer(name: str, value: Any, default: int, low: int, high: int) -> int:
    return default if value is None else _between(name, value, low, high)


def _between(name: str, value: Any, low: int, high: int, what: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}{what}, got {value}")
    return value


def _copy(tokenizer: Any) -> Tokenizer:
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"tokenizer: expected a tokenizers.Tokenizer, got {type(tokenizer).__name__}"
        )
    try:
        copy: Tokenizer = Tokenizer.from_str(tokenizer.to_str())
    # The tokenizers library raises plain Exception for parts written in Python.
    except Exception as error:
        raise ValueError(f"tokenizer: expected one that can be saved, got: {error}") from None
    copy.no_padding()
    copy.no_truncation()
    return copy
