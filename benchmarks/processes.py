"""Processes that the suite starts: servers in the background, and drivers that obey one command at a time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from benchmarks.machine import redis_server

STOP_S = 10.0
LOG_LINES = 15


class BenchmarkError(Exception):
    """A contestant could not be measured; the message says why, with the end of its log."""

    @property
    def reason(self) -> str:
        """What happened, and the last line of the log."""
        lines = str(self).splitlines()
        return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1].strip()}"


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def log_tail(log: Path) -> str:
    """The end of a log, for an error message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


@contextmanager
def running(
    argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A background process in a group of its own; the whole group is stopped at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """SIGTERM to the process's group, SIGKILL to what is left of it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@contextmanager
def private_redis(folder: Path) -> Iterator[str]:
    """The URL of a Redis of our own, without persistence, empty."""
    port = free_port()
    argv = [redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    log = folder / "redis.log"
    with running([*argv, "--dir", str(folder)], log) as process:
        url = f"redis://127.0.0.1:{port}/0"
        client = redis.Redis.from_url(url)
        wait_for(lambda: _answers(client), process, log, limit_s=10.0)
        client.close()
        yield url


def flush(url: str) -> None:
    """Empty our own Redis."""
    with redis.Redis.from_url(url) as client:
        client.flushall()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def wait_for(ready: Any, process: subprocess.Popen[Any], log: Path, limit_s: float) -> None:
    """Poll `ready()` until it is true.

    Raises:
        BenchmarkError: the process ended, or the time is up.
    """
    give_up_s = time.monotonic() + limit_s
    while not ready():
        if process.poll() is not None:
            raise BenchmarkError(f"{process.args!r} ended with {process.returncode}:\n{log_tail(log)}")
        if time.monotonic() > give_up_s:
            raise BenchmarkError(f"{process.args!r} is not ready after {limit_s:.0f} s:\n{log_tail(log)}")
        time.sleep(0.05)


START_LIMIT_S = 300.0
"""A driver may load a model, or convert it, before it is ready."""


class Driver:
    """A process that reads one JSON command a line and answers each with one JSON line (see peers/driver.py)."""

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None):
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )
        try:
            self.versions: dict[str, str] = self._answer(START_LIMIT_S)["versions"]
        except BaseException:  # told to stop meanwhile: nobody else knows of the process yet
            self._end()
            raise

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        stop(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def ask(self, limit_s: float = 300.0, **command: Any) -> dict[str, Any]:
        """Send a command, wait for its answer.

        Raises:
            BenchmarkError: the process ended, or took longer than `limit_s` and was killed.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise BenchmarkError(f"{self.process.args!r} has ended:\n{log_tail(self.log)}") from None
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            self.process.kill()

        timer = threading.Timer(limit_s, give_up)
        timer.daemon = True  # told to stop while it starts, nothing waits for it
        try:
            timer.start()
            line = self.process.stdout.readline()
            code = None if line else self.process.wait()
        finally:
            timer.cancel()
        if not line:
            why = f"gave no answer within {limit_s:g} s" if is_late.is_set() else f"ended with {code}"
            raise BenchmarkError(f"{self.process.args!r} {why}:\n{log_tail(self.log)}")
        answer: dict[str, Any] = json.loads(line)
        return answer
