"""`muai up` as people run it: start, submit, Ctrl-C; and killed without a chance to say goodbye."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.transport_support import ROOT, free_port, wait_until

pytestmark = pytest.mark.redis
CONFIGURATION = {
    "models": {"noop": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]}},
}


class Up:
    """A `muai up` with the fake engine, in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        server = {"queue_capacity": 1000, "port": self.port}
        configuration = {**CONFIGURATION, "monitoring": {"enabled": False, "server": server}}
        (home / "muai.yaml").write_text(json.dumps(configuration))
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("MUAI_")}
        self.env |= {
            "MUAI_HOME": str(home),
            "MUAI_CONFIG": str(home / "muai.yaml"),
            "PYTHONPATH": ":".join(str(ROOT / part) for part in ("config", "producers", "batching", "workers")),
        }
        self.log = home / "up.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*MUAI, "up", "--engines", "fake"], stdout=log, stderr=subprocess.STDOUT, env=self.env
            )

    def muai(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*MUAI, *args], env=self.env, capture_output=True, text=True, timeout=60, check=False)

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


def answers(port: int) -> bool:
    """Whether the gateway's health page is there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


MUAI = (sys.executable, "-m", "muai_producers")


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path)
    try:
        yield up
    finally:
        up.process.kill()
        up.process.wait()
        # The watchdog is to end the rest, Redis with it, which nobody else could find: it writes over its environment.
        wait_until(lambda: not up.processes(), timeout_s=30, what="the end of everything that was started")


def test_Given_muai_up_When_interrupted_Then_what_was_accepted_is_answered_and_nothing_is_left_running(up: Up) -> None:
    up.submit()
    (up.home / "lines.txt").write_text("text\n" * 300)
    accepted = up.muai("submit", "noop", "--file", str(up.home / "lines.txt"))
    assert len(accepted.stdout.split()) == 300
    assert len(up.processes()) >= 6  # itself, watchdog, redis, collector, worker, control; the gateway where it can be
    wait_until(lambda: answers(up.port), what="the gateway")
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=60) == 0
    said = up.log.read_text()
    assert "everything accepted is answered" in said
    assert up.processes() == []
    assert not (up.home / "up.json").exists()


def test_Given_muai_up_When_it_is_killed_Then_nothing_is_left_running(up: Up) -> None:
    up.submit()
    up.process.kill()
    up.process.wait()
    wait_until(lambda: not up.processes(), timeout_s=30, what="the end of everything that was started")


def test_Given_an_engine_that_cannot_run_here_Then_up_says_why(up: Up) -> None:
    refused = up.muai("--config", str(up.home / "muai.yaml"), "up", "--engines", "deepspeed,fake")
    assert refused.returncode == 1
    assert refused.stderr.startswith("engine_unavailable: cannot run here: deepspeed: ")
