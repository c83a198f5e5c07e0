"""Where a model's files are: a path, the built-in `demo`, or a Hugging Face Hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bireme.errors import CheckpointError

DEMO = "demo"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_CONFIGS = ["*.json", "*.jinja", "*.model", "*.txt"]


def resolve_model(model: str, *, needs_weights: bool = True) -> Path:
    """The folder of `model`; from the Hub only the files that are needed.

    CheckpointError if there is no such folder, or the Hub cannot be reached.
    """
    if model == DEMO:
        return Path(__file__).parent.parent / "assets" / "demo"
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.name == "config.json":
        return path.parent
    if not _HUB_ID.match(model) or model.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model} is no folder; give a folder with a config.json, `{DEMO}`, or a Hub id like org/name"
        )
    return _from_hub(model, needs_weights)


def _from_hub(model: str, needs_weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [*_CONFIGS, "*.safetensors"] if needs_weights else _CONFIGS
    try:
        cached = Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        if _is_complete(cached, needs_weights):
            return cached
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the Hub
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise CheckpointError(f"{model} is not in the local Hub cache, and HF_HUB_OFFLINE forbids to fetch it")
    try:
        names = [entry.rfilename for entry in HfApi().model_info(model).siblings or []]
        if needs_weights and not any(name.endswith(".safetensors") for name in names):
            patterns.append("*.bin")
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except RepositoryNotFoundError:
        raise CheckpointError(f"{model} is no folder here and no model on the Hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{model} is not in the local Hub cache, and the Hub cannot be reached: {reason}") from None


def _is_complete(folder: Path, needs_weights: bool) -> bool:
    if not (folder / "config.json").exists():
        return False
    index = folder / "model.safetensors.index.json"
    if not needs_weights:
        return True
    if index.exists():
        from bireme.model_config import read_json

        names = set(read_json(index).get("weight_map", {}).values())
        return all((folder / name).exists() for name in names)
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
