"""What can be wrong with a configuration, as values: one problem is one line."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

MAX_KEY_LENGTH = 200
# Whatever a terminal or `splitlines` takes for the end of a line, or worse.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def one_line(text: str) -> str:
    """`text` with every control character escaped."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value came from: the built-in default, a file (with its line), an environment variable, or a change at
    run time.
    """

    kind: Literal["default", "file", "variable", "runtime"]
    name: str = ""
    line: int | None = None

    def __str__(self) -> str:
        if self.kind == "default":
            return "default"
        return self.name if self.line is None else f"{self.name}:{self.line}"


DEFAULT = Source("default")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        key: dotted path of the setting, or the name of the variable or file that the problem is about.
        message: what is wrong and what is allowed, on one line.
    """

    key: str
    message: str
    source: Source = DEFAULT

    def __str__(self) -> str:
        key = self.key if len(self.key) <= MAX_KEY_LENGTH else self.key[:MAX_KEY_LENGTH] + "…"
        line = f"{key}: {self.message}"
        return one_line(line if self.source.kind == "default" else f"{line} [from {self.source}]")


class ConfigError(ValueError):
    """The configuration cannot be used. `str()` is one line per problem, all of them at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class UnknownModelError(KeyError):
    """The catalog has no model of that name; `nearest` holds the names that look like it, best first."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        known = sorted(known)
        self.nearest: tuple[str, ...] = tuple(difflib.get_close_matches(name, known, n=3, cutoff=0.5))
        hint = f"did you mean {' or '.join(self.nearest)}?" if self.nearest else f"the catalog has {', '.join(known)}"
        self.message = f"unknown model {name!r}: {hint}"
        super().__init__(self.message)

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_unknown_model, (self.name, self.nearest, self.message)


def _rebuild_unknown_model(name: str, nearest: tuple[str, ...], message: str) -> UnknownModelError:
    error = UnknownModelError(name, nearest)
    error.nearest, error.message = nearest, message
    return error


def did_you_mean(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate nearest in spelling to `name`, or None when none is near."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None
