"""What every BERT model class shares: weights in and out, initialisation, ties, the seed."""

import os
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from bertfast.model.config import BertConfig

if TYPE_CHECKING:
    from bertfast.model.bert import BertModel

Model = TypeVar("Model", bound="BertPreTrainedModel")


class BertPreTrainedModel(nn.Module):
    """Base of ``BertModel`` and of the heads, which hold one as ``self.bert``.

    Args:
        config: the model's shape. Not copied: models may share one.

    Raises:
        TypeError: ``config`` is no :class:`BertConfig`.
        TypeError, ValueError: ``config`` holds values that make no BERT.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        if not isinstance(config, BertConfig):
            raise TypeError(f"config: expected a BertConfig, got {type(config).__name__}")
        config.validate()
        self.config = config

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | os.PathLike[str],
        *,
        config: BertConfig | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        fresh_heads: bool = True,
        **options: Any,
    ) -> Model:
        """Load a model in evaluation mode; see :func:`bertfast.model.checkpoint.load`.

        Args:
            path: directory in Hugging Face's layout or with a TensorFlow checkpoint, such a
                checkpoint's prefix (``…/bert_model.ckpt``), or the id of a model on the hub.
            config: instead of the checkpoint's.
            dtype: of the parameters; None keeps the checkpoint's, or float32 if it mixes several.
            device: where the parameters go; None is the CPU.
            revision: branch, tag or commit on the hub; None is its main branch.
            fresh_heads: False makes it an error when the checkpoint does not have the head.
            options: config fields to override (``num_labels=3``; ``max_position_embeddings=128``
                cuts the position table), and the class's own arguments
                (``add_pooling_layer=False``).

        Raises:
            CheckpointError: files are missing or damaged, or do not fit the model.
            TypeError, ValueError: a bad argument.
        """
        from bertfast.model import checkpoint

        return checkpoint.load(
            cls,
            path,
            config=config,
            dtype=dtype,
            device=device,
            revision=revision,
            options=options,
            fresh_heads=fresh_heads,
        )

    def save_pretrained(
        self, path: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write ``config.json`` and safetensors; see :func:`bertfast.model.checkpoint.save`.

        Args:
            path: directory, created if need be.
            max_shard_size: bytes per weight file, as a number or as ``"200MB"``.
        """
        from bertfast.model import checkpoint

        checkpoint.save(self, path, max_shard_size=max_shard_size)

    @property
    def device(self) -> torch.device:
        """Where the word table lives."""
        return self.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The word table's dtype."""
        return self.get_input_embeddings().weight.dtype

    @property
    def base_model(self) -> "BertModel":
        """The encoder: this model itself, or what its head sits on."""
        base: Any = getattr(self, "bert", self)
        return base

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

    def gradient_checkpointing_enable(self) -> None:
        """Keep one tensor per layer for the backward pass and compute the rest again there.

        Gradients stay bit for bit the same: the dropout mask is a function of the forward's seed.
        """
        self.base_model.encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass again."""
        self.base_model.encoder.gradient_checkpointing = False

    def resize_token_embeddings(
        self, new_num_tokens: int, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Cut or grow the vocabulary. Kept rows keep their values, new ones are freshly drawn.

        A masked-LM decoder and its bias change along, ties stay, and ``self.config`` becomes a
        copy with the new ``vocab_size``. Parameters are new objects: make optimizers afterwards.

        Args:
            new_num_tokens: rows of the new word table.
            pad_to_multiple_of: round that up, to sizes that matrix units like.

        Returns:
            The new word table.

        Raises:
            TypeError, ValueError: a size that makes no vocabulary, or that cuts off
                ``pad_token_id``.
        """
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", multiple)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        count = -(-new_num_tokens // multiple) * multiple
        config = self.config.replace(vocab_size=count)

        old = self.get_input_embeddings()
        new = nn.Embedding(count, config.hidden_size, old.padding_idx, device="meta")
        new.weight = self._resized("word_embeddings.weight", old.weight, count)
        self.set_input_embeddings(new)
        decoder = self.get_output_embeddings()
        if decoder is not None:
            decoder.out_features = count
            if not config.tie_word_embeddings:
                decoder.weight = self._resized("decoder.weight", decoder.weight, count)
            assert decoder.bias is not None
            decoder.bias = self._resized("decoder.bias", decoder.bias, count)
        for module in self.modules():
            if isinstance(module, BertPreTrainedModel):
                module.config = config
        self.tie_weights()
        return new

    def _resized(self, name: str, old: Tensor, count: int) -> nn.Parameter:
        new = nn.Parameter(old.new_empty(count, *old.shape[1:]), requires_grad=old.requires_grad)
        init_parameter(name, new, self.config)
        kept = min(count, old.shape[0])
        with torch.no_grad():
            new[:kept] = old[:kept]
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
def init_parameter(name: str, parameter: Tensor, config: BertConfig) -> None:
    """Fill a new parameter by its name: zero biases, LayerNorm weights one, others normal."""
    if name.endswith("bias"):
        parameter.zero_()
    elif name.endswith("LayerNorm.weight"):
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, config.initializer_range)
        if name.endswith("word_embeddings.weight") and config.pad_token_id is not None:
            parameter[config.pad_token_id] = 0.0
