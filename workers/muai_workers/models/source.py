"""From a catalog entry to a folder with the model's files."""

from __future__ import annotations

from pathlib import Path

from muai_config import ModelFilesNotFoundError, ModelSpec
from muai_producers.errors import ModelLoadError

WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
"""What is fetched from the hub: never weights in formats that can hold code."""


def resolve_source(spec: ModelSpec, cache_dir: Path | None = None) -> Path:
    """The folder that holds the files of `spec`, fetched from the hub where that is its source.

    Args:
        cache_dir: where files from the hub are kept; None: the hub library's own place.
    Raises:
        ModelLoadError: the files are not here and cannot be fetched.
    """
    try:
        folder = spec.source.local_folder()
    except ModelFilesNotFoundError as error:
        raise ModelLoadError(f"{spec.name}: {error}", {"model": spec.name, "source": str(spec.source)}) from error
    if folder is None:
        folder = _from_hub(spec, cache_dir)
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"{spec.name}: {folder} holds no model (no config.json)", {"model": spec.name, "source": str(spec.source)}
        )
    return folder


def _from_hub(spec: ModelSpec, cache_dir: Path | None) -> Path:
    from huggingface_hub import snapshot_download

    repository = str(spec.source.hub)
    patterns = WANTED_FILES if spec.trust_remote_code else [one for one in WANTED_FILES if one != "*.py"]
    try:
        return Path(snapshot_download(repository, revision=spec.revision, cache_dir=cache_dir, allow_patterns=patterns))
    except Exception as error:  # the hub's library raises many kinds, from HTTP to lock files
        revision = f"@{spec.revision}" if spec.revision else ""
        raise ModelLoadError(
            f"{spec.name}: {repository}{revision} could not be fetched from the hub and is not in its cache "
            f"({type(error).__name__}); put the files in a folder and set source to folder:PATH",
            {"model": spec.name, "source": str(spec.source), "cause": str(error)[:500]},
        ) from error
