"""What is kept out of logs and traces: passwords and keys always, what clients sent unless it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

HIDDEN = "***"
WITHHELD = "[withheld]"
MIN_QUOTED = 12
"""Shorter ones of what clients send are in any sentence: they are withheld where they stand in quotes."""
_PATTERNS = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]*:)[^\s/@'\"]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (re.compile(r"\b(muai_[0-9a-f]{12}_)[A-Za-z0-9_-]{20,}"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (
        re.compile(r"(?i)\b((?:password|passwd|secret|api[_-]?key|token)['\"]?\s*[:=]\s*['\"]?)[^\s'\",;&}]{4,}"),
        rf"\1{HIDDEN}",
    ),
)


def passwords_of(urls: Iterable[str | None]) -> tuple[str, ...]:
    """The passwords in addresses, as they are written there and as they are meant."""
    found: dict[str, None] = {}
    for url in urls:
        for one in (url or "").split(";"):
            password = urlsplit(one).password
            if password and len(password) >= 4:
                found |= {password: None, unquote(password): None}
    return tuple(found)


class Redactor:
    """Takes out of a text what does not belong there.

    Args:
        secrets: texts that never appear, whatever they are part of.
        contents: whether what clients sent may appear.
    """

    def __init__(self, secrets: Sequence[str] = (), *, contents: bool = False) -> None:
        self._secrets = sorted(filter(None, secrets), key=len, reverse=True)
        self.contents = contents

    def clean(self, text: str, inputs: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text without secrets, and without what it quotes of `inputs`."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        for pattern, shown in _PATTERNS:
            text = pattern.sub(shown, text)
        if inputs and not self.contents:
            text = withhold(text, (one for request in inputs for one in texts_of(request)))
        return text


def texts_of(value: Any) -> Iterator[str]:
    """Every text within inputs."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if key not in ("role", "type"):
                yield from texts_of(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts_of(one)


def withhold(text: str, quoted: Iterable[str]) -> str:
    """The text without the runs that it has in common with what clients sent, cut off or escaped as they may be."""
    for one in quoted:
        for form in {one, repr(one)[1:-1]}:
            text = _without(text, form)
    return text


def _without(text: str, form: str) -> str:
    if len(form) < MIN_QUOTED:
        return re.sub(rf"(['\"`]){re.escape(form)}\1", rf"\1{WITHHELD}\1", text) if form else text
    seed, start = form[:MIN_QUOTED], 0
    while (found := text.find(seed, start)) >= 0:
        length = MIN_QUOTED
        while length < len(form) and text[found + length : found + length + 1] == form[length]:
            length += 1
        text = text[:found] + WITHHELD + text[found + length :]
        start = found + len(WITHHELD)
    return text
