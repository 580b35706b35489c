"""The OpenAPI document: the runtime configuration."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from muai_producers.gateway.openapi import content, header, operation, response
from muai_producers.runtime_config.versions import MAX_TEXT, Applied, ConfigVersion

MAX_KEYS = 200
Key = Annotated[str, Meta(min_length=1, max_length=200)]
Why = Annotated[str, Meta(max_length=MAX_TEXT)]
Version = Annotated[int, Meta(ge=0, le=2**53)]


class ConfigPatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change of settings, taken whole or refused whole."""

    set: Annotated[dict[Key, Any], Meta(max_length=MAX_KEYS)] = {}
    """New values by dotted key, as the file has them. null is a value, such as that of no limit."""
    unset: Annotated[list[Key], Meta(max_length=MAX_KEYS)] = []
    """Keys that go by files and variables again."""
    why: Why = ""
    """Kept in the history."""
    version: Version | None = None
    """The version that the change was thought of for: with another one there it is refused. If-Match says the same."""


class ConfigRollback(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which version to go back to."""

    to: Version | None = None
    """Its number; the one before the latest where it is left out. 0: nothing is changed at run time any more."""
    why: Why = ""
    version: Version | None = None
    """As in a change."""


class RunningConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What may change at run time, as it is now."""

    version: ConfigVersion
    """The latest; its `overrides` are all that differs from files and variables."""
    values: dict[str, Any]
    """Every reloadable setting, as this gateway's own file and variables have it where it is not overridden."""
    processes: list[Applied]
    """Which version each process works by."""


class ConfigHistory(msgspec.Struct, frozen=True, kw_only=True):
    """Versions, newest first."""

    data: list[ConfigVersion]


TYPES = (ConfigPatch, ConfigRollback, RunningConfig, ConfigHistory)
_SIZE = "optimization.batcher.max_batch_size"
_VERSION = {
    "number": 7,
    "overrides": {_SIZE: 64},
    "changed": {_SIZE: 64},
    "at": 1_790_000_000.0,
    "by": "key 4be20f1c7a93 (on call), tenant ops",
    "why": "larger GPUs",
}
_BACK = {
    "number": 8,
    "removed": [_SIZE],
    "restores": 0,
    "at": 1_790_000_060.0,
    "by": "key 4be20f1c7a93 (on call), tenant ops",
    "why": "too slow",
}
_STUBBORN = f"{_SIZE}: 64 is not allowed (allowed: at least min_batch_size, which is 80)"
_RUNNING = {
    "version": _VERSION,
    "values": {_SIZE: 64, "optimization.batcher.batch_timeout_ms": 50},
    "processes": [
        {"process": "c1@gpu-1 (collector)", "version": 7},
        {"process": "onnx-812 (worker)", "version": 6, "wanted": 7, "error": _STUBBORN},
    ],
}
_PATCHES = {
    "change": {"summary": "Larger batches", "value": {"set": {_SIZE: 64}, "why": "larger GPUs"}},
    "careful": {
        "summary": "Only if nobody has changed anything since",
        "value": {"set": {"queue.tenant_max_requests": None}, "unset": [_SIZE], "version": 7},
    },
}
_ROLLBACKS = {
    "last": {"summary": "Take the last change back", "value": {}},
    "all": {"summary": "Take every change back", "value": {"to": 0, "why": "too slow"}},
}
_IF_MATCH = header(
    "If-Match",
    'The version that this was thought of for, as ETag gives it: `"7"`. With another one there it is refused.',
    type="string",
    pattern='^(\\*|"[0-9]{1,15}")$',
)
_ETAG = {"ETag": {"description": "The version's number, for If-Match.", "schema": {"type": "string"}}}


def _versioned(description: str, schema: type, example: Any) -> dict[str, Any]:
    return response(description, schema, example) | {"headers": _ETAG}


GET = operation(
    "getConfig",
    "The settings that may change at run time, and who works by them",
    {200: _versioned("As it is now.", RunningConfig, _RUNNING)},
    (403,),
)
PATCH = operation(
    "changeConfig",
    "Change settings of the running installation; every process applies it within a second",
    {
        200: _versioned(
            "The version that holds now; that of before where nothing would change.", ConfigVersion, _VERSION
        )
    },
    (403, 408, 409, 413, 415, 422),
    _IF_MATCH,
    requestBody={"required": True, "content": content(ConfigPatch, examples=_PATCHES)},
)
HISTORY = operation(
    "configHistory",
    "What was changed at run time, by whom and why, newest first",
    {200: response("The last of them.", ConfigHistory, {"data": [_BACK, _VERSION]})},
    (403,),
    {
        "name": "limit",
        "in": "query",
        "description": "At most so many.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 50},
    },
)
ROLLBACK = operation(
    "rollbackConfig",
    "Go back to an earlier version, as a new one",
    {200: _versioned("The version that holds now.", ConfigVersion, _BACK)},
    (403, 404, 408, 409, 413, 415, 422),
    _IF_MATCH,
    requestBody={"required": True, "content": content(ConfigRollback, examples=_ROLLBACKS)},
)
