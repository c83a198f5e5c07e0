"""Where a model's files are: a path, the built-in `demo`, or a Hugging Face Hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bireme.checkpoint.files import PICKLED, SAFETENSORS
from bireme.errors import CheckpointError

DEMO = "demo"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_CONFIG_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # of configs and tokenizers, all small


def resolve_model(model: str, *, needs_weights: bool = True, reads_bin: bool = False) -> Path:
    """The folder of `model`; from the Hub only the files that are needed, and none if cached.

    `reads_bin` says that `.bin` weights will do. CheckpointError if there is no such folder or
    model, or the Hub cannot be reached.
    """
    if model == DEMO:
        return Path(__file__).parent.parent / "assets" / "demo"
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.is_file() and path.name == "config.json":
        return path.parent
    if model and path.exists():
        raise CheckpointError(f"{model} is a file; give its folder, {path.parent}")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model!r} is no folder; "
            f"give a folder with a config.json, `{DEMO}`, or a Hub id like org/name"
        )
    return _cached(model, needs_weights, reads_bin) or _from_hub(model, needs_weights, reads_bin)


def _cached(model: str, needs_weights: bool, reads_bin: bool) -> Path | None:
    """The snapshot in the local Hub cache, if all that is needed is there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        has_weights = SAFETENSORS.inside(folder) or (reads_bin and PICKLED.inside(folder))
    except CheckpointError:  # an index, and not all of its files
        return None
    return folder if has_weights or not needs_weights else None


def _from_hub(model: str, needs_weights: bool, reads_bin: bool) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise CheckpointError(
            f"{model} is no folder here and not in the local Hub cache, "
            "and HF_HUB_OFFLINE forbids to fetch it"
        )
    try:
        return _download(model, needs_weights, reads_bin)
    except CheckpointError:
        raise
    except GatedRepoError:
        raise CheckpointError(
            f"{model} is gated; accept its terms on the Hub, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{model} is no folder here and no model on the Hub") from None
    except Exception as error:  # of the HTTP library, which differs by huggingface_hub's version
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(
            f"{model} is no folder here and not whole in the local Hub cache, "
            f"and fetching it from {constants.ENDPOINT} failed: {reason}"
        ) from None


def _download(model: str, needs_weights: bool, reads_bin: bool) -> Path:
    """Configs and tokenizer first, and then the weight files, which an index may name."""
    from huggingface_hub import HfApi, snapshot_download

    names = [entry.rfilename for entry in HfApi().model_info(model).siblings or []]
    if "config.json" not in names:
        raise CheckpointError(f"{model} has no config.json on the Hub; it is no model to run")
    small = [name for name in names if "/" not in name and name.endswith(_CONFIG_SUFFIXES)]
    folder = Path(snapshot_download(model, allow_patterns=small))
    if needs_weights:
        weights = SAFETENSORS.among(names, folder)
        if not weights and (pickled := PICKLED.among(names, folder)):
            if not reads_bin:
                raise CheckpointError(
                    f"{model} holds .bin files only; `bireme shard {model} OUT` reads those"
                )
            weights = pickled
        if not weights:
            raise CheckpointError(f"{model} has no safetensors file on the Hub")
        snapshot_download(model, revision=folder.name, allow_patterns=weights)
    return folder
