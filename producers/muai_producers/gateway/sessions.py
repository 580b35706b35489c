"""The console's sessions. A browser that was given a key once holds a random value in its place; the key itself is kept
nowhere but by its owner.

A session's cookie alone opens the console's own pages. On any other path, and for whatever changes something, the token
must come with it: pages of ours carry it, and pages of other sites can neither read it nor send it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from muai_producers.gateway.failures import ForbiddenError
from muai_producers.store import Store

COOKIE = "muai_console"
TOKEN_HEADER = b"x-muai-console"
_SESSION = re.compile(r"[A-Za-z0-9_-]{43}")
Headers = Iterable[tuple[bytes, bytes]]


def new_session() -> str:
    """A value that nobody can guess."""
    return secrets.token_urlsafe(32)


def token_of(session: str) -> str:
    """The token of a session's pages."""
    return hashlib.sha256(b"muai console page\0" + session.encode()).hexdigest()


def session_in(headers: Headers) -> str | None:
    """The session that the cookies name; None where they name none."""
    for name, value in headers:
        if name == b"cookie":
            for part in value.decode("latin-1").split(";"):
                cookie, _, session = part.strip().partition("=")
                if cookie == COOKIE and _SESSION.fullmatch(session):
                    return session
    return None


def is_token(session: str, token: str) -> bool:
    """Whether the token is that of the session's pages."""
    return hmac.compare_digest(token_of(session).encode(), token.encode("utf-8", "replace"))


def spoken_for(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """The session of a call that one of our pages makes; None where the token is missing or another's."""
    token = next((value for name, value in headers if name == TOKEN_HEADER), None)
    session = None if token is None else session_in(headers)
    if session is None or token is None or not is_token(session, token.decode("latin-1")):
        return None
    return session


def check_same_origin(headers: Headers) -> None:
    """Refuse what a page of another site sends.

    Raises:
        ForbiddenError: it does, or the browser does not say.
    """
    found = {name: value.decode("latin-1") for name, value in headers}
    site, origin = found.get(b"sec-fetch-site"), found.get(b"origin")
    if site is not None:
        is_own = site in ("same-origin", "none")
    else:
        is_own = origin is not None and urlsplit(origin).netloc == found.get(b"host")
    if not is_own:
        raise ForbiddenError("this can be done from the console's own pages alone")


def cookie(session: str, *, is_https: bool, max_age_s: int | None = None) -> str:
    """The header Set-Cookie; without a `max_age_s` the cookie goes with the browser's window."""
    parts = [f"{COOKIE}={session}", "Path=/", "HttpOnly", "SameSite=Strict"]
    parts += ["Secure"] if is_https else []
    parts += [] if max_age_s is None else [f"Max-Age={max_age_s}"]
    return "; ".join(parts)


class Sessions:
    """The sessions in the state store: for each the id of its key, under the session's hash.

    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store, keep_s: int) -> None:
        self._client: Any = store.client
        self._prefix = f"{store.keys.prefix}:console:"
        self.keep_s = keep_s

    def begin(self, key_id: str) -> str:
        """A new session of a key's."""
        session = new_session()
        self._client.set(self._key(session), key_id, ex=self.keep_s)
        return session

    def key_ids(self, sessions: Sequence[str]) -> list[str | None]:
        """The id of each session's key; None where the session has ended."""
        found = self._client.mget([self._key(session) for session in sessions])
        return [None if key_id is None else key_id.decode() for key_id in found]

    def end(self, session: str) -> None:
        """The session is over."""
        self._client.delete(self._key(session))

    def _key(self, session: str) -> str:
        return self._prefix + hashlib.sha256(session.encode()).hexdigest()
