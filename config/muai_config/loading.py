"""From a file and the environment to checked settings: environment over file over default, every problem at once."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from muai_config.catalog import RESERVED_MODEL_KEYS, is_model_entry
from muai_config.document import Document, read_document
from muai_config.errors import DEFAULT, ConfigError, Problem, Source, did_you_mean
from muai_config.reference import (
    SECTIONS,
    KeyPath,
    all_settings,
    allowed_words,
    field_at,
    list_item,
    section_at,
    settings_by_path,
    shown_value,
)
from muai_config.settings import Settings
from muai_config.variables import read_variables

DEFAULT_FILES = (Path("config/optimization.yaml"), Path("config/system.yaml"))
# An application's own configuration file, which may hold our sections beside its own.
SHARED_FILE_NAME = "system.yaml"


@dataclass(frozen=True, slots=True)
class Origin:
    """What the values of a file are called in problems, whether the file is an application's own, and what reading
    it has found wrong already.
    """

    name: str = ""
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    shared: bool = False
    problems: tuple[Problem, ...] = ()

    def source(self, path: KeyPath) -> Source:
        if not self.name:
            return DEFAULT
        known = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in self.lines), ())
        return Source("file", self.name, self.lines.get(known))


@dataclass(frozen=True, slots=True)
class Resolution:
    """Settings, where each of them came from, and what of the file was left alone.

    Attributes:
        sources: by the key's path in the file; every setting is there.
        ignored: keys of an application's own file that are not ours.
    """

    settings: Settings
    sources: Mapping[KeyPath, Source]
    ignored: tuple[str, ...] = ()
    file: Path | None = None
    model_sources: Mapping[str, Source] = field(default_factory=dict)

    def model_source(self, name: str) -> Source:
        """Where the catalog's entry `name` came from."""
        return self.model_sources.get(name, DEFAULT)


def load_settings(path: Path | None = None, env: Mapping[str, str] | None = None) -> Settings:
    """Read, merge and check the configuration.

    Args:
        path: the file; without it the one that MUAI_CONFIG names, else config/optimization.yaml or config/system.yaml
            under the current folder if there is one, else none.
        env: the environment, `os.environ` by default.
    Raises:
        ConfigError: the file cannot be read or a value is wrong.
    """
    return resolve_file(path, env).settings


def resolve_file(path: Path | None = None, env: Mapping[str, str] | None = None) -> Resolution:
    """As `load_settings`, with the origin of each value."""
    env = os.environ if env is None else env
    path = path or _default_file(env)
    document = Document({}, {}) if path is None else read_document(path)
    origin = Origin()
    if path is not None:
        origin = Origin(str(path), document.lines, path.name == SHARED_FILE_NAME, document.problems)
    return resolve(document.values, env, origin, path)


def build_settings(document: Mapping[str, Any], env: Mapping[str, str]) -> Settings:
    """Merge and check a document that is already read. Touches neither files nor the process's environment.

    Raises:
        ConfigError: a value is wrong.
    """
    return resolve(document, env, Origin()).settings


def _default_file(env: Mapping[str, str]) -> Path | None:
    named = env.get("MUAI_CONFIG", "").strip()
    if named:
        return Path(named).expanduser()
    return next((path for path in DEFAULT_FILES if path.is_file()), None)


def resolve(
    document: Mapping[str, Any], env: Mapping[str, str], origin: Origin, file: Path | None = None
) -> Resolution:
    """Lay the environment over the document and check the whole.

    Raises:
        ConfigError: with all problems of both.
    """
    values, ignored = _own_sections(document, origin)
    given, wrong_variables = read_variables(env)
    problems = [*origin.problems, *wrong_variables]
    variable_sources = {info.path: Source("variable", name) for info, (name, _) in given.items()}
    for info, (_, value) in given.items():
        _put(values, info.path, value)
    home = env.get("MUAI_HOME", "").strip()
    cache_dir = ("optimization", "onnx", "cache_dir")
    if home and _get(values, cache_dir) is None and cache_dir not in variable_sources:
        _put(values, cache_dir, str(Path(home) / "onnx"))
        variable_sources[cache_dir] = Source("variable", "MUAI_HOME")

    def source(path: KeyPath) -> Source:
        return variable_sources.get(path) or (origin.source(path) if _has(values, path) else DEFAULT)

    def problem_source(path: KeyPath) -> Source:
        known = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in variable_sources), None)
        return origin.source(path) if known is None else variable_sources[known]

    try:
        settings = Settings.model_validate(_as_model_input(values))
    except ValidationError as error:
        problems += problems_of(error, problem_source)
    if problems:
        raise ConfigError(_without_repeats(problems))
    sources = {info.path: source(info.path) for info in all_settings()}
    model_sources = {name: source(("models", name)) for name in settings.models}
    return Resolution(settings, sources, ignored, file, model_sources)


def _own_sections(document: Mapping[str, Any], origin: Origin) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A copy of what is ours in the document, deep enough to lay the environment over, and what is not ours."""
    values = _copied(document)
    if not origin.shared:
        return values, ()
    ignored = [name for name in values if name not in SECTIONS]
    for name in ignored:
        del values[name]
    models = values.get("models")
    if isinstance(models, dict):
        foreign = [
            name for name, entry in models.items() if name not in RESERVED_MODEL_KEYS and not is_model_entry(entry)
        ]
        for name in foreign:
            del models[name]
        ignored += [f"models.{name}" for name in foreign]
    if "optimization" not in values:
        # An application that was there before us keeps working as it did until it asks for more.
        values["optimization"] = {"enabled": False}
    return values, tuple(ignored)


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _put(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    for name in path[:-1]:
        inner = values.get(name)
        if inner is None:
            inner = values[name] = {}
        if not isinstance(inner, dict):
            return  # what stands there is wrong itself, and reported as such
        values = inner
    values[path[-1]] = value


def _get(values: Any, path: KeyPath) -> Any:
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return None
        values = values[name]
    return values


def _has(values: Any, path: KeyPath) -> bool:
    parent = _get(values, path[:-1])
    return isinstance(parent, dict) and path[-1] in parent


def _as_model_input(values: Mapping[str, Any]) -> dict[str, Any]:
    """The document as `Settings` takes it: the keys beside the models in a section of their own."""
    shaped = dict(values)
    if "model_cache" in shaped:
        # Only `Settings` has such a section; in a file it is an unknown key, and the blank keeps it one.
        shaped["model_cache "] = shaped.pop("model_cache")
    models = values.get("models")
    if isinstance(models, dict):
        shaped["models"] = {name: entry for name, entry in models.items() if name not in RESERVED_MODEL_KEYS}
        shaped["model_cache"] = {name: entry for name, entry in models.items() if name in RESERVED_MODEL_KEYS}
    return shaped


def problems_of(error: ValidationError, source: Callable[[KeyPath], Source]) -> list[Problem]:
    """What pydantic found wrong, a line for each.

    Args:
        source: where the value of a key came from.
    """
    return _without_repeats([line for details in _own_errors(error) for line in _problems(details, source)])


def _own_errors(error: ValidationError) -> list[ErrorDetails]:
    """pydantic's entries, without that a list is too short where it is so only because its entries are wrong."""
    entries = error.errors(include_url=False)
    with_wrong_items = {entry["loc"][:-1] for entry in entries if entry["loc"] and isinstance(entry["loc"][-1], int)}
    return [entry for entry in entries if entry["type"] != "too_short" or entry["loc"] not in with_wrong_items]


def _problems(details: ErrorDetails, source: Any) -> Iterator[Problem]:
    """The lines that one of pydantic's error entries stands for."""
    location = details["loc"]
    names = tuple(str(part).strip() for part in location if isinstance(part, str))
    index = next((part for part in location if isinstance(part, int)), None)
    path = ("models", *names[1:]) if names[:1] == ("model_cache",) and len(names) > 1 else names
    kind = details["type"]
    if kind == "conflicts":
        for conflict in details["ctx"]["conflicts"]:
            key = (*path, *conflict.key.split("."))
            yield _not_allowed(key, conflict.value, conflict.allowed, source(key))
    elif kind == "extra_forbidden":
        yield Problem(".".join(path), f"there is no such key; {_key_hint(path)}", source(path))
    elif kind == "missing":
        yield Problem(".".join(path), f"is missing (allowed: {_allowed(path, None)})", source(path))
    else:
        yield _not_allowed(path, details["input"], _allowed(path, index), source(path), index)


def _not_allowed(path: KeyPath, value: Any, allowed: str, source: Source, index: int | None = None) -> Problem:
    key = ".".join(path) + ("" if index is None else f"[{index}]")
    return Problem(key or "the file", f"{shown_value(value)} is not allowed (allowed: {allowed})", source)


def _allowed(path: KeyPath, index: int | None) -> str:
    declared = field_at(path)
    if (declared is not None and section_at(path) is None) or path[-1:] == ("source",):
        assert declared is not None
        item = list_item(declared.annotation) if index is not None else None
        return allowed_words(declared.annotation, declared.metadata) if item is None else allowed_words(item)
    if path == ("models",):
        return "a section of models by name"
    model = section_at(path)
    keys: Sequence[str] = () if model is None else [name for name in model.model_fields if name != "name"]
    return f"a section with the keys {', '.join(keys)}" if keys else "a section"


def _key_hint(path: KeyPath) -> str:
    """What an unknown key was probably meant to be: a neighbour, or a key of a section inside or elsewhere."""
    parent = path[:-1]
    model = section_at(parent)
    names = list(SECTIONS) if not parent else [] if model is None else list(model.model_fields)
    if len(parent) == 2 and parent[0] == "models":
        names.remove("name")
    candidates = {name: ".".join((*parent, name)) for name in names}
    for info in all_settings():
        inside = info.path[len(parent) :]
        if info.path[: len(parent)] == parent and len(inside) > 1:
            candidates.setdefault("_".join(inside), info.key)
    nearest = did_you_mean(path[-1], candidates)
    if nearest is not None:
        return f"did you mean {candidates[nearest]}?"
    elsewhere = [info.key for info in settings_by_path().values() if info.path[-1] == path[-1]]
    if len(elsewhere) == 1:
        return f"did you mean {elsewhere[0]}?"
    return f"the keys there are {', '.join(names)}" if names else "`muai config docs` lists the keys"


def _without_repeats(problems: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
