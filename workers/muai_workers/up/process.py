"""One supervised process: started in a group of its own, and ended with everything that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

from muai_workers.up.decisions import Hold
from muai_workers.up.plan import ProcessSpec


@dataclass
class SupervisedProcess:
    """A process as its supervisor knows it."""

    spec: ProcessSpec
    popen: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    due_s: float | None = 0.0
    """When it is to be started; None: not at all, or it runs."""
    restarts: int = 0
    quick_deaths: int = 0
    given_up: str | None = None
    stop_sent_s: float | None = None
    hold: Hold | None = None
    """Why it is kept from running, while it is."""
    group: int = 0
    """Its process group, and that of the last run once that has ended."""

    @property
    def is_running(self) -> bool:
        return self.popen is not None

    def start(self, now_s: float, env: Mapping[str, str]) -> IO[bytes]:
        """Start it; returns what it writes.

        A session of its own: Ctrl-C on the terminal reaches the supervisor alone, which then stops it in its turn.
        """
        popen = subprocess.Popen(
            self.spec.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**env, "PYTHONUNBUFFERED": "1", **self.spec.variables},
            start_new_session=True,
        )
        self.popen, self.group, self.started_s, self.due_s, self.stop_sent_s = popen, popen.pid, now_s, None, None
        assert popen.stdout is not None
        return popen.stdout

    def ended(self) -> int | None:
        """Its status once it has ended, and then what it left of its group is killed; None while it runs."""
        if self.popen is None:
            return None
        status = self.popen.poll()
        if status is not None:
            self.kill()
            self.popen = None
        return status

    def release(self, now_s: float) -> None:
        """End its hold: it starts anew, and what it died of before counts no more."""
        self.hold, self.given_up, self.quick_deaths = None, None, 0
        if not self.is_running:
            self.due_s = now_s

    def ask_to_stop(self, now_s: float) -> None:
        """Tell the process itself, which knows how to stop what it has started."""
        self.stop_sent_s = now_s
        if self.popen is not None:
            self.popen.terminate()

    def kill(self) -> None:
        """Kill it and everything in its group."""
        if self.popen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
