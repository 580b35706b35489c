"""`/api/v1/config`: the settings that change at run time, for those who run the installation."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI, Request, Response

from muai_config.errors import ConfigError, Source
from muai_config.runtime import overlaid, reloadable_values
from muai_producers.errors import InvalidRequestError
from muai_producers.gateway import openapi_config as documented
from muai_producers.gateway.callers import caller_of
from muai_producers.gateway.failures import JSON_TYPE
from muai_producers.gateway.file_routes import asking
from muai_producers.gateway.openapi_config import ConfigHistory, ConfigPatch, ConfigRollback, RunningConfig
from muai_producers.gateway.reading import headers_of, query_of, read_json
from muai_producers.gateway.submission import parse_number, read_struct
from muai_producers.gateway.watch_routes import check_operator
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.versions import KEPT_VERSIONS, ConfigVersion, ConfigVersions

if TYPE_CHECKING:
    from muai_producers.runtime_config.live import LiveSettings
    from muai_producers.store import Store

DEFAULT_HISTORY = 50
_ETAG = re.compile(r'"([0-9]{1,15})"')
_encode = msgspec.json.Encoder().encode
_decode_patch = msgspec.json.Decoder(ConfigPatch).decode
_decode_rollback = msgspec.json.Decoder(ConfigRollback).decode


class ConfigRoutes:
    """The endpoints.

    Args:
        live: what this gateway works by; changes are checked against what it started with.
        check_size: raises when a body may not have so many bytes.
    """

    def __init__(self, live: LiveSettings, store: Store, executor: Executor, check_size: Callable[[int], None]) -> None:
        self._live = live
        self._versions = ConfigVersions(store)
        self._editor = ConfigEditor(live.started_with, self._versions)
        self._executor = executor
        self._check_size = check_size

    def register(self, app: FastAPI) -> None:
        """Give the application the paths with their documentation."""
        router = app.router
        router.get("/api/v1/config", **documented.GET)(self.get)
        router.patch("/api/v1/config", **documented.PATCH)(self.change)
        router.get("/api/v1/config/history", **documented.HISTORY)(self.history)
        router.post("/api/v1/config/rollback", **documented.ROLLBACK)(self.rollback)

    async def get(self, request: Request) -> Response:
        """What may change at run time, as it is now."""
        check_operator(request)
        running = await asking(self._executor, self._running)
        return Response(_encode(running), headers=_etag(running.version), media_type=JSON_TYPE)

    def _running(self) -> RunningConfig:
        version = self._versions.current()
        try:
            source = Source("runtime", f"version {version.number}")
            settings = overlaid(self._live.started_with, version.overrides, source)
        except ConfigError:  # this gateway's own file contradicts it; `processes` says so
            settings = self._live.current
        return RunningConfig(version=version, values=reloadable_values(settings), processes=self._versions.applied())

    async def change(self, request: Request) -> Response:
        """Change settings."""
        check_operator(request)
        patch = read_struct(_decode_patch, await read_json(request, headers_of(request), self._check_size))
        expected = expected_version(request, patch.version)
        if not patch.set and not patch.unset:
            raise InvalidRequestError("nothing is to be changed: `set` and `unset` are empty", {"field": "set"})
        who = caller_of(request).who
        made = await asking(
            self._executor,
            lambda: self._editor.change(patch.set, patch.unset, by=who, why=patch.why, expected=expected),
        )
        return Response(_encode(made), headers=_etag(made), media_type=JSON_TYPE)

    async def history(self, request: Request) -> Response:
        """The versions, newest first."""
        check_operator(request)
        told = query_of(request).get("limit", str(DEFAULT_HISTORY))
        limit = parse_number(told)
        if limit is None or not limit.is_integer() or not 1 <= limit <= KEPT_VERSIONS:
            raise InvalidRequestError(f"limit must be a whole number from 1 to {KEPT_VERSIONS}", {"field": "limit"})
        found = await asking(self._executor, lambda: self._versions.history(int(limit)))
        return Response(_encode(ConfigHistory(data=found)), media_type=JSON_TYPE)

    async def rollback(self, request: Request) -> Response:
        """Go back to an earlier version."""
        check_operator(request)
        body = read_struct(_decode_rollback, await read_json(request, headers_of(request), self._check_size))
        expected, who = expected_version(request, body.version), caller_of(request).who
        made = await asking(
            self._executor, lambda: self._editor.rollback(body.to, by=who, why=body.why, expected=expected)
        )
        return Response(_encode(made), headers=_etag(made), media_type=JSON_TYPE)


def expected_version(request: Request, told: int | None) -> int | None:
    """The version that a change was thought of for, from If-Match or the body; None where neither says.

    Raises:
        InvalidRequestError: If-Match is no version, or the two contradict each other.
    """
    header = headers_of(request).get("if-match", "*").strip()
    if header == "*":
        return told
    found = _ETAG.fullmatch(header)
    if found is None:
        raise InvalidRequestError(
            f'If-Match must be a version as ETag gives it, such as "7", or *; got {header[:40]}', {"field": "If-Match"}
        )
    number = int(found[1])
    if told is not None and told != number:
        raise InvalidRequestError(
            f"If-Match says version {number}, the body says {told}: send one of them", {"field": "version"}
        )
    return number


def _etag(version: ConfigVersion) -> dict[str, str]:
    return {"etag": f'"{version.number}"'}
