"""One vector for each text, from the encoder's outputs."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from bertfast.data.tokenizer_config import lowercase_first
from bertfast.data.vocab import load_tokenizer
from bertfast.errors import CheckpointError
from bertfast.model.bert import BertModel
from bertfast.model.sources import directory_of, locate
from bertfast.tasks.batches import Row, finite, token_ids
from bertfast.tasks.modules import Dense, Layout, poolings, read_layout
from bertfast.tasks.task import Done, Task, check_count, limit

Self = TypeVar("Self", bound="Embed")


class Embed(Task[str, Tensor]):
    """``Embed.from_pretrained(directory)("A sentence.")``.

    ``model``: a ``BertModel``. Other arguments as in :class:`~bertfast.tasks.task.Task`. Special
    tokens take part in every pooling, as in sentence-transformers; an empty text is nothing but
    them.

    Args:
        pooling: ``"cls"`` is the first token's output and ``"lasttoken"`` the last one's;
            ``"mean"`` the mean, ``"max"`` the largest value of all tokens';
            ``"mean_sqrt_len_tokens"`` their sum divided by the root of their number;
            ``"weightedmean"`` the mean in which the n-th token counts n times. Several, in a list,
            are joined.
        layers: whose outputs; their mean is taken where they are several. 0 is the embedding, 1 the
            first layer, -1 the last.
        head: what is computed of the pooled vectors, ``(N, in)`` to ``(N, out)``: a module, which
            is copied, and runs in float32 on the CPU, in eval mode.
        dimensions: keep so many of the first ones (models trained for that are called Matryoshka
            models).
        normalize: make vectors of length 1, last of all.
        prompt: put before every text.
        prompts: more of them, by names; ``prompt_name`` is the one that is put before every text
            where there is no ``prompt``.
        include_prompt: whether the prompt's tokens, and the special ones before it, are pooled.
        long: ``"window"`` averages the windows of a long text, each counted as its tokens are
            (``cls`` and ``lasttoken``: once), or takes the largest value of all (``max``).
        stride: 0 unless given, so that no token counts twice.

    Raises:
        ValueError: an unknown pooling or prompt, a layer that is not there, too many dimensions.
    """

    pairs = False
    models = (BertModel,)

    def __init__(
        self,
        model: BertModel,
        tokenizer: Tokenizer,
        *,
        pooling: str | Sequence[str] = "mean",
        layers: Sequence[int] = (-1,),
        head: nn.Module | None = None,
        normalize: bool = False,
        dimensions: int | None = None,
        prompt: str | None = None,
        prompts: Mapping[str, str] | None = None,
        prompt_name: str | None = None,
        include_prompt: bool = True,
        stride: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, stride=stride, **options)
        config = self._module.config
        self._poolings = poolings(pooling)
        self.pooling = pooling if isinstance(pooling, str) else self._poolings
        for name, flag in (("normalize", normalize), ("include_prompt", include_prompt)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
        self.normalize, self.include_prompt = normalize, include_prompt
        self.prompts = dict(prompts or {})
        for text in self.prompts.values():
            check_prompt(text)
        self.prompt = self._prompt(prompt, prompt_name) or ""
        self.layers = _layers(layers, config.num_hidden_layers)
        width = len(self._poolings) * config.hidden_size
        self.head = None
        if head is not None:
            self.head = copy.deepcopy(head).to("cpu", torch.float32).eval().requires_grad_(False)
            width = self._through_head(torch.zeros(1, width, dtype=torch.float32, device="cpu"))
            width = width.shape[1]
        self.dimensions = width
        if dimensions is not None:
            self.dimensions = check_count("dimensions", dimensions, width, "numbers of a vector")

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
        """As :meth:`Task.from_pretrained <bertfast.tasks.task.Task.from_pretrained>`.

        A directory of sentence-transformers says by itself how it wants to be pooled, normalized
        and truncated, what is computed of the pooled vectors and which prompts it has
        (``modules.json``); arguments override that.

        Raises:
            CheckpointError: it asks for something that is not there: another pooling, another
                layer on top, a setting that this package does not know.
        """
        place = locate(
            path, revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir
        )
        layout = read_layout(directory_of(place))
        model = BertModel.from_pretrained(
            layout.folder if place.is_dir() else place,
            dtype=dtype,
            device=device,
            ignore=ignore,
            add_pooling_layer=False,
        )
        hidden = model.config.hidden_size
        if layout.pooled is not None and layout.pooled[1] != hidden:
            raise CheckpointError(
                f"{layout.pooled[0]}: expected vectors of the model's {hidden} numbers "
                f"(hidden_size), got {layout.pooled[1]}"
            )
        defaults, positions = layout.options, model.config.max_position_embeddings
        if "pooling" in options and "head" not in options:
            _check_width(options["pooling"], hidden, layout)
        # As there: the encoder's limit counts, not the tokenizer's.
        defaults["max_length"] = limit(layout.folder, positions, defaults.get("max_length"))
        if options.get("prompt") is not None:
            defaults.pop("prompt_name", None)
        # None stands for what the directory says.
        if options.get("max_length") is None:
            options["max_length"] = defaults["max_length"]
        tokenizer = load_tokenizer(layout.folder)
        if layout.lowercase:
            lowercase_first(tokenizer)
        return cls(model, tokenizer, **{**defaults, **options})

    def __call__(
        self, text: str, *, prompt: str | None = None, prompt_name: str | None = None
    ) -> Tensor:
        """The vector of ``text``, float32 ``(dimensions,)`` on the CPU.

        ``prompt`` or the one of ``prompt_name`` is used in the place of the object's own.

        Raises TypeError for anything but a string, ValueError for an unknown prompt.
        """
        return self._one(text, prompt=self._prompt(prompt, prompt_name))

    def many(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The vectors of ``texts``, float32 ``(len(texts), dimensions)`` on the CPU."""
        vectors = self._many(texts, progress, prompt=self._prompt(prompt, prompt_name))
        if vectors:
            return torch.stack(vectors)
        return torch.zeros(0, self.dimensions, dtype=torch.float32, device="cpu")

    def _prompt(self, prompt: str | None, name: str | None) -> str | None:
        if prompt is not None and name is not None:
            raise ValueError("prompt, prompt_name: expected one of them, got both")
        if name is not None:
            if name not in self.prompts:
                names = ", ".join(self.prompts)
                expected = f"one of {names}" if names else "none, as there are no prompts"
                raise ValueError(f"prompt_name: expected {expected}, got {name!r}")
            return self.prompts[name]
        return None if prompt is None else check_prompt(prompt)

    def _results(self, texts: Sequence[str], done: Done, /, **options: Any) -> list[Tensor]:
        prompt = self.prompt if options["prompt"] is None else options["prompt"]
        # How many tokens of each text are its prompt's, and not pooled.
        left_out = None
        if prompt:
            if not self.include_prompt:
                left_out = len(token_ids(self._encode([prompt]))[0])
            texts = [prompt + text for text in texts]
        rows = self._rows(token_ids(self._encode(texts)))
        skips = [0 if left_out is None else _skip(row, left_out) for row in rows]
        read = partial(self._read, skips=skips if any(skips) else None)
        pooled = torch.stack(self._run(rows, read, done))
        if len(rows) > len(texts):
            pooled = self._merge(pooled, rows, skips, len(texts))
        if self.head is not None:
            pooled = self._through_head(pooled)
        pooled = pooled[:, : self.dimensions]
        return list(F.normalize(pooled) if self.normalize else pooled)

    def _through_head(self, pooled: Tensor) -> Tensor:
        with torch.no_grad():
            vectors = self.head(pooled) if self.head is not None else pooled
        if not isinstance(vectors, Tensor) or vectors.dim() != 2 or len(vectors) != len(pooled):
            raise ValueError(
                f"head: expected (N, out) vectors of {tuple(pooled.shape)} ones, got "
                f"{tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__}"
            )
        return vectors

    def _read(
        self, inputs: dict[str, Any], places: Sequence[int], *, skips: Sequence[int] | None
    ) -> Sequence[Tensor]:
        last_only = self.layers == [self._module.config.num_hidden_layers]
        out = self.model(**inputs, output_hidden_states=not last_only, return_dict=True)
        if last_only:
            hidden = out.last_hidden_state.float()
        else:
            hidden = sum(out.hidden_states[i].float() for i in self.layers) / len(self.layers)
        bounds = inputs["cu_seqlens"]
        skip = None
        if skips is not None:
            skip = torch.tensor([skips[i] for i in places], dtype=torch.int64, device=bounds.device)
        return finite(pool(hidden, bounds, self._poolings, skip=skip).cpu()).unbind()

    def _merge(
        self, pooled: Tensor, rows: Sequence[Row], skips: Sequence[int], texts: int
    ) -> Tensor:
        """Windows' vectors ``(rows, D)`` to their texts' ``(texts, D)``."""
        cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        # A window of nothing but prompt says nothing.
        held = [i for i, row in enumerate(rows) if skips[i] < len(row.input_ids)]
        pooled = pooled[held]
        owners = torch.tensor([rows[i].owner for i in held], dtype=torch.int64, device="cpu")
        tokens = torch.tensor([len(rows[i].input_ids) for i in held], **cpu)
        skipped = torch.tensor([skips[i] for i in held], **cpu)

        def summed(values: Tensor) -> Tensor:
            return torch.zeros(texts, *values.shape[1:], **cpu).index_add(0, owners, values)

        merged = []
        parts = pooled.chunk(len(self._poolings), dim=1)
        for name, part in zip(self._poolings, parts, strict=True):
            if name == "max":
                index = owners.unsqueeze(1).expand_as(part)
                zeros = torch.zeros(texts, part.shape[1], **cpu)
                merged.append(zeros.scatter_reduce(0, index, part, "amax", include_self=False))
                continue
            weights, total = torch.ones_like(tokens), None
            if name == "mean":
                weights = tokens - skipped
            elif name == "mean_sqrt_len_tokens":
                weights = (tokens - skipped).sqrt()
                total = summed(tokens - skipped).sqrt()
            elif name == "weightedmean":
                weights = (tokens * (tokens + 1) - skipped * (skipped + 1)) / 2
            total = summed(weights) if total is None else total
            merged.append(summed(part * weights.unsqueeze(1)) / total.clamp(min=1).unsqueeze(1))
        return torch.cat(merged, dim=1)


def _check_width(pooling: Any, hidden: int, layout: Layout) -> None:
    """Whether another pooling than a directory's fits what the directory computes of it."""
    # Others take vectors of any width.
    sized = [part for part in layout.options.get("head", ()) if [*part.parameters()]]
    if not sized:
        return
    expected, got = (hidden * len(poolings(p)) for p in (layout.options["pooling"], pooling))
    if got != expected:
        name = "Dense" if isinstance(sized[0], Dense) else "LayerNorm"
        raise ValueError(
            f"pooling: expected vectors of {expected} numbers for the directory's {name}, got {got}"
        )


def pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    pooling: str | Sequence[str],
    *,
    skip: Tensor | None = None,
) -> Tensor:
    """One vector for each packed sequence: ``(T, H)`` to ``(B, H)``; zeros for an empty one.

    Args:
        pooling: as for :class:`Embed`; several are joined, ``(B, H * poolings)``.
        skip: int64 ``(B,)``, how many of each sequence's first tokens are left out.
    """
    names = poolings(pooling)
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    places = torch.arange(hidden.shape[0], device=hidden.device, dtype=torch.int64)
    places = places - bounds[:-1].repeat_interleave(lengths)
    if skip is not None:
        skip = skip.minimum(lengths)
        kept = places >= skip.repeat_interleave(lengths)
        hidden, places, lengths = hidden[kept], places[kept], lengths - skip
        bounds = F.pad(lengths.cumsum(0), (1, 0))
    if hidden.shape[0] == 0:
        return hidden.new_zeros(lengths.shape[0], hidden.shape[1] * len(names))
    pooled = torch.cat([_pool(hidden, bounds, lengths, places, name) for name in names], dim=1)
    return pooled.masked_fill((lengths == 0).unsqueeze(1), 0.0)


def _pool(hidden: Tensor, bounds: Tensor, lengths: Tensor, places: Tensor, name: str) -> Tensor:
    """``places``: which token of its sequence each is, from 0. Anything for an empty sequence."""
    last = hidden.shape[0] - 1
    if name == "cls":
        # An empty sequence at the very end starts behind the last row.
        return hidden[bounds[:-1].clamp(max=last)]
    if name == "lasttoken":
        return hidden[(bounds[1:] - 1).clamp(min=0)]
    if name in ("mean", "max"):
        return torch.segment_reduce(hidden, name, lengths=lengths)
    if name == "mean_sqrt_len_tokens":
        summed = torch.segment_reduce(hidden, "sum", lengths=lengths)
        return summed / lengths.clamp(min=1).sqrt().unsqueeze(1)
    weights = (places + 1).to(hidden.dtype).unsqueeze(1)
    weighted = torch.segment_reduce(hidden * weights, "sum", lengths=lengths)
    return weighted / torch.segment_reduce(weights, "sum", lengths=lengths)


def check_prompt(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a string, got {type(prompt).__name__}")
    return prompt


def _skip(row: Row, prompt: int) -> int:
    """How many tokens of a row are of its text's prompt of so many, or before it."""
    left = prompt - row.first
    return row.start + min(left, row.size) if left > 0 or row.first == 0 else 0


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
