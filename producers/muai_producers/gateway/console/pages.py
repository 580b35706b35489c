"""The console's pages: `/`, signing in and out, and what operators do with dead letters."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

import msgspec
from fastapi import FastAPI, Request, Response

from muai_producers.errors import BrokerError, InvalidRequestError, MuaiError, PayloadTooLargeError
from muai_producers.gateway.answers import ModelList, catalog
from muai_producers.gateway.callers import ANYBODY, Caller, Doorkeeper
from muai_producers.gateway.console import document, presenting
from muai_producers.gateway.console.api import SHOWN_RECENT, check_operator
from muai_producers.gateway.console.letters import Deed, LetterDesk
from muai_producers.gateway.console.lookout import Lookout
from muai_producers.gateway.console.records import DeadLetterList, Overview, RecentList, RequestWay
from muai_producers.gateway.failures import JSON_TYPE, ForbiddenError, PathNotFoundError, UnauthorizedError
from muai_producers.gateway.failures import shown as error_shown
from muai_producers.gateway.file_routes import asking
from muai_producers.gateway.reading import BODY_TIMEOUT_S, body_chunks, headers_of, query_of
from muai_producers.gateway.sessions import (
    Sessions,
    check_same_origin,
    cookie,
    is_token,
    new_session,
    session_in,
    token_of,
)

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from muai_config import Settings

log = logging.getLogger(__name__)
MAX_FORM_BYTES = 65_536
MAX_FIELDS = 600
THEMES = ("light", "dark")
THEME_COOKIE = "muai_theme"
SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
KEPT = {"cache-control": "no-store", "vary": "accept, cookie"}


@dataclass(frozen=True)
class Visitor:
    """Who looks at a page."""

    caller: Caller
    session: str
    is_new: bool
    """Whether the browser does not have the session yet."""


@dataclass(frozen=True)
class Shown:
    """What a page shows; None: not known, because the state store does not answer, or not for this visitor."""

    overview: Overview
    recent: RecentList | None
    way: RequestWay | None
    way_error: str | None
    letters: DeadLetterList | None


class ConsolePages:
    """The endpoints."""

    def __init__(
        self,
        settings: Settings,
        version: str,
        lookout: Lookout,
        desk: LetterDesk,
        doorkeeper: Doorkeeper,
        sessions: Sessions,
        executor: Executor,
    ) -> None:
        self._refresh_s = settings.gateway.console.refresh_s
        self._version = version
        self._lookout = lookout
        self._desk = desk
        self._doorkeeper = doorkeeper
        self._sessions = sessions
        self._executor = executor
        self._assets = presenting.read_assets()
        self._templates = presenting.environment(self._assets)
        self._models: ModelList = catalog(settings)
        self.paths = frozenset(
            (
                "/console/sign-in",
                "/console/sign-out",
                "/console/dead-letters",
                *(f"/console/assets/{name}" for name in self._assets),
            )
        )
        """These, and `/`, find out by themselves who asks."""

    def register(self, app: FastAPI) -> None:
        """Give the application the paths; none is part of the OpenAPI document: they are for browsers."""
        router = app.router
        router.get("/console/assets/{name}", include_in_schema=False)(self.asset)
        router.post("/console/sign-in", include_in_schema=False)(self.sign_in)
        router.post("/console/sign-out", include_in_schema=False)(self.sign_out)
        router.post("/console/dead-letters", include_in_schema=False)(self.dead_letters)

    # -- the page ------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """The console, or the question for a key."""
        try:
            visitor = await self._visitor(request)
        except UnauthorizedError:
            return self._render(request, "sign_in.html", wrong=False)
        except BrokerError as error:
            log.warning("%s", error)
            return self._render(request, "away.html", status=503)
        shown = await self._look(visitor.caller, query_of(request).get("request", "").strip()[:256])
        response = self._render(
            request,
            "page.html",
            caller=visitor.caller,
            is_signed_in=self._doorkeeper.required,
            token=token_of(visitor.session),
            refresh_s=self._refresh_s,
            models=self._models.data,
            shown=shown,
            deed=Deed.from_query(query_of(request)),
        )
        if visitor.is_new:
            is_https = request.url.scheme == "https"
            response.headers["set-cookie"] = cookie(visitor.session, is_https=is_https)
        return response

    async def _look(self, caller: Caller, request_id: str) -> Shown:
        overview = await self._lookout.overview(caller)
        recent = letters = way = way_error = None
        if overview.state_store:
            try:
                recent = await self._lookout.recent(caller, SHOWN_RECENT)
                letters = await self._lookout.dead_letters() if caller.is_operator else None
                way = await self._lookout.way(caller, request_id) if request_id else None
            except BrokerError as error:
                log.warning("%s", error)
            except MuaiError as error:
                way_error = error.message
        return Shown(overview, recent, way, way_error, letters)

    async def _visitor(self, request: Request) -> Visitor:
        session = session_in(request.scope["headers"])
        if not self._doorkeeper.required:
            return Visitor(ANYBODY, session or new_session(), is_new=session is None)
        if session is None:
            raise UnauthorizedError("there is no session")
        return Visitor(await self._doorkeeper.of_session(session), session, is_new=False)

    async def asset(self, request: Request) -> Response:
        """A file that pages name."""
        asset = self._assets.get(request.path_params["name"])
        if asset is None:
            raise PathNotFoundError("the console has no such file")
        is_named = query_of(request).get("v") == asset.version
        kept = "public, max-age=31536000, immutable" if is_named else "no-cache"
        headers = {**SECURITY, "cache-control": kept, "etag": f'"{asset.version}"'}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(asset.content, media_type=asset.media_type, headers=headers)

    # -- what is done --------------------------------------------------------------------------------------------

    async def sign_in(self, request: Request) -> Response:
        """Take a key, and give a session in its place."""
        return await self._done(request, self._sign_in)

    async def _sign_in(self, request: Request) -> Response:
        form = await self._form(request)
        try:
            record = await self._doorkeeper.key(_one(form, "key").strip())
        except UnauthorizedError:
            return self._render(request, "sign_in.html", status=401, wrong=True)
        session = await asking(self._executor, lambda: self._sessions.begin(record.id))
        log.info("console: key %s of tenant %s signed in", record.id, record.tenant)
        return _see("/", cookie(session, is_https=request.url.scheme == "https", max_age_s=self._sessions.keep_s))

    async def _done(self, request: Request, do: Callable[[Request], Awaitable[Response]]) -> Response:
        """What `do` answers; what it refuses is told on a page."""
        try:
            check_same_origin(request.scope["headers"])
            return await do(request)
        except UnauthorizedError:
            return _see("/")
        except MuaiError as error:
            told = error_shown(error)
            return self._render(request, "refused.html", status=told.http_status, message=told.message)

    async def sign_out(self, request: Request) -> Response:
        """End the session."""
        return await self._done(request, self._sign_out)

    async def _sign_out(self, request: Request) -> Response:
        session = session_in(request.scope["headers"])
        form = await self._form(request)
        if session is not None:
            _check_token(session, form)
            await asking(self._executor, lambda: self._sessions.end(session))
        return _see("/", cookie("", is_https=request.url.scheme == "https", max_age_s=0))

    async def dead_letters(self, request: Request) -> Response:
        """Replay or purge dead letters; what cannot be undone is asked about first."""
        return await self._done(request, self._dead_letters)

    async def _dead_letters(self, request: Request) -> Response:
        visitor = await self._visitor(request)
        form = await self._form(request)
        _check_token(visitor.session, form)
        check_operator(visitor.caller)
        everything = bool(_one(form, "everything"))
        action, entries = _one(form, "everything") or _one(form, "action"), form.get("entry", [])
        if action not in ("replay", "purge") or (not entries and not everything):
            return _see("/?nothing=1#dead-letters")
        if (action == "purge" or everything) and _one(form, "confirmed") != "1":
            return self._render(
                request,
                "confirm.html",
                action=action,
                entries=[] if everything else entries,
                everything=everything,
                token=token_of(visitor.session),
            )
        chosen = None if everything else entries
        deed = await asking(self._executor, lambda: self._desk.act(action, chosen))
        log.info("console: tenant %s: %s", visitor.caller.tenant, deed)
        return _see(f"/?{urlencode(deed.to_query())}#dead-letters")

    async def _form(self, request: Request) -> Mapping[str, Sequence[str]]:
        def check_size(num_bytes: int) -> None:
            if num_bytes > MAX_FORM_BYTES:
                raise PayloadTooLargeError(f"a form has at most {MAX_FORM_BYTES} bytes")

        chunks = body_chunks(request, headers_of(request), check_size, BODY_TIMEOUT_S)
        body = b"".join([chunk async for chunk in chunks])
        try:
            return parse_qs(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS)
        except ValueError as error:
            raise InvalidRequestError(f"the form cannot be read: {error}") from None

    def _render(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        theme = request.cookies.get(THEME_COOKIE, "")
        html = self._templates.get_template(template).render(
            theme=theme if theme in THEMES else "auto", version=self._version, **values
        )
        return Response(html, status, {**SECURITY, **KEPT}, "text/html")


class IndexRoute:
    """`/`: for browsers the console, for anybody else what there is.

    Args:
        pages: None: there is no console.
    """

    def __init__(self, settings: Settings, version: str, pages: ConsolePages | None) -> None:
        self._pages = pages
        server = settings.monitoring.server
        links = {
            "document": "/openapi.json",
            "health": server.health_check_path,
            "readiness": server.readiness_check_path,
            "models": "/v1/models",
        }
        if pages is not None:
            links["console"] = "/v1/console/overview"
        index = document.Index(name="MuAI", version=version, console=pages is not None, links=links)
        self._index = msgspec.json.encode(index)

    def register(self, app: FastAPI) -> None:
        """Give the application the path with its documentation."""
        app.router.get("/", **document.INDEX)(self.index)
        app.router.add_api_route("/", self.index, methods=["HEAD"], include_in_schema=False)

    async def index(self, request: Request) -> Response:
        """The index, or the page."""
        if self._pages is not None and request.method == "GET" and wants_html(request.headers.get("accept", "")):
            return await self._pages.page(request)
        return Response(self._index, media_type=JSON_TYPE, headers={"vary": "accept"})


def wants_html(accept: str) -> bool:
    """Whether a page is asked for: browsers name HTML, programs that take anything do not."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "text/html" in kinds or "application/xhtml+xml" in kinds


def _one(form: Mapping[str, Sequence[str]], name: str) -> str:
    return next(iter(form.get(name, ())), "")


def _check_token(session: str, form: Mapping[str, Sequence[str]]) -> None:
    if not is_token(session, _one(form, "token")):
        raise ForbiddenError("this page is out of date: load it anew, and try again")


def _see(path: str, set_cookie: str | None = None) -> Response:
    headers = {**SECURITY, **KEPT, "location": path}
    return Response(status_code=303, headers=headers if set_cookie is None else {**headers, "set-cookie": set_cookie})
