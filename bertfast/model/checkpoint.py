"""Weights in and out: into a model from any of :mod:`bertfast.model.sources`, out to a directory
in Hugging Face's layout.

Shapes are compared before parameters are allocated, and whatever is wrong with a file is a
:class:`CheckpointError` that names it. A checkpoint fits a model exactly, or the difference is one
of these:

* the body's names come with or without ``bert.``, LayerNorm's as ``gamma`` and ``beta``;
* buffers that are no weights (``position_ids``) are skipped;
* a tied decoder may be stored or not, and its bias under either of its names;
* a head or pooler that the model does not have is skipped; one that the checkpoint does not have
  is drawn anew, with a warning;
* tensors that a pattern of the caller's leaves out;
* the position table is longer than the caller asks for: its first rows are taken;
* what :mod:`bertfast.model.families` says of BERT's relatives.
"""

import dataclasses
import fnmatch
import inspect
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from bertfast.errors import CheckpointError, short
from bertfast.model.base import BertPreTrainedModel, init_parameter
from bertfast.model.bert import BertModel
from bertfast.model.config import UNSUPPORTED, BertConfig
from bertfast.model.families import CLASSIFIER, POOLER, PREDICTIONS, bert_names
from bertfast.model.keywords import FROM_PRETRAINED, NOTES, check_off, switch
from bertfast.model.shapes import on_meta
from bertfast.model.sources import CONFIG, FLOATS, SAFETENSORS, Source, listed, open_source

BODY = ("embeddings.", "encoder.", "pooler.")
BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
WORD_TABLE = "bert.embeddings.word_embeddings.weight"
POSITION_TABLE = "bert.embeddings.position_embeddings.weight"
TYPE_TABLE = "bert.embeddings.token_type_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
PREDICTION_BIAS = "cls.predictions.bias"
TIED = {DECODER: WORD_TABLE, DECODER_BIAS: PREDICTION_BIAS}
# Each of these is in a checkpoint, or in a model, as a whole or not at all.
PARTS = (POOLER, PREDICTIONS, "cls.seq_relationship.", CLASSIFIER, "qa_outputs.")

FIELDS = {field.name for field in dataclasses.fields(BertConfig)} - {"extra"}
WAY_ROUND = "ignore= in from_pretrained, or convert --ignore, leaves out what a pattern matches"

Model = TypeVar("Model", bound=BertPreTrainedModel)
_CPU = torch.device("cpu")


def load(
    cls: type[Model],
    path: str | os.PathLike[str],
    *,
    config: BertConfig | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    options: dict[str, Any] | None = None,
    fresh_heads: bool = True,
    ignore: Sequence[str] = (),
    ignore_mismatched_sizes: bool = False,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> Model:
    """Build ``cls`` with the weights that ``path`` means, in evaluation mode.

    A directory holds ``config.json`` (unless ``config`` is given) and one of
    ``model.safetensors``, ``model.safetensors.index.json``, ``pytorch_model.bin``,
    ``pytorch_model.bin.index.json``, looked for in this order; or ``bert_config.json`` and a
    TensorFlow checkpoint (``*.index``, ``*.data-…``), as Google published them.

    Args:
        cls: the model class.
        path: a directory, a TensorFlow checkpoint's prefix (``…/bert_model.ckpt``), or the id of a
            model on the hub, for which ``huggingface_hub`` must be installed.
        config: in place of the checkpoint's; its weights are then taken for BERT's, or for those
            of what a config of transformers is of.
        dtype: of the parameters, or its name; None or ``"auto"`` keeps the checkpoint's, or float32
            if it mixes several.
        device: where the parameters go; None is the CPU.
        options: config fields to override, and ``cls``'s own arguments. A
            ``max_position_embeddings`` below the checkpoint's cuts its position table.
        fresh_heads: a head that the checkpoint does not have is drawn anew; False makes it an
            error, as for predictions it is one.
        ignore: patterns of stored tensors to leave out; see :func:`ignored`.
        ignore_mismatched_sizes: parameters of another shape than stored are drawn anew, with a
            warning.
        use_safetensors: True wants ``model.safetensors``, in shards or not; False does where there
            is no ``pytorch_model.bin``.
        hub: ``revision``, ``local_files_only``, ``token``, ``cache_dir``; see
            :func:`bertfast.model.sources.locate`.

    Raises:
        CheckpointError: files are missing, damaged or foreign, or names or shapes do not fit.
        TypeError, ValueError: a bad argument.
    """
    dtype = checked_dtype(dtype)
    device = _device(device)
    for name, value in (("fresh_heads", fresh_heads),
                        ("ignore_mismatched_sizes", ignore_mismatched_sizes),
                        ("use_safetensors", use_safetensors)):  # fmt: skip
        switch(name, value, False)
    options = _known(cls, options or {})
    source = open_source(path, config, pickles_first=use_safetensors is False, **hub)
    if use_safetensors and ".safetensors" not in source.file.name:
        raise CheckpointError(
            f"{source.file.parent}: expected {SAFETENSORS}, as use_safetensors says, got "
            f"{source.file.name}"
        )
    return build(
        cls, source, given=config is not None, dtype=dtype, device=device, options=options,
        fresh_heads=fresh_heads, ignore=ignore, ignore_mismatched_sizes=ignore_mismatched_sizes,
    )  # fmt: skip


def build(
    cls: type[Model],
    source: Source,
    *,
    given: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device = _CPU,
    options: dict[str, Any] | None = None,
    fresh_heads: bool = True,
    ignore: Sequence[str] = (),
    ignore_mismatched_sizes: bool = False,
) -> Model:
    """What :func:`load` does, of a checkpoint that is open already; ``given`` says that its config
    is the caller's."""
    config = source.config
    options = dict(options or {})
    overrides = {name: options.pop(name) for name in list(options) if name in FIELDS}
    notes = {name: options.pop(name) for name in list(options) if name in NOTES}
    if overrides or notes:
        config = config.replace(**overrides, extra={**config.extra, **notes})
    if cls is BertModel and not source.family.has_pooler:
        options.setdefault("add_pooling_layer", False)

    # On the meta device a model costs no memory, so shapes are compared before any is allocated.
    with on_meta():
        model = cls(config, **options)
    weights, stored_names = _canonical(source, model, ignore)
    chosen = given or "max_position_embeddings" in overrides
    rows = _positions(source, config, weights, chosen)
    fresh = _match(source.file, model, weights, ignore_mismatched_sizes)
    if fresh and not fresh_heads:
        raise CheckpointError(
            f"{source.file}: expected the weights of a trained {cls.__name__}, "
            f"got none for {', '.join(part.rstrip('.') for part in fresh)}"
        )
    dtype = _dtype_of(weights) if dtype is None else dtype

    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weight = weights.get(with_bert(name))
        if weight is None:
            weight = torch.empty(parameter.shape, device=device, dtype=dtype)
            init_parameter(name, weight, config)
        elif weight.is_meta:
            weight = source.read(stored_names[with_bert(name)])
            weight = weight[rows] if with_bert(name) == POSITION_TABLE else weight
        # A copy always: a loaded tensor may be a view of a mapped file.
        state[name] = weight.to(device=device, dtype=dtype, copy=True).contiguous()
    # Tied parameters are asked for under every name they have, and become one again after that.
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[name] = state[first_name[id(parameter)]]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    if fresh:
        warnings.warn(
            f"{source.file}: has no {listed(part.rstrip('.') for part in fresh)}, which "
            f"{cls.__name__} draws anew; train before use",
            stacklevel=4,
        )
    return model.eval()


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A parameter's dtype, also by its name; None, and ``"auto"``, is as it is stored."""
    if dtype is None or dtype == "auto":
        return None
    names = {str(known).removeprefix("torch."): known for known in FLOATS}
    found = names.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in FLOATS:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, FLOATS))}, got {dtype}")
    return found


def _known(cls: type[BertPreTrainedModel], options: dict[str, Any]) -> dict[str, Any]:
    """Those of ``from_pretrained``'s other keywords that mean something; the rest must not."""
    own = inspect.signature(cls.__init__).parameters.keys() - {"self", "config"}
    given = {name: value for name, value in options.items() if name in FIELDS | NOTES | own}
    others = {name: value for name, value in options.items() if name not in given}
    check_off(
        f"{cls.__name__}.from_pretrained",
        others,
        UNSUPPORTED | FROM_PRETRAINED,
        " or a field of BertConfig",
    )
    return given


def ignored(source: Source, patterns: Sequence[str]) -> list[str]:
    """The stored tensors that any of ``patterns`` matches: the shell's, with ``*``, ``?``, ``[…]``.

    Raises:
        TypeError: one is no string.
        ValueError: one matches none.
    """
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise TypeError(f"ignore: expected a list of patterns, got {type(patterns).__name__}")
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"ignore: expected strings, got {type(pattern).__name__}")
        matches = fnmatch.filter(source.tensors, pattern)
        if not matches:
            raise ValueError(
                f"ignore: expected patterns of tensors in {source.file}, got {pattern!r}, which "
                f"none of its {len(source.tensors)} matches"
            )
        found.update(matches)
    return sorted(found)


def _device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    # A device that this build of torch lacks is an AssertionError there.
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that is here, got {device!r} ({reason})") from error


def _canonical(
    source: Source, model: BertPreTrainedModel, ignore: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights under the names that a whole Hugging Face BERT has today, without buffers and
    what is to be left out, and the stored names of those."""
    file, family = source.file, source.family
    parts = parts_of(with_bert(name) for name, _ in model.named_parameters())
    act = family.prediction_act
    if PREDICTIONS in parts and act not in (None, model.config.hidden_act):
        raise CheckpointError(
            f"{file}: expected hidden_act {act!r}, got {model.config.hidden_act!r}: the masked-LM "
            "head of this architecture has that activation whatever its layers have"
        )
    weights: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    left_out = ignored(source, ignore)
    needed = {with_bert(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, new in bert_names(file, family, source.tensors, parts).items():
        if new is None:
            continue
        new = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", with_bert(new)))
        if name in left_out and new in needed:
            raise ValueError(
                f"ignore: expected patterns of tensors that {type(model).__name__} does not need, "
                f"got one that matches {name}"
            )
        if new in BUFFERS or name in left_out:
            continue
        dtype = source.tensors[name].dtype
        # Others that are no weights are told with whatever else is beyond the model.
        if dtype not in FLOATS and TIED.get(new, new) in needed:
            raise CheckpointError(
                f"{file}: expected {name} in one of {', '.join(map(str, FLOATS))}, got {dtype}"
            )
        if new in weights:
            raise CheckpointError(f"{file}: expected one {new}, got {origin[new]} and {name}")
        weights[new], origin[new] = source.tensors[name], name
    if not family.has_token_types:
        shape = (model.config.type_vocab_size, model.config.hidden_size)
        types = torch.zeros(shape, dtype=_dtype_of(weights), device="cpu")
        weights.setdefault(TYPE_TABLE, types)
    return weights, origin


def parts_of(names: Iterable[str]) -> set[str]:
    """Which of :data:`PARTS` there are among these weights."""
    return {part for name in names for part in PARTS if name.startswith(part)}


def _dtype_of(weights: dict[str, Tensor]) -> torch.dtype:
    dtypes = {weight.dtype for weight in weights.values()}.intersection(FLOATS)
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _positions(
    source: Source, config: BertConfig, weights: dict[str, Tensor], chosen: bool
) -> slice:
    """Cut the position table to the rows that the model has, and say which these are.

    ``chosen``: the caller asks for so many positions, and not only the checkpoint's config.
    """
    first = 0
    if source.family.positions_after_padding:
        assert source.config.pad_token_id is not None
        first = source.config.pad_token_id + 1
    rows = slice(first, None)
    table = weights.get(POSITION_TABLE)
    if table is None or table.dim() != 2:
        return rows
    asked, there = config.max_position_embeddings, table.shape[0] - first
    if chosen and asked > there:
        raise CheckpointError(
            f"{source.file}: expected max_position_embeddings of at most {there}, the rows of its "
            f"position table, got {asked}: nothing was learnt for positions beyond"
        )
    if chosen:
        rows = slice(first, first + asked)
    weights[POSITION_TABLE] = table[rows]
    return rows


def _match(
    file: Path, model: BertPreTrainedModel, weights: dict[str, Tensor], redraw: bool
) -> list[str]:
    """Reduce ``weights`` to the model's parameters; what cannot be explained is an error.

    ``redraw``: a parameter of another shape is one that the checkpoint does not have.

    Returns:
        The parts of the model, and parameters, that the checkpoint does not have.
    """
    shapes = {with_bert(name): tuple(p.shape) for name, p in model.named_parameters()}
    has_head = parts_of(shapes)
    # An alias as well, which else would be compared with what it is tied to.
    other = {
        name
        for name, weight in weights.items()
        if redraw and tuple(weight.shape) != shapes.get(TIED.get(name, name), tuple(weight.shape))
    }
    for name in other:
        del weights[name]
    for name in [n for n in weights if n.startswith(PARTS) and not n.startswith(tuple(has_head))]:
        del weights[name]
    _merge_aliases(file, model, weights, shapes)

    missing, unexpected = shapes.keys() - weights.keys(), weights.keys() - shapes.keys()
    fresh = [
        part
        for part in PARTS
        if part in has_head and not any(name.startswith(part) for name in weights)
    ]
    missing = {name for name in missing if not name.startswith(tuple(fresh))}
    fresh += [f"{name} of shape {shapes[name]}" for name in sorted(missing & other)]
    missing -= other
    problems = []
    if missing:
        problems.append(f"missing: {listed(missing)}")
    if unexpected:
        beyond = [
            name if weights[name].dtype in FLOATS else f"{name} of {weights[name].dtype}"
            for name in unexpected
        ]
        problems.append(f"unexpected: {listed(beyond)} ({WAY_ROUND})")
    wrong = [
        f"{name} is {tuple(weights[name].shape)} where the config makes it {shape}"
        for name, shape in shapes.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if wrong:
        problems.append(f"shapes: {listed(wrong, '; ')}")
    if problems:
        raise CheckpointError(
            f"{file}: does not fit {type(model).__name__} with its config; {'; '.join(problems)}"
        )
    return fresh


def _merge_aliases(
    file: Path,
    model: BertPreTrainedModel,
    weights: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Leave one name for each parameter that goes by two."""
    if model.get_output_embeddings() is None:
        return
    tied = model.config.tie_word_embeddings
    pairs = [(DECODER_BIAS, PREDICTION_BIAS)] + ([(DECODER, WORD_TABLE)] if tied else [])
    for alias, name in pairs:
        stored = weights.pop(alias, None)
        if stored is None:
            continue
        # An untied decoder's own bias is the one that Hugging Face computes with.
        if name not in weights or (alias == DECODER_BIAS and not tied):
            weights[name] = stored
            continue
        # Before any value is read: a file of 1 KB can hold a view of 2**40 elements.
        for key, weight in ((alias, stored), (name, weights[name])):
            if tuple(weight.shape) != shapes[name]:
                raise CheckpointError(
                    f"{file}: does not fit {type(model).__name__} with its config; shapes: {key} "
                    f"is {tuple(weight.shape)} where the config makes it {shapes[name]}"
                )
        if stored.dtype != weights[name].dtype:
            raise CheckpointError(
                f"{file}: expected {alias} in {weights[name].dtype} as {name}, which it is tied "
                f"to, got {stored.dtype}"
            )
        if not _same(stored, weights[name]):
            raise CheckpointError(
                f"{file}: expected {alias} to equal {name}, which it is tied to, but they differ; "
                "pass tie_word_embeddings=False to keep both"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    # A diverged run's NaNs are no reason to call its checkpoint damaged.
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def with_bert(name: str) -> str:
    return f"bert.{name}" if name.startswith(BODY) else name


def save(
    model: BertPreTrainedModel,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write ``config.json`` and safetensors to the directory ``path``.

    All files are complete and on disk under other names before the first old one is touched, so
    a failure to write leaves the old checkpoint. The renaming that follows has two forms:

    * Weights in one file, with the same ``config.json`` as before: ``model.safetensors`` is read
      before any shards, so its renaming is the one step from the old checkpoint to the new.
    * Otherwise ``config.json`` (and an index) is removed first and comes back last. A crash in the
      moment between leaves a directory that ``from_pretrained`` refuses, not a mixed checkpoint.

    Weight files of an earlier, differently sharded checkpoint are removed.

    Args:
        model: any model of this package.
        path: directory, created if need be.
        max_shard_size: bytes per file, as a number or as ``"200MB"`` (``KB``, ``MB``, ``GB``,
            powers of 1000); a single larger tensor gets a file of its own.

    Raises:
        TypeError, ValueError: a bad ``path`` or ``max_shard_size``.
        ValueError: the model has other tensors than one of its class and config, as a pruned, a
            quantised or an adapted one has, which :func:`load` would refuse.
        OSError: the directory cannot be written.
    """
    limit = _bytes(max_shard_size)
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a directory's path, got {type(path).__name__}")
    _check_savable(model)
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    # named_parameters gives a tied parameter once, under its first name, as Hugging Face stores it.
    weights = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    if not model.config.tie_word_embeddings and model.get_output_embeddings() is not None:
        weights[DECODER_BIAS] = weights[PREDICTION_BIAS].clone()
    shards = _shards(weights, limit)
    names = [SAFETENSORS]
    if len(shards) > 1:
        total = f"{len(shards):05d}"
        names = [f"model-{i + 1:05d}-of-{total}.safetensors" for i in range(len(shards))]

    extra = {
        **model.config.extra,
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    extra.pop("torch_dtype", None)

    index, config = directory / f"{SAFETENSORS}.index.json", directory / CONFIG
    written: list[tuple[Path, Path]] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            written.append((_temporary(directory, name), directory / name))
            save_file(shard, written[-1][0], metadata={"format": "pt"})
        if len(shards) > 1:
            written.append((_temporary(directory, index.name), index))
            written[-1][0].write_text(_index(names, shards), encoding="utf-8")
        written.append((_temporary(directory, CONFIG), config))
        model.config.replace(extra=extra).save(written[-1][0])
        for temporary, _ in written:
            sync(temporary)
        if len(shards) > 1 or not _equal_files(written[-1][0], config):
            config.unlink(missing_ok=True)
            index.unlink(missing_ok=True)
            sync(directory)
        *weight_files, (new_config, _) = written
        for temporary, final in weight_files:
            os.replace(temporary, final)
        # config.json vouches for the weights: they are on disk, and alone, before it is back.
        kept = {final.name for _, final in weight_files}
        for file in directory.glob("model*.safetensors*"):
            ours = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", file.name)
            if ours and file.name not in kept:
                file.unlink()
        sync(directory)
        os.replace(new_config, config)
        sync(directory)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on disk."""
    if path.is_dir() and os.name != "posix":  # only there can a directory be opened
        return
    # Windows wants a writable descriptor for a file, POSIX a readable one for a directory.
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    except OSError:
        # Some network file systems have no such call for directories.
        if not path.is_dir():
            raise
    finally:
        os.close(opened)


def _equal_files(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


def _temporary(directory: Path, name: str) -> Path:
    return directory / f".{name}.{os.getpid()}.tmp"


# What libraries call the tensors that they put in the place of a weight, and what undoes it.
WAYS_OUT = (
    (r"_mask$|_orig$", "torch.nn.utils.prune.remove(module, 'weight'), or remove_spectral_norm"),
    (r"_[guv]$", "torch.nn.utils.remove_weight_norm(module), or remove_spectral_norm"),
    (r"\.parametrizations\.", "torch.nn.utils.parametrize.remove_parametrizations"),
    (r"lora_|\.base_layer\.|\.modules_to_save\.", "peft's merge_and_unload()"),
)


def _check_savable(model: BertPreTrainedModel) -> None:
    """Refuse a model that :func:`load` would refuse after it was written."""
    try:
        with on_meta():
            plain = type(model)(model.config)
    except TypeError:  # a class of somebody's own, with arguments that only they know
        return
    expected = {name: tuple(p.shape) for name, p in plain.named_parameters(remove_duplicate=False)}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    buffers = model.state_dict().keys() - tensors.keys()
    # A pooler may be left out, or somebody's own part; a head is known to be missing, too.
    whole = parts_of(with_bert(name) for name in tensors)
    missing = [
        name
        for name in expected.keys() - tensors.keys()
        if not with_bert(name).startswith(tuple(set(PARTS) - whole))
    ]
    odd = sorted({*tensors.keys() - expected.keys(), *buffers})
    wrong = [
        f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)} where the config makes it "
        f"{shape}"
        for name, shape in expected.items()
        if name in tensors
        and (tuple(tensors[name].shape) != shape or tensors[name].dtype not in FLOATS)
    ]
    problems = [
        f"{kind}: {listed(names, separator)}"
        for kind, names, separator in (
            ("missing", missing, ", "), ("unexpected", odd, ", "), ("shapes", wrong, "; "),
        )
        if names
    ]  # fmt: skip
    table, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    tied = decoder is not None and model.config.tie_word_embeddings
    if tied and not problems and decoder.weight is not table.weight:  # type: ignore[union-attr]
        problems.append(
            "the decoder's weight is not the word table, which config.tie_word_embeddings says it "
            "is; call tie_weights(), or set it to False"
        )
    if problems:
        ways = [way for pattern, way in WAYS_OUT if any(re.search(pattern, name) for name in odd)]
        raise ValueError(
            f"save_pretrained: expected the weights of a plain {type(model).__name__} of its "
            f"config, which from_pretrained reads; {'; '.join(problems)}"
            + (f". Before saving: {'; '.join(ways)}" if ways else "")
        )


def _shards(weights: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    return shards


def _index(names: list[str], shards: list[dict[str, Tensor]]) -> str:
    total = sum(weight.nbytes for shard in shards for weight in shard.values())
    weight_map = {
        weight: file for file, shard in zip(names, shards, strict=True) for weight in shard
    }
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _bytes(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool) and size >= 1:
        return size
    match = re.fullmatch(r"([1-9]\d{0,11}) ?([KMG])B", str(size).upper())
    if match is None:
        raise ValueError(
            f"max_shard_size: expected bytes >= 1, or a text like '200MB', got {short(size)}"
        )
    return int(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[match[2]]
