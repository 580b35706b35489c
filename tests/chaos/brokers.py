"""Brokers of a test run's own, which may be killed and started again without harm to anybody else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Protocol

import amqp
import pytest
import redis
from tests.transport_support import free_port, redis_executable, wait_until

from muai_config.queues import ALL_QUEUES

START_LIMIT_S = 60.0


class Broker(Protocol):
    """What carries the messages."""

    kind: str
    port: int

    def url(self, port: int | None = None) -> str:
        """Its address, or that of a proxy before it."""
        ...

    def kill(self) -> None:
        """SIGKILL: what was not on disk is gone."""
        ...

    def start(self) -> None:
        """Start it, on the same port with the same data, and return when it answers."""
        ...


class RedisServer:
    """A Redis that writes every change to disk before it answers, and tells of every key that is set."""

    kind = "redis"

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        executable = redis_executable()
        self._command = [executable, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self._command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        self._command += ["--notify-keyspace-events", "K$", "--client-output-buffer-limit", "pubsub 0 0 0"]
        self.client = redis.Redis(port=self.port)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def url(self, port: int | None = None) -> str:
        return f"redis://127.0.0.1:{port or self.port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, start_new_session=True)
        wait_until(self._answers, START_LIMIT_S, "redis-server")

    def _answers(self) -> bool:
        with contextlib.suppress(redis.ConnectionError, redis.exceptions.BusyLoadingError):
            return bool(self.client.ping())
        return False

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self.client.close()
        self.kill()


def rabbitmq_script() -> Path:
    """RabbitMQ's start script; where there is none, a skip on a laptop and a failure in CI."""
    for place in ("/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/usr/local/sbin", "/opt/homebrew/sbin"):
        script = Path(place, "rabbitmq-server")
        if script.exists():
            return script
    reason = "RabbitMQ is not installed here (a node of the test's own is started: its server program is needed)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


class RabbitNode:
    """A RabbitMQ node of the test's own: other name, ports and folders than the one that may run here already."""

    kind = "rabbitmq"

    def __init__(self, folder: Path) -> None:
        self._script = rabbitmq_script()
        self.port, distribution_port = free_port(), free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "server.log"
        self._environment = {
            **os.environ,
            "HOME": str(folder),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"muai-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "none"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none-either"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def url(self, port: int | None = None) -> str:
        return f"amqp://guest:guest@127.0.0.1:{port or self.port}//"

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._script)], env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_until(self._answers, START_LIMIT_S, "rabbitmq-server")
        except AssertionError:
            self.kill()
            raise AssertionError(f"rabbitmq-server did not start:\n{self._log.read_text()[-2000:]}") from None

    def connect(self) -> amqp.Connection:
        connection = amqp.Connection(f"127.0.0.1:{self.port}", "guest", "guest", connect_timeout=2, read_timeout=10)
        connection.connect()
        return connection

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, amqp.AMQPError), self.connect():
            return True
        return False

    def kill(self) -> None:
        assert self._process is not None
        # The server forks helpers of its own: all of its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def delete_queues(self) -> None:
        """Leave nothing to the next test."""
        with self.connect() as connection:
            channel = connection.channel()
            for queue in ALL_QUEUES:
                channel.queue_delete(queue)

    def depths(self) -> dict[str, int]:
        """Messages ready on each queue that there is."""
        found = {}
        with self.connect() as connection:
            for queue in ALL_QUEUES:
                # A channel each: the broker closes the one on which it is asked for a queue that it does not have.
                with contextlib.suppress(amqp.NotFound):
                    found[queue] = connection.channel().queue_declare(queue, passive=True).message_count
        return found

    def stop(self) -> None:
        self.kill()
