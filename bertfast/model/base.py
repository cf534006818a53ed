"""What every BERT model class shares: weights in and out, initialisation, ties, the seed."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bertfast.model.config import BertConfig
from bertfast.model.families import as_config
from bertfast.model.keywords import (
    FORWARD,
    SAVE_PRETRAINED,
    check_off,
    one_device,
    same_thing,
    switch,
)
from bertfast.model.plain import is_plain
from bertfast.model.shapes import on_meta

if TYPE_CHECKING:
    from bertfast.model.bert import BertModel

Model = TypeVar("Model", bound="BertPreTrainedModel")

# The spread of new rows around the mean of a table, in standard deviations of its rows: as
# transformers', whose new rows have 1e-9 of the old ones' covariance.
RESIZED_STD = 1e-9**0.5


class BertPreTrainedModel(nn.Module):
    """Base of ``BertModel`` and of the heads, which hold one as ``self.bert``.

    Args:
        config: the model's shape. Not copied: models may share one. transformers' configs are
            converted.

    Raises:
        TypeError: ``config`` is neither a :class:`BertConfig` nor one of transformers'.
        TypeError, ValueError: ``config`` holds values that make no BERT.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        _, self.config = as_config(config)
        self.config.validate()

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | os.PathLike[str] | None = None,
        *,
        config: BertConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        fresh_heads: bool = True,
        ignore: Sequence[str] = (),
        ignore_mismatched_sizes: bool = False,
        use_safetensors: bool | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Model:
        """Load a model in evaluation mode; see :func:`bertfast.model.checkpoint.load`.

        Args:
            path: directory in Hugging Face's layout or with a TensorFlow checkpoint, such a
                checkpoint's prefix (``…/bert_model.ckpt``), or the id of a model on the hub.
            config: instead of the checkpoint's; transformers' are converted.
            dtype: of the parameters, as ``torch.float16`` or ``"float16"``; None or ``"auto"``
                keeps the checkpoint's, or float32 if it mixes several.
            device: where the parameters go; None is the CPU.
            revision: branch, tag or commit on the hub; None is its main branch.
            fresh_heads: False makes it an error when the checkpoint does not have the head.
            ignore: patterns, as the shell's (``"cls.species.*"``), of stored tensors to leave out;
                each must match some, and none that the model needs. Without them a checkpoint with
                tensors beyond the model is refused.
            ignore_mismatched_sizes: parameters whose stored shape is another are drawn anew, with
                a warning, as a classifier under another ``num_labels``.
            use_safetensors: True refuses a checkpoint that has only ``pytorch_model.bin`` or
                TensorFlow's files; False takes the former where both are there.
            local_files_only, token, cache_dir: of the hub, as huggingface_hub takes them.
            torch_dtype, device_map, pretrained_model_name_or_path: other names of ``dtype``, for a
                single one ``device``, and ``path``.
            options: config fields to override (``num_labels=3``, ``output_hidden_states=True``;
                ``max_position_embeddings=128`` cuts the position table), and the class's own
                arguments (``add_pooling_layer=False``). transformers' other keywords, and fields
                of its configs, are taken where they ask for nothing, and else refused.

        Raises:
            CheckpointError: files are missing or damaged, or do not fit the model.
            TypeError, ValueError: a bad argument.
        """
        from bertfast.model import checkpoint

        return checkpoint.load(
            cls,
            same_thing(
                "path", path, "pretrained_model_name_or_path", pretrained_model_name_or_path
            ),
            config=config,
            dtype=same_thing("dtype", dtype, "torch_dtype", torch_dtype),
            device=same_thing("device", device, "device_map", one_device(device_map)),
            options=options,
            fresh_heads=fresh_heads,
            ignore=ignore,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            use_safetensors=use_safetensors,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
        )

    def _asked(
        self, hidden_states: Any, attentions: Any, return_dict: Any, others: dict[str, Any]
    ) -> tuple[bool, bool, bool]:
        """What a call asks for, by its arguments or else by the config: ``output_hidden_states``,
        ``output_attentions``, ``return_dict``. ``others`` are the keywords that ask for nothing."""
        if others:
            check_off(f"{type(self).__name__}.forward", others, FORWARD)
        config = self.config
        return (
            switch("output_hidden_states", hidden_states, config.output_hidden_states),
            switch("output_attentions", attentions, config.output_attentions),
            switch("return_dict", return_dict, config.return_dict),
        )

    def save_pretrained(
        self, path: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", **others: Any
    ) -> None:
        """Write ``config.json`` and safetensors; see :func:`bertfast.model.checkpoint.save`.

        Args:
            path: directory, created if need be.
            max_shard_size: bytes per weight file, as a number or as ``"200MB"``.
            others: transformers' keywords (``safe_serialization=True``, ``state_dict=None``, …)
                where they ask for nothing.

        Raises:
            TypeError, ValueError: a bad argument, or a model that ``from_pretrained`` would refuse.
        """
        from bertfast.model import checkpoint

        check_off(f"{type(self).__name__}.save_pretrained", others, SAVE_PRETRAINED)

        checkpoint.save(self, path, max_shard_size=max_shard_size)

    @property
    def device(self) -> torch.device:
        """Where the first parameter, usually the word table, lives."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The first parameter's dtype, usually the word table's."""
        return next(self.parameters()).dtype

    @property
    def base_model(self) -> "BertModel":
        """The encoder: this model itself, or what its head sits on."""
        base: Any = getattr(self, "bert", self)
        return base

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters are, a tied one counted once.

        Args:
            only_trainable: those alone that require gradients.
            exclude_embeddings: without the three tables.
        """
        tables = (m for m in self.modules() if isinstance(m, nn.Embedding))
        left_out = {id(p) for m in tables for p in m.parameters()} if exclude_embeddings else set()
        return sum(
            p.numel()
            for p in self.parameters()
            if id(p) not in left_out and (p.requires_grad or not only_trainable)
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """The word table."""
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        """Replace the word table; call :meth:`tie_weights` for a decoder to follow it."""
        self.base_model.embeddings.word_embeddings = embeddings

    def get_output_embeddings(self) -> nn.Linear | None:
        """The masked-LM decoder, or None for a model without one."""
        return None

    def tie_weights(self) -> None:
        """Make the parameters that the config says are shared the same object again."""

    def init_weights(self) -> None:
        """Draw every parameter anew, as Google and Hugging Face do: normal weights, zero biases."""
        for name, parameter in self.named_parameters():
            init_parameter(name, parameter, self.config)

    # transformers' Trainer asks for it before it asks for gradient checkpointing.
    supports_gradient_checkpointing: ClassVar[bool] = True
    # Whether the loss takes Trainer's ``num_items_in_batch``.
    accepts_loss_kwargs: ClassVar[bool] = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the encoder computes its layers again in the backward pass."""
        return self.base_model.encoder.gradient_checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **others: Any
    ) -> None:
        """Keep one tensor per layer for the backward pass and compute the rest again there.

        Gradients stay bit for bit the same: the dropout mask is a function of the forward's seed.

        Args:
            gradient_checkpointing_kwargs: ``{"use_reentrant": False}`` or nothing: it is never
                done reentrantly, and torch's other options are not taken.
            others: transformers' ``every_n_layers=1`` and ``offload=False``.
        """
        given = dict(gradient_checkpointing_kwargs or {})
        check_off("gradient_checkpointing_kwargs", given, {"use_reentrant": (False, None)})
        known = {"every_n_layers": (1, None), "offload": (False, None)}
        check_off("gradient_checkpointing_enable", others, known)
        self.base_model.encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass again."""
        self.base_model.encoder.gradient_checkpointing = False

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **others: Any
    ) -> None:
        """transformers' newer name of :meth:`gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **others)

    def activation_checkpointing_disable(self) -> None:
        """transformers' newer name of :meth:`gradient_checkpointing_disable`."""
        self.gradient_checkpointing_disable()

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Cut or grow the vocabulary. Kept rows keep their values.

        New rows of the table, and of a decoder and its bias of its own, are drawn closely around
        the mean of the old ones, as transformers does: in every column a normal distribution of
        a 30,000th of the old rows' spread. A masked-LM decoder and its bias change along, ties
        stay, and ``self.config`` becomes a copy with the new ``vocab_size``. Parameters are new
        objects: make optimizers afterwards.

        Args:
            new_num_tokens: rows of the new word table; None is as many as now.
            pad_to_multiple_of: round that up, to sizes that matrix units like.
            mean_resizing: False draws new rows as those of a new model, zeros for a bias.

        Returns:
            The new word table.

        Raises:
            TypeError, ValueError: a size that makes no vocabulary, or that cuts off
                ``pad_token_id``; a table or a decoder that is wrapped, pruned or hooked.
        """
        old, decoder = self.get_input_embeddings(), self.get_output_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return old
        if new_num_tokens is None:
            new_num_tokens = self.config.vocab_size
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", multiple)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        # A wrapper's own parameters would be left behind.
        parts: list[tuple[type[nn.Module], Any]] = [(nn.Embedding, old), (nn.Linear, decoder)]
        for kind, part in parts:
            if part is not None and not is_plain(part, kind):
                raise TypeError(
                    f"resize_token_embeddings: expected a plain nn.{kind.__name__}, got "
                    f"{type(part).__name__} with hooks or parameters of its own; remove them"
                )
        count = -(-new_num_tokens // multiple) * multiple
        config = self.config.replace(vocab_size=count)

        with on_meta():
            new = nn.Embedding(count, config.hidden_size, old.padding_idx)
        new.weight = self._resized("word_embeddings.weight", old.weight, count, mean_resizing)
        self.set_input_embeddings(new)
        if decoder is not None:
            decoder.out_features = count
            if not config.tie_word_embeddings:
                weight = self._resized("decoder.weight", decoder.weight, count, mean_resizing)
                decoder.weight = weight
            assert decoder.bias is not None
            decoder.bias = self._resized("decoder.bias", decoder.bias, count, mean_resizing)
        for module in self.modules():
            if isinstance(module, BertPreTrainedModel):
                module.config = config
        self.tie_weights()
        return new

    def _resized(self, name: str, old: Tensor, count: int, at_mean: bool) -> nn.Parameter:
        new = nn.Parameter(old.new_empty(count, *old.shape[1:]), requires_grad=old.requires_grad)
        kept = min(count, old.shape[0])
        with torch.no_grad():
            new[:kept] = old[:kept]
            if not at_mean:
                init_parameter(name, new[kept:], self.config, padding=False)
            elif kept < count:
                # In float64, whatever the table is in; the numbers are the default generator's.
                rows = old.double()
                drawn = torch.randn(count - kept, *old.shape[1:], dtype=rows.dtype, device="cpu")
                spread = rows.std(0, correction=0) * RESIZED_STD
                new[kept:] = (rows.mean(0) + spread * drawn.to(rows.device)).to(new.dtype)
        return new

    def dropout_seed(self, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
        """The seed of one forward's dropout masks: int64 ``(1,)`` on ``device``.

        None when nothing is dropped: no module with a positive ``dropout_p`` is in training mode.
        That attribute is the config's probability at the time the model was built. Without
        a given ``seed`` it is drawn from torch's default CPU generator, so ``torch.manual_seed``
        governs training on every device.

        Args:
            seed: ``forward``'s argument: an integer of 64 bits, an int64 tensor of one element,
                or None.
            device: where the forward computes.

        Raises:
            TypeError, ValueError: ``seed`` is something else.
        """
        if isinstance(seed, Tensor):
            if seed.dtype != torch.int64 or seed.numel() != 1:
                raise TypeError(
                    "seed: expected an int64 tensor of one element, "
                    f"got {seed.dtype} of shape {tuple(seed.shape)}"
                )
        elif seed is not None:
            if isinstance(seed, bool) or not isinstance(seed, int):
                raise TypeError(f"seed: expected an integer or a tensor, got {type(seed).__name__}")
            if not -(2**63) <= seed < 2**63:
                raise ValueError(f"seed: expected a signed 64-bit integer, got {seed}")
        if not _drops(self):
            return None
        if seed is None:
            seed = draw_seed()
        if isinstance(seed, int):
            seed = torch.tensor([seed], dtype=torch.int64, device="cpu")
        return seed.reshape(1).to(device)


def _drops(module: nn.Module) -> bool:
    # Each module's own mode counts, since a part may be in training inside an evaluated whole.
    # Every forward asks this, and module.modules() takes several times as long.
    parts: list[nn.Module | None] = [module]
    while parts:
        part = parts.pop()
        if part is None:  # a pooler that is left out
            continue
        if part.training and getattr(part, "dropout_p", 0.0) > 0:
            return True
        if part._modules:
            parts.extend(part._modules.values())
    return False


# A compiled graph must not bake the draw in, nor take it from a device's generator. This is
# torch.compiler.disable, which imports torch._dynamo, put off to the first call.
@torch._disable_dynamo
def draw_seed() -> Tensor:
    """A seed of dropout masks from torch's default CPU generator: int64 ``(1,)`` on the CPU."""
    return torch.empty(1, dtype=torch.int64, device="cpu").random_(-(2**63), None)


@torch.no_grad()
def init_parameter(
    name: str, parameter: Tensor, config: BertConfig, *, padding: bool = True
) -> None:
    """Fill a new parameter by its name: zero biases, LayerNorm weights one, others normal.

    ``padding``: whether the row of the padding's word, which is zeros, is among these.
    """
    if name.endswith("bias"):
        parameter.zero_()
    elif name.endswith("LayerNorm.weight"):
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, config.initializer_range)
        table = padding and name.endswith("word_embeddings.weight")
        if table and config.pad_token_id is not None:
            parameter[config.pad_token_id] = 0.0
