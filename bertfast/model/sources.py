"""Where weights come from: a directory in Hugging Face's layout, a TensorFlow checkpoint, the hub.

Files are material from strangers: nothing is unpickled beyond ``weights_only``, and whatever is
wrong with a file is a :class:`CheckpointError` that names it.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bertfast.errors import CheckpointError, short
from bertfast.model.config import MAX_LABELS, BertConfig, read_json
from bertfast.model.families import BERT, Family, as_config, bert_config, google_name
from bertfast.model.tensorflow import Checkpoint, is_table

CONFIG = "config.json"
GOOGLE_CONFIG = "bert_config.json"
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
# In the order they are looked for.
WEIGHT_FILES = (SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLE, f"{PICKLE}.index.json")
# TensorFlow's note, beside its checkpoints, of which is the latest.
LATEST = "checkpoint"

# What a hub id may look like, which a path with a typing error in it often does not.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Source(NamedTuple):
    """An opened checkpoint.

    ``file`` is for messages, and ``others`` counts what it has that is no weight, as an optimizer's
    slots. ``tensors`` are under their stored names, or for Google's under
    Hugging Face's; those on the meta device are read by ``read``, one at a time, when their shapes
    are known to fit.
    """

    file: Path
    family: Family
    config: BertConfig
    tensors: dict[str, Tensor]
    read: Callable[[str], Tensor]
    others: int = 0


def open_source(
    path: str | os.PathLike[str],
    config: Any = None,
    revision: str | None = None,
    *,
    pickles_first: bool = False,
    **hub: Any,
) -> Source:
    """Find the checkpoint that ``path`` means, and its config unless one is given.

    Args:
        path: a directory, the prefix of a TensorFlow checkpoint (``…/bert_model.ckpt``), or the id
            of a model on the hub.
        config: in place of the checkpoint's, of ours or of transformers'.
        pickles_first: whether ``pytorch_model.bin`` comes before safetensors.
        revision, hub: as :func:`locate`.

    Raises:
        CheckpointError: files are missing, damaged or foreign.
        TypeError: a bad argument.
    """
    given = None if config is None else as_config(config)
    place = locate(path, revision, **hub)
    if not place.is_dir():
        return _open_tensorflow(place, given and given[1])
    order = sorted(WEIGHT_FILES, key=lambda name: pickles_first and ".safetensors" in name)
    for name in order:
        file = place / name
        if file.is_file():
            family, config = given or _read_config(place / CONFIG)
            tensors = _read_shards(file) if name.endswith(".json") else _read_file(file)
            return Source(file, family, config, tensors, tensors.__getitem__)
    return _open_tensorflow(_prefix(place), given and given[1])


def locate(
    path: str | os.PathLike[str],
    revision: str | None = None,
    *,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The directory, or the prefix of a TensorFlow checkpoint, that ``path`` means.

    Where it is the id of a model on the hub, this is the directory its files were downloaded to.

    Args:
        path: one of these.
        revision: branch, tag or commit on the hub; None is its main branch.
        local_files_only: nothing is downloaded, and what is in the hub's cache is taken.
        token, cache_dir: as huggingface_hub takes them; None is its own settings.

    Raises:
        CheckpointError: there is none.
        TypeError: a bad argument.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a path or a hub id, got {type(path).__name__}")
    if revision is not None and not isinstance(revision, str):
        raise TypeError(f"revision: expected a string or None, got {type(revision).__name__}")
    place = Path(path)
    try:
        if place.is_dir():
            return place
        prefix = place.with_name(re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", place.name))
        if prefix.name and prefix.with_name(f"{prefix.name}.index").is_file():
            return prefix
        exists = place.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"path: expected a directory, got {str(path)!r} ({error})") from error
    if exists:
        old = ", in TensorFlow's old V1 format, which is not read" if is_table(place) else ""
        raise CheckpointError(
            f"path: expected a directory or the prefix of a TensorFlow checkpoint, got "
            f"{str(path)!r}, which is a file{old}"
        )
    if isinstance(path, str) and HUB_ID.fullmatch(path):
        from bertfast.model.hub import fetch

        return fetch(path, revision, offline=local_files_only, token=token, cache_dir=cache_dir)
    raise CheckpointError(
        f"path: expected a directory, the prefix of a TensorFlow checkpoint or a hub id, got "
        f"{str(path)!r}, which is none of them"
    )


def directory_of(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory that the checkpoint lies in which ``path`` means, and its tokenizer with it.

    Raises as :func:`locate`.
    """
    place = locate(path, revision)
    return place if place.is_dir() else place.parent


def _read_config(file: Path) -> tuple[Family, BertConfig]:
    try:
        return bert_config(read_json(file))
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _prefix(directory: Path) -> Path:
    """The TensorFlow checkpoint in a directory: the only one, or the one it was left at."""
    try:
        there = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed ({error})") from error
    indices = [name for name in there if name.endswith(".index") and (directory / name).is_file()]
    found = [name.removesuffix(".index") for name in indices]
    if not found:
        raise CheckpointError(
            f"{directory}: expected one of {', '.join(WEIGHT_FILES)}, or a TensorFlow checkpoint "
            f"(*.index), got {listed(there) or 'nothing'}"
        )
    if len(found) > 1 and (directory / LATEST).is_file():
        with open(directory / LATEST, "rb") as opened:
            note = opened.read(2**16).decode("utf-8", "replace")
        # It may be the path on the machine it was trained on.
        for latest in re.findall(r'^model_checkpoint_path: "(?:[^"]*/)?([^"/]+)"', note, re.M)[:1]:
            found = [name for name in found if name == latest] or found
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: expected one TensorFlow checkpoint, got {listed(found)}; pass one's path"
        )
    return directory / found[0]


def _open_tensorflow(prefix: Path, config: BertConfig | None) -> Source:
    checkpoint = Checkpoint(prefix)
    variables = checkpoint.variables
    if not any(name.startswith("bert/") for name in variables):
        objects = any("/.ATTRIBUTES/" in name for name in variables)
        raise CheckpointError(
            f"{checkpoint.index}: expected the variables of Google's BERT (bert/embeddings/...), "
            f"got {len(variables)} others: {listed(variables)}"
            + ("; tf.train.Checkpoint wrote it, by the names of its objects" if objects else "")
        )
    # An optimizer's slots are called as the variable they belong to and something more; its
    # counters are scalars, which no weight is.
    weights: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for stored, variable in variables.items():
        if not variable.shape or stored.rpartition("/")[0] in variables:
            continue
        name = google_name(stored)
        if name in weights:
            raise CheckpointError(
                f"{checkpoint.index}: expected one {name}, got {weights[name]} and {stored}"
            )
        shape, dtype = checkpoint.layout(stored)
        weights[name] = stored
        tensors[name] = _turned(stored, torch.empty(shape, dtype=dtype, device="meta"))

    def read(name: str) -> Tensor:
        return _turned(weights[name], checkpoint.read(weights[name]))

    if config is None:
        config = _google_config(prefix)
        classifier = tensors.get("classifier.weight")
        if classifier is not None and 1 <= classifier.shape[0] <= MAX_LABELS:
            config = config.replace(num_labels=classifier.shape[0])
    others = len(variables) - len(tensors)
    return Source(checkpoint.index, BERT, config, tensors, read, others)


def _turned(variable: str, value: Tensor) -> Tensor:
    """A dense layer's kernel is (in, out), and its weight here (out, in)."""
    return value.T if variable.endswith("/kernel") and value.dim() == 2 else value


def _google_config(prefix: Path) -> BertConfig:
    """The config beside a TensorFlow checkpoint.

    In ``bert_config.json``, Google's file, "gelu" is the function of Google's code, which is
    tanh's approximation; in ``config.json``, Hugging Face's, it is that of erf.
    """
    file = prefix.with_name(GOOGLE_CONFIG)
    if file.is_file():
        config = BertConfig.from_json_file(file)
        return config.replace(hidden_act="gelu_new") if config.hidden_act == "gelu" else config
    file = prefix.with_name(CONFIG)
    if file.is_file():
        return BertConfig.from_json_file(file)
    raise CheckpointError(
        f"{prefix.parent}: expected {GOOGLE_CONFIG} beside {prefix.name}, which is missing; "
        "copy it from the model that was trained on, or pass config="
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise CheckpointError(
            f'{index}: expected an object whose "weight_map" gives each weight\'s file, '
            f"got {short(content)}"
        )
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        # A plain file name, so that an index cannot reach out of its directory.
        if not shard or shard in (".", "..") or re.search(r"[/\\:\x00]", shard):
            raise CheckpointError(f"{index}: expected names of files beside it, got {short(shard)}")
        file = index.parent / shard
        if not file.is_file():
            raise CheckpointError(f"{index}: expected the file {shard} beside it, which is missing")
        tensors = _read_file(file)
        promised = {name for name, where in weight_map.items() if where == shard}
        for kind, names in (
            ("has no", promised - tensors.keys()),
            ("has, unknown to the index,", tensors.keys() - promised),
        ):
            if names:
                raise CheckpointError(f"{file}: {kind} {listed(names)}, according to {index.name}")
        weights.update(tensors)
    return weights


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The one file of weights in a folder, of a module that is no model by itself."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = folder / name
        if file.is_file():
            return file, _read_file(file)
    raise CheckpointError(f"{folder}: expected model.safetensors or pytorch_model.bin")


def _read_file(file: Path) -> dict[str, Tensor]:
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    # Dtypes that torch lacks and shapes it refuses come as other exceptions than SafetensorError.
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError,
            KeyError, MemoryError, OverflowError) as error:  # fmt: skip
        raise CheckpointError(_damaged(file, "a safetensors file", error)) from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    # A damaged pickle fails in the interpreter of a small language: anything may come out.
    except Exception as error:
        raise CheckpointError(_damaged(file, "a file of torch weights", error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a dict of tensors, got {short(content)}")
    for name, weight in content.items():
        dense = isinstance(weight, Tensor) and weight.layout is torch.strided
        if not isinstance(name, str) or not dense or weight.device.type != "cpu":
            raise CheckpointError(
                f"{file}: expected a dict of names and dense tensors, got "
                f"{short(name)} with {short(weight)}"
            )
    return {name: weight.detach() for name, weight in content.items()}


def _damaged(file: Path, expected: str, error: Exception) -> str:
    try:
        with file.open("rb") as opened:
            start = opened.read(16)
        found = f"{file.stat().st_size} bytes starting {start!r}"
    except OSError:
        found = "something that cannot be read"
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"{file}: expected {expected}, got {found} ({short(reason)})"


def listed(items: Iterable[str], separator: str = ", ", limit: int = 12) -> str:
    names = sorted(items)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more
