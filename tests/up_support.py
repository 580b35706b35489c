"""`muai up` with the fake engine, in a home of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import redis

from tests.transport_support import ROOT, free_port, wait_until

MUAI = (sys.executable, "-m", "muai_producers")
MODELS = {"noop": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]}}


class Up:
    """A `muai up`. It may be killed and started again: its home keeps what it knew.

    Args:
        sections: further sections of the configuration; `models` beside the one that does nothing.
        fake: options of the fake engine.
        server: keys of `monitoring.server`.
    """

    def __init__(
        self,
        home: Path,
        *,
        sections: dict[str, Any] | None = None,
        fake: dict[str, Any] | None = None,
        **server: Any,
    ) -> None:
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        sections = dict(sections or {})
        configuration = {
            "models": {**MODELS, **sections.pop("models", {})},
            "monitoring": {"enabled": False, "server": {"queue_capacity": 1000, "port": self.port, **server}},
            **sections,
        }
        (home / "muai.yaml").write_text(json.dumps(configuration))
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("MUAI_")}
        self.env |= {
            "MUAI_HOME": str(home),
            "MUAI_CONFIG": str(home / "muai.yaml"),
            "MUAI_TEST_FAKE_ENGINE": json.dumps(fake or {}),
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("config", "producers", "batching", "workers")),
        }
        self.log = home / "up.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*MUAI, "up", "--engines", "fake"], stdout=log, stderr=subprocess.STDOUT, env=self.env
            )

    def wait_for_gateway(self, timeout_s: float = 60.0) -> None:
        wait_until(lambda: is_ready(self.port), timeout_s, "the gateway to be ready")

    def muai(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*MUAI, *args], env=self.env, capture_output=True, text=True, timeout=60, check=False)

    def redis(self) -> redis.Redis:
        """A client of its Redis."""
        settings = dict(
            line.split(maxsplit=1) for line in (self.home / "redis" / "redis.conf").read_text().splitlines()
        )
        return redis.Redis(port=int(settings["port"]), password=settings["requirepass"])

    def submit(self) -> None:
        """One request, answered: then everything works."""
        wait_until(lambda: (self.home / "up.json").exists(), what="the note of muai up")
        # The broker may not be there yet.
        wait_until(self._is_served, timeout_s=60, what="an answer")

    def _is_served(self) -> bool:
        done = self.muai("submit", "noop", "hello", "--wait", "--timeout-s", "30", "--json")
        return done.returncode == 0 and json.loads(done.stdout)["engine_used"] == "fake"

    def processes(self) -> list[int]:
        """Every process that has this home in its environment, however it was started."""
        wanted = f"MUAI_HOME={self.home}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def pid_of(self, *words: str) -> int:
        """The process whose command line holds all of these words."""
        for pid in self.processes():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if all(word in line for word in words):
                return pid
        raise AssertionError(f"no process runs {' '.join(words)}")

    def kill_everything(self) -> None:
        """`kill -9` of all processes, its Redis and its watchdog among them, at one moment."""
        pid_file = self.redis().info("server")["process_id"]
        # The watchdog has written over its environment and the supervisor's end is what it waits for.
        for pid in [*self.processes(), int(pid_file)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        wait_until(lambda: not self.processes(), timeout_s=30, what="the end of everything that was started")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        # The watchdog is to end the rest, Redis with it, which nobody else could find: it writes over its environment.
        wait_until(lambda: not self.processes(), timeout_s=30, what="the end of everything that was started")


def answers(port: int, path: str = "/health") -> bool:
    """Whether the gateway's health page is there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def is_ready(port: int) -> bool:
    """Whether the gateway is to be sent requests, and an engine is there to serve them."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(json.load(answer)["status"] == "healthy")
    except OSError:
        return False
