"""An HTTP client that costs little, for load at a steady rate: requests leave when they are due, whatever the answers
do, so that a slow server is not asked more slowly."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Connection:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer.

        Raises:
            OSError, EOFError: the connection broke before an answer was there.
        """
        if self._reader is not None and self._reader.at_eof():
            self.close()  # the server has let it go while it was idle
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        assert self._reader is not None
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self._port}", f"Content-Length: {len(body)}"]
        if body:
            lines.append("Content-Type: application/json")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        try:
            self._writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status, *rest = head.split("\r\n")
            told = dict(line.lower().split(": ", 1) for line in rest if ": " in line)
            answer = await self._reader.readexactly(int(told.get("content-length", "0")))
        except BaseException:
            self.close()
            raise
        if told.get("connection") == "close":
            self.close()
        return int(status.split(" ", 2)[1]), told, answer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


@dataclass
class Load:
    """What came of a load."""

    latencies_ms: list[float] = field(default_factory=list)
    """Of the requests that were answered with a result, from when each was due."""
    statuses: Counter[int] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)
    """Of the requests that were accepted."""
    problems: list[str] = field(default_factory=list)

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def steady_load(
    port: int,
    rate_per_s: float,
    until: Callable[[float], bool],
    body: Callable[[int], dict[str, Any]],
    path: str = "/v1/inference?wait=30",
) -> Load:
    """POST `body(n)` at a steady rate.

    Args:
        until: told the seconds since the start; ends the load when it is true.
    """
    load = Load()
    idle: list[Connection] = []
    tasks: set[asyncio.Task[None]] = set()
    began_s = time.monotonic()

    async def one(number: int, due_s: float) -> None:
        connection = idle.pop() if idle else Connection(port)
        try:
            status, _, answer = await connection.ask("POST", path, json.dumps(body(number)).encode())
        except (OSError, EOFError) as error:
            load.problems.append(repr(error))
            return
        idle.append(connection)
        load.statuses[status] += 1
        told = json.loads(answer)
        if status in (200, 202):
            load.ids.append(told["id"])
        if status == 200:
            load.latencies_ms.append((time.monotonic() - due_s) * 1000)
        else:
            load.problems.append(f"{status}: {answer[:200]!r}")

    number = 0
    while not until((now_s := time.monotonic()) - began_s):
        while began_s + number / rate_per_s <= now_s:
            due_s = began_s + number / rate_per_s
            task = asyncio.create_task(one(number, due_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.sleep(max(0.0, began_s + number / rate_per_s - time.monotonic()))
    if tasks:
        await asyncio.wait(tasks)
    for connection in idle:
        connection.close()
    return load
