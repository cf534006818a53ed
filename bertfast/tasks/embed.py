"""One vector for each text, from the encoder's outputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from bertfast.data.vocab import load_tokenizer
from bertfast.errors import CheckpointError
from bertfast.model.bert import BertModel
from bertfast.model.config import read_json
from bertfast.model.sources import directory_of, locate
from bertfast.tasks.batches import Row, finite, token_ids
from bertfast.tasks.task import Done, Task, check_count

POOLINGS = ("cls", "mean", "max")

Self = TypeVar("Self", bound="Embed")


class Embed(Task[str, Tensor]):
    """``Embed.from_pretrained(directory)("A sentence.")``.

    ``model``: a ``BertModel``. Other arguments as in :class:`~bertfast.tasks.task.Task`. Special
    tokens take part in ``mean`` and ``max``, as in sentence-transformers; an empty text is nothing
    but them.

    Args:
        pooling: ``"cls"`` is the first token's output, ``"mean"`` the mean and ``"max"`` the
            largest value of all tokens'.
        layers: whose outputs; their mean is taken where they are several. 0 is the embedding, 1 the
            first layer, -1 the last.
        normalize: make vectors of length 1.
        dimensions: keep so many of the first ones (models trained for that are called Matryoshka
            models); before ``normalize``.
        prompt: put before every text.
        long: ``"window"`` averages the windows of a long text, each counted by its tokens
            (``mean``) or once (``cls``), or takes the largest value of all (``max``).
        stride: 0 unless given, so that no token counts twice.

    Raises:
        ValueError: an unknown pooling, a layer that is not there, too many dimensions.
    """

    models = (BertModel,)

    def __init__(
        self,
        model: BertModel,
        tokenizer: Tokenizer,
        *,
        pooling: str = "mean",
        layers: Sequence[int] = (-1,),
        normalize: bool = False,
        dimensions: int | None = None,
        prompt: str = "",
        stride: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, stride=stride, **options)
        config = self._module.config
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected a bool, got {type(normalize).__name__}")
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: expected a string, got {type(prompt).__name__}")
        self.pooling, self.normalize, self.prompt = pooling, normalize, prompt
        self.layers = _layers(layers, config.num_hidden_layers)
        self.dimensions = config.hidden_size
        if dimensions is not None:
            self.dimensions = check_count(
                "dimensions", dimensions, config.hidden_size, "hidden_size"
            )

    @classmethod
    def from_pretrained(
        cls: type[Self],
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """As :meth:`Task.from_pretrained <bertfast.tasks.task.Task.from_pretrained>`.

        A directory of sentence-transformers says by itself how it wants to be pooled, normalized
        and truncated (``modules.json``); arguments override that.

        Raises:
            CheckpointError: it asks for something that is not there: another pooling, or another
                layer on top.
        """
        place = locate(path)
        folder, defaults = sentence_transformers_defaults(directory_of(place))
        model = BertModel.from_pretrained(
            folder if place.is_dir() else place, dtype=dtype, device=device, add_pooling_layer=False
        )
        if "max_length" in defaults:
            positions = model.config.max_position_embeddings
            defaults["max_length"] = min(defaults["max_length"], positions)
        return cls(model, load_tokenizer(folder), **{**defaults, **options})

    def __call__(self, text: str) -> Tensor:
        """The vector of ``text``, float32 ``(dimensions,)`` on the CPU.

        Raises TypeError for anything but a string.
        """
        return self._one(text)

    def many(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """The vectors of ``texts``, float32 ``(len(texts), dimensions)`` on the CPU."""
        vectors = self._many(texts, progress)
        if not vectors:
            return torch.zeros(0, self.dimensions, dtype=torch.float32, device="cpu")
        return torch.stack(vectors)

    def _results(self, texts: Sequence[str], done: Done, /, **options: Any) -> list[Tensor]:
        if self.prompt:
            texts = [self.prompt + text for text in texts]
        rows = self._rows(token_ids(self._encode(texts)))
        pooled = torch.stack(self._run(rows, self._read, done))
        if len(rows) > len(texts):
            pooled = self._merge(pooled, rows, len(texts))
        pooled = pooled[:, : self.dimensions]
        return list(F.normalize(pooled) if self.normalize else pooled)

    def _read(self, inputs: dict[str, Any], places: Sequence[int]) -> Sequence[Tensor]:
        last_only = self.layers == [self._module.config.num_hidden_layers]
        out = self.model(**inputs, output_hidden_states=not last_only)
        if last_only:
            hidden = out.last_hidden_state.float()
        else:
            hidden = sum(out.hidden_states[i].float() for i in self.layers) / len(self.layers)
        return finite(pool(hidden, inputs["cu_seqlens"], self.pooling).cpu()).unbind()

    def _merge(self, pooled: Tensor, rows: Sequence[Row], texts: int) -> Tensor:
        """Windows' vectors ``(rows, H)`` to their texts' ``(texts, H)``."""
        owners = pooled.new_tensor([row.owner for row in rows], dtype=torch.int64)
        if self.pooling == "max":
            index = owners.unsqueeze(1).expand_as(pooled)
            merged = pooled.new_zeros(texts, pooled.shape[1])
            return merged.scatter_reduce(0, index, pooled, "amax", include_self=False)
        mean = self.pooling == "mean"
        weights = pooled.new_tensor([float(len(row.input_ids)) if mean else 1.0 for row in rows])
        total = pooled.new_zeros(texts).index_add(0, owners, weights).clamp(min=1)
        summed = pooled.new_zeros(texts, pooled.shape[1])
        summed = summed.index_add(0, owners, pooled * weights.unsqueeze(1))
        return summed / total.unsqueeze(1)


def pool(hidden: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """One vector for each packed sequence: ``(T, H)`` to ``(B, H)``; zeros for an empty one."""
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    if hidden.shape[0] == 0:
        return hidden.new_zeros(lengths.shape[0], hidden.shape[1])
    if pooling == "cls":
        # An empty sequence at the very end starts behind the last row.
        pooled = hidden[bounds[:-1].clamp(max=hidden.shape[0] - 1)]
    else:
        pooled = torch.segment_reduce(hidden, pooling, lengths=lengths)
    return pooled.masked_fill((lengths == 0).unsqueeze(1), 0.0)


def _layers(layers: Any, count: int) -> list[int]:
    """Indices into hidden_states, whose first is the embedding."""
    found = list(layers) if isinstance(layers, Sequence) else [layers]
    if not found:
        raise ValueError("layers: expected at least one, got none")
    for layer in found:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers: expected integers, got {type(layer).__name__}")
        if not -count - 1 <= layer <= count:
            raise ValueError(f"layers: expected {-count - 1} to {count}, got {layer}")
    return [layer % (count + 1) for layer in found]


def sentence_transformers_defaults(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Where the encoder is in a directory of sentence-transformers, and the arguments of
    :class:`Embed` that it asks for. Any other directory is the encoder's own and asks for none.

    Raises CheckpointError for modules that :class:`Embed` has not.
    """
    listed = directory / "modules.json"
    if not listed.is_file():
        return directory, {}
    modules = read_json(listed)
    folder = directory
    defaults: dict[str, Any] = {"normalize": False}
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{listed}: expected a list of modules")
    for module in modules:
        kind = str(module.get("type")).rpartition(".")[2]
        path = directory / _inside(listed, module.get("path"))
        if kind == "Transformer":
            folder = path
            defaults |= _length(path)
        elif kind == "Pooling":
            defaults["pooling"] = _pooling(path / "config.json")
        elif kind == "Normalize":
            defaults["normalize"] = True
        else:
            raise CheckpointError(
                f"{listed}: expected the modules Transformer, Pooling and Normalize, got {kind}"
            )
    return folder, defaults | _prompt_and_dimensions(directory)


def _inside(file: Path, path: Any) -> str:
    if not isinstance(path, str) or ".." in path or Path(path).is_absolute():
        raise CheckpointError(f"{file}: expected folders inside its own, got {path!r}")
    return path


def _length(folder: Path) -> dict[str, Any]:
    file = folder / "sentence_bert_config.json"
    config = _object(file) if file.is_file() else {}
    return _count(file, config, "max_seq_length", "max_length")


def _count(file: Path, config: dict[str, Any], key: str, argument: str) -> dict[str, Any]:
    """What a file gives as ``key``, under the name of the argument, if it gives it."""
    value = config.get(key)
    if value is None:
        return {}
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{file}: expected an integer as {key}, got {value!r}")
    return {argument: value}


def _pooling(file: Path) -> str:
    config = _object(file)
    chosen: Any = config.get("pooling_mode")
    if chosen is None:
        short = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
        flags = [name.removeprefix("pooling_mode_") for name, on in config.items() if on is True]
        chosen = [short.get(name, name) for name in flags if f"pooling_mode_{name}" in config]
    modes = chosen if isinstance(chosen, list) else [chosen]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        got = " + ".join(map(str, modes)) or "none"
        raise CheckpointError(f"{file}: expected one pooling of {', '.join(POOLINGS)}, got {got}")
    if config.get("include_prompt") is False:
        raise CheckpointError(f"{file}: pooling without the prompt's tokens is not supported")
    return str(modes[0])


def _prompt_and_dimensions(directory: Path) -> dict[str, Any]:
    file = directory / "config_sentence_transformers.json"
    config = _object(file) if file.is_file() else {}
    found: dict[str, Any] = {}
    name, prompts = config.get("default_prompt_name"), config.get("prompts")
    if name is not None:
        known = prompts if isinstance(prompts, dict) else {}
        prompt = known.get(name) if isinstance(name, str) else None
        if not isinstance(prompt, str):
            raise CheckpointError(f"{file}: expected a prompt named {name!r} among its prompts")
        found["prompt"] = prompt
    return found | _count(file, config, "truncate_dim", "dimensions")


def _object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
