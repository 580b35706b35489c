"""`/v1/console`: what the console shows, as JSON, for programs. Read only."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from muai_producers.errors import InvalidRequestError
from muai_producers.gateway.callers import Caller, caller_of
from muai_producers.gateway.console import document
from muai_producers.gateway.console.lookout import Lookout
from muai_producers.gateway.failures import JSON_TYPE, ForbiddenError
from muai_producers.gateway.reading import query_of
from muai_producers.recent import MAX_RECENT

SHOWN_RECENT = 20
_encode = msgspec.json.Encoder().encode


class ConsoleApi:
    """The endpoints."""

    def __init__(self, lookout: Lookout) -> None:
        self._lookout = lookout

    def register(self, app: FastAPI) -> None:
        """Give the application the paths with their documentation."""
        router = app.router
        router.get("/v1/console/overview", **document.OVERVIEW)(self.overview)
        router.get("/v1/console/requests", **document.REQUESTS)(self.requests)
        router.get("/v1/console/requests/{id}", **document.REQUEST)(self.request)
        router.get("/v1/console/dead-letters", **document.DEAD_LETTERS)(self.dead_letters)

    async def overview(self, request: Request) -> Response:
        """How things stand."""
        return _answer(await self._lookout.overview(caller_of(request)))

    async def requests(self, request: Request) -> Response:
        """The last that were answered."""
        return _answer(await self._lookout.recent(caller_of(request), _limit(request, SHOWN_RECENT, MAX_RECENT)))

    async def request(self, request: Request) -> Response:
        """A request's way."""
        return _answer(await self._lookout.way(caller_of(request), request.path_params["id"]))

    async def dead_letters(self, request: Request) -> Response:
        """The newest dead letters."""
        check_operator(caller_of(request))
        return _answer(await self._lookout.dead_letters(_limit(request, 50, 500)))


def check_operator(caller: Caller) -> None:
    """Raise unless the caller is an operator.

    Raises:
        ForbiddenError: the caller is not.
    """
    if not caller.is_operator:
        raise ForbiddenError("this needs an operator's key: `muai keys create --tenant NAME --operator` makes one")


def _limit(request: Request, default: int, most: int) -> int:
    told = query_of(request).get("limit")
    if told is None:
        return default
    if not (told.isascii() and told.isdecimal() and 1 <= int(told[:6]) <= most):
        raise InvalidRequestError(
            f"limit must be a whole number from 1 to {most}, got {told[:40]!r}", {"field": "limit"}
        )
    return int(told)


def _answer(answer: Any) -> Response:
    return Response(_encode(answer), media_type=JSON_TYPE, headers={"cache-control": "no-store"})
