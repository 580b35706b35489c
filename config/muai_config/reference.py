"""Every setting with what is known about it, read off the models: errors, documentation and examples use this."""

import functools
import json
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from muai_config.catalog import SOURCE_ALLOWED, ModelSource, ModelSpec
from muai_config.fields import Allowed, Section
from muai_config.settings import Settings

KeyPath = tuple[str, ...]

VARIABLE_PREFIXES = {
    "optimization": "MUAI_OPT",
    "monitoring": "MUAI_MON",
    "queue": "MUAI_QUEUE",
    "gateway": "MUAI_GATEWAY",
    "models": "MUAI_MODELS",
}
SECTIONS = tuple(VARIABLE_PREFIXES)
SHOWN_LENGTH = 80


@dataclass(frozen=True, slots=True)
class SettingInfo:
    """One setting.

    Attributes:
        path: where it stands in the file.
        location: where it stands in `Settings`; another place only for the keys beside the models.
        variables: the environment variables that set it, the main one first.
    """

    path: KeyPath
    location: KeyPath
    field: FieldInfo
    variables: tuple[str, ...]
    regular_variable: str

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def annotation(self) -> Any:
        return self.field.annotation

    @property
    def default(self) -> Any:
        return self.field.default

    @property
    def description(self) -> str:
        return self.field.description or ""

    @property
    def unit(self) -> str | None:
        return _extra(self.field).get("unit")

    @property
    def reloadable(self) -> bool:
        return bool(_extra(self.field).get("reloadable"))

    @property
    def example(self) -> Any:
        return field_example(self.field)

    @property
    def allowed(self) -> str:
        return allowed_words(self.field.annotation, self.field.metadata)

    @property
    def type_words(self) -> str:
        return type_words(self.field.annotation)


def field_example(field: FieldInfo) -> Any:
    """A value worth showing: the one declared, or the other boolean, or the default."""
    extra = _extra(field)
    if "example" in extra:
        return extra["example"]
    return not field.default if isinstance(field.default, bool) else field.default


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


@functools.cache
def all_settings() -> tuple[SettingInfo, ...]:
    """Every setting in the order of the guide; the models themselves are not settings but entries."""
    found: list[SettingInfo] = []
    for section in ("optimization", "monitoring", "queue", "gateway"):
        _collect(section_model(Settings, section), (section,), (section,), found)
    _collect(section_model(Settings, "model_cache"), ("models",), ("model_cache",), found)
    return tuple(found)


@functools.cache
def settings_by_path() -> Mapping[KeyPath, SettingInfo]:
    return {info.path: info for info in all_settings()}


def _collect(model: type[Section], path: KeyPath, location: KeyPath, found: list[SettingInfo]) -> None:
    # The keys of a section before the sections inside it, as a reader expects them.
    for name, field in model.model_fields.items():
        if not _is_section(field.annotation):
            found.append(_info(field, (*path, name), (*location, name)))
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            _collect(section_model(model, name), (*path, name), (*location, name), found)


def _info(field: FieldInfo, path: KeyPath, location: KeyPath) -> SettingInfo:
    extra = _extra(field)
    regular = "_".join((VARIABLE_PREFIXES[path[0]], *path[1:])).upper()
    main = extra.get("env") or regular
    variables = (main, extra["also_env"]) if "also_env" in extra else (main,)
    return SettingInfo(path, location, field, variables, regular)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def section_model(parent: type[BaseModel], name: str) -> type[Section]:
    """The class of the section `name` inside `parent`."""
    annotation = parent.model_fields[name].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, Section)
    return annotation


def section_at(path: KeyPath) -> type[Section] | None:
    """The class of the section at `path` in the file; None when a setting, an entry's value or nothing is there."""
    if not path:
        return Settings
    if path[0] == "models":
        return {2: ModelSpec, 3: ModelSource if path[-1] == "source" else None}.get(len(path))
    model: type[Section] = Settings
    for name in path:
        if name not in model.model_fields or not _is_section(model.model_fields[name].annotation):
            return None
        model = section_model(model, name)
    return model


def section_description(path: KeyPath) -> str:
    """What the section at `path` in the file is for."""
    if path == ("models",):
        return Settings.model_fields["models"].description or ""
    field = field_at(path)
    return "" if field is None else field.description or ""


def field_at(path: KeyPath) -> FieldInfo | None:
    """The declaration of the key at `path` in the file, model entries included."""
    info = settings_by_path().get(path)
    if info is not None:
        return info.field
    parent = section_at(path[:-1]) if path else None
    return None if parent is None else parent.model_fields.get(path[-1])


def value_of(settings: Settings, info: SettingInfo) -> Any:
    value: Any = settings
    for name in info.location:
        value = getattr(value, name)
    return value


def _bare(annotation: Any) -> tuple[Any, list[Any], bool]:
    """`annotation` without Annotated and without `| None`; with their metadata and whether None was there."""
    metadata: list[Any] = []
    nullable = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *extra = get_args(annotation)
            metadata += extra
        elif get_origin(annotation) in (Union, types.UnionType):
            others = [part for part in get_args(annotation) if part is not type(None)]
            nullable = len(others) < len(get_args(annotation))
            annotation = others[0]
        else:
            return annotation, metadata, nullable


def list_item(annotation: Any) -> Any:
    """The annotation of a list's entries; None when it is no list."""
    bare = _bare(annotation)[0]
    return get_args(bare)[0] if get_origin(bare) is tuple else None


def is_nullable(annotation: Any) -> bool:
    return _bare(annotation)[2]


def plain_type(annotation: Any) -> Any:
    """bool, int, float, str, Path, tuple or a Literal: the type under all annotations."""
    bare = _bare(annotation)[0]
    return tuple if get_origin(bare) is tuple else bare


def type_words(annotation: Any) -> str:
    """The type as the configuration guide writes it, such as `int|null`."""
    bare = plain_type(annotation)
    names = {bool: "bool", int: "int", float: "float", str: "str", Path: "path", tuple: "list"}
    return names.get(bare, "str") + ("|null" if is_nullable(annotation) else "")


def allowed_words(annotation: Any, metadata: Any = ()) -> str:
    """What a value may be, in words that follow "allowed:"."""
    bare, inner, nullable = _bare(annotation)
    words = _words(bare, [*inner, *metadata])
    return f"{words}, or null" if nullable else words


def _words(bare: Any, metadata: list[Any]) -> str:
    stated = next((entry.words for entry in metadata if isinstance(entry, Allowed)), None)
    if get_origin(bare) is tuple:
        items = allowed_words(get_args(bare)[0])
        at_least_one = any(isinstance(entry, annotated_types.MinLen) for entry in metadata)
        size = "a list of at least one entry" if at_least_one else "a list"
        return f"{size}, {stated}, each {items}" if stated else f"{size}, each {items}"
    if bare is ModelSource:
        return SOURCE_ALLOWED.words
    if stated:
        return stated
    if get_origin(bare) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(bare))
    if bare is bool:
        return "true or false"
    if bare is int:
        return "an integer" + _range(metadata)
    if bare is float:
        return "a number" + _range(metadata)
    return "a text that is not empty" if any(isinstance(m, annotated_types.MinLen) for m in metadata) else "a text"


def _range(metadata: list[Any]) -> str:
    low = next((entry.ge for entry in metadata if isinstance(entry, annotated_types.Ge)), None)
    above = next((entry.gt for entry in metadata if isinstance(entry, annotated_types.Gt)), None)
    high = next((entry.le for entry in metadata if isinstance(entry, annotated_types.Le)), None)
    if low is not None:
        return f" from {low} to {high}" if high is not None else f" of at least {low}"
    if above is not None:
        return f" above {above}" + (f", at most {high}" if high is not None else "")
    return f" of at most {high}" if high is not None else ""


_PASSWORD = re.compile(
    r"(?P<before>[A-Za-z0-9+.-]+://[^\s:/@]*:)[^\s@/]+(?=@)|(?P<key>[?&;](?:[^=&;\s]*(?:password|secret|token|key))=)[^&;\s]+",
    re.I,
)


def masked(text: str) -> str:
    """`text` with the passwords of its addresses replaced by ***."""
    return _PASSWORD.sub(lambda match: (match["before"] or match["key"]) + "***", text)


def shown_value(value: Any) -> str:
    """A value on one line, short, without passwords, as an error message quotes it."""
    text = masked(json.dumps(plain(value), ensure_ascii=False, default=repr))
    return text if len(text) <= SHOWN_LENGTH else text[: SHOWN_LENGTH - 1] + "…"


def plain(value: Any) -> Any:
    """The value as YAML and JSON write it: tuples as lists, paths as texts, model entries as mappings."""
    if isinstance(value, ModelSource):
        return str(value)
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value
