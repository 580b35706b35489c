"""One try of a delivery over HTTP: to an address that the policy allows, and nowhere else.

The host's name is looked up here and the connection made to the very address that was checked: a name that leads
elsewhere at its second look-up (DNS rebinding) gains nothing. Redirects are not followed. The whole try, look-up and
TLS included, takes `timeout_s` at most, and of an answer no more than its head is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence

from muai_producers.errors import InvalidRequestError
from muai_producers.webhooks.policy import HookPolicy, Target
from muai_producers.webhooks.retrying import Tried

MAX_HEAD_BYTES = 32_768
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: |\r\n)")
_RETRY_AFTER = re.compile(rb"\r\nretry-after:[ \t]*([0-9]{1,6})[ \t]*\r\n", re.IGNORECASE)
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def look_up(host: str, port: int) -> list[str]:
    """The addresses of a host, in the order in which they are to be tried.

    Raises:
        OSError: it has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]).partition("%")[0] for *_, address in found]


class Poster:
    """Makes tries.

    Args:
        trust: which certificates are accepted; None: those that the system trusts.
    """

    def __init__(
        self,
        policy: HookPolicy,
        *,
        timeout_s: float,
        resolve: Resolve = look_up,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy
        self._timeout_s = timeout_s
        self._resolve = resolve
        self._trust = trust or ssl.create_default_context()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Tried:
        """Try once. Never raises on account of the receiver."""
        try:
            target = self._policy.target(url)
        except InvalidRequestError as error:  # the policy has changed since the request was accepted
            return Tried(reason=error.message)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._try(target, headers, body)
        except TimeoutError:
            return Tried(reason=f"no answer within {self._timeout_s:g} s")
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            return Tried(reason=f"{type(error).__name__}: {error}")

    async def _try(self, target: Target, headers: Mapping[str, str], body: bytes) -> Tried:
        address = self._policy.choose(await self._resolve(target.host, target.port))
        if address is None:
            return Tried(reason=f"{target.host} leads to no address on the internet (allow_private_networks)")
        is_secure = target.scheme == "https"
        reader, writer = await asyncio.open_connection(
            address,
            target.port,
            limit=MAX_HEAD_BYTES,
            ssl=self._trust if is_secure else None,
            server_hostname=target.host if is_secure else None,
        )
        try:
            writer.write(_request(target, headers, body))
            await writer.drain()
            return _tried(await _head(reader))
        finally:
            writer.transport.abort()  # not closed politely: what else the receiver says is none of our business
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def _request(target: Target, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = [
        f"POST {target.path} HTTP/1.1",
        f"Host: {target.host_header}",
        "User-Agent: muai-webhooks",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body


async def _head(reader: asyncio.StreamReader) -> bytes:
    """The head of the answer proper; those before it (100 Continue, 103 Early Hints) are passed over."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):
            return head


def _tried(head: bytes) -> Tried:
    """Raises: ValueError: it is no answer of HTTP."""
    status = _STATUS.match(head)
    if status is None:
        raise ValueError(f"no answer of HTTP/1.1: {head[:40]!r}")
    asked = _RETRY_AFTER.search(head)
    return Tried(int(status[1]), retry_after_s=None if asked is None else float(asked[1]))
