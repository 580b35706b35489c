"""An HTTP load generator: closed loop over keep-alive connections; a driver for the suite (see peers/driver.py).

Told by BENCH_URL, BENCH_BODY (`%s` stands for the text as JSON) and BENCH_CONNECTIONS.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from urllib.parse import urlsplit

import driver


class HttpError(Exception):
    """An answer other than 200."""


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bytes:
    """Send a request, return the answer's body.

    Raises:
        HttpError: it is no 200, or tells neither its length nor that it comes in chunks.
    """
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status, *lines = head.split("\r\n")
    headers = dict(line.lower().split(":", 1) for line in lines if ":" in line)
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    elif headers.get("transfer-encoding", "").strip() == "chunked":
        body = b"".join([chunk async for chunk in _chunks(reader)])
    else:
        raise HttpError(f"no length, and no chunks: {head}")
    if status.split(" ", 2)[1] != "200":
        raise HttpError(f"{status}: {body[:300]!r}")
    return body


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        chunk = await reader.readexactly(size + 2)
        if not size:
            return
        yield chunk[:-2]


class Producer:
    """Keeps `connections` requests under way."""

    def __init__(self, url: str, body: str, connections: int) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self.target = parts.path + (f"?{parts.query}" if parts.query else "")
        self.body = body
        self.connections = connections

    def bulk(self, texts: Sequence[str]) -> None:
        asyncio.run(self._bulk(iter([self.request(text) for text in texts])))

    def one(self, text: str) -> None:
        self.bulk([text])

    def request(self, text: str) -> bytes:
        """The bytes of one request."""
        body = (self.body % json.dumps(text)).encode()
        head = f"POST {self.target} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def _bulk(self, requests: Iterator[bytes]) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self.connections):
                group.create_task(self._connection(requests))

    async def _connection(self, requests: Iterator[bytes]) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            for request in requests:
                await post(reader, writer, request)
        finally:
            writer.close()


if __name__ == "__main__":
    environ = os.environ
    driver.obey(lambda: Producer(environ["BENCH_URL"], environ["BENCH_BODY"], int(environ["BENCH_CONNECTIONS"])), ())
