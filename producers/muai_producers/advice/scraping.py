"""Fetching a vLLM server's metrics: from hosts that are allowed, `/metrics` alone, a bounded page in a bounded time.

The host's name is looked up once and the connection made to the very address that was looked at. Redirects are not
followed. Addresses that are no host's (link-local ones, where clouds keep their credentials, and multicast) are refused
whatever is allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING

from muai_producers.advice.vllm_metrics import ScrapeError
from muai_producers.errors import InvalidRequestError
from muai_producers.webhooks.policy import Target, host_matches
from muai_producers.webhooks.posting import look_up

if TYPE_CHECKING:
    from muai_config.gateway import AdviceSettings

PATH = "/metrics"
VLLM_PORT = 8000
MAX_BYTES = 2_000_000
"""A page of vLLM's is some fifty thousand."""
_ADDRESS = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)"
    r"(?::(?P<port>[0-9]{1,5}))?(?:/(?:metrics)?)?"
)


class HostNotAllowedError(InvalidRequestError):
    """The host is not among those that may be asked."""


def target_of(instance_id: str, settings: AdviceSettings) -> Target:
    """Where an instance's metrics are.

    Raises:
        InvalidRequestError: it is no HOST:PORT.
        HostNotAllowedError: its host may not be asked.
    """
    found = _ADDRESS.fullmatch(instance_id)
    port = int(found["port"] or VLLM_PORT) if found else 0
    if found is None or not 1 <= port <= 65535:
        raise InvalidRequestError(
            f"instance_id must be a vLLM server as HOST:PORT, or a model of this installation; got "
            f"{instance_id[:100]!r}",
            {"field": "instance_id"},
        )
    host = found["host"].strip("[]").rstrip(".").lower()
    if not any(host_matches(pattern, host) for pattern in settings.allowed_hosts):
        raise HostNotAllowedError(
            f"instance_id: the host {host[:100]} is not among gateway.advice.allowed_hosts", {"field": "instance_id"}
        )
    return Target(found["scheme"] or "http", host, port, PATH)


def is_a_host(address: str) -> bool:
    """Whether a server may have that address."""
    found = ipaddress.ip_address(address)
    inner = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    found = inner or found
    return not (found.is_link_local or found.is_multicast or found.is_unspecified)


def scrape(target: Target, timeout_s: float) -> str:
    """The page. Blocks, for `timeout_s` at most.

    Raises:
        ScrapeError: it did not come; the message says why.
    """
    where = f"{target.host}:{target.port}"

    async def within() -> str:
        async with asyncio.timeout(timeout_s):
            return await _fetch(target)

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(within())
    except TimeoutError:
        raise ScrapeError(f"{where} did not send its metrics within {timeout_s:g} s") from None
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        raise ScrapeError(f"{where} cannot be asked for its metrics: {type(error).__name__}: {error}") from None
    finally:
        loop.close()  # asyncio.run would wait for a name server that does not answer, however long that takes


async def _fetch(target: Target) -> str:
    address = _choose(await look_up(target.host, target.port), target)
    is_secure = target.scheme == "https"
    reader, writer = await asyncio.open_connection(
        address,
        target.port,
        ssl=ssl.create_default_context() if is_secure else None,
        server_hostname=target.host if is_secure else None,
    )
    try:
        writer.write(
            f"GET {target.path} HTTP/1.1\r\nHost: {target.host_header}\r\nUser-Agent: muai-advice\r\n"
            "Accept: text/plain;version=0.0.4\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        await writer.drain()
        return await _read(reader, target)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _choose(addresses: Sequence[str], target: Target) -> str:
    chosen = next((address for address in addresses if is_a_host(address)), None)
    if chosen is None:
        raise ScrapeError(f"{target.host} leads to no address that a server may have")
    return chosen


class _Page:
    """Takes an answer in as httptools reads it."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.is_whole = False
        self.says_its_length = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.says_its_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_body(self, part: bytes) -> None:
        self.body += part

    def on_message_complete(self) -> None:
        self.is_whole = True


async def _read(reader: asyncio.StreamReader, target: Target) -> str:
    import httptools

    page = _Page()
    parser = httptools.HttpResponseParser(page)
    num_bytes = 0
    while not page.is_whole:
        part = await reader.read(65_536)
        if not part:
            if page.says_its_length:
                raise EOFError("the connection was cut off")
            break
        num_bytes += len(part)
        if num_bytes > MAX_BYTES:
            raise ScrapeError(f"{target.host}:{target.port} says more than {MAX_BYTES} bytes at {PATH}")
        try:
            parser.feed_data(part)
        except httptools.HttpParserError as error:
            raise ValueError(f"no answer of HTTP: {error}") from None
    status = parser.get_status_code()
    if status != 200:
        raise ScrapeError(f"{target.host}:{target.port} answered {status or 'nothing'} at {PATH}")
    return page.body.decode("utf-8", "replace")
