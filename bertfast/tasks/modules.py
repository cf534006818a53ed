"""Directories of sentence-transformers: the modules they list, as arguments of ``Embed``.

Settings are obeyed or refused, as everywhere; what a newer release writes and this file does not
know is refused, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast.errors import CheckpointError
from bertfast.model.config import read_json
from bertfast.model.sources import listed, read_weights
from bertfast.settings import Settings

# By the names that the newest sentence-transformers has for them, in the order in which older ones
# join them; and the flags of the older ones.
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# The encoder's settings, by the names they have had.
ENCODER_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
# What is computed for each number by itself, and takes no argument.
ACTIVATIONS = {
    kind.__name__: kind
    for kind in (nn.ELU, nn.GELU, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.Sigmoid, nn.SiLU,
                 nn.Softplus, nn.Softsign, nn.Tanh)
}  # fmt: skip
# Of the arguments for transformers: how it computes, not what.
HARMLESS_ARGUMENTS = frozenset(
    {"add_pooling_layer", "attn_implementation", "device_map", "low_cpu_mem_usage", "revision",
     "trust_remote_code", "use_safetensors"}
)  # fmt: skip
ON_CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
VECTOR = "sentence_embedding"
MODEL_FILE = "config_sentence_transformers.json"
# How vectors are compared is up to who compares them.
UNUSED = frozenset({"__version__", "requirements", "similarity_fn_name"})


class Layout(NamedTuple):
    """folder: the encoder's. options: arguments of ``Embed``. lowercase: whether texts are
    lower-cased before all else. pooled: the file that says how, and of which width the outputs
    are that it expects."""

    folder: Path
    options: dict[str, Any]
    lowercase: bool = False
    pooled: tuple[Path, int] | None = None


class Dense(nn.Module):
    """``(N, in)`` to ``(N, out)``, with sentence-transformers' names for the parameters."""

    def __init__(
        self, width: int, out: int, bias: bool, activation: nn.Module, use_residual: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out, bias=bias, **ON_CPU)
        self.activation = activation
        self.residual: nn.Module | None = None
        if use_residual:
            same = width == out
            self.residual = nn.Identity() if same else nn.Linear(width, out, bias=False, **ON_CPU)

    def forward(self, vectors: Tensor) -> Tensor:
        found: Tensor = self.activation(self.linear(vectors))
        return found if self.residual is None else found + self.residual(vectors)


class UnitLength(nn.Module):
    """Vectors ``(N, D)`` of length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors)


def read_layout(directory: Path) -> Layout:
    """What a directory of sentence-transformers asks for. Any other directory is the encoder's own
    and asks for nothing.

    Raises CheckpointError for modules and settings that ``Embed`` has not.
    """
    file = directory / "modules.json"
    if not file.is_file():
        return Layout(directory, {})
    modules = _modules(file)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= READERS.keys():
        raise CheckpointError(
            f"{file}: expected the modules Transformer, Pooling, and then any of "
            f"{', '.join(READERS)}, got {', '.join(kinds) or 'none'}"
        )
    folder = modules[0][1]
    options, lowercase = _encoder(folder)
    file = modules[1][1] / "config.json"
    pooling, outputs = _pooling(Settings.read(file))
    options |= pooling
    width = outputs * len(poolings(pooling["pooling"]))
    head: list[nn.Module] = []
    for kind, path in modules[2:]:
        module, width = READERS[kind](Settings.read(path / "config.json"), path, width)
        head.append(module)
    options["normalize"] = bool(head) and isinstance(head[-1], UnitLength)
    if options["normalize"]:
        head.pop()
    if head:
        options["head"] = nn.Sequential(*head)
    return Layout(folder, options | _model(directory), lowercase, (file, outputs))


def _modules(file: Path) -> list[tuple[str, Path]]:
    """The kind and the folder of each."""
    entries = read_json(file)
    if not isinstance(entries, list):
        raise CheckpointError(f"{file}: expected a list of modules")
    found = []
    for entry in entries:
        settings = Settings(file, entry)
        name = settings.text("type") or ""
        package, _, kind = name.rpartition(".")
        # Others' classes may have the same names.
        if package.split(".")[0] != "sentence_transformers":
            raise settings.error("type", name, "a class of sentence_transformers")
        path = settings.take("path", object, "a folder")
        if not isinstance(path, str) or ".." in path or Path(path).is_absolute():
            raise CheckpointError(f"{file}: expected folders inside its own, got {path!r}")
        settings.finish({"idx", "name"})
        found.append((kind, file.parent / path))
    return found


def read_cross_encoder(directory: Path) -> tuple[dict[str, Any], bool]:
    """What a cross-encoder of sentence-transformers 6 asks for: arguments of ``Classify``, whose
    ``function`` is the name of a class, and whether texts are lower-cased. Other directories ask
    for nothing; older cross-encoders have it all in ``config.json``.

    Raises CheckpointError for modules and settings that ``Classify`` has not.
    """
    settings = Settings.read(directory / MODEL_FILE)
    if settings.text("model_type") != "CrossEncoder":
        return {}, False
    file = directory / "modules.json"
    kinds = [
        kind for kind, folder in _modules(file) if kind != "Transformer" or folder != directory
    ]
    if kinds:
        raise CheckpointError(f"{file}: expected one Transformer, got {', '.join(kinds)}")
    options, lowercase = _encoder(directory, "sequence-classification", "logits", "scores")
    activation = settings.text("activation_fn")
    if activation is not None:
        options["activation"] = activation
    # Without a default, prompts are for those who ask for them.
    settings.only("default_prompt_name")
    settings.finish({*UNUSED, "prompts", "keep_in_fp32_modules"})
    return options, lowercase


def _encoder(
    folder: Path,
    task: str = "feature-extraction",
    output: str = "last_hidden_state",
    name: str = "token_embeddings",
) -> tuple[dict[str, Any], bool]:
    files = (folder / name for name in ENCODER_FILES)
    file = next((file for file in files if file.is_file()), folder / ENCODER_FILES[0])
    settings = Settings.read(file)
    length = settings.count("max_seq_length")
    lowercase = settings.flag("do_lower_case")
    # Where nothing is said, it is the encoder of an older release.
    settings.only("transformer_task", task)
    text = {"method": "forward", "method_output_name": output}
    settings.only("modality_config", {"text": text})
    settings.only("module_output_name", name)
    for key in ("model", "tokenizer", "processor", "config"):
        for argument in (f"{key}_args", f"{key}_kwargs"):
            values = settings.take(argument, dict, "an object") or {}
            Settings(file, values).finish(HARMLESS_ARGUMENTS)
    # Whether padding is left out, which changes nothing.
    settings.finish({"unpad_inputs"})
    return {} if length is None else {"max_length": length}, bool(lowercase)


def _pooling(settings: Settings) -> tuple[dict[str, Any], int]:
    """The arguments, and the width of what is pooled."""
    width = _either(settings, "embedding_dimension", "word_embedding_dimension")
    flags = {key: settings.flag(key) for key in FLAGS if key in settings}
    chosen = settings.take("pooling_mode", (str, list), "the name of a pooling, or a list of them")
    if chosen is None:
        chosen = [FLAGS[key] for key in FLAGS if flags.get(key)] or ["mean"]
    modes = [chosen] if isinstance(chosen, str) else chosen
    if not modes or not all(mode in POOLINGS for mode in modes):
        raise settings.error("pooling_mode", chosen, f"some of {', '.join(POOLINGS)}")
    prompt = settings.flag("include_prompt")
    settings.finish()
    pooling = modes[0] if len(modes) == 1 else tuple(modes)
    return {"pooling": pooling, "include_prompt": prompt is not False}, width


def poolings(pooling: Any) -> tuple[str, ...]:
    """The names of one pooling or of several."""
    several = isinstance(pooling, Sequence) and not isinstance(pooling, str)
    names = tuple(pooling) if several else (pooling,)
    for name in names or (pooling,):
        if name not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {name!r}")
    return names


def _either(settings: Settings, key: str, older: str) -> int:
    values = [settings.count(name) for name in (key, older)]
    value = values[0] or values[1]
    if value is None:
        raise settings.error(key, None, "a positive integer")
    return value


def _same(settings: Settings, key: str, width: int) -> None:
    value = settings.count(key)
    if value != width:
        raise settings.error(key, value, f"{width}, the length of the vectors it is given")


def _dense(settings: Settings, folder: Path, width: int) -> tuple[nn.Module, int]:
    _same(settings, "in_features", width)
    out = settings.count("out_features")
    if out is None:
        raise settings.error("out_features", None, "a positive integer")
    # Of these two, null is not as good as absent: sentence-transformers fails on it.
    for key in ("activation_function", "module_input_name"):
        if key in settings and dict(settings.items())[key] is None:
            raise settings.error(key, None, "a string, or no such setting")
    name = settings.text("activation_function") or "torch.nn.modules.activation.Tanh"
    kind = ACTIVATIONS.get(name.rpartition(".")[2])
    if kind is None or not name.startswith("torch.nn."):
        raise settings.error(
            "activation_function", name, f"one of torch.nn's {', '.join(ACTIVATIONS)}"
        )
    bias = settings.flag("bias") is not False
    use_residual = bool(settings.flag("use_residual"))
    _vectors_only(settings)
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (out, width)}
    if bias:
        shapes["linear.bias"] = (out,)
    if use_residual and width != out:
        shapes["residual.weight"] = (out, width)
    weights = _weights(settings.file, folder, "out_features", shapes)
    return _filled(Dense(width, out, bias, kind(), use_residual), weights), out


def _layer_norm(settings: Settings, folder: Path, width: int) -> tuple[nn.Module, int]:
    _same(settings, "dimension", width)
    settings.finish()
    shapes = {"norm.weight": (width,), "norm.bias": (width,)}
    weights = _weights(settings.file, folder, "dimension", shapes)
    norm = nn.Sequential(OrderedDict(norm=nn.LayerNorm(width, **ON_CPU)))
    return _filled(norm, weights), width


def _normalize(settings: Settings, folder: Path, width: int) -> tuple[nn.Module, int]:
    _vectors_only(settings)
    return UnitLength(), width


def _dropout(settings: Settings, folder: Path, width: int) -> tuple[nn.Module, int]:
    """Something of training alone."""
    settings.finish({"dropout"})
    return nn.Identity(), width


READERS = {
    "Dense": _dense, "LayerNorm": _layer_norm, "Normalize": _normalize, "Dropout": _dropout,
}  # fmt: skip


def _vectors_only(settings: Settings) -> None:
    settings.only("module_input_name", VECTOR)
    settings.only("module_output_name", VECTOR)
    settings.finish()


def _weights(
    settings: Path, folder: Path, key: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The weights in a module's folder if they have the shapes that its settings, the ``key`` in
    their file, ask for. Numbers in a file may be of any size: nothing is allocated before."""
    file, weights = read_weights(folder)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != shapes:
        expected, got = (
            listed(f"{name} {shape}" for name, shape in sizes.items()) for sizes in (shapes, found)
        )
        raise CheckpointError(f"{file}: expected {expected} ({key} in {settings}), got {got}")
    return weights


def _filled(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
    return module


def _model(directory: Path) -> dict[str, Any]:
    settings = Settings.read(directory / MODEL_FILE)
    settings.only("model_type", "SentenceTransformer")
    prompts = settings.take("prompts", dict, "prompts by their names") or {}
    if not all(prompt is None or isinstance(prompt, str) for prompt in prompts.values()):
        raise settings.error("prompts", prompts, "prompts by their names")
    # Their names for the two sides of a search are there, whether there are prompts for them.
    prompts = {"query": "", "document": "", **{name: p or "" for name, p in prompts.items()}}
    name = settings.text("default_prompt_name")
    if name is not None and name not in prompts:
        raise settings.error("default_prompt_name", name, f"one of {', '.join(prompts)}")
    options: dict[str, Any] = {"prompts": prompts, "prompt_name": name}
    dimensions = settings.count("truncate_dim")
    if dimensions is not None:
        options["dimensions"] = dimensions
    settings.finish(UNUSED)
    return options
