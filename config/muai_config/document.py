"""Reading a YAML file from anywhere without harm: bounded in size and depth, no tags, no key twice."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from muai_config.errors import ConfigError, Problem, Source

MAX_BYTES: Final = 1_048_576
MAX_DEPTH: Final = 32
# Counted with every alias written out, so that a few lines of aliases to aliases cannot fill the memory.
MAX_VALUES: Final = 50_000

KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A file's content as plain values, the line that each key stands on, and the keys that stand twice."""

    values: Mapping[str, Any]
    lines: Mapping[KeyPath, int]
    problems: tuple[Problem, ...] = ()


class _Loader(yaml.SafeLoader):
    """YAML's scalars with the traps taken out: 010 is no octal, 12:30 no number, a date stays a text, 1e-3 a number.

    true, false, yes, no, on and off are booleans, as everywhere in YAML 1.1.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - a class attribute of PyYAML's own


_WORDS = {"bool": r"(?:true|false|yes|no|on|off)", "null": r"(?:null|~|)"}
_INTEGER = r"[-+]?(?:0|[1-9][0-9]*)"
_NUMBER = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)"
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(rf"^{_WORDS['bool']}$", re.I), list("tTfFyYnNoO"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(rf"^{_WORDS['null']}$", re.I), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"^{_INTEGER}$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^(?:{_NUMBER})$"), list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def read_document(path: Path) -> Document:
    """Read the YAML file at `path`.

    Raises:
        ConfigError: the file cannot be read, is too large, is not YAML, or is not a mapping at its top.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _refusal(name, f"cannot be read: {error.strerror or error}") from error
    return parse_document(content, name)


def parse_document(content: bytes, name: str) -> Document:
    """Turn YAML into plain values; `name` is what problems call the file.

    Raises:
        ConfigError: as `read_document`.
    """
    if len(content) > MAX_BYTES:
        raise _refusal(name, f"is too large (allowed: at most {MAX_BYTES:,} bytes)")
    try:
        text = content.decode("utf-8-sig")
        _check_shape(text, name)
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            reading = _Reading(loader, name)
            values = None if root is None else reading.value(root, (), frozenset())
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise _refusal(name, f"is not UTF-8 text (byte {error.start} is not)") from error
    except yaml.MarkedYAMLError as error:
        raise _refusal(_at(name, error.problem_mark), f"this is not valid YAML: {_sentence(error)}") from error
    except yaml.YAMLError as error:
        position = getattr(error, "position", 0)
        raise _refusal(_position(name, text, position), "this is not valid YAML: a character is not allowed") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise _refusal(name, "the file must hold sections with keys, such as optimization:, not a single value or list")
    return Document(values, reading.lines, tuple(reading.problems))


def _refusal(where: str, message: str) -> ConfigError:
    return ConfigError([Problem(where, message)])


def _at(name: str, mark: Any) -> str:
    return name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"


def _position(name: str, text: str, position: int) -> str:
    before = text[:position]
    return f"{name}:{before.count(chr(10)) + 1}:{position - (before.rfind(chr(10)) + 1) + 1}"


def _sentence(error: yaml.MarkedYAMLError) -> str:
    said = ", ".join(part for part in (error.context, error.problem) if part)
    return " ".join(said.split())[:200] or "it cannot be read"


def _check_shape(text: str, name: str) -> None:
    """Refuse deep nesting and masses of values before anything recursive or slow sees them."""
    depth = 0
    for num_events, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if num_events > 2 * MAX_VALUES:
            raise _too_many(name)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _refusal(_at(name, event.start_mark), f"is nested too deeply (allowed: {MAX_DEPTH} levels)")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _too_many(name: str) -> ConfigError:
    return _refusal(name, f"holds too many values, aliases counted (allowed: {MAX_VALUES:,})")


class _Reading:
    """Turns YAML nodes into values while it notes lines, counts, and refuses what is ambiguous."""

    def __init__(self, loader: _Loader, name: str) -> None:
        self._loader = loader
        self._name = name
        self._num_values = 0
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []

    def value(self, node: yaml.Node, path: KeyPath, open_nodes: frozenset[int]) -> Any:
        """The value of `node`; `open_nodes` are the ids of those around it, which an alias must not name."""
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise _too_many(self._name)
        if id(node) in open_nodes:
            raise _refusal(_at(self._name, node.start_mark), "an alias stands inside what it names")
        inside = open_nodes | {id(node)}
        if len(inside) > MAX_DEPTH:
            raise _refusal(_at(self._name, node.start_mark), f"is nested too deeply (allowed: {MAX_DEPTH} levels)")
        if isinstance(node, yaml.MappingNode):
            self._refuse_tag(node, "map")
            return self._mapping(node, path, inside)
        if isinstance(node, yaml.SequenceNode):
            self._refuse_tag(node, "seq")
            return [self.value(item, path, inside) for item in node.value]
        return self._scalar(node)

    def _scalar(self, node: yaml.Node) -> Any:
        self._refuse_tag(node, "str", "bool", "null", "int", "float", "merge")
        if node.tag == "tag:yaml.org,2002:merge":
            return node.value
        try:
            return self._loader.construct_object(node)
        except (ValueError, KeyError) as error:  # an explicit !!int before a word, or an integer of thousands of digits
            raise _refusal(
                _at(self._name, node.start_mark), f"{node.value[:40]!r} is not a value of its type"
            ) from error

    def _refuse_tag(self, node: yaml.Node, *allowed: str) -> None:
        if node.tag not in {f"tag:yaml.org,2002:{kind}" for kind in allowed}:
            shown = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _refusal(_at(self._name, node.start_mark), f"the tag {shown} is not allowed (allowed: plain values)")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, inside: frozenset[int]) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged = self._merge(value_node, path, inside) | merged
                continue
            key = self._key(key_node)
            if key in own:
                self._duplicate(key_node, (*path, key))
                continue
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            own[key] = self.value(value_node, (*path, key), inside)
        return merged | own

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:null":
            raise _refusal(_at(self._name, node.start_mark), "a key must be a single word or text")
        # `on:` and `8000:` are names here, whatever they would mean as values.
        return str(node.value)

    def _duplicate(self, node: yaml.Node, path: KeyPath) -> None:
        first = self.lines[path]
        line = node.start_mark.line + 1
        message = f"stands twice (allowed: once; the first is in line {first})"
        self.problems.append(Problem(".".join(path), message, Source("file", self._name, line)))

    def _merge(self, node: yaml.Node, path: KeyPath, inside: frozenset[int]) -> dict[str, Any]:
        """What `<<` brings in: the mapping, or the mappings of the list with the earlier ones first in rank."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in parts:
            values = self.value(part, path, inside)
            if not isinstance(values, dict):
                raise _refusal(_at(self._name, part.start_mark), "<< takes a section, or a list of sections")
            merged = values | merged
        return merged
