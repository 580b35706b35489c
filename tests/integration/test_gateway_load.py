"""Gateways under load: a rolling restart of everything, a thousand readers, and one that reads slowly.

The short forms look at what must hold on any machine; `make test-load` takes two minutes and a thousand readers.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from tests.gateway_support import GatewayStack, Process, gateway_stack
from tests.http_support import Connection
from tests.load_report import keep_figure
from tests.transport_support import free_port, wait_until

from muai_producers.fleet import Fleet
from muai_producers.store import Store

IS_LONG = os.environ.get("MUAI_TEST_LOAD") == "long"
pytestmark = [pytest.mark.redis, pytest.mark.timeout(900 if IS_LONG else 180)]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[GatewayStack]:
    with gateway_stack(tmp_path, queue_capacity=100_000, graceful_shutdown_timeout=10) as stack:
        yield stack


# -- a rolling restart -----------------------------------------------------------------------------------------------

RATE_PER_S, ROLLING_S = (200.0, 120.0) if IS_LONG else (50.0, 0.0)
"""0.0: every process is restarted once, however long that takes."""


@dataclass
class Seen:
    """What clients met."""

    accepted: dict[int, str] = field(default_factory=dict)
    """The request's id by its number."""
    answers: Counter[str] = field(default_factory=Counter)
    draining: int = 0
    """503 with Retry-After: sent again elsewhere."""
    refused: int = 0
    """Connections to a replica that was away: tried elsewhere."""
    broken: int = 0
    """Requests that were sent and got no answer."""


class Balancer:
    """What a load balancer does: connections kept to each replica, and what one cannot take goes to the other."""

    def __init__(self, ports: list[int], seen: Seen) -> None:
        self._ports = ports
        self._seen = seen
        self._idle: dict[int, list[Connection]] = {port: [] for port in ports}

    async def submit(self, number: int, *, wait: bool) -> None:
        """Hand one request in, wherever it is taken."""
        body = json.dumps({"model": "noop", "inputs": f"number {number}"}).encode()
        path = "/v1/inference?wait=30" if wait else "/v1/inference"
        key = uuid.uuid4().hex
        async with asyncio.timeout(60):
            for turn in range(1_000_000):
                port = self._ports[(number + turn) % len(self._ports)]
                if await self._try(port, path, body, key, number):
                    return
                await asyncio.sleep(0.05 if turn % 2 else 0.0)

    async def _try(self, port: int, path: str, body: bytes, key: str, number: int) -> bool:
        seen = self._seen
        connection = self._idle[port].pop() if self._idle[port] else Connection(port)
        try:
            status, headers, answer = await connection.ask("POST", path, body, Idempotency_Key=key)
        except ConnectionRefusedError:
            seen.refused += 1
            return False
        except (OSError, EOFError):
            seen.broken += 1
            return False
        self._idle[port].append(connection)
        if status == 503 and "retry-after" in headers:
            seen.draining += 1
            return False
        seen.answers[str(status)] += 1
        if status in (200, 202):
            seen.accepted[number] = json.loads(answer)["id"]
        return True

    def close(self) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.close()


class Fleetful:
    """Two machines with one of each process."""

    def __init__(self, stack: GatewayStack) -> None:
        self.stack = stack
        self.ports = [free_port(), free_port()]
        self.fleet = Fleet(Store(stack.redis.client))
        self.commands = {
            **{f"g{n}": ("gateway", "--port", str(self.ports[n])) for n in (0, 1)},
            **{f"c{n}": ("collector", "--name", f"c{n}") for n in (0, 1)},
            **{f"w{n}": ("worker", "--engine", "fake", "--name", f"w{n}") for n in (0, 1)},
        }
        self.running: dict[str, Process] = {name: stack.start(*command) for name, command in self.commands.items()}

    def is_up(self, name: str) -> bool:
        view = self.fleet.view(())
        if name.startswith("g"):
            try:
                return httpx.get(f"http://127.0.0.1:{self.ports[int(name[1])]}/ready").status_code == 200
            except httpx.TransportError:
                return False
        records = view.collectors if name.startswith("c") else view.workers
        pid = self.running[name].popen.pid
        return any(record.pid == pid for record in records)

    def wait_up(self, name: str) -> None:
        wait_until(lambda: self.is_up(name), 60.0, f"{name} to be up")

    def restart(self, machine: int) -> int:
        """Restart all processes of one machine, as an update of it would; returns how many."""
        names = [name for name in self.commands if name.endswith(str(machine))]
        for name in names:
            self.running[name].terminate()
        for name in names:
            old = self.running[name]
            assert old.popen.wait(timeout=30) == 0, old.log.read_text()[-3000:]
            self.running[name] = self.stack.start(*self.commands[name])
        for name in names:
            self.wait_up(name)
        return len(names)


async def load_until(balancer: Balancer, is_over: Callable[[], bool]) -> int:
    """Submit at the rate until it is over and all has an answer; returns how many."""
    tasks: set[asyncio.Task[None]] = set()
    number, began_s = 0, time.monotonic()
    while not is_over():
        while began_s + number / RATE_PER_S <= time.monotonic():
            tasks.add(asyncio.create_task(balancer.submit(number, wait=number % 2 == 0)))
            number += 1
        await asyncio.sleep(0.005)
        for done in [task for task in tasks if task.done()]:
            tasks.discard(done)
            done.result()
    await asyncio.gather(*tasks)
    return number


def test_given_a_rolling_restart_of_everything_under_load_then_nothing_is_lost_doubled_or_refused_in_vain(
    stack: GatewayStack,
) -> None:
    fleet = Fleetful(stack)
    for name in fleet.running:
        fleet.wait_up(name)
    seen = Seen()
    balancer = Balancer(fleet.ports, seen)
    restarts = 0

    async def scenario() -> int:
        nonlocal restarts

        async def roll() -> None:
            nonlocal restarts
            began_s = time.monotonic()
            while restarts == 0 or time.monotonic() - began_s < ROLLING_S:
                for machine in (0, 1):
                    restarts += await asyncio.to_thread(fleet.restart, machine)

        rolling = asyncio.create_task(roll())
        count = await load_until(balancer, rolling.done)
        rolling.result()
        balancer.close()
        return count

    count = asyncio.run(scenario())
    store = Store(stack.redis.client)
    wait_until(lambda: store.in_flight() == 0, 60.0, "all to be answered")
    states: Counter[str] = Counter()
    ids = list(seen.accepted.values())
    for start in range(0, len(ids), 1000):
        states.update("lost" if state is None else state.status for state in store.states(ids[start : start + 1000]))
    second = int(stack.redis.client.hget(store.keys.stats, "duplicates_refused") or 0)  # type: ignore[arg-type]
    answered = int(stack.redis.client.hget(store.keys.stats, "answered") or 0)  # type: ignore[arg-type]
    keep_figure(
        "rolling restart",
        requests=count,
        per_s=RATE_PER_S,
        restarts=restarts,
        lost=count - states["SUCCESS"],
        second_results=second,
        answers=dict(seen.answers),
        draining_503=seen.draining,
        refused_connections=seen.refused,
        broken=seen.broken,
    )
    assert set(seen.answers) <= {"200", "202"}, "a 5xx other than 503 with Retry-After, or a 4xx"
    assert (len(ids), len(set(ids))) == (count, count)
    assert states == Counter(SUCCESS=count)
    assert (second, answered) == (0, count), "some request ran twice"
    assert seen.broken == 0, "a connection was cut while its request was under way"


# -- readers of streams ----------------------------------------------------------------------------------------------

READERS, WATCHED_S = (1000, 20.0) if IS_LONG else (100, 3.0)


async def open_stream(
    port: int, request_id: str, *, receive_buffer: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A reader whose answer has begun."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    limit = 2**16 if receive_buffer is None else receive_buffer
    reader, writer = await asyncio.open_connection(sock=connection, limit=limit)
    writer.write(f"GET /v1/inference/{request_id}/stream HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    if receive_buffer is None:
        assert b" 200 " in (await reader.readuntil(b"\r\n\r\n"))
        await reader.readuntil(b"retry: 1000\n\n")
    return reader, writer


@asynccontextmanager
async def idle_readers(port: int, request_id: str, count: int) -> AsyncIterator[list[asyncio.StreamReader]]:
    opened = []
    for start in range(0, count, 50):
        opened += await asyncio.gather(*(open_stream(port, request_id) for _ in range(start, min(count, start + 50))))
    try:
        yield [reader for reader, _ in opened]
    finally:
        for _, writer in opened:
            writer.close()


def test_given_a_thousand_idle_readers_then_they_cost_little_and_hear_the_end(stack: GatewayStack) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * READERS)), hard))
    gateway = stack.start_gateway()
    parked = {"model": "parked", "inputs": "x"}
    request_id = httpx.post(f"{stack.url}/v1/inference", json=parked).json()["id"]
    process = psutil.Process(gateway.popen.pid)

    async def scenario() -> None:
        before = process.memory_info().rss
        began_s = time.monotonic()
        async with idle_readers(stack.port, request_id, READERS) as readers:
            opened_s = time.monotonic() - began_s
            with_all = process.memory_info().rss
            process.cpu_percent()
            await asyncio.sleep(WATCHED_S)  # what is measured is idleness
            cpu = process.cpu_percent()
            async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
                began_s = time.monotonic()
                assert (await http.delete(f"/v1/inference/{request_id}")).status_code == 200
                ends = await asyncio.gather(*(reader.readuntil(b"event: end\n") for reader in readers))
                told_s = time.monotonic() - began_s
        assert len(ends) == READERS
        keep_figure(
            "idle readers",
            readers=READERS,
            kilobytes_each=round((with_all - before) / 1024 / READERS, 1),
            megabytes=round(with_all / 1e6),
            cpu_percent=cpu,
            opened_s=round(opened_s, 2),
            all_told_s=round(told_s, 2),
        )
        assert (with_all - before) / READERS < 200_000
        assert cpu < 50.0

    asyncio.run(scenario())


def test_given_a_reader_that_takes_nothing_then_others_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUAI_TEST_FAKE_ENGINE", json.dumps({"latency_per_piece_ms": 1.0}))
    # The text of one reader fills all buffers on its way: 400,000 characters.
    room = {"optimization": {"batcher": {"max_batch_tokens": 1_000_000}}}
    with gateway_stack(tmp_path, sections=room) as stack:
        stack.start_serving()
        stack.start_gateway()
        words = " ".join(f"{'word' * 60}{number}" for number in range(1500))
        body = {"model": "chatty", "inputs": words, "parameters": {"max_tokens": 1500}, "stream": True}
        request_id = httpx.post(f"{stack.url}/v1/inference", json=body).json()["id"]

        async def scenario() -> None:
            slow = [await open_stream(stack.port, request_id, receive_buffer=2048) for _ in range(5)]
            reader, writer = await open_stream(stack.port, request_id)
            async with asyncio.timeout(30):
                while b"event: end" not in await reader.readuntil(b"\n\n"):
                    pass
            assert httpx.get(f"{stack.url}/v1/models", timeout=2.0).status_code == 200
            for _, other in [*slow, (reader, writer)]:
                other.close()

        asyncio.run(scenario())
        assert httpx.get(f"{stack.url}/v1/inference/{request_id}").json()["state"] == "SUCCESS"
