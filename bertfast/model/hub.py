"""Checkpoints by their id on the Hugging Face hub, through ``huggingface_hub`` where that is
installed. Its settings hold: ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``.
"""

import glob
import os
import re
from pathlib import Path
from typing import Any

from bertfast.errors import CheckpointError
from bertfast.model.sources import CONFIG, GOOGLE_CONFIG, LATEST, WEIGHT_FILES, listed

# What belongs to a model besides config and weights: its tokenizer, how sentence-transformers pools
# it, and what that has on top of it.
COMPANIONS = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|vocab\.txt|vocab\.json"
    r"|added_tokens\.json|merges\.txt|sentencepiece\.bpe\.model"
    r"|modules\.json|config_sentence_transformers\.json|sentence_[\w-]+_config\.json"
    r"|\d+_\w+/(config\.json|model\.safetensors|pytorch_model\.bin)"
)


def fetch(
    repo_id: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The directory of a model's config, weights and tokenizer, downloaded unless it is there.

    Where the hub cannot be reached, or ``HF_HUB_OFFLINE`` forbids it, what is in the cache is
    taken. Only files that a model is loaded from are downloaded, and the weights in one format.

    Args:
        repo_id: as ``google-bert/bert-base-uncased``.
        revision: branch, tag or commit; None is the main branch.
        offline: take what is in the cache, whatever is on the hub.
        token: as huggingface_hub takes it; None is what is set for it.
        cache_dir: the cache; None is what is set for it.

    Raises:
        CheckpointError: ``huggingface_hub`` is not installed, there is no such model, or it can
            neither be reached nor is in the cache.
    """
    what = f"path: expected a directory or a hub id, got {repo_id!r}, which is no directory here"
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{what}; loading from the hub needs huggingface_hub: pip install 'bertfast[hub]'"
        ) from error
    cache: dict[str, Any] = {} if cache_dir is None else {"cache_dir": cache_dir}
    identity: dict[str, Any] = {} if token is None else {"token": token}
    if offline:
        cached = _cached(huggingface_hub, repo_id, revision, cache)
        if cached is not None:
            return cached
        raise CheckpointError(f"{what}, nor in the hub's cache (local_files_only)")
    try:
        api = huggingface_hub.HfApi(**identity)
        model = api.model_info(repo_id, revision=revision, timeout=10)
    # Its own errors, those of its HTTP library, OSError: they have no class in common.
    except Exception as error:
        cached = _cached(huggingface_hub, repo_id, revision, cache)
        if cached is not None:
            return cached
        raise CheckpointError(f"{what}; the hub does not give it: {_reason(error)}") from error
    names = [file.rfilename for file in model.siblings or []]
    files = wanted(names)
    if not files:
        raise CheckpointError(
            f"{what}; on the hub it has none of {', '.join(WEIGHT_FILES)} and no TensorFlow "
            f"checkpoint (*.index), but {listed(names) or 'nothing'}"
        )
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=model.sha, allow_patterns=[glob.escape(name) for name in files],
            **cache, **identity,
        )  # fmt: skip
    except Exception as error:
        raise CheckpointError(f"{what}; downloading failed: {_reason(error)}") from error
    return Path(folder)


def wanted(names: list[str]) -> list[str]:
    """Those of a repository's files that a model is loaded from; none if it has no weights."""
    top = [name for name in names if "/" not in name]
    for name in WEIGHT_FILES:
        if name in top:
            stem, suffix = re.escape(name.split(".")[0]), name.split(".")[1]
            shard = re.compile(rf"{stem}-\d+-of-\d+\.{suffix}")
            weights = [n for n in top if n == name or ("index" in name and shard.fullmatch(n))]
            break
    else:
        index = re.compile(r".+\.(index|data-\d{5}-of-\d{5})")
        weights = [name for name in top if index.fullmatch(name)]
    if not weights:
        return []
    others = {name for name in names if COMPANIONS.fullmatch(name)}
    return sorted({*weights, *others, *{CONFIG, GOOGLE_CONFIG, LATEST}.intersection(top)})


def _cached(hub: Any, repo_id: str, revision: str | None, cache: dict[str, Any]) -> Path | None:
    for name in (CONFIG, GOOGLE_CONFIG):
        try:
            file = hub.try_to_load_from_cache(repo_id, name, revision=revision, **cache)
        except ValueError:  # not the form of an id
            return None
        if isinstance(file, str):
            return Path(file).parent
    return None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
