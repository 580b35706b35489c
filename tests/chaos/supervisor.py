"""Starts processes and starts them again when they die, as `muai up` does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = os.pathsep.join(str(ROOT / part) for part in ("config", "producers", "batching", "workers", "."))
READY = b" ready."
"""What Celery logs once it consumes."""
START_LIMIT_S = 40.0
RESTART_PAUSE_S = 0.5
"""Between the restarts of a process that never became ready: it would fail again at once."""


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a process that finds our packages and takes one core at most."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": SOURCES, "PYTHONWARNINGS": "ignore", **more}


class Supervised:
    """One process, restarted at once whenever it ends without being told to."""

    def __init__(self, name: str, arguments: Sequence[str], environment: Mapping[str, str], log_file: Path) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.environment = dict(environment)
        self.log_file = log_file
        self.lives = 0
        """How often it was started."""
        self._changed = threading.Condition()
        self._ready_life = 0
        self._wanted_life = 1
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep_alive, name=f"supervise-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _keep_alive(self) -> None:
        while not self._stopping.is_set():
            with self._changed:
                self._process = process = subprocess.Popen(
                    [sys.executable, "-m", "tests.chaos.role", *self.arguments],
                    env=child_environment(**self.environment),
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self.lives += 1
            self._follow(process)
            process.wait()
            if self._ready_life < self.lives:
                self._stopping.wait(RESTART_PAUSE_S)

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        """Keep what the process says, until it ends."""
        assert process.stdout is not None
        with process.stdout, self.log_file.open("ab", buffering=0) as log:
            for line in process.stdout:
                log.write(line)
                if READY in line:
                    with self._changed:
                        self._ready_life = self.lives
                        self._changed.notify_all()

    def wait_ready(self) -> None:
        """Wait until it consumes: in its next life where it was told to end the present one."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready_life >= self._wanted_life, START_LIMIT_S):
                raise AssertionError(f"{self.name} did not get ready:\n{self.log_tail()}")

    def signal(self, number: signal.Signals) -> float:
        """Send a signal; returns the monotonic time of it."""
        with self._changed:
            assert self._process is not None
            now_s = time.monotonic()
            if number in (signal.SIGKILL, signal.SIGTERM):
                self._wanted_life = self.lives + 1
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            return now_s

    def restart(self, number: signal.Signals, **environment: str) -> None:
        """End it by a signal and wait until the next life consumes, in another environment."""
        self.environment.update(environment)
        self.signal(number)
        self.wait_ready()

    def begin_stop(self) -> None:
        """Ask it to end, and start it no more."""
        if not self._stopping.is_set():
            self._stopping.set()
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)

    def stop(self, limit_s: float = 15.0) -> None:
        """End it softly, or by force after a while."""
        self.begin_stop()
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self.signal(signal.SIGKILL)
            self._thread.join(5.0)

    def log_tail(self, lines: int = 40) -> str:
        if not self.log_file.exists():
            return "(it said nothing)"
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])
